"""What an optimizer keeps for each parameter: moments, buffers, counters, of any class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gradscope.instruments.flat_copies import is_elsewhere
from gradscope.instruments.late import Known, Late, Numbers, scalar_of
from gradscope.instruments.statistics import Reals, Statistics, StatisticsReader

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StateLayout:
    """Which entries the state of an optimizer has; the same object as long as it has the same.

    Attributes:
        keys: the names that occur in ``optimizer.state[p]``, once each.
        places: int64[n], place of the parameter in the list that was passed, per entry.
        key: int64[n], index into ``keys``.
        tensors: int64[t], the entries that are tensors.
        numbers: int64[n - t], the entries that are single numbers.
    """

    keys: tuple[str, ...]
    places: Integers
    key: Integers
    tensors: Integers
    numbers: Integers


@dataclass(slots=True)
class StateReading:
    """The state of an optimizer at one moment.

    Attributes:
        layout: the entries.
        statistics: of the entries that are tensors.
        values: float64[n - t], the entries that are single numbers.
    """

    layout: StateLayout
    statistics: Late[Statistics]
    values: Late[Reals]

    def ready(self) -> bool:
        """Whether every value has arrived."""
        return self.statistics.ready() and self.values.ready()

    def by_parameter(self, key: str, name: str, n: int) -> Reals:
        """Return one statistic of one key for each of ``n`` parameters, NaN where there is none.

        Of a single number every statistic is that number's.
        """
        result = np.full(n, np.nan)
        layout = self.layout
        if key not in layout.keys:
            return result
        wanted = layout.key == layout.keys.index(key)
        at = wanted[layout.tensors]
        result[layout.places[layout.tensors[at]]] = getattr(self.statistics.value(), name)[at]
        at = wanted[layout.numbers]
        values = self.values.value()[at]
        result[layout.places[layout.numbers[at]]] = np.abs(values) if name == "norm" else values
        return result


class StateReader:
    """Reads the state that an optimizer holds for a list of parameters."""

    def __init__(self) -> None:
        self._held: list[list[str]] = []
        self._shapes: list[Any] = []
        self._layout = StateLayout((), *(np.zeros(0, np.int64) for _ in range(4)))
        self._reader = StatisticsReader([])
        self._numbers = _NumberReader(0)
        self._ids: list[int] = []
        self._n = 0
        self._is_on_host = True
        self._versions: list[int] | None = None
        self._last: StateReading | None = None

    def read(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[torch.Tensor | None],
        *,
        no_step_since: bool = False,
    ) -> StateReading:
        """Read the state as it is now; a parameter that has none yet has no entry.

        Args:
            optimizer: the optimizer.
            parameters: its parameters, None for one that is gone.
            no_step_since: whether the optimizer has made no step since the last reading, which then
                still holds unless a tensor of the state was replaced or written.
        """
        # The state is a defaultdict: asking for what is not there would create it.
        states = [{} if p is None else optimizer.state.get(p) or {} for p in parameters]
        values = [value for state in states for value in state.values()]
        ids, versions = [id(value) for value in values], _versions(values)
        is_same = ids == self._ids and len(states) == self._n
        if no_step_since and is_same and versions is not None and versions == self._versions:
            assert self._last is not None
            if not self._is_written(values, self._last):
                return self._last
        if not is_same or versions is None:
            self._ids, self._n = ids, len(states)
            self._is_on_host = not any(map(is_elsewhere, values))
            held, shapes = [list(state) for state in states], [_shape(value) for value in values]
            if shapes != self._shapes or held != self._held:
                self._held, self._shapes = held, shapes
                self._layout = _layout(held, shapes)
                self._reader = StatisticsReader([values[i] for i in self._layout.tensors])
                self._numbers = _NumberReader(len(self._layout.numbers))
        self._versions = versions
        self._last = StateReading(
            layout=self._layout,
            statistics=self._reader.statistics(
                [values[i] for i in self._layout.tensors], count_zeros=False
            ),
            values=self._numbers.read([values[i] for i in self._layout.numbers]),
        )
        return self._last

    def _is_written(self, values: list[Any], last: StateReading) -> bool:
        """Whether the contents have changed, which through ``.data`` moves no version."""
        if not self._is_on_host:  # to be told only by waiting for the device
            return False
        tensors = [values[i] for i in last.layout.tensors]
        now = self._reader.sums_of_squares(tensors).value()
        before = last.statistics.value().sum_of_squares
        return not np.allclose(now, before, rtol=_SAME, atol=0, equal_nan=True)


_SAME = 1e-6
"""Two sums of squares of the same numbers, added in another order, agree to this."""


def _versions(values: list[Any]) -> list[int] | None:
    """Autograd's version counter of each tensor; None where there is anything without one."""
    try:
        return [value._version for value in values]
    except (AttributeError, RuntimeError):  # a number; a tensor made in inference mode
        return None


