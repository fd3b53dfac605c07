"""GS105: trainable, in the optimizer, and reached by no backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from gradscope.rules.facts import belongs_to, has_moved, is_compiled, listed, model_of, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording

_Around: TypeAlias = tuple[tuple[str, ...], tuple[str, ...]]

_FEWEST_STEPS = 5
"""Experts, heads and skipped blocks get their gradients later than the first step."""


class UnusedParameter(Rule):
    """GS105 unused-parameter: a parameter takes no part in any loss of the whole run.

    ## What it finds

    Trainable parameters in an optimizer that steps, to which no backward ever wrote a gradient,
    while others of it get theirs.

    ## Why it matters

    A layer that was forgotten in `forward` is no part of the model, whatever `print(model)` says.

    ## How it is found

    Over all backwards of the run. Experts, heads and blocks that are used now and then have their
    gradient by then; one that never was is silent if others of its list get theirs at some steps
    only. One without elements is silent, and one that never had a gradient at a step and moved all
    the same: a codebook that follows a mean, which the program moves itself. So is one whose
    gradients the program assigns. Where the graph was
    cut on the way, that finding explains this one.

    A module is said never to have run where closer looks have seen its model run without it.

    ## Example

        self.layer2 = nn.Linear(32, 32)          # never called in forward

    ## Fix

        x = torch.relu(self.layer2(x))

    ## When it is wrong

    A head or pooling layer of a larger model that this training has no use for.
    """

    code = "GS105"
    name = "unused-parameter"
    severity = Severity.WARNING
    tables = ("params", "steps", "calls", "grads")
    symptom_of = (
        "GS102",
        "GS106",
        "GS301",
        "GS302",
        "GS303",
        "GS304",
        "GS312",
        "GS313",
        "GS314",
        "GS401",
        "GS403",
    )

    def check(self, run: Recording) -> list[Finding]:
        """Return at most one finding per optimizer."""
        counts = stepped(run).groupby("optimizer")["step"].count()
        calls = run.frame("calls")
        called = set(calls["module"])
        used_at_times = _used_at_times(run)
        moved_by_hand = _moved_by_hand(run)
        given = _given_gradients(run)
        findings = []
        for number, known in enumerate(run.optimizers):
            held = [e for e in run.parameters if any(n == number for n, _ in e.holders)]
            unused = [
                e
                for e in held
                if e.requires_grad
                and e.numel
                and not e.reached
                and e.in_model
                and e.name not in moved_by_hand
                and e.name not in given
                and used_at_times.isdisjoint(_numbers_left_out(e.name))
            ]
            if (
                counts.get(known.name, 0) < _FEWEST_STEPS
                or not unused
                or not any(e.reached for e in held)
            ):
                continue
            modules = tuple(dict.fromkeys(e.module for e in unused))
            silent = [
                m
                for m in modules
                if m
                and called.isdisjoint(_spellings(run, m))
                and not is_compiled(run, m)
                and _ran(run, model_of(run, f"{m}."), called)
            ]
            why = f"; {listed(silent)} never ran" if silent else ""
            findings.append(
                self.finding(
                    message=(
                        f"{listed(e.name for e in unused)} got no gradient from any backward of "
                        f"the run, although {known.name} holds "
                        f"{'them' if len(unused) > 1 else 'it'}{why}"
                    ),
                    fix="use them in forward, or take them out of the model",
                    params=tuple(e.name for e in unused),
                    modules=modules,
                    optimizer=known.name,
                    count=int(counts[known.name]),
                    evidence={
                        "unused_parameters": len(unused),
                        "steps": int(counts[known.name]),
                        **({"modules_that_never_ran": ", ".join(silent)} if silent else {}),
                    },
                )
            )
        return findings


def _spellings(run: Recording, module: str) -> set[str]:
    """The paths of a module: of the model that was met first, also without that model's name."""
    return {module, module.removeprefix(f"{run.models[0].name}.")} if run.models else {module}


def _ran(run: Recording, model: str, called: set[str]) -> bool:
    """Whether a model, or a part of it, was called at any look."""
    if len(run.models) == 1:
        return any(not path.startswith("<") for path in called)
    return any(path == model or belongs_to(path, model) for path in called) if model else False


def _moved_by_hand(run: Recording) -> set[str]:
    """What no backward reached and no step could move, and what has moved all the same."""
    moved = {e.name for e in run.parameters if not e.reached and has_moved(e)}
    if not moved:
        return moved
    grads = run.frame("grads")
    # A step moves only what has a gradient, of zeros even.
    return moved - set(grads.loc[grads["status"] != "none", "param"])


def _given_gradients(run: Recording) -> set[str]:
    """What the program itself gives gradients, such as those of ``torch.autograd.grad``."""
    grads = run.frame("grads")
    return set(grads.loc[(grads["status"] == "assigned") & (grads["norm"] > 0), "param"])


def _used_at_times(run: Recording) -> set[_Around]:
    """Where in a list parameters lie that had a gradient at some steps only."""
    grads = run.frame("grads")
    has_gradient = grads["status"].isin(["fresh", "accumulated", "assigned"])
    share = has_gradient.groupby(grads["param"]).mean()
    return {
        around
        for name in share.index[(share > 0) & (share < 1)]
        for around in _numbers_left_out(str(name))
    }


def _numbers_left_out(name: str) -> Iterator[_Around]:
    """What stands before and behind each number in a name: alike for all of one list."""
    parts = tuple(name.split("."))
    for place, part in enumerate(parts):
        if part.isdigit():
            yield parts[:place], parts[place + 1 :]
