"""An optimizer's update taken apart, and compared with its formula."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gradscope.formulas.formula import Formula
from gradscope.formulas.worksheet import Worksheet
from gradscope.instruments.block_plan import BlockPlan, NotPlannedError
from gradscope.instruments.flat_copies import FlatCopies, Integers
from gradscope.instruments.late import Known, Late, Numbers
from gradscope.instruments.segments import DeviceSegments, HostSegments, HostWhole, Segments

Reals = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

_BLOCK = 16_384
"""Elements worked out at a time: few enough for all arrays of a block to stay in a core's cache
(AdamW's take 1.1 MiB), enough to repay the calls."""

LARGE = 8_192
"""From how many elements on a parameter is worked out alone."""

_MOST_CUTS = 64
"""Of how many runs the cuts are kept: usually one for each parameter group."""

_ALIKE = 8
"""From how many parameters of one size on these are worked out without others."""

# Outside of these a float32 sum of squares may have lost digits to underflow or overflow.
_TINY, _HUGE = 1e-25, 1e25
_DIFFERENT = 1e-5
_ROUNDING = 2.0**-22


@dataclass(slots=True)
class Anatomy:
    """An update taken apart, per parameter: float64[n] each, NaN where it does not apply.

    Attributes:
        weight_before, weight_after, update: sums of squares.
        decay, momentum, fresh: sums of squares of the parts of the update by the formula.
        formula: sum of squares of the update by the formula.
        residual: sum of squares of the difference between it and the update.
        gradient: sum of squares.
        first_moment: sum of squares of exp_avg before the step.
        update_gradient: dot product of update and gradient.
        momentum_gradient: dot product of exp_avg before the step and gradient.
        unchanged: how many elements rounding left as they were.
        eps_dominates: for how many elements eps is the larger part of the denominator.
        denominator, effective_lr: sums over the elements.
        denominator_min, effective_lr_min, denominator_max, effective_lr_max: over the elements.
    """

    weight_before: Reals
    weight_after: Reals
    update: Reals
    decay: Reals
    momentum: Reals
    fresh: Reals
    formula: Reals
    residual: Reals
    gradient: Reals
    first_moment: Reals
    update_gradient: Reals
    momentum_gradient: Reals
    unchanged: Reals
    eps_dominates: Reals
    denominator: Reals
    effective_lr: Reals
    denominator_min: Reals
    effective_lr_min: Reals
    denominator_max: Reals
    effective_lr_max: Reals

    @classmethod
    def unknown(cls, n: int) -> Anatomy:
        """Return an anatomy of which nothing is known."""
        return cls(*(np.full(n, np.nan) for _ in fields(cls)))


_ROWS = {entry.name: row for row, entry in enumerate(fields(Anatomy))}
_LEAST = [row for name, row in _ROWS.items() if name.endswith("_min")]
_GREATEST = [row for name, row in _ROWS.items() if name.endswith("_max")]
_SUMS = {row for row in _ROWS.values() if row not in (*_LEAST, *_GREATEST)}


_OF_ALL = ("weight_before", "weight_after", "update")
"""What is known of a parameter whose turn it is not."""


@dataclass(slots=True)
class Run:
    """Neighbouring parameters that one evaluation of a formula works out together.

    Attributes:
        first, last: members of the copies, ``last`` not included.
        formula: the rule; None where none is known.
        given: what the worksheet is given besides arrays: hyper-parameters, counters.
        arrays: quantity of the worksheet → name of the buffer that holds it.
        shaped: where the rule needs the whole parameter (which is then alone in its run), what of
            the state has a shape of its own.
        has_gradient: whether they have gradients; a parameter without is not updated.
    """

    first: int
    last: int
    formula: Formula | None
    given: dict[str, Any]
    arrays: dict[str, str]
    shaped: dict[str, torch.Tensor] = field(default_factory=dict)
    has_gradient: bool = True


class WorkedOut(Late[Anatomy]):
    """The anatomies of the parameters of several copies, as one.

    Args:
        n: how many parameters the optimizer has.
        empty: places of those without elements.
        parts: copies, and what :func:`work_out` made of them.
        others: places of parameters that were not taken apart, and float64[3, k]: sums of squares
            of weight before, weight after and update.
    """

    def __init__(
        self,
        n: int,
        empty: Sequence[int],
        parts: Sequence[tuple[FlatCopies, Late[Any]]],
        others: Sequence[tuple[Integers, Late[Reals]]] = (),
    ) -> None:
        self._n, self._empty, self._parts, self._others = n, empty, parts, others

    def ready(self) -> bool:
        """Whether all numbers have arrived."""
        return all(numbers.ready() for _, numbers in (*self._parts, *self._others))

    def value(self) -> Anatomy:
        """Return the anatomy of all parameters of the optimizer."""
        anatomy = Anatomy.unknown(self._n)
        for copies, numbers in self._parts:
            rows = numbers.value()
            for name, row in _ROWS.items():
                getattr(anatomy, name)[copies.places] = rows[row]
        for places, squares in self._others:
            for name, found in zip(_OF_ALL, squares.value(), strict=True):
                getattr(anatomy, name)[places] = found
        for name in ("weight_before", "weight_after", "update", "formula", "residual"):
            getattr(anatomy, name)[self._empty] = 0
        return anatomy


def work_out(copies: FlatCopies, runs: Sequence[Run]) -> Late[Reals]:
    """Take the updates of the parameters of some copies apart.

    The copies hold ``weight_before`` and ``weight_after``, ``g`` where there are gradients, and
    the state before the step.

    Returns:
        One row per field of :class:`Anatomy` and one column per parameter of the copies.
    """
    if copies.device.type == "cpu":
        return Known(_on_host(copies, runs))
    return Numbers(_on_device(copies, runs))


def _on_host(copies: FlatCopies, runs: Sequence[Run]) -> Reals:
    rows = np.full((len(_ROWS), len(copies.places)), np.nan)
    with np.errstate(all="ignore"):
        for run in runs:
            _work_out_run(copies, run, rows)
        if copies.dtype is torch.float64:
            return rows
        for member in np.flatnonzero(~_is_trustworthy(rows)).tolist():
            run = next(run for run in runs if run.first <= member < run.last)
            alone = replace(run, first=member, last=member + 1)
            for block in _blocks(copies, alone, on_host=True):
                arrays = _loaded(block, lambda tensor: tensor.numpy().astype(np.float64))
                found = _evaluate(run, block.segments, arrays, block)
                _enter(np, rows, block, found, np.array(list(found.values()))[:, None])
    return rows


def _work_out_run(copies: FlatCopies, run: Run, rows: Reals) -> None:
    try:
        plan, planned = _planned(copies, run)
    except NotPlannedError:
        for block in _blocks(copies, run, on_host=True):
            arrays = _loaded(block, torch.Tensor.numpy)
            found = _evaluate(run, block.segments, arrays, block)
            values = np.array(list(found.values()), np.float64)
            _enter(np, rows, block, found, values.reshape(len(found), -1))
        return
    starts = copies.starts
    base = int(starts[run.first])
    buffers = ("weight_before", "weight_after", *run.arrays.values())
    whole = [copies.flat(name, base, int(starts[run.last])).numpy() for name in buffers]
    members: list[int] = []
    pieces: list[list[Any]] = []
    for first, last, start, stop, segments in _cut(copies, run):
        parts = [array[start - base : stop - base] for array in whole]
        if last == first + 1:
            members.append(first)
            pieces.append(plan.work_out(parts, segments))
        else:
            raw = np.array(plan.work_out(parts, segments), np.float64)
            rows[[_ROWS[name] for name in planned], first:last] = plan.finished(
                planned.values(), raw
            )
    if pieces:
        values = plan.finished(planned.values(), np.array(pieces, np.float64).T)
        _enter_pieces(rows, members, planned, values)


def _cut(copies: FlatCopies, run: Run) -> list[tuple[int, int, int, int, Any]]:
    """The stretches of a run, each with its cut into members; the same from step to step."""
    key = (run.first, run.last)
    found = copies.cuts.get(key)
    if found is None:
        if len(copies.cuts) >= _MOST_CUTS:
            copies.cuts.clear()
        starts = copies.starts
        found = copies.cuts[key] = [
            (
                first,
                last,
                start,
                stop,
                _host_segments(starts[first:last] - start, stop - start),
            )
            for first, last, start, stop in _stretches(copies, run, False)
        ]
    return found


def _enter_pieces(rows: Reals, members: Sequence[int], names: Iterable[str], values: Reals) -> None:
    """Write down what pieces of large parameters gave; those of one follow each other."""
    begins = np.flatnonzero(np.diff(members, prepend=-1))
    own = np.array(members)[begins]
    for name, found in zip(names, values, strict=True):
        row = _ROWS[name]
        join = np.minimum if row in _LEAST else np.maximum if row in _GREATEST else np.add
        rows[row, own] = join.reduceat(found, begins)


def _planned(copies: FlatCopies, run: Run) -> tuple[BlockPlan, dict[str, Any]]:
    """Note down what is to be done for each block of a run."""
    if run.formula is not None and not run.formula.elementwise and run.has_gradient:
        raise NotPlannedError
    plan = BlockPlan(["weight_before", "weight_after", *run.arrays], copies.dtype)
    return plan, _evaluate(run, plan, dict(plan.arrays), None)


def _on_device(copies: FlatCopies, runs: Sequence[Run]) -> torch.Tensor:
    # Apple's device has no float64.
    wide = torch.float32 if copies.device.type == "mps" else torch.float64
    rows = torch.full((len(_ROWS), len(copies.places)), torch.nan, dtype=wide, device=copies.device)
    for run in runs:
        for block in _blocks(copies, run, on_host=False):
            arrays = _loaded(block, lambda tensor: tensor.to(wide))
            found = _evaluate(run, block.segments, arrays, block)
            values = torch.stack([value.to(wide) for value in found.values()])
            _enter(torch, rows, block, found, values)
    return rows


def _enter(library: Any, rows: Any, block: _Block, names: Iterable[str], values: Any) -> None:
    """Write down what a block gave; a later piece of the same parameter is added to it."""
    indices = [_ROWS[name] for name in names]
    members = slice(block.first, block.last)
    if block.continues:
        earlier = rows[indices, members]
        for i, row in enumerate(indices):
            if row in _SUMS:
                values[i] += earlier[i]
            else:
                join = library.minimum if row in _LEAST else library.maximum
                values[i] = join(values[i], earlier[i])
    rows[indices, members] = values


@dataclass(slots=True)
class _Block:
    """A few small parameters of a run, or a piece of a large one.

    Attributes:
        first, last: the members it touches.
        continues: whether it is a further piece of the parameter before.
        segments: its cut into the members.
        tensors: the arrays of the worksheet, and ``weight_after``.
        run: the run.
        shape: of the weight, where the rule needs the whole parameter.
    """

    first: int
    last: int
    continues: bool
    segments: Segments
    tensors: Mapping[str, torch.Tensor]
    run: Run
    shape: torch.Size | None


def _blocks(copies: FlatCopies, run: Run, *, on_host: bool) -> Iterator[_Block]:
    whole = run.formula is not None and not run.formula.elementwise and run.has_gradient
    names = {"weight_before": "weight_before", "weight_after": "weight_after", **run.arrays}
    starts = copies.starts
    for first, last, start, stop in _stretches(copies, run, whole or not on_host):
        begins, length = starts[first:last] - start, stop - start
        segments: Segments
        if on_host:
            segments = _host_segments(begins, length)
        else:
            segments = DeviceSegments(begins, length, copies.device)
        yield _Block(
            first,
            last,
            bool(start > starts[first]),
            segments,
            {name: copies.flat(buffer, start, stop) for name, buffer in names.items()},
            run,
            copies.shaped("weight_before", first).shape if whole else None,
        )


def _host_segments(begins: Integers, length: int) -> HostWhole | HostSegments:
    return HostWhole(length) if len(begins) == 1 else HostSegments(begins, length)


def _stretches(
    copies: FlatCopies, run: Run, undivided: bool
) -> Iterator[tuple[int, int, int, int]]:
    """Cut a run into (first member, last member + 1, first element, last element + 1)."""
    starts = copies.starts
    if undivided:
        yield run.first, run.last, int(starts[run.first]), int(starts[run.last])
        return
    sizes = np.diff(starts[run.first : run.last + 1])
    large = [*(run.first + np.flatnonzero(sizes >= LARGE)).tolist(), run.last]
    changes = np.append(run.first + 1 + np.flatnonzero(np.diff(sizes)), run.last)
    member = run.first
    for next_large in large:
        while member < next_large:
            most = int(np.searchsorted(starts, starts[member] + _BLOCK, "right")) - 1
            last = min(most, next_large)
            last_alike = int(changes[np.searchsorted(changes, member, "right")])
            if last_alike - member >= _ALIKE:  # equal ones are reduced faster
                last = min(last, last_alike)
            yield member, last, int(starts[member]), int(starts[last])
            member = last
        if member < run.last:
            end = int(starts[member + 1])
            for start in range(int(starts[member]), end, _BLOCK):
                yield member, member + 1, start, min(start + _BLOCK, end)
            member += 1


def _evaluate(
    run: Run, segments: Segments, arrays: dict[str, Any], block: _Block | None
) -> dict[str, Any]:
    """Work a block out.

    Args:
        run: what it belongs to.
        segments: its cut into members.
        arrays: those of the worksheet, and ``weight_after``.
        block: the block; None where arrays and segments only note what is to be done for each.

    Returns:
        By field of Anatomy one value per member that it touches.
    """
    before, after, g = arrays["weight_before"], arrays.pop("weight_after"), arrays.get("g")
    update = after - before
    is_unchanged = update == 0
    found = {
        "weight_before": segments.product(before, before),
        "weight_after": segments.product(after, after),
        "update": segments.product(update, update),
    }
    if not run.has_gradient:
        # Nothing is to happen, so whatever did is no doing of the formula's.
        found["formula"] = found["decay"] = found["momentum"] = found["fresh"] = 0 * found["update"]
        found["residual"], found["unchanged"] = found["update"], found["formula"]
        return found
    assert g is not None
    found["gradient"] = segments.product(g, g)
    found["update_gradient"] = segments.product(update, g)
    if run.formula is None:
        found["unchanged"] = segments.count(is_unchanged & (g != 0))
        return found

    shape = None if block is None else block.shape
    sheet = _worksheet(run, arrays, shape)
    run.formula.apply(sheet)
    flat = sheet.written if shape is None else _flattened(sheet.written, shape)
    formula = flat["update"]
    residual = update - formula
    found["formula"] = segments.product(formula, formula)
    found["residual"] = segments.product(residual, residual)
    found["unchanged"] = segments.count(is_unchanged & (formula != 0))
    has_all_parts = "fresh" in flat
    for part in ("decay", "momentum", "fresh"):
        if part in flat:
            found[part] = segments.product(flat[part], flat[part])
        elif has_all_parts:
            found[part] = 0 * found["formula"]
    if "eps_dominates" in flat:
        found["eps_dominates"] = segments.count(flat["eps_dominates"])
    for name in ("denominator", "effective_lr"):
        values = flat.get(name)
        if values is not None:
            values = segments.stretched(values)
            found[name] = segments.total(values)
            found[f"{name}_min"] = segments.least(values)
            found[f"{name}_max"] = segments.greatest(values)
    if "m_before" in arrays:
        m = arrays["m_before"]
        found["first_moment"] = segments.product(m, m)
        found["momentum_gradient"] = segments.product(m, g)
    return found


def _loaded(block: _Block, load: Callable[[torch.Tensor], Any]) -> dict[str, Any]:
    return {name: load(t) for name, t in {**block.tensors, **block.run.shaped}.items()}


def _worksheet(run: Run, arrays: dict[str, Any], shape: torch.Size | None) -> Worksheet:
    if shape is not None:
        arrays = {
            name: array if name in run.shaped else array.reshape(tuple(shape))
            for name, array in arrays.items()
        }
    return Worksheet(**run.given, **arrays)


def _flattened(written: dict[str, Any], shape: torch.Size) -> dict[str, Any]:
    """The quantities that have the weight's shape, or can be stretched to it, without shape."""
    flat: dict[str, Any] = {}
    for name, value in written.items():
        if getattr(value, "ndim", 0) == 0:
            flat[name] = value
            continue
        try:
            stretched = (
                value.expand(shape)
                if isinstance(value, torch.Tensor)
                else np.broadcast_to(value, tuple(shape))
            )
        except (RuntimeError, ValueError):
            continue
        flat[name] = stretched.reshape(-1)
    return flat


def _is_trustworthy(rows: Reals) -> Flags:
    """bool[n], whether float32 was enough for each parameter.

    It is where no square came near the ends of its range, and the weight arrived where the formula
    puts it, up to the rounding of the weight itself. Everywhere else double precision decides.
    """
    squares = rows[[_ROWS[name] for name in ("update", "formula", "gradient")]]
    is_safe = np.isnan(squares) | ((squares > _TINY) & (squares < _HUGE))
    residual, update, weight = (
        rows[_ROWS[name]] for name in ("residual", "update", "weight_after")
    )
    # Of a parameter whose turn it is not, nothing is known, and nothing wrong.
    agrees = np.isnan(residual) | (residual <= _DIFFERENT**2 * update + _ROUNDING**2 * weight)
    return np.asarray(is_safe.all(axis=0) & agrees)
