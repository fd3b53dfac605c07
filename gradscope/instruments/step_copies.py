"""What an update reads and what it leaves, copied around it, and taken apart."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gradscope.formulas import FORMULAS
from gradscope.formulas.formula import Formula
from gradscope.instruments.anatomy import LARGE, Anatomy, Run, WorkedOut, work_out
from gradscope.instruments.flat_copies import (
    FlatCopies,
    Integers,
    can_be_copied,
    is_elsewhere,
    working_dtype,
)
from gradscope.instruments.late import Known, Late, scalar_of
from gradscope.instruments.local import is_spread, local
from gradscope.instruments.other_updates import OtherUpdates
from gradscope.run.weight_step import GivenTogether, TrackedWeights, WeightStep

Tensors = Sequence[torch.Tensor | None]
Flags = npt.NDArray[np.bool_]
LateNumbers = dict[int, Late[Any]]
"""Values of hyper-parameters on a device, by the id of the tensor."""

_UNKNOWN_STATE = 2
"""How many tensors of state to make room for where the rule, and so its state, is not known."""


def formula_of(optimizer: torch.optim.Optimizer) -> Formula | None:
    """Return the rule by which an optimizer steps, or None for one that is not torch's own.

    A subclass that leaves ``step`` as it is steps by the rule of its base.
    """
    step = inspect.unwrap(type(optimizer).step)
    for base in type(optimizer).__mro__:
        formula = FORMULAS.get(base.__name__)
        if formula is not None and base.__module__.startswith("torch.optim"):
            return formula if inspect.unwrap(base.step) is step else None  # type: ignore[attr-defined]
    return None


class StepCopies:
    """Copies the parameters of one optimizer around its updates.

    In the order of a step: :meth:`before`, :meth:`gradients` (once more for each evaluation of a
    closure), :meth:`after`.

    Args:
        optimizer: the optimizer; not kept.
        parameters: its parameters, None for one that is gone.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Tensors) -> None:
        self.formula = formula_of(optimizer)
        self._n = len(parameters)
        # What a rule does to single elements it does to a rank's part of them; else a part tells
        # nothing. Nor does a place in a part tell which weight it is.
        self._is_spread = any(map(is_spread, parameters))
        self._reads_parts = self._is_spread and (self.formula is None or self.formula.elementwise)
        wholes, parameters = parameters, self._here(parameters)
        self._empty = [i for i, p in enumerate(parameters) if p is not None and _is_empty(p)]
        self._groups = group_numbers(optimizer, wholes)
        self._parts = [
            _Part(copies, self._groups[copies.places], self.formula)
            for copies in _copies(parameters, self._groups, self.formula)
        ]

    def before(self, optimizer: torch.optim.Optimizer, parameters: Tensors) -> None:
        """Copy weights and state as an update finds them."""
        with torch.no_grad():
            # The state is a defaultdict: asking for what is not there would create it.
            states = [{} if p is None else optimizer.state.get(p) or {} for p in parameters]
            if self._is_spread:
                states = [{key: local(v) for key, v in state.items()} for state in states]
            own = self._here(parameters)
            for part in self._parts:
                part.before(optimizer, own, states)

    def gradients(self, gradients: Tensors, scale: torch.Tensor | None) -> None:
        """Copy the gradients that an update is about to read.

        Args:
            gradients: one per parameter.
            scale: what they are still multiplied by, and the update will divide them by.
        """
        with torch.no_grad():
            own = self._here(gradients)
            for part in self._parts:
                part.gradients(own, scale)

    def after(self, parameters: Tensors) -> Late[Anatomy]:
        """Copy the weights as an update left them, and take the update apart."""
        with torch.no_grad():
            own = self._here(parameters)
            worked_out = [(part.copies, part.after(own)) for part in self._parts]
            others = [part.others(own) for part in self._parts if part.copies.has_turns]
        return WorkedOut(self._n, self._empty, worked_out, others)

    def _here(self, tensors: Tensors) -> Tensors:
        """Tensors as they are, or what this rank holds of them."""
        return [local(tensor) for tensor in tensors] if self._reads_parts else tensors

    def tracked(self, params: Any) -> Late[TrackedWeights | None]:
        """Return a few weights of each parameter around the step that is just over.

        Args:
            params: int64[n], the numbers of the parameters.
        """
        if self._is_spread:
            return Known(None)
        return _Tracked([late for part in self._parts for late in part.tracked(params)])

    def weight(self, place: int, position: int, index: tuple[int, ...]) -> WeightStep | None:
        """Return any weight around the last step that was copied; None if it was not.

        Args:
            place: of the parameter in the list of all.
            position: of the weight in the flattened parameter.
            index: of the weight in the parameter, to be kept with it.
        """
        for part in self._parts if not self._is_spread else ():
            members = np.flatnonzero(part.copies.places == place)
            if len(members):
                return part.weight(int(members[0]), position, index)
        return None

    def whole(self, place: int) -> tuple[dict[str, Any], GivenTogether] | None:
        """Return all weights of a parameter around the last step; None if it was not copied.

        Returns:
            Arrays by their names on the worksheet and ``weight_after``; and what the rule was given
            besides.
        """
        for part in self._parts if not self._is_spread else ():
            members = np.flatnonzero(part.copies.places == place)
            if len(members):
                return part.whole(int(members[0]))
        return None

    def common(self, place: int) -> Late[GivenTogether]:
        """Return what the rule was given besides tensors, of the parameter in a place."""
        for part in self._parts:
            members = np.flatnonzero(part.copies.places == place)
            if len(members):
                return part.common(int(members[0]))
        return Known(GivenTogether(None, {}, {}))


