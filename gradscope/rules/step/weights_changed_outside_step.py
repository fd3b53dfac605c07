"""GS512: something other than the optimizer moves the weights between its steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gradscope.rules.facts import events_of, held_by, listed, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import pandas as pd

_FEWEST_PAIRS = 2
"""The first three steps are always recorded: two pairs."""

_NEARLY_ALL = 0.9

_VISIBLE = 1e-3
"""Change outside by the update itself; putting weights back to a norm hardly shows."""

_ROUNDING = {"float16": 2.0**-9, "bfloat16": 2.0**-6}
"""What a perturbation that was taken back may leave, by the norm of the weights."""

_ROUNDING_ELSE = 1e-5

_JUMP = 8.0
"""In single updates. Lookahead comes back by half of its five or six steps."""

_FEWEST_WRITTEN = 0.9
"""Share of the parameters; a reset leaves out none."""

_RARELY = 0.5
"""Share of the steps. What is written before every step belongs to the method, or is the sharding
of the parameters."""

_JUMP_OF_WRITTEN = 2.0
"""In single updates, where the weights are known to have been written; their way from one step to
another is at most one update a step, and those between may have been larger than the two seen."""

_LEAST_WAY = 3
"""In steps. A step that is taken back because it made things worse is a shorter one."""

_FEWEST_JUMPS = 2
"""Loading the best weights, or averaged ones, is done once."""


@dataclass(frozen=True, slots=True)
class _Look:
    """The tracked weights around one step, by number of the parameter."""

    step: int
    turn: int
    before: dict[int, Any]
    after: dict[int, Any]


class WeightsChangedOutsideStep(Rule):
    """GS512 weights-changed-outside-step: the weights are not what the last step left.

    ## What it finds

    A program that changes nearly all weights of its only optimizer after nearly every step
    (clamping, re-scaling, noise), or that puts them back to where they had been, again and again
    (loading a state dict, initialising).

    ## Why it matters

    What the optimizer does is undone, while its moments go on as if it had happened.

    ## How it is found

    Some weights of each parameter are kept around each recorded step. What a step left is compared
    with what the directly following one finds; over longer distances a jump has to be larger than
    several updates of every step in between, or two where a version counter tells that something
    wrote the weights just before; and weights written to the very values of an earlier step are
    told at once. Of an optimizer that moves nothing at two recorded steps, and may well do so at
    those between, nothing is said but what a version counter tells. Weights that are swapped for
    an evaluation and put back are the same again; a projection of some layers, one load of the
    best weights, the clamped critic of a Wasserstein GAN, and jumps at which the optimizer's state
    begins anew as well, as for each fold of a cross-validation, are not reported.

    ## Example

        optimizer.step()
        for p in model.parameters():
            p.data.clamp_(-0.01, 0.01)

    ## Fix

        optimizer.step()

    ## When it is wrong

    A method that projects every weight after every step.
    """

    code = "GS512"
    name = "weights-changed-outside-step"
    severity = Severity.WARNING
    tables = ("steps", "events", "params", "state")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer whose work is undone."""
        if len(events_of(run, "paused")) or len(events_of(run, "watch_started")) > 1:
            return []  # whatever happened meanwhile was not to be seen
        steps = stepped(run)
        active = set(steps["optimizer"])
        shared = {
            number
            for number, entry in enumerate(run.parameters)
            if len({run.optimizers[n].name for n, _ in entry.holders} & active) > 1
        }
        findings = []
        for optimizer, own in steps.groupby("optimizer", sort=False):
            held = [number for number in held_by(run, str(optimizer)) if number not in shared]
            looks = _looks(run, own, held)
            constantly = _changed_constantly(run, looks) if len(active) == 1 else []
            jumps, names = _jumps(run, looks, own)
            if constantly:
                how, params = "after every step", constantly
                text = (
                    f"the weights that a step of {optimizer} found were not those that the step "
                    f"before had left: {listed(run.parameters[n].name for n in params)} were "
                    "changed outside of the optimizer between nearly all of its steps"
                )
                first, count = looks[0].step, len(looks)
            elif len(jumps) >= _FEWEST_JUMPS:
                how, params = "again and again", names
                text = (
                    f"the weights of {optimizer} jumped {len(jumps)} times between its steps "
                    f"(before steps {listed(map(str, jumps))}), far more than it moves them: "
                    f"{listed(run.parameters[n].name for n in params)} were reset or overwritten"
                )
                first, count = jumps[0], len(jumps)
            else:
                continue
            findings.append(
                self.finding(
                    message=text,
                    fix=(
                        "look for clamp_, copy_, load_state_dict, init or assignments to .data on "
                        f"these parameters inside the loop, after {optimizer}.step()"
                    ),
                    params=tuple(run.parameters[number].name for number in params),
                    optimizer=str(optimizer),
                    step_first=int(first),
                    step_last=int(looks[-1].step),
                    count=count,
                    evidence={
                        "how": how,
                        "changed_parameters": len(params),
                        "parameters": len(held),
                        "compared_steps": len(looks),
                    },
                )
            )
        return findings


