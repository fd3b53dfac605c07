"""GS504: the learning rate has decayed to almost nothing, long before the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradscope.rules.facts import events_of, first_place, made_at, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.rules.step.loss_trend import loss_trend
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import pandas as pd

_FEWEST_STEPS = 10
"""Of fewer steps nobody can tell how a schedule goes on."""

_SMALL = ((1e-3, 0.5), (1e-5, 0.25))
"""(share of the peak, share of the run): usual schedules end at a hundredth to a ten-thousandth of
their peak, and are below a thousandth for their last few percent only."""


_FALLS_TO = 0.9
"""Of the loss at the beginning of the stretch, at its end: something is learned in it."""


class DecayedLearningRate(Rule):
    """GS504 decayed-learning-rate: the learning rate is next to nothing for most of the run.

    ## What it finds

    A learning rate that fell to a thousandth of its peak, or less, and stayed there for at least
    half of the steps.

    ## Why it matters

    From there on the weights hardly move: the rest of the run is computed for nothing, while the
    loss looks as if it had converged.

    ## How it is found

    The largest learning rate of the optimizer's groups at each step is compared with its peak;
    steps before the peak do not count, so warm-ups and learning rate range tests are silent. So is
    the only optimizer of a program whose loss goes on falling, as in a second phase that trains
    everything, gently, after a head of its own was trained at a large rate. The
    usual reason is a scheduler that counts epochs and is stepped in every iteration.

    ## Example

        scheduler = MultiStepLR(optimizer, milestones=[30, 60, 90])   # meant as epochs
        for xb, yb in loader:
            ...
            scheduler.step()                                          # once per batch

    ## Fix

        for epoch in range(epochs):
            for xb, yb in loader:
                ...
            scheduler.step()

    ## When it is wrong

    A run that is deliberately continued for long at a tiny learning rate.
    """

    code = "GS504"
    name = "decayed-learning-rate"
    severity = Severity.WARNING
    tables = ("groups", "steps", "events")
    symptom_of = ("GS503",)

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer whose learning rate is gone."""
        groups = run.frame("groups")
        groups = groups.loc[groups["step"].isin(stepped(run)["step"])]
        findings = []
        for optimizer, own in groups.groupby("optimizer", sort=False):
            lr = own.groupby("step")["lr"].max()
            peak = float(lr.max())
            if len(lr) < _FEWEST_STEPS or not peak > 0:
                continue
            after = lr.loc[lr.idxmax() :]
            small = [
                after.loc[after <= share * peak]
                for share, of_the_run in _SMALL
                if (after <= share * peak).sum() >= of_the_run * len(lr)
            ]
            if not small:
                continue
            rows = small[0]
            if len(run.optimizers) == 1 and _still_learns(stepped(run), int(rows.index[0])):
                continue
            scheduled = events_of(run, "scheduler", str(optimizer))
            where = first_place(scheduled)
            kind = str(scheduled["detail"].iloc[0]) if len(scheduled) else ""
            by = f"; {kind}.step() was called {len(scheduled)} times" if kind else ""
            findings.append(
                self.finding(
                    message=(
                        f"the learning rate of {optimizer} fell from {peak:.3g} to "
                        f"{float(rows.iloc[0]):.3g} by step {int(rows.index[0])} and stayed that "
                        f"low at {len(rows)} of {len(lr)} steps{by}"
                    ),
                    fix=_fix(kind, str(optimizer)),
                    optimizer=str(optimizer),
                    step_first=int(rows.index[0]),
                    step_last=int(rows.index[-1]),
                    count=len(rows),
                    **(where if where["file"] else made_at(run, str(optimizer))),
                    evidence={
                        "peak": peak,
                        "last": float(lr.iloc[-1]),
                        "steps_of_optimizer": len(lr),
                        "steps_of_scheduler": len(scheduled),
                    },
                )
            )
        return findings


def _fix(kind: str, optimizer: str) -> str:
    if not kind:
        return f"look at what lowers the learning rate of {optimizer}"
    if kind.startswith("ReduceLROnPlateau"):
        return (
            f"give {kind} the mode that fits what it is stepped with (min for a loss, max for an "
            "accuracy), more patience, or a greater min_lr"
        )
    return f"step {kind} once per epoch if its lengths are epochs, or give them in iterations"


def _still_learns(steps: pd.DataFrame, since: int) -> bool:
    """Whether the loss falls clearly over the steps from one on."""
    trend = loss_trend(steps.loc[steps["step"] >= since])
    if trend is None or not trend.first > 0:
        return False
    return trend.last < _FALLS_TO * trend.first and trend.first - trend.last > 2 * trend.spread
