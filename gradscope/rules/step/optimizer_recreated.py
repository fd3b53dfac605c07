"""GS507: a new optimizer, without a memory, for every few steps."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from gradscope.rules.facts import stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.rules.wording import place
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import pandas as pd

_FEWEST = 4
"""As many optimizers as no training has phases with a step or two each."""

_MANY_STEPS = 5
"""An optimizer that lives longer than this is one per epoch, task or phase."""


class OptimizerRecreated(Rule):
    """GS507 optimizer-recreated: the optimizer is made anew in every iteration.

    ## What it finds

    Optimizers of one class, over the same parameters, that the same line of the program makes again
    and again, and that step a few times each.

    ## Why it matters

    What an optimizer knows is lost with it: Adam's moments, SGD's momentum, the step count of the
    bias correction. Every step is a first step, and for Adam that is a step of full length along
    the sign of the gradient.

    ## How it is found

    From the line that made each optimizer, the parameters it holds, how often it stepped, and its
    class (plain SGD has nothing to lose). The weights have to go on from one to the next: inner
    loops of meta-learning and simulated clients begin at other weights each time.

    ## Example

        def train_step(xb, yb):
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
            ...
            optimizer.step()

    ## Fix

        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

        def train_step(xb, yb):
            ...
            optimizer.step()

    ## When it is wrong

    A method that wants an optimizer without memory, and uses Adam's first step as such.
    """

    code = "GS507"
    name = "optimizer-recreated"
    severity = Severity.ERROR
    tables = ("steps", "events", "params", "groups", "updates")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per line that makes optimizers."""
        events = run.frame("events")
        made = events.loc[
            (events["event"] == "optimizer_found")
            & (events["file"] != "")
            & (events["subject"] != "")
        ]
        steps = stepped(run)
        n_steps = steps.groupby("optimizer")["step"].count()
        held: dict[str, set[int]] = {known.name: set() for known in run.optimizers}
        for number, entry in enumerate(run.parameters):
            for holder, _ in entry.holders:
                held[run.optimizers[holder].name].add(number)
        groups = run.frame("groups")
        findings = []
        for (file, line, kind), rows in made.groupby(["file", "line", "detail"], sort=False):
            names = [str(name) for name in rows["subject"] if n_steps.get(name, 0) > 0]
            if len(names) < _FEWEST:
                continue
            counts = [int(n_steps[name]) for name in names]
            alike = [
                len(held[a] & held[b]) > len(held[a] | held[b]) / 2
                for a, b in itertools.pairwise(names)
            ]
            own = groups.loc[groups["optimizer"].isin(names)]
            if (
                np.median(counts) > _MANY_STEPS
                or np.mean(alike) < 0.9
                or not _has_memory(str(kind), own)
                or not _goes_on(run, steps, names)
            ):
                continue
            severity = Severity.ERROR if np.median(counts) == 1 else Severity.WARNING
            where = place(str(file), int(str(line)))
            each = "once" if np.median(counts) == 1 else f"{np.median(counts):g} times"
            findings.append(
                self.finding(
                    message=(
                        f"{where} made {len(rows)} {kind} optimizers over the same parameters, and "
                        f"each stepped {each}: their state (moments, momentum, step count) is lost "
                        "every time"
                    ),
                    fix=f"make the optimizer once, before the loop, instead of at {where}",
                    severity=severity,
                    params=tuple(run.parameters[n].name for n in sorted(held[names[-1]])),
                    step_first=int(steps.loc[steps["optimizer"] == names[0], "step"].min()),
                    step_last=int(steps.loc[steps["optimizer"] == names[-1], "step"].max()),
                    count=int(sum(counts)),
                    file=str(file),
                    line=int(str(line)),
                    evidence={
                        "optimizers_made": len(rows),
                        "steps_of_each": float(np.median(counts)),
                        "class": str(kind),
                        "first_name": names[0],
                    },
                )
            )
        return findings


def _has_memory(kind: str, groups: pd.DataFrame) -> bool:
    """Whether anything is lost with an optimizer of a class."""
    if kind == "SGD":
        return bool((groups["momentum"].fillna(0) != 0).any())
    return kind not in ("LBFGS", "ASGD")


def _goes_on(run: Recording, steps: pd.DataFrame, names: list[str]) -> bool:
    """Whether the weights that one optimizer left are those that the next one found."""
    updates = run.frame("updates")
    updates = updates.loc[updates["optimizer"].isin(names)]
    squares: Any = updates.assign(
        before=updates["weight_norm_before"] ** 2, after=updates["weight_norm_after"] ** 2
    )
    sums = squares.groupby("step")[["before", "after"]].sum()
    last = steps.loc[steps["optimizer"].isin(names)].groupby("optimizer")["step"].max()
    first = steps.loc[steps["optimizer"].isin(names)].groupby("optimizer")["step"].min()
    same = [
        math.isclose(sums["after"][last[a]], sums["before"][first[b]], rel_tol=1e-6)
        for a, b in itertools.pairwise(names)
        if last[a] in sums.index and first[b] in sums.index
    ]
    return not same or float(np.mean(same)) >= 0.5
