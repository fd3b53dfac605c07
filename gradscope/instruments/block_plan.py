"""Arithmetic on arrays, noted down once and then done block by block, in buffers used again.

What is noted is put into fewer passes over memory than the same arithmetic takes as it is written:

- an array times a number stays an array and a number, which meet in sums (``a + k * b`` is one
  pass) and in results (the sum of squares of ``k * a`` is that of ``a``, times ``k**2``);
- what is noted twice is done once, and what no result needs is not done at all.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter, itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gradscope.instruments.segments import HostSegments, HostWhole

Reals = npt.NDArray[np.float64]

_LEAST, _GREATEST = 1e-12, 1e6
"""Outside of these a factor kept apart could hide that float32 overflowed or lost digits."""


_LINE = 16
"""How many float32 a cache line holds."""

_APART = 1_040
"""By how much more than a block's length buffers lie apart, so that they share no cache sets."""


class NotPlannedError(Exception):
    """The arithmetic is none that a plan can take; it is to be done as it is written."""


class BlockPlan:
    """Notes arithmetic on :class:`Planned` arrays, and does it for any block of these arrays.

    It has the methods of :class:`~gradscope.instruments.segments.Segments`, whose results are
    :class:`Result`: what :meth:`work_out` is to give.

    Args:
        names: of the arrays.
        dtype: of all of them.
    """

    def __init__(self, names: Sequence[str], dtype: torch.dtype) -> None:
        self._names, self._dtype = names, dtype
        self._nodes: dict[tuple[Any, ...], int] = {("array", n): i for i, n in enumerate(names)}
        self._results: dict[tuple[Any, ...], int] = {}
        self._program: _Program | None = None
        self.arrays = {name: Planned(self, i, 1.0) for i, name in enumerate(names)}

    def node(self, operation: str, operands: tuple[int, ...], *numbers: float) -> int:
        """Note an operation; returns its number."""
        return self._nodes.setdefault((operation, operands, numbers), len(self._nodes))

    def stretched(self, values: Any) -> Any:
        """Return the array or number as it is."""
        return values

    def total(self, values: Any) -> Result:
        """Return the sum of each segment."""
        if isinstance(values, Planned):
            return self._result("total", (values.node,), values.factor)
        return self._result("lengths", (), _number(values))

    def product(self, left: Any, right: Any) -> Result:
        """Return the sum of the products of each segment."""
        nodes = tuple(sorted((left.node, right.node)))
        return self._result("product", nodes, left.factor * right.factor)

    def least(self, values: Any) -> Result:
        """Return the least element of each segment."""
        return self._extreme(values, "least", "greatest")

    def greatest(self, values: Any) -> Result:
        """Return the greatest element of each segment."""
        return self._extreme(values, "greatest", "least")

    def count(self, flags: Any) -> Result:
        """Return how many elements of each segment are true."""
        if isinstance(flags, Condition):
            return self._result("count", (flags.tests,), 1.0)
        return self._result("lengths", (), float(bool(flags)))

    def _extreme(self, values: Any, name: str, negative: str) -> Result:
        if not isinstance(values, Planned):
            return self._result("ones", (), _number(values))
        return self._result(name if values.factor > 0 else negative, (values.node,), values.factor)

    def _result(self, reduction: str, operands: tuple[Any, ...], factor: float) -> Result:
        place = self._results.setdefault((reduction, operands), len(self._results))
        return Result(place, factor)

    def work_out(self, arrays: Sequence[Any], segments: HostWhole | HostSegments) -> list[Any]:
        """Do what is noted for one block.

        Args:
            arrays: in the order of the names, all of one length.
            segments: the cut of the block.

        Returns:
            For each place of a :class:`Result` a number, or one per segment.
        """
        if self._program is None:
            self._program = _Program(self._nodes, list(self._results))
        program = self._program
        buffers = _BUFFERS.views(self._dtype, program.n_buffers, len(arrays[0]))
        values = [*arrays, *program.numbers, *buffers]
        for function, operands in program.steps:
            function(*operands(values))
        reductions = program.whole if isinstance(segments, HostWhole) else program.segmented
        return [reduce(segments, *[values[i] for i in operands]) for reduce, operands in reductions]

    def finished(self, found: Iterable[Result], raw: Any) -> Reals:
        """Return float64[n, k]: of each result its row of ``raw``, times its number."""
        own = list(found)
        factors = np.array([result.factor for result in own])
        return np.asarray(raw[[result.place for result in own]] * factors[:, None], np.float64)


