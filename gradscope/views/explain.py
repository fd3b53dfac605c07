"""From a name, an index and a step to what is known of them, or to a word about what to ask for."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from gradscope.errors import ScopeStateError, UsageError
from gradscope.formulas import FORMULAS
from gradscope.formulas.formula import Formula
from gradscope.formulas.worksheet import Worksheet
from gradscope.run.columns import Columns
from gradscope.run.entries import ParameterEntry
from gradscope.run.recording import Recording
from gradscope.run.weight_step import WeightStep
from gradscope.views.explanation import Explanation
from gradscope.views.parameter_summary import ParameterSummary

LastCopied = Callable[[int, int, int, tuple[int, ...]], WeightStep | None]
"""``last(step, param, position, index)`` is one weight around the last recorded step."""

_OF_PARTS = {"complex64": "float32", "complex128": "float64"}
"""The dtype of the real and imaginary parts of complex numbers."""

_OF_SUMMARY = ("grads", "updates", "moments")


def explain(
    recording: Recording,
    param: str,
    index: int | Iterable[int] | None,
    step: int,
    last: LastCopied,
) -> Explanation | ParameterSummary:
    """Explain the step of one weight, or without an index sum up that of its parameter.

    Args:
        recording: the run.
        param: name of the parameter.
        index: of the weight; of a complex parameter with 0 for the real or 1 for the imaginary part
            at the end.
        step: number of the step; a negative one counts the recorded steps from the last.
        last: gives any weight of the last recorded step.

    Raises:
        UsageError: if there is no such parameter or weight.
        ScopeStateError: if nothing is known of that weight at that step.
    """
    number = number_of(recording, param)
    entry = recording.parameters[number]
    at = _recorded_step(recording, number, step)
    if index is None:
        return _summary(recording, number, at)
    shape = _real_shape(entry)
    place = _checked_index(entry, shape, index)
    position = int(np.ravel_multi_index(place, shape)) if place else 0
    found = recording.kept.weight(at, number, position, place) or last(at, number, position, place)
    if found is None and at in recording.tracked:
        found = recording.tracked[at].weight(number, position, place)
    if found is None:
        turns = _taken_apart(recording.rows("updates"), number)
        raise ScopeStateError(
            _unknown(recording, number, shape, place, at)
            if at in turns or not turns
            else f"{entry.name} was not taken apart at step {at}: parameters of a large model take "
            f"turns, and it had its own at {_listed(turns)}. To have it at all of them, pass "
            f"keep=[{entry.name!r}] to watch()"
        )
    optimizer = _optimizer_of(recording, at)
    return Explanation(
        _rule_for(found),
        found.given,
        index=place,
        param=entry.name,
        step=at,
        optimizer=recording.optimizers[optimizer].name,
        optimizer_kind=recording.optimizers[optimizer].kind,
        weight_stored=found.weight_stored,
        stored=found.stored,
        dtype=_OF_PARTS.get(entry.dtype, entry.dtype),
        note=_note(recording, at, found),
    )


def tensors(recording: Recording, param: str, step: int) -> dict[str, Any]:
    """Return the tensors that were kept of a parameter around a step, by name.

    Raises:
        UsageError: if there is no such parameter.
        ScopeStateError: if none were kept of that step.
    """
    number = number_of(recording, param)
    name = recording.parameters[number].name
    steps = recording.kept.steps_of(number)
    if not steps:
        raise ScopeStateError(
            f"no tensors of {name} were kept: pass keep=[{name!r}] to watch(), and keep_steps= for "
            "other steps than the last ones"
        )
    at = _from_the_end(steps, step)
    kept = recording.kept.tensors(at, number)
    if kept is None:
        raise ScopeStateError(
            f"no tensors of {name} were kept of step {at}, only of {_listed(steps)}: pass "
            f"keep=[{name!r}], keep_steps=[{at}] to watch()"
        )
    return kept


def number_of(recording: Recording, param: str) -> int:
    """Return the number of a parameter by its name, or one of its other names.

    Raises:
        UsageError: if nothing is called so; the message names what is called alike.
    """
    names: dict[str, int] = {}
    for number, entry in enumerate(recording.parameters):
        for name in (entry.name, *entry.aliases):
            names.setdefault(name, number)
    if param in names:
        return names[param]
    close = difflib.get_close_matches(str(param), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there is {_listed(list(names))}"
    raise UsageError(f"no parameter is called {param!r}: {hint}")


def _recorded_step(recording: Recording, param: int, step: int) -> int:
    """The number of a step in which the parameter was recorded."""
    name = recording.parameters[param].name
    updates = recording.rows("updates")
    steps = updates.array("step")[updates.array("param") == param].tolist()
    if not steps:
        holders = recording.parameters[param].holders
        raise ScopeStateError(
            f"{name} was in no recorded step yet"
            if holders
            else f"{name} is in no optimizer, so no step was about to change it"
        )
    if step < 0:
        return _from_the_end(_taken_apart(updates, param) or steps, step)
    at = step
    if at in steps:
        return at
    if not 0 <= at < recording.n_steps:
        raise ScopeStateError(f"there is no step {at}; the last one is {recording.n_steps - 1}")
    known = recording.rows_of("steps", step=at)
    if known.empty:
        raise ScopeStateError(
            f"memory holds nothing of step {at} any more; it has {_listed(steps)}"
        )
    facts = known.iloc[0]
    if facts["outcome"] != "stepped":
        raise ScopeStateError(f"step {at} did not update anything: its outcome is {facts.outcome}")
    own = [recording.optimizers[holder].name for holder, _ in recording.parameters[param].holders]
    if facts["optimizer"] not in own:
        raise ScopeStateError(
            f"step {at} is one of {facts.optimizer}, but {name} is updated by {' and '.join(own)}: "
            f"its recorded steps are {_listed(steps)}"
        )
    raise ScopeStateError(
        f"step {at} was not recorded in full; recorded: {_listed(steps)}. To have it, pass "
        f"keep=[{name!r}], keep_steps=[{at}] to watch(), or every=1 for all steps"
    )


def _taken_apart(updates: Columns, param: int) -> list[int]:
    """The steps that more is known of than norms: parameters of a large model take turns."""
    is_known = np.isfinite(updates.array("unchanged_fraction"))
    steps: list[int] = updates.array("step")[is_known & (updates.array("param") == param)].tolist()
    return steps


def _optimizer_of(recording: Recording, step: int) -> int:
    row = recording.row_of_step(step)
    if row is None:  # of a damaged run: else what updates holds, steps does too
        raise ScopeStateError(f"nothing is known of step {step}")
    return int(recording.rows("steps").array("optimizer")[row])


def _from_the_end(steps: list[int], step: int) -> int:
    if step >= 0:
        return step
    if -step > len(steps):
        raise ScopeStateError(f"step={step}: only {len(steps)} steps are there, {_listed(steps)}")
    return steps[step]


def _real_shape(entry: ParameterEntry) -> tuple[int, ...]:
    return (*entry.shape, 2) if entry.dtype.startswith("complex") else entry.shape


def _checked_index(
    entry: ParameterEntry, shape: tuple[int, ...], index: int | Iterable[int]
) -> tuple[int, ...]:
    """The index with every entry counted from the front."""
    try:
        place = tuple(int(i) for i in (index if isinstance(index, Iterable) else (index,)))
    except (TypeError, ValueError):
        place = (-1,) * (len(shape) + 1)
    fits = len(place) == len(shape) and all(-n <= i < n for i, n in zip(place, shape, strict=True))
    if not fits:
        parts = " (the last number is 0 for the real part, 1 for the imaginary one)"
        is_complex = entry.dtype.startswith("complex")
        raise UsageError(
            f"index={index!r}: {entry.name} has the shape {shape}{parts if is_complex else ''}, so "
            f"pass {_numbers(len(shape))}"
        )
    return tuple(i % n for i, n in zip(place, shape, strict=True))


def _numbers(n: int) -> str:
    if n == 0:
        return "index=() for its only weight"
    return "one number within it" if n == 1 else f"a tuple of {n} numbers within it"


def _unknown(
    recording: Recording, param: int, shape: tuple[int, ...], place: tuple[int, ...], step: int
) -> str:
    name = recording.parameters[param].name
    text = f"nothing was kept of {name}[{', '.join(map(str, place))}] at step {step}. To have it, "
    text += f"pass keep=[{name!r}], keep_steps=[{step}] to watch()"
    tracked = recording.tracked.get(step)
    if tracked is None:
        return text
    positions = tracked.position[(tracked.param == param) & (tracked.run >= 0)].tolist()
    indices = [tuple(map(int, np.unravel_index(at, shape))) for at in positions]
    return f"{text}; without that there is, of this step, {_listed(indices)}" if indices else text


def _rule_for(found: WeightStep) -> Formula | None:
    """The rule by which the weight moved; where it has no gradient, no optimizer moves it."""
    rule = FORMULAS.get(found.formula or "")
    return rule if rule is None or "g" in found.given else replace(rule, apply=_stay)


def _stay(sheet: Worksheet) -> None:
    sheet.update = 0.0


def _note(recording: Recording, step: int, found: WeightStep) -> str:
    if "g" not in found.given:
        return "It had no gradient at this step, and what has none is left alone."
    facts = recording.rows_of("steps", step=step).iloc[0]
    if facts["scaled"]:
        return (
            "The gradient is shown unscaled, as the fused step reads it; .grad held it multiplied "
            "by the loss scale."
        )
    return ""


def _summary(recording: Recording, param: int, step: int) -> ParameterSummary:
    rows: dict[str, Any] = {}
    params = recording.frame("params")
    rows["params"] = params.iloc[param].to_dict()
    for table in _OF_SUMMARY:
        found = recording.rows_of(table, step=step, param=param)
        if len(found):
            rows[table] = found.iloc[0].to_dict()
    optimizer = _optimizer_of(recording, step)
    for holder, group in recording.parameters[param].holders:
        groups = recording.rows_of("groups", step=step, group=group)
        if holder == optimizer and len(groups):
            rows["groups"] = groups.iloc[0].to_dict()
    rows["state"] = recording.rows_of("state", step=step, param=param).to_dict("records")
    return ParameterSummary(recording.parameters[param].name, step, rows)


def _listed(things: list[Any], most: int = 8) -> str:
    """A few of them, first and last among them."""
    if len(things) > most:
        things = [*things[: most // 2], "…", *things[-most // 2 :]]
    return ", ".join(map(str, things))