class _Part:
    """The parameters of one device and working precision."""

    def __init__(self, copies: FlatCopies, groups: Any, formula: Formula | None) -> None:
        self.copies = copies
        self._groups = groups
        self._formula = formula
        self._given: list[dict[str, Any]] = []
        self.late: LateNumbers = {}
        self._states: list[dict[str, Any]] = []
        self._present: dict[str, Flags] = {}
        self._numbers: dict[str, Any] = {}
        self._spread: set[str] = set()
        self._shaped: dict[str, list[torch.Tensor | None]] = {}
        self._is_first: Flags = np.zeros(0, np.bool_)
        self._runs: list[Run] = []
        self._other_updates: OtherUpdates | None = None

    def before(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Tensors,
        states: Sequence[dict[str, Any]],
    ) -> None:
        copies = self.copies
        copies.next_turn()
        everybody = [parameters[place] for place in copies.places]
        copies.copy_weights(everybody)
        self.late = {}
        self._given = [_given(group, copies.device, self.late) for group in optimizer.param_groups]
        first, last = copies.turn
        self._states = [states[place] for place in copies.places[first:last]]
        self._present, self._numbers, self._shaped, self._spread = {}, {}, {}, set()
        self._is_first = np.array([not state for state in self._states], np.bool_)
        if self._formula is None:
            return
        for key, name in self._formula.state.items():
            held = [state.get(key) for state in self._states]
            if name in self._formula.scalars:
                if any(map(is_elsewhere, held)) and not self._formula.elementwise:
                    self._shaped[name] = [_copy(value, copies.dtype) for value in held]
                elif any(map(is_elsewhere, held)):
                    # Which parameters share a count is not known here: each element has its own.
                    copies.spread(name, held)
                    self._spread.add(name)
                else:
                    self._numbers[name] = _numbers(held)
            elif self._formula.elementwise:
                present = copies.copy(
                    name, [v if isinstance(v, torch.Tensor) else None for v in held]
                )
                self._present[name] = present
            else:  # rows and columns, the whole matrix: as it is
                self._shaped[name] = [_copy(value, copies.dtype) for value in held]
                self._present[name] = np.array([v is not None for v in self._shaped[name]])
        if self._present:
            # SGD has an entry for its buffer before it has a buffer.
            self._is_first = ~np.logical_or.reduce(list(self._present.values()))

    def gradients(self, gradients: Tensors, scale: torch.Tensor | None) -> None:
        copies = self.copies
        first, last = copies.turn
        own = [gradients[place] for place in copies.places[first:last]]
        self._present["g"] = copies.copy("g", own)
        if scale is not None:
            begin, end = copies.starts[first], copies.starts[last]
            copies.flat("g", int(begin), int(end)).div_(scale.to(copies.device, copies.dtype))
        self._present["touched"] = np.array(
            [g is not None and g.layout is torch.sparse_coo for g in own], np.bool_
        )
        for member in np.flatnonzero(self._present["touched"]):
            touched = copies.shaped("touched", first + int(member))
            touched.zero_()
            gradient = own[member]
            assert gradient is not None
            touched[tuple(gradient._indices())] = 1

    def after(self, parameters: Tensors) -> Late[Any]:
        copies = self.copies
        first, last = copies.turn
        copies.copy("weight_after", [parameters[place] for place in copies.places[first:last]])
        self._states = []
        self._runs = self._cut_into_runs()
        return work_out(copies, self._runs)

    def others(self, parameters: Tensors) -> tuple[Integers, Late[Any]]:
        """Read what was not taken apart; places of these parameters, and numbers of each."""
        if self._other_updates is None:
            self._other_updates = OtherUpdates(self.copies)
        places = self.copies.places
        at, squares = self._other_updates.read([parameters[place] for place in places])
        return places[at], squares

    def tracked(self, params: Any) -> list[Late[TrackedWeights | None]]:
        copies = self.copies
        if self._formula is not None and not self._formula.elementwise:
            return []
        at_all, member = copies.tracked
        own = slice(*np.searchsorted(member, copies.turn))
        at_all, member = at_all[own], member[own]
        runs = self._runs
        run = np.searchsorted([run.last for run in runs], member, "right")
        names = {"weight_before", "weight_after"}.union(*(run.arrays.values() for run in runs))
        values = {name: copies.gather(name, at_all) for name in sorted(names)}
        late = self.late
        position = at_all - copies.starts[member]
        param = params[copies.places[member]]

        def finish(arrived: dict[str, Any]) -> TrackedWeights:
            common = tuple(_Together(each, late).value() for each in runs)
            return TrackedWeights(param, position, arrived, common, run)

        if self._other_updates is None:
            return [_Gathered(values, finish)]
        at_others, others, values_of_others = self._other_updates.tracked

        def finish_others(arrived: dict[str, Any]) -> TrackedWeights:
            param = params[copies.places[others]]
            position = at_others - copies.starts[others]
            return TrackedWeights(param, position, arrived, (), np.full(len(param), -1))

        return [_Gathered(values, finish), _Gathered(values_of_others, finish_others)]

    def run_of(self, member: int) -> Run | None:
        """Return the run that a member belonged to in the last step; None if it was not copied."""
        return next((run for run in self._runs if run.first <= member < run.last), None)

    def common(self, member: int) -> Late[GivenTogether]:
        """Return what the rule was given besides tensors, of a member of any turn."""
        run = self.run_of(member)
        if run is None:
            given = dict(self._given[self._groups[member]])
            given |= {"touched": 1, "dtype": self.copies.names_of_dtypes[member]}
            run = Run(member, member + 1, self._formula, given, {})
        return _Together(run, self.late)

    def weight(self, member: int, position: int, index: tuple[int, ...]) -> WeightStep | None:
        copies = self.copies
        run = self.run_of(member)
        if run is None:
            return None
        names = {"weight_before": "weight_before", "weight_after": "weight_after", **run.arrays}
        if run.formula is not None and not run.formula.elementwise:
            values: dict[str, Any] = {
                name: copies.shaped(kept, member).double().cpu().numpy()
                for name, kept in names.items()
            }
            values |= {name: t.double().cpu().numpy() for name, t in run.shaped.items()}
            after = float(values.pop("weight_after")[index])
        else:
            values = {
                name: np.float64(copies.shaped(kept, member).reshape(-1)[position].item())
                for name, kept in names.items()
            }
            after = float(values.pop("weight_after"))
        together = _Together(run, self.late).value()
        return WeightStep(together.formula, {**together.given, **values}, index, after)

    def whole(self, member: int) -> tuple[dict[str, Any], GivenTogether] | None:
        copies = self.copies
        run = self.run_of(member)
        if run is None:
            return None
        names = {"weight_before": "weight_before", "weight_after": "weight_after", **run.arrays}
        arrays = {name: copies.shaped(kept, member).cpu().numpy() for name, kept in names.items()}
        arrays |= {name: tensor.cpu().numpy() for name, tensor in run.shaped.items()}
        return arrays, _Together(run, self.late).value()

    def _cut_into_runs(self) -> list[Run]:
        """Split the parameters where anything that the formula is given changes."""
        first, last = self.copies.turn
        formula = self._formula
        marks = [self._groups[first:last], self._is_first, *self._present.values()]
        marks += list(self._numbers.values())
        splits = np.zeros(last - first, np.bool_)
        splits[:1] = True
        for mark in marks:
            splits[1:] |= mark[1:] != mark[:-1]
        if formula is not None and not formula.elementwise:
            splits[:] = True
        begins = np.flatnonzero(splits)
        ends = np.append(begins[1:], last - first)
        return [self._run(int(begin), int(end)) for begin, end in zip(begins, ends, strict=True)]

    def _run(self, begin: int, end: int) -> Run:
        first, formula = self.copies.turn[0], self._formula
        has_gradient = bool(self._present["g"][begin])
        given = dict(self._given[self._groups[first + begin]])
        given["is_first"] = bool(self._is_first[begin])
        given["touched"] = 1
        given["dtype"] = self.copies.names_of_dtypes[first + begin]
        arrays = {"g": "g"} if has_gradient else {}
        shaped: dict[str, torch.Tensor] = {}
        for name, numbers in self._numbers.items():
            given[f"{name}_before"] = float(numbers[begin])
        arrays |= {f"{name}_before": name for name in self._spread if has_gradient}
        if formula is not None and has_gradient:
            for name in formula.state.values():
                if name in self._numbers or name in self._spread:
                    continue
                if name in self._shaped and (own := self._shaped[name][begin]) is not None:
                    shaped[f"{name}_before"] = own
                elif name in self._present and self._present[name][begin]:
                    arrays[f"{name}_before"] = name
                else:
                    given[f"{name}_before"] = 0.0
            if self._present["touched"][begin]:
                del given["touched"]
                arrays["touched"] = "touched"
        return Run(first + begin, first + end, formula, given, arrays, shaped, has_gradient)