def _looks(run: Recording, own: Any, held: list[int]) -> list[_Look]:
    wanted = [n for n in held if run.parameters[n].requires_grad]
    looks = []
    for step, turn in zip(own["step"], own["optimizer_step"], strict=True):
        tracked = run.tracked.get(int(step))
        if tracked is None or "weight_after" not in tracked.values:
            continue
        # Squares of these numbers may lie outside of single precision.
        before, after = (
            tracked.values[name].astype(np.complex128) for name in ("weight_before", "weight_after")
        )
        where = {n: tracked.param == n for n in wanted}
        looks.append(
            _Look(
                int(step),
                int(turn),
                {n: before[at] for n, at in where.items() if at.any()},
                {n: after[at] for n, at in where.items() if at.any()},
            )
        )
    return looks


def _distance(a: Any, b: Any) -> float:
    return float(np.linalg.norm(a - b))


def _changed_constantly(run: Recording, looks: list[_Look]) -> list[int]:
    """Parameters changed between nearly all directly following steps.

    They have to be nearly all, or those that are thrown much farther each time than a step moves
    them: a projection of some layers takes back what the step did, and no more.
    """
    pairs = [(a, b) for a, b in itertools.pairwise(looks) if b.turn == a.turn + 1]
    if len(pairs) < _FEWEST_PAIRS:
        return []
    counts: dict[int, int] = {}
    thrown: dict[int, int] = {}
    for a, b in pairs:
        for n in a.after.keys() & b.before.keys():
            outside, inside = _distance(b.before[n], a.after[n]), _distance(a.after[n], a.before[n])
            rounding = _ROUNDING.get(run.parameters[n].dtype, _ROUNDING_ELSE)
            is_seen = outside > _VISIBLE * inside
            is_seen = is_seen and outside > rounding * float(np.linalg.norm(a.after[n]))
            counts[n] = counts.get(n, 0) + is_seen
            thrown[n] = thrown.get(n, 0) + (is_seen and outside > _JUMP * inside > 0)
    changed = [n for n, count in counts.items() if count >= _NEARLY_ALL * len(pairs)]
    if len(changed) >= _NEARLY_ALL * max(1, len(counts)):
        return sorted(changed)
    return sorted(n for n, count in thrown.items() if count == len(pairs))


def _written(own: pd.DataFrame) -> set[int]:
    """Steps before which something wrote nearly all weights, if that is rare."""
    written = own.loc[own["written_between"] >= _FEWEST_WRITTEN, "step"]
    return set(written) if len(written) <= _RARELY * len(own) else set()


def _jumps(run: Recording, looks: list[_Look], own: pd.DataFrame) -> tuple[list[int], list[int]]:
    """Steps before which nearly all weights lay where the optimizer cannot have brought them."""
    written = _written(own)
    gradients = own.set_index("optimizer_step")["grad_norm"]
    jumps, names = [], set[int]()
    forgotten = _forgotten_states(run, own)
    for place, (a, b) in enumerate(itertools.pairwise(looks)):
        common = sorted(a.after.keys() & b.before.keys())
        if b.turn > a.turn + 1 and b.step not in written and not (_moves(a) or _moves(b)):
            continue  # it moves them at other steps than these, nobody knows how far
        limit = _JUMP_OF_WRITTEN if b.step in written else _JUMP
        limit *= _larger_between(gradients, a.turn, b.turn)
        far = [
            n
            for n in common
            if _distance(b.before[n], a.after[n])
            > limit
            * (b.turn - a.turn)
            * max(
                _distance(a.after[n], a.before[n]),
                _distance(b.after[n], b.before[n]),
                1e-6 * float(np.linalg.norm(a.after[n])),
            )
        ]
        same = [c.turn for c in looks[: place + 1] if b.step in written and _is_same(b, c)]
        back = bool(same) and b.turn - same[-1] >= _LEAST_WAY
        if b.step in forgotten:
            continue
        if _n_values(run, far) >= _NEARLY_ALL * max(1, _n_values(run, common)) or back:
            jumps.append(b.step)
            names.update(common if back else far)
    return jumps, sorted(names)


def _moves(look: _Look) -> bool:
    return any(not np.array_equal(look.before[n], look.after[n]) for n in look.before)


def _forgotten_states(run: Recording, own: pd.DataFrame) -> set[int]:
    """Steps that find an optimizer's state empty, or at an earlier step count than was left."""
    state = run.frame("state")
    state = state.loc[state["step"].isin(own["step"])]
    left = state.loc[state["when"] == "after"]
    found = state.loc[state["when"] == "before"]
    steps = sorted(set(left["step"]))
    counts = [
        rows.loc[rows["key"] == "step"].groupby("step")["value"].max() for rows in (left, found)
    ]
    empty = set(steps[1:]) - set(found["step"])
    back = {
        b for a, b in itertools.pairwise(steps) if counts[0].get(a, 0) > counts[1].get(b, math.inf)
    }
    return empty | back


def _larger_between(gradients: pd.Series[float], first: int, last: int) -> float:
    """How much larger gradients were on the way than at its ends: so may updates have been."""
    seen = gradients.reindex([first, last]).max()
    most = gradients.loc[first:last].max()
    if not most > seen:  # also where nothing is known
        return 1.0
    return float(most / seen) if seen > 0 else math.inf


def _is_same(later: _Look, earlier: _Look) -> bool:
    """Whether a step finds the very weights that an earlier one had found, and moved away from."""
    return all(
        n in earlier.before and np.array_equal(later.before[n], earlier.before[n])
        for n in later.before
    ) and not any(
        np.array_equal(earlier.after[n], later.before[n])
        for n in later.before
        if _distance(earlier.after[n], earlier.before[n])
    )


def _n_values(run: Recording, params: Iterable[int]) -> int:
    return sum(run.parameters[n].numel for n in params)
