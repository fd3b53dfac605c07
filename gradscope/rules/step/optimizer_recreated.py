"""GS507: a new optimizer, without a memory, for every few steps."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from gradscope.rules.facts import listed, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.rules.wording import place
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import pandas as pd

_FEWEST = 4
"""As many optimizers as no training has phases with a step or two each."""

_FEWEST_EMPTY = 2
"""The first three steps of an optimizer are always recorded; two of them should find a state."""

_MANY_STEPS = 5
"""An optimizer that lives longer than this is one per epoch, task or phase."""


class OptimizerRecreated(Rule):
    """GS507 optimizer-recreated: the optimizer is made anew in every iteration.

    ## What it finds

    Optimizers of one class, over the same parameters, that the same line of the program makes again
    and again, and that step a few times each; or one optimizer whose `state` is emptied before
    every step.

    ## Why it matters

    What an optimizer knows is lost with it: Adam's moments, SGD's momentum, the step count of the
    bias correction. Every step is a first step, and for Adam that is a step of full length along
    the sign of the gradient.

    ## How it is found

    From the line that made each optimizer, the parameters it holds, how often it stepped, and its
    class (plain SGD has nothing to lose). The state is emptied where a step leaves some and the
    later steps find none. The weights have to go on from one to the next: inner loops of
    meta-learning and simulated clients begin at other weights each time.

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
    tables = ("steps", "events", "params", "groups", "updates", "state")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per line that makes optimizers, and per one without memory."""
        return [*self._made_anew(run), *self._emptied(run)]

    def _emptied(self, run: Recording) -> list[Finding]:
        """One finding per optimizer that finds no state, although its steps leave some."""
        steps, state = stepped(run), run.frame("state")
        findings = []
        for optimizer, rows in state.groupby("optimizer", sort=False):
            left = set(rows.loc[rows["when"] == "after", "step"])
            found = set(rows.loc[rows["when"] == "before", "step"])
            later = sorted(left)[1:]
            empty = [step for step in later if step not in found]
            own = steps.loc[steps["optimizer"] == optimizer]
            turns = own.set_index("step")["optimizer_step"]
            pairs = [
                (a, b)
                for a, b in itertools.pairwise(sorted(left))
                if turns.get(b, 0) - turns.get(a, 0) == 1
            ]
            if (
                len(empty) < _FEWEST_EMPTY
                or len(empty) < len(later)
                or not _same_weights(run, [str(optimizer)], pairs)
            ):
                continue
            keys = listed(dict.fromkeys(rows["key"]))
            findings.append(
                self.finding(
                    message=(
                        f"the state of {optimizer} ({keys}) is thrown away before every step: what "
                        "a step leaves, the next one does not find"
                    ),
                    fix=(
                        f"look for {optimizer}.state.clear(), a new state or load_state_dict "
                        "inside the loop, and take it out of there"
                    ),
                    params=tuple(dict.fromkeys(rows["param"])),
                    optimizer=str(optimizer),
                    step_first=int(empty[0]),
                    step_last=int(empty[-1]),
                    count=len(empty),
                    evidence={"recorded_steps": len(later), "found_no_state": len(empty)},
                )
            )
        return findings

    def _made_anew(self, run: Recording) -> list[Finding]:
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
    last = steps.loc[steps["optimizer"].isin(names)].groupby("optimizer")["step"].max()
    first = steps.loc[steps["optimizer"].isin(names)].groupby("optimizer")["step"].min()
    return _same_weights(run, names, [(last[a], first[b]) for a, b in itertools.pairwise(names)])


def _same_weights(run: Recording, names: list[str], pairs: list[tuple[int, int]]) -> bool:
    """Whether the weights after the first steps are those before the second ones, at most pairs."""
    updates = run.frame("updates")
    updates = updates.loc[updates["optimizer"].isin(names)]
    squares: Any = updates.assign(
        before=updates["weight_norm_before"] ** 2, after=updates["weight_norm_after"] ** 2
    )
    sums = squares.groupby("step")[["before", "after"]].sum()
    same = [
        math.isclose(sums["after"][a], sums["before"][b], rel_tol=1e-6)
        for a, b in pairs
        if a in sums.index and b in sums.index
    ]
    return not same or float(np.mean(same)) >= 0.5