class _Program:
    """What is noted in a plan, as calls on a list: the arrays, then numbers, then buffers.

    Args:
        nodes: the number of each operation.
        results: what it is done for.
    """

    def __init__(self, nodes: dict[tuple[Any, ...], int], results: list[tuple[Any, ...]]) -> None:
        self._nodes = nodes
        kept = {node for reduction, on in results for node in _read_by(reduction, on)}
        needed = set(kept)
        order = []
        for key, node in reversed(nodes.items()):
            if node in needed and key[0] != "array":
                order.append((key, node))
                needed.update(key[1])
        order.reverse()
        last_use = {node: i for i, (key, _) in enumerate(order) for node in key[1]}
        self.numbers = list(dict.fromkeys(x for key, _ in order for x in key[2]))
        n_arrays = sum(key[0] == "array" for key in nodes)
        first_buffer = n_arrays + len(self.numbers)
        place = {node: node for node in range(n_arrays)}
        free: list[int] = []
        self.n_buffers = 0
        self.steps: list[tuple[Any, Any]] = []
        for i, ((operation, operands, numbers), node) in enumerate(order):
            # An operand that nothing reads later makes room for the result.
            for x in dict.fromkeys(operands):
                if x >= n_arrays and x not in kept and last_use[x] == i:
                    free.append(place[x])
            if not free:
                free.append(first_buffer + self.n_buffers)
                self.n_buffers += 1
            place[node] = free.pop()
            at = [place[x] for x in operands]
            at += [n_arrays + self.numbers.index(x) for x in numbers]
            at = at[::-1] if operation == "divided" else at
            self.steps.append((_FUNCTIONS[operation], itemgetter(*at, place[node])))
        read = [tuple(place[node] for node in _read_by(*result)) for result in results]
        self.whole, self.segmented = (
            [(_reducer(kind, *result), at) for result, at in zip(results, read, strict=True)]
            for kind in (HostWhole, HostSegments)
        )