class _Gathered(Late[TrackedWeights | None]):
    """Values gathered from copies, and what is made of them once they have arrived."""

    def __init__(
        self,
        values: dict[str, Late[Any]],
        finish: Callable[[dict[str, Any]], TrackedWeights],
    ) -> None:
        self._values, self._finish = values, finish

    def ready(self) -> bool:
        return all(value.ready() for value in self._values.values())

    def value(self) -> TrackedWeights:
        return self._finish({name: value.value() for name, value in self._values.items()})


class _Tracked(Late[TrackedWeights | None]):
    """The tracked weights of several copies, as one."""

    def __init__(self, parts: list[Late[TrackedWeights | None]]) -> None:
        self._parts = parts

    def ready(self) -> bool:
        return all(part.ready() for part in self._parts)

    def value(self) -> TrackedWeights | None:
        found = [tracked for part in self._parts if (tracked := part.value()) is not None]
        if len(found) < 2:
            return found[0] if found else None
        names = set().union(*(each.values for each in found))
        shifts = np.cumsum([0, *(len(each.common) for each in found)])
        return TrackedWeights(
            np.concatenate([each.param for each in found]),
            np.concatenate([each.position for each in found]),
            {
                name: np.concatenate(
                    [each.values.get(name, np.full(len(each.param), np.nan)) for each in found]
                )
                for name in names
            },
            tuple(common for each in found for common in each.common),
            np.concatenate(
                [np.where(e.run < 0, -1, e.run + s) for e, s in zip(found, shifts, strict=False)]
            ),
        )


