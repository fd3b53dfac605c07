"""A quantity that remembers how it was computed, and the sheet that writes each line down.

An update rule that is run with terms instead of arrays leaves behind the expression behind every
quantity it wrote: what :mod:`gradscope.formulas.notation` writes out in symbols and in numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from gradscope.formulas.arithmetic import lerp, newton_schulz
from gradscope.formulas.worksheet import Worksheet

NAME, NUMBER = "name", "number"
"""The operations of the leaves: a quantity with a name, a number as the rule spells it."""


@dataclass(frozen=True, slots=True)
class Element:
    """Which element of a weight is asked about.

    Attributes:
        index: its place; empty where the quantities of one weight are plain numbers.
        shape: the weight's.
    """

    index: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()

    def of(self, value: Any) -> Any:
        """Return what belongs to this element; None if the value has no element that does.

        A number belongs to every element, and so does an axis of length 1, as in broadcasting.
        """
        shape = np.shape(value)
        if not shape:
            return value.item() if isinstance(value, np.generic | np.ndarray) else value
        axes = len(self.shape) - len(shape)
        if axes < 0 or any(
            length not in (1, whole) for length, whole in zip(shape, self.shape[axes:], strict=True)
        ):
            return None
        at = (0 if n == 1 else i for n, i in zip(shape, self.index[axes:], strict=True))
        return value[tuple(at)].item()


class Term:
    """A value and the expression that gave it.

    Arithmetic never raises for a value: what divides by zero or overflows is infinite or NaN, as
    it would be in a tensor. Comparisons give a plain bool; between arrays they give a
    :class:`Truth`, which ``arithmetic.where`` understands.

    Attributes:
        operation: ``name``, ``number``, ``+ - * / **``, or the name of a function.
        operands: the terms it was computed from; none for a leaf.
        label: the name of a ``name``, the spelling of a ``number``, otherwise what tells this
            operation from others of its kind (the axis of a mean).
        value: a float64, or for rules that need the whole tensor an array of them.
    """

    __slots__ = ("label", "operands", "operation", "value")

    # NumPy's numbers and arrays leave an operation with a term to the term.
    __array_ufunc__ = None

    def __init__(
        self, operation: str, operands: tuple[Term, ...], value: Any, label: str = ""
    ) -> None:
        self.operation = operation
        self.operands = operands
        self.value = value
        self.label = label

    @staticmethod
    def named(name: str, value: Any) -> Term:
        """Return a quantity known by its name alone."""
        return Term(NAME, (), _float64(value), name)

    @staticmethod
    def number(value: Any) -> Term:
        """Return a number that stands in the rule itself; spelled as Python spells it."""
        plain = value.item() if isinstance(value, np.generic) else value
        return Term(NUMBER, (), _float64(plain), repr(plain) if np.ndim(plain) == 0 else "")

    def __repr__(self) -> str:
        inside = ", ".join(map(repr, self.operands)) or self.label
        return f"{self.operation}({inside})"

    def __bool__(self) -> bool:
        return bool(self.value)

    def __float__(self) -> float:
        return float(self.value)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its value; empty for a number."""
        return np.shape(self.value)

    @property
    def ndim(self) -> int:
        """The number of dimensions of its value."""
        return np.ndim(self.value)

    @property
    def size(self) -> Term:
        """The number of elements of its value, to be shown as such where a rule counts them."""
        return Term.number(int(np.size(self.value)))

    def __add__(self, other: Any) -> Any:
        return _binary("+", np.add, self, other)

    def __radd__(self, other: Any) -> Any:
        return _binary("+", np.add, other, self)

    def __sub__(self, other: Any) -> Any:
        return _binary("-", np.subtract, self, other)

    def __rsub__(self, other: Any) -> Any:
        return _binary("-", np.subtract, other, self)

    def __mul__(self, other: Any) -> Any:
        return _binary("*", np.multiply, self, other)

    def __rmul__(self, other: Any) -> Any:
        return _binary("*", np.multiply, other, self)

    def __truediv__(self, other: Any) -> Any:
        return _binary("/", np.divide, self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return _binary("/", np.divide, other, self)

    def __pow__(self, other: Any) -> Any:
        return _binary("**", np.float_power, self, other)

    def __rpow__(self, other: Any) -> Any:
        return _binary("**", np.float_power, other, self)

    def __matmul__(self, other: Any) -> Any:
        return _binary("matmul", np.matmul, self, other)

    def __rmatmul__(self, other: Any) -> Any:
        return _binary("matmul", np.matmul, other, self)

    def __neg__(self) -> Term:
        return _operation("neg", np.negative, self)

    def __pos__(self) -> Term:
        return self

    def __abs__(self) -> Term:
        return _operation("abs", np.abs, self)

    def __lt__(self, other: Any) -> Any:
        return _compared(np.less, self, other)

    def __le__(self, other: Any) -> Any:
        return _compared(np.less_equal, self, other)

    def __gt__(self, other: Any) -> Any:
        return _compared(np.greater, self, other)

    def __ge__(self, other: Any) -> Any:
        return _compared(np.greater_equal, self, other)

    def __eq__(self, other: object) -> Any:
        return _compared(np.equal, self, other)

    def __ne__(self, other: object) -> Any:
        return _compared(np.not_equal, self, other)

    __hash__ = None  # type: ignore[assignment]  # equal values do not make equal terms

    def sqrt(self) -> Term:
        """Return the square root."""
        return _operation("sqrt", np.sqrt, self)

    def sign(self) -> Term:
        """Return -1, 0 or 1; 0 for NaN, as torch does."""
        return _operation("sign", lambda x: np.where(np.isnan(x), 0.0, np.sign(x)), self)

    def maximum(self, other: Any) -> Any:
        """Return the greater of the two, element by element."""
        return _binary("max", np.maximum, self, other)

    def minimum(self, other: Any) -> Any:
        """Return the lesser of the two, element by element."""
        return _binary("min", np.minimum, self, other)

    def mean(self, axis: int, keepdims: bool) -> Term:
        """Return the mean over an axis."""
        return _operation(
            "mean", lambda x: np.mean(x, axis=axis, keepdims=keepdims), self, label=str(axis)
        )

    def norm(self) -> Term:
        """Return the L2 norm of all elements."""
        return _operation("norm", lambda x: np.sqrt(np.sum(np.square(x))), self)

    def lerp(self, start: Any, weight: Any, dtype: str) -> Term:
        """Return what ``arithmetic.lerp`` does from ``start`` to this, as the sum that it is."""
        spelled: Term = start + weight * (self - start)
        if self.ndim:
            base = np.broadcast_to(_term(start).value, self.shape).copy()
            spelled.value = lerp(base, self.value, float(weight), dtype)
        return spelled

    def newton_schulz(self, coefficients: Sequence[Any], steps: Any, eps: Any) -> Term:
        """Return about the nearest semi-orthogonal matrix, as ``arithmetic.newton_schulz`` does."""
        value = newton_schulz(self.value, coefficients, steps, eps)
        return Term("newton_schulz", (self,), _float64(value), f"{float(steps):g}")


class Truth:
    """Where something holds among the elements of an array."""

    __slots__ = ("holds",)

    def __init__(self, holds: Any) -> None:
        self.holds = holds

    def where_(self, x: Any, y: Any) -> Term:
        """Return a term of the elements of ``x`` where it holds, else of ``y``."""
        x, y = _term(x), _term(y)
        chosen = Term(NUMBER, (), self.holds)
        return Term("where", (chosen, x, y), np.where(self.holds, x.value, y.value))

    def __and__(self, other: Any) -> Truth:
        return Truth(self.holds & _holds(other))


class TracedWorksheet(Worksheet):
    """A worksheet of terms that keeps every line in order.

    Numbers and arrays that are given become terms of their name, those in a tuple of their name
    and place (``etas[0]``); switches, texts and None stay what they are. What the rule writes is
    kept with its expression in ``lines``, and read back as a quantity of that name, so that the
    next line names it instead of spelling it out.
    """

    lines: list[tuple[str, Term]]

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__(**{name: _given(name, value) for name, value in given.items()})
        object.__setattr__(self, "lines", [])

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, bool | np.bool_ | Truth | str | tuple) or value is None:
            super().__setattr__(name, value)
            return
        term = _term(value)
        self.lines.append((name, term))
        super().__setattr__(name, Term.named(name, term.value))


