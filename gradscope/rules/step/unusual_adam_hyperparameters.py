"""GS510: betas and eps with which Adam is no longer Adam."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradscope.rules.facts import made_at, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import pandas as pd

_SLOW_BETA1 = 0.995
"""An average over the last 200 steps and more; the usual ones are 0 to 0.95."""

_FAST_BETA2 = 0.5
"""An average over the last two steps and fewer; the usual ones are 0.9 to 0.9999."""

_LARGE_EPS = 1e-2
"""Reinforcement learning uses up to 1e-3."""

_MOSTLY_EPS = 0.9
"""Share of the elements whose denominator is eps rather than their own gradients."""

_FEWEST_STEPS = 5


class UnusualAdamHyperparameters(Rule):
    """GS510 unusual-adam-hyperparameters: betas or eps far outside of what works.

    ## What it finds

    An optimizer of the Adam family with β₁ above β₂ (as after swapping them), with β₁ of 0.995 and
    more, with β₂ below 0.5, or with an eps so large that it is what gradients are divided by.

    ## Why it matters

    β₁ is the memory of the direction and β₂ that of the scale. Swapped, the direction lags hundreds
    of steps behind while the scale follows each batch. With a large eps Adam becomes a momentum SGD
    with the learning rate lr / eps. With an eps of 0 a gradient of exactly 0 gives NaN.

    ## How it is found

    From the groups' values at each step; for eps also from the share of elements at which it is the
    larger part of the denominator.

    ## Example

        torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.999, 0.9))

    ## Fix

        torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999))

    ## When it is wrong

    Research on exactly these values.
    """

    code = "GS510"
    name = "unusual-adam-hyperparameters"
    severity = Severity.WARNING
    tables = ("groups", "steps", "updates", "events")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer."""
        steps = stepped(run)
        groups = run.frame("groups")
        groups = groups.loc[groups["step"].isin(steps["step"]) & groups["beta2"].notna()]
        kinds = {known.name: known.kind for known in run.optimizers}
        findings = []
        for optimizer, own in groups.groupby("optimizer", sort=False):
            # Schedules such as OneCycleLR move β₁; what counts is what it was for most steps.
            usual = own.groupby("group")[["beta1", "beta2", "eps"]].median()
            updates = run.frame("updates")
            by_eps = updates.loc[updates["optimizer"] == optimizer, "eps_fraction"]
            wrong = _wrong(usual, float(by_eps.median()) if by_eps.notna().any() else 0.0)
            n_steps = int(own["step"].nunique())
            if not wrong or n_steps < _FEWEST_STEPS:
                continue
            kind = kinds.get(str(optimizer), "Adam")
            findings.append(
                self.finding(
                    message=f"{optimizer} ({kind}) has " + "; ".join(wrong),
                    fix=(
                        f"give {optimizer} the usual values, betas=(0.9, 0.999) and eps=1e-8, or "
                        "some near them"
                    ),
                    optimizer=str(optimizer),
                    step_first=int(own["step"].min()),
                    step_last=int(own["step"].max()),
                    count=n_steps,
                    **made_at(run, str(optimizer)),
                    evidence={
                        "beta1": float(usual["beta1"].iloc[0]),
                        "beta2": float(usual["beta2"].iloc[0]),
                        "eps": float(usual["eps"].iloc[0]),
                        "eps_fraction": float(by_eps.median()),
                    },
                )
            )
        return findings


def _wrong(groups: pd.DataFrame, eps_fraction: float) -> list[str]:
    """What is unusual about the values of an optimizer's groups, in words."""
    wrong = []
    for beta1, beta2, eps in groups.itertuples(index=False):
        betas = f"betas=({beta1:g}, {beta2:g})"
        if beta1 > beta2:
            wrong.append(
                f"{betas}: the average of the gradient forgets more slowly than that of its "
                "square; they look swapped"
            )
        elif beta1 >= _SLOW_BETA1:
            wrong.append(f"{betas}: the direction is an average over {1 / (1 - beta1):.0f} steps")
        elif beta2 < _FAST_BETA2:
            wrong.append(f"{betas}: the scale of the gradient is forgotten at once")
        if eps >= _LARGE_EPS and eps_fraction >= _MOSTLY_EPS:
            wrong.append(
                f"eps={eps:g}, which is the larger part of the denominator at "
                f"{eps_fraction:.0%} of the weights: gradients are no longer normalised"
            )
        elif eps == 0:
            wrong.append("eps=0, which makes a gradient of exactly 0 an update of NaN")
    return list(dict.fromkeys(wrong))