class _Together(Late[GivenTogether]):
    """What a run has in common, as plain data: a tensor of one element becomes its value."""

    def __init__(self, run: Run, late: LateNumbers) -> None:
        self._run, self._late = run, late

    def ready(self) -> bool:
        return all(number.ready() for number in self._late.values())

    def value(self) -> GivenTogether:
        formula = self._run.formula
        given = {name: self._plain(value) for name, value in self._run.given.items()}
        return GivenTogether(None if formula is None else formula.name, given, self._run.arrays)

    def _plain(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self._plain, value))
        return float(self._late[id(value)].value()) if isinstance(value, torch.Tensor) else value


def _copies(parameters: Tensors, groups: Any, formula: Formula | None) -> list[FlatCopies]:
    places: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, parameter in enumerate(parameters):
        if can_be_copied(parameter) and not _is_empty(parameter):
            places.setdefault((parameter.device, working_dtype(parameter)), []).append(place)
    n_state = _UNKNOWN_STATE
    if formula is not None:
        n_state = len(set(formula.state.values()) - set(formula.scalars))
    copies = []
    for (device, dtype), at in places.items():
        # What is worked out together lies together: the small parameters of a group, and of these
        # the ones of a shape. Large ones come first, most of which then begin at a cache line:
        # elsewhere arithmetic takes up to twice as long.
        at.sort(key=lambda i: (groups[i], *_size_and_shape(parameters[i])))
        own = [p for i in at if (p := parameters[i]) is not None]
        copies.append(FlatCopies(device, dtype, at, own, 2 + n_state))
    return copies