def _given(name: str, value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_given(f"{name}[{i}]", element) for i, element in enumerate(value))
    return Term.named(name, value) if _is_quantity(value) else value


def _is_quantity(value: Any) -> bool:
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype != np.bool_
    return isinstance(value, Real) and not isinstance(value, bool)


def _float64(value: Any) -> Any:
    """A number as NumPy's float64, an array as one of them."""
    return np.float64(value) if np.ndim(value) == 0 else np.asarray(value, dtype=np.float64)


def _term(value: Any) -> Term:
    return value if isinstance(value, Term) else Term.number(value)


def _holds(truth: Any) -> Any:
    return truth.holds if isinstance(truth, Truth) else truth


def _operation(
    operation: str, function: Callable[..., Any], *operands: Term, label: str = ""
) -> Term:
    with np.errstate(all="ignore"):
        value = function(*(operand.value for operand in operands))
    return Term(operation, operands, _float64(value), label)


def _binary(operation: str, function: Callable[..., Any], x: Any, y: Any) -> Any:
    if not (_can_be_term(x) and _can_be_term(y)):
        return NotImplemented
    return _operation(operation, function, _term(x), _term(y))


def _can_be_term(value: Any) -> bool:
    return isinstance(value, Term | Real | np.ndarray | np.generic)


def _compared(function: Callable[..., Any], x: Any, y: Any) -> Any:
    if not (_can_be_term(x) and _can_be_term(y)):
        return NotImplemented
    holds = function(_term(x).value, _term(y).value)
    return bool(holds) if np.ndim(holds) == 0 else Truth(holds)