def _read_by(reduction: str, operands: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(test[0] for test in operands[0]) if reduction == "count" else operands


def _reducer(kind: type, reduction: str, operands: tuple[Any, ...]) -> Callable[..., Any]:
    if reduction == "count":
        tests = [(getattr(np, comparison), number) for _, comparison, number in operands[0]]
        return lambda segments, *arrays: _count(segments, tests, arrays)
    if reduction in ("lengths", "ones"):
        return attrgetter(reduction)
    reducer: Callable[..., Any] = getattr(kind, reduction)
    return reducer


class Result:
    """A result of a plan, times a number."""

    __slots__ = ("factor", "place")

    def __init__(self, place: int, factor: float) -> None:
        self.place, self.factor = place, factor

    def __rmul__(self, number: float) -> Result:
        return Result(self.place, number * self.factor)


class Planned:
    """An array that is only noted, times a number."""

    __slots__ = ("factor", "node", "plan")

    def __init__(self, plan: BlockPlan, node: int, factor: float) -> None:
        if not _LEAST < abs(factor) < _GREATEST:  # also where it is NaN
            raise NotPlannedError
        self.plan, self.node, self.factor = plan, node, factor

    def _of(self, operation: str, factor: float, *numbers: float) -> Planned:
        return Planned(self.plan, self.plan.node(operation, (self.node,), *numbers), factor)

    def _with(self, other: Planned, operation: str, factor: float, *numbers: float) -> Planned:
        operands = (self.node, other.node)
        return Planned(self.plan, self.plan.node(operation, operands, *numbers), factor)

    def _times(self, ratio: float) -> Planned:
        """This array itself, and not the number that it stands with, times a number."""
        one = Planned(self.plan, self.node, 1.0)
        return one if ratio == 1 else one._of("multiply", 1.0, ratio)

    def __neg__(self) -> Planned:
        return Planned(self.plan, self.node, -self.factor)

    def __mul__(self, other: Any) -> Planned:
        if not isinstance(other, Planned):
            return Planned(self.plan, self.node, self.factor * _number(other))
        first, second = sorted((self, other), key=lambda each: each.node)
        return first._with(second, "multiply", self.factor * other.factor)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Planned:
        if not isinstance(other, Planned):
            return Planned(self.plan, self.node, self.factor / _divisor(other))
        return self._with(other, "divide", self.factor / other.factor)

    def __rtruediv__(self, number: Any) -> Planned:
        return self._of("divided", 1.0, _number(number) / self.factor)

    def __add__(self, other: Any) -> Planned:
        if not isinstance(other, Planned):
            number = _number(other)
            return self if number == 0 else self._of("add", self.factor, number / self.factor)
        # The smaller of the two numbers is the one that an element is multiplied by.
        if abs(self.factor) < abs(other.factor):
            return other.__add__(self)
        ratio = other.factor / self.factor
        if ratio == -1:
            return self._with(other, "subtract", self.factor)
        return self._with(other._times(ratio), "add", self.factor)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Planned:
        return self.__add__(-other)

    def __rsub__(self, other: Any) -> Planned:
        return (-self).__add__(other)

    def __pow__(self, exponent: Any) -> Planned:
        if exponent != 2:
            raise NotPlannedError
        return self * self

    def __abs__(self) -> Planned:
        return self._of("absolute", abs(self.factor))

    def sqrt(self) -> Planned:
        """Return the square root."""
        if self.factor < 0:
            raise NotPlannedError
        return self._of("sqrt", math.sqrt(self.factor))

    def maximum(self, other: Any) -> Planned:
        """Return the greater of the two, element by element."""
        if self.factor < 0 or not isinstance(other, Planned):
            raise NotPlannedError
        scaled = other._times(other.factor / self.factor)
        return self._with(scaled, "maximum", self.factor)

    def minimum(self, other: Any) -> Planned:
        """Refuse: no rule that could be planned needs it."""
        raise NotPlannedError

    def sign(self) -> Planned:
        """Refuse: no rule that could be planned needs it."""
        raise NotPlannedError

    def __lt__(self, other: Any) -> Condition:
        return self._compared("less", "greater", other)

    def __gt__(self, other: Any) -> Condition:
        return self._compared("greater", "less", other)

    def __eq__(self, other: object) -> Any:
        return self._compared("equal", "equal", other)

    def __ne__(self, other: object) -> Any:
        return self._compared("not_equal", "not_equal", other)

    __hash__ = None  # type: ignore[assignment]  # what is compared here are elements

    def _compared(self, comparison: str, negative: str, other: Any) -> Condition:
        comparison = comparison if self.factor > 0 else negative
        return Condition(((self.node, comparison, _number(other) / self.factor),))


class Condition:
    """Comparisons of arrays with numbers, all of which are to hold.

    Args:
        tests: of each the node, the name of NumPy's function, and the number.
    """

    __slots__ = ("tests",)

    def __init__(self, tests: tuple[tuple[int, str, float], ...]) -> None:
        self.tests = tests

    def __and__(self, other: Any) -> Any:
        if isinstance(other, Condition):
            return Condition(self.tests + other.tests)
        return self if other else False

    def where_(self, x: Any, y: Any) -> Planned:
        """Refuse: no rule that could be planned chooses between arrays."""
        raise NotPlannedError


def _number(value: Any) -> float:
    if not isinstance(value, int | float):
        raise NotPlannedError
    return float(value)


def _divisor(value: Any) -> float:
    number = _number(value)
    if number == 0:
        raise NotPlannedError
    return number


# Called with the operands, numbers, and where the result goes.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
    "divided": np.divide,
    "absolute": np.absolute,
    "sqrt": np.sqrt,
    "maximum": lambda x, y, out: np.maximum(x, y, out=out),
}


def _count(segments: Any, tests: Any, arrays: Any) -> Any:
    flags: Any = None
    for (compare, number), array in zip(tests, arrays, strict=True):
        holds = compare(array, number)
        flags = holds if flags is None else flags & holds
        if not np.count_nonzero(flags):  # the usual case, and then no further one needs a look
            return 0 * segments.ones
    return segments.count(flags)


class _Buffers(threading.local):
    """Memory for the arrays of a block, kept for the next one; each thread has its own."""

    def __init__(self) -> None:
        self._rows: dict[torch.dtype, Any] = {}

    def views(self, dtype: torch.dtype, n: int, length: int) -> Any:
        rows = self._rows.get(dtype)
        if rows is None or rows.shape[0] < n or rows.shape[1] < length:
            # Of torch, which begins at a cache line. All lengths of rows are multiples of one.
            room = -(-length // _LINE) * _LINE + _APART
            made = torch.zeros((max(n, 8), room), dtype=dtype, device="cpu")
            rows = self._rows[dtype] = made.numpy()
        return rows[:n, :length]


_BUFFERS = _Buffers()