def _size_and_shape(parameter: Any) -> tuple[Any, ...]:
    numel = parameter.numel()
    return (False,) if numel >= LARGE else (True, numel, tuple(parameter.shape))


def _is_empty(parameter: torch.Tensor) -> bool:
    return can_be_copied(parameter) and not parameter.numel()


def group_numbers(optimizer: torch.optim.Optimizer, parameters: Tensors) -> Any:
    """Return int64[n], the group of each parameter."""
    group_of = {
        id(parameter): number
        for number, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }
    return np.array([group_of.get(id(parameter), 0) for parameter in parameters], np.int64)


def _given(group: dict[str, Any], device: torch.device, late: LateNumbers) -> dict[str, Any]:
    """The hyper-parameters of a group, as a worksheet is given them."""

    def number(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.device.type == "cpu":
            return float(value)
        # The rule is given it where it is; its value comes late.
        own = value.detach().to(device, copy=True)
        late[id(own)] = scalar_of(own)
        return own

    given: dict[str, Any] = {}
    for name, value in group.items():
        if name == "params":
            continue
        if name == "betas":
            given["beta1"], given["beta2"] = map(number, value)
        elif isinstance(value, tuple | list):
            given[name] = tuple(map(number, value))
        else:
            given["mu" if name == "momentum" else name] = number(value)
    return given


def _copy(value: Any, dtype: torch.dtype) -> torch.Tensor | None:
    return value.detach().to(dtype, copy=True) if isinstance(value, torch.Tensor) else None


def _numbers(values: Sequence[Any]) -> Any:
    """float64[n], the values of single numbers on the host; 0 where there is none."""
    return np.array([0.0 if value is None else float(value) for value in values], np.float64)