def _shape(value: Any) -> Any:
    """The shape of a tensor, () for a number, None for anything else."""
    if isinstance(value, torch.Tensor):
        # A complex number is no number of the table, but has a norm as any tensor has.
        return torch.Size([1]) if value.is_complex() and not value.ndim else value.shape
    return () if isinstance(value, int | float) else None


def _layout(held: list[list[str]], shapes: list[Any]) -> StateLayout:
    keys = [str(key) for state in held for key in state]
    places = [place for place, state in enumerate(held) for _ in state]
    known = tuple(dict.fromkeys(keys))
    kept = [i for i, shape in enumerate(shapes) if shape is not None]
    return StateLayout(
        keys=known,
        places=np.array(places, np.int64),
        key=np.array([known.index(key) for key in keys], np.int64),
        tensors=np.array([i for i in kept if len(shapes[i])], np.int64),
        numbers=np.array([i for i in kept if not len(shapes[i])], np.int64),
    )


class _NumberReader:
    """Reads many single numbers at once: Python's own, and tensors with one element.

    Args:
        n: how many.
    """

    def __init__(self, n: int) -> None:
        self._host = torch.zeros(n, dtype=torch.float64, device="cpu")
        self._views = list(self._host.unbind())

    def read(self, values: Sequence[Any]) -> Late[Reals]:
        """Return float64[n], NaN for what is no real number."""
        try:
            # The usual case: the counts of steps, small tensors on the host.
            if not any(value.device.type != "cpu" for value in values):
                torch._foreach_copy_(self._views, values)  # type: ignore[arg-type]
                return Known(self._host.numpy().copy())
        except (AttributeError, TypeError, RuntimeError):
            pass  # a Python number among them, or a tensor that cannot be read like this
        own = [_number(value) for value in values]
        elsewhere: dict[torch.device, list[int]] = {}
        for i, number in enumerate(own):
            if isinstance(number, torch.Tensor):
                elsewhere.setdefault(number.device, []).append(i)
        numbers = np.array([np.nan if isinstance(n, torch.Tensor) else n for n in own], np.float64)
        # One copy for each device, not one for each number.
        return _Collected(
            numbers,
            [
                (places, Numbers(torch.stack([own[i] for i in places])))
                for places in elsewhere.values()
            ],
        )


def _number(value: Any) -> Any:
    """A number as a float; one on a device as a tensor of a common dtype."""
    if not isinstance(value, torch.Tensor):
        return float(value)
    is_number = value.numel() == 1 and not value.is_complex() and not value.is_meta
    if is_elsewhere(value) and is_number:
        return value.detach().reshape(()).float()
    return scalar_of(value).value()


class _Collected(Late[Reals]):
    """An array of which some numbers are still under way."""

    def __init__(self, numbers: Reals, parts: list[tuple[list[int], Late[Any]]]) -> None:
        self._numbers, self._parts = numbers, parts

    def ready(self) -> bool:
        return all(part.ready() for _, part in self._parts)

    def value(self) -> Reals:
        for places, part in self._parts:
            self._numbers[places] = part.value()
        return self._numbers
