"""Compares two recordings, stage by stage, in the order in which a step happens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Final

import numpy as np

from gradscope.comparison import beginning, events, forward, hyperparameters, tensors
from gradscope.comparison.difference import EXACT, Comparison, Difference, Fact, Growth
from gradscope.comparison.drift import growth, jump
from gradscope.comparison.pair import Pair
from gradscope.run.recording import Recording

_SURROUNDINGS: Final = (
    "command",
    "git_commit",
    "torch",
    "gradscope",
    "python",
    "platform",
    "device",
    "host",
    "world_size",
)


def compare(a: Recording, b: Recording, rtol: float = 0.0, *, ended: bool = True) -> Comparison:
    """Compare two recordings of what should be the same training.

    Never compared are times, lines of the program, and what gradscope itself did.

    Args:
        a: the first recording.
        b: the second one.
        rtol: relative differences of numbers up to this one are passed over; with 0, numbers are
            equal that are the same to the last bit.
        ended: whether both have ended, so that their last weights can be compared.
    """
    pair = Pair(a, b)
    found = list(_all(pair, rtol, ended=ended))
    # sorted is stable: of several of a stage and step the first told comes first.
    found.sort(key=lambda difference: difference.order)
    by_stage: dict[str, Difference] = {}
    for each in found:
        by_stage.setdefault(each.stage, each)
    differences = list(by_stage.values())
    beyond: Difference | None = None
    drifted: tuple[Growth, ...] = ()
    if differences:
        first = differences[0]
        if first.stage == "loss" and first.relative is not None:
            differences[0] = first = replace(first, **_around_loss(pair, first))
        at = -1 if first.step is None else first.step
        weights = by_stage.get("weights_before")
        drifted = growth(pair, at, math.inf if weights is None else weights.order[0])
        if first.like_rounding:
            beyond = _beyond_rounding(pair, found, at)
    return Comparison(
        n_steps=pair.n_steps,
        n_common=len(pair.steps),
        rtol=rtol,
        rounding=pair.rounding,
        differences=tuple(differences),
        beyond_rounding=beyond,
        growth=drifted,
        compared={stage: n for stage, n in pair.compared.items() if n},
        not_compared=tuple(_not_compared(pair)),
        surroundings=tuple(_surroundings(a, b)),
    )


def _all(pair: Pair, rtol: float, *, ended: bool) -> Iterator[Difference]:
    yield from beginning.models_and_parameters(pair)
    yield from beginning.initial_weights(pair, rtol)
    stages: Iterable[Callable[..., Iterator[Difference]]] = (
        partial(hyperparameters.hyperparameters, rtol=rtol),
        partial(tensors.weights_before, rtol=rtol),
        partial(tensors.state_before, rtol=rtol),
        events.order_of_events,
        partial(forward.inputs, rtol=rtol),
        forward.graph,
        partial(forward.forward, rtol=rtol),
        partial(forward.loss, rtol=rtol),
        partial(tensors.gradients_before_clipping, rtol=rtol),
        partial(tensors.gradients, rtol=rtol),
        partial(tensors.state_after, rtol=rtol),
        partial(tensors.update, rtol=rtol),
        partial(tensors.weights_after, rtol=rtol),
    )
    for stage in stages:
        yield from stage(pair)
    if ended and pair.n_steps[0] == pair.n_steps[1]:
        yield from tensors.weights_at_the_end(pair, rtol)


def _beyond_rounding(pair: Pair, found: list[Difference], first: int) -> Difference | None:
    """The first difference that rounding does not explain, nor its growth."""
    others = [each for each in found if each.stage in EXACT or each.relative is None]
    sudden = jump(pair, first)
    if sudden is not None:
        others.append(sudden)
    return min(others, key=lambda each: each.order, default=None)


def _around_loss(pair: Pair, first: Difference) -> dict[str, Any]:
    """What is known to be equal before a loss that differs, and what is left as its cause."""
    step = first.step if first.step is not None else 0
    updates = pair.joined("updates", ("param",)).step
    looks = pair.joined("batches", ("role",)).step
    known = updates[updates <= step]
    weights_known = step == 0 or (len(known) > 0 and int(known.max()) >= step - 1)
    looked_at = looks[looks <= step]
    inputs_known = step in looked_at
    said = first.message
    causes = [] if inputs_known else ["the inputs"]
    causes.append("a random number, such as dropout's")
    facts = list(first.facts)
    if weights_known:
        said += ", all weights before it are equal"
    else:
        last = f"since step {int(known.max())}" if len(known) else "since the beginning"
        causes.append(f"an update {last}, whose weights were not recorded in both")
    if len(looked_at):
        facts.append(Fact(f"inputs at step {int(looked_at.max())}", "equal", "equal"))
    if len(known):
        facts.append(Fact(f"weights at step {int(known.max())}", "equal", "equal"))
    hint = f"left as its cause: {', or '.join(causes)}"
    if first.like_rounding:
        hint = "a sum in another order is enough for that"
    return {"message": said, "hint": hint, "facts": tuple(facts)}


def _not_compared(pair: Pair) -> Iterator[str]:
    n_a, n_b = pair.n_steps
    if n_a != n_b:
        yield f"A has {n_a:,} steps and B {n_b:,}: the first {pair.n_common:,} are in both"
    if pair.last_in_midst:
        cut = "A" if n_a <= n_b and _outcome(pair.a, n_a - 1) == "open" else "B"
        yield f"step {min(n_a, n_b) - 1}: {cut} ended in the midst of it"
    if len(pair.steps) < pair.n_common:
        yield (
            f"of these, {len(pair.steps):,} are held in memory of both runs; the others were "
            "thinned out"
        )
    joined = pair.joined("steps")
    full = [np.asarray(each, np.bool_) for each in joined.column("recorded")]
    n_full = int((full[0] & full[1]).sum())
    if n_full < len(joined):
        counts = f"A {int(full[0].sum()):,}, B {int(full[1].sum()):,}, both {n_full:,}"
        yield (
            "weights, state and updates of steps that were not recorded in full in both "
            f"({counts}); watch(every=1) records all"
        )
    looks = np.unique(pair.joined("batches", ("role",)).step)
    if len(looks) < len(joined):
        told = ", ".join(map(str, looks[:5].tolist())) + (" …" if len(looks) > 5 else "")
        yield f"inputs and outputs of modules between closer looks (steps {told or 'none'})"
    graphs = sorted(set(pair.a.graphs) & set(pair.b.graphs) & set(pair.steps.tolist()))
    if not graphs and len(joined):
        yield "graphs: none of the same step was captured in both"
    for name, run in (("A", pair.a), ("B", pair.b)):
        yield from (f"{name}: {note}" for note in run.notes[:3])


def _outcome(run: Recording, step: int) -> str:
    row = run.row_of_step(step)
    return "" if row is None else str(run.rows("steps").texts("outcome")[row])


def _surroundings(a: Recording, b: Recording) -> Iterator[Fact]:
    facts = [getattr(run, "facts", None) or {} for run in (a, b)]
    for name in _SURROUNDINGS:
        values = [_text(each.get(name)) for each in facts]
        if name == "command":
            values = _unlike_commands(*(each.get(name) for each in facts))
        if all(facts) and values[0] != values[1]:
            yield Fact(name.replace("_", " "), values[0], values[1])
    devices = [", ".join(sorted({entry.device for entry in run.parameters})) for run in (a, b)]
    if devices[0] != devices[1]:
        yield Fact("device of parameters", devices[0], devices[1])


def _unlike_commands(a: Any, b: Any) -> list[str]:
    """What two commands differ in, from the first word on; where they recorded to is left out."""
    if not isinstance(a, list) or not isinstance(b, list):
        return [_text(a), _text(b)]
    words = [[str(word) for word in each[1:]] for each in (a, b)]
    for each in words:
        for option in ("-o", "--output"):
            if option in each:
                at = each.index(option)
                del each[at : at + 2]
    same = 0
    while same < min(map(len, words)) and words[0][same] == words[1][same]:
        same += 1
    start = max(0, same - 1)  # the word before says where they differ
    return [("… " if start else "") + " ".join(each[start:]) for each in words]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else str(value)
