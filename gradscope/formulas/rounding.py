"""How far a step that is worked out in a tensor's dtype may be from the same step in float64.

A bound of the rounding errors, carried along the expression of each quantity; Higham (2002),
Accuracy and Stability of Numerical Algorithms, sections 2.1, 2.2 and 3.1. Every operation on
elements rounds once. Numbers that optimizers keep on the host (hyper-parameters, and in most of
them bias corrections) are worked out in double precision there, and rounded once where they meet
an element.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np

from gradscope.formulas.term import NAME, NUMBER, Element, Term

# Bits after the leading one, and the least exponent of a normal number.
_FORMATS = {
    "float64": (52, -1022),
    "float32": (23, -126),
    "float16": (10, -14),
    "bfloat16": (7, -126),
}

# torch orders operations otherwise than the papers do (lerp, addcdiv). Before it adds the rest, in
# up to two sums, it multiplies the weight by 1 - lr * weight_decay, a number rounded itself: the
# weight is rounded four times where the formula here has one sum.
_SLACK = 4.0

# Sums of many elements: torch adds them in blocks, so that their errors hardly grow.
_OF_SUMS = 4.0

# Whatever the dtype, torch iterates in bfloat16 for a matrix whose singular values are about 1.
_OF_NEWTON_SCHULZ = 2.0**-8


def unit_in_last_place(value: float, dtype: str) -> float:
    """Return the distance between the numbers of a dtype about ``value``; NaN if unknown."""
    if dtype not in _FORMATS or not math.isfinite(value):
        return math.nan
    bits, least = _FORMATS[dtype]
    exponent = math.frexp(value)[1] - 1 if value else least
    return math.ldexp(1.0, max(exponent, least) - bits)


class RoundingErrors:
    """Bounds for the quantities of one step, asked line by line in the order of the rule.

    Args:
        dtype: of the weight and the state: ``float32``, ``bfloat16`` …
        element: the one asked about.
        in_tensors: names of the given quantities that lie in tensors; every other one is a number
            on the host.
        host_dtype: in which these are kept from step to step.
    """

    def __init__(
        self,
        dtype: str,
        element: Element,
        in_tensors: Collection[str],
        host_dtype: str = "float64",
    ) -> None:
        bits, least = _FORMATS.get(dtype, (0, 0))
        self._is_known = dtype in _FORMATS
        self._roundoff = math.ldexp(0.5, -bits)
        # An element of double precision may have met a number of single precision.
        self._of_host = max(self._roundoff, unit_in_last_place(1.0, host_dtype) / 2)
        self._least_normal = math.ldexp(1.0, least)
        self._greatest = math.ldexp(2.0 - 2 * self._roundoff, 1 - least)
        self._element = element
        # None for numbers on the host.
        self._bounds: dict[str, float | None] = dict.fromkeys(in_tensors, 0.0)

    def bound(self, name: str, expression: Term) -> float:
        """Return how far this element may be off; infinite where it cannot be bounded.

        It cannot where a quantity on the way is too large for the dtype, or a divisor so small
        that it may round to 0. NaN in a dtype of which nothing is known.
        """
        if not self._is_known:
            return math.nan
        with np.errstate(all="ignore"):
            bound = self._bounds[name] = self._of(expression)
        if bound is None:  # stored in a tensor after all
            bound = self._from_host(self._element.of(expression.value))
        return float(_SLACK * (bound + 2 * self._roundoff * self._least_normal))

    def _of(self, term: Term) -> float | None:
        if term.operation == NAME:
            return self._bounds.get(term.label)
        if term.operation == NUMBER:
            return None
        if term.operation == "where":
            mask, yes, no = term.operands
            return self._of(yes if self._element.of(mask.value) else no)
        if term.operation == "newton_schulz":
            return _OF_NEWTON_SCHULZ
        bounds = [self._of(operand) for operand in term.operands]
        if all(bound is None for bound in bounds):
            return None
        value = self._element.of(term.value)
        values = [self._element.of(operand.value) for operand in term.operands]
        errors = [
            self._from_host(x) if bound is None else bound
            for x, bound in zip(values, bounds, strict=True)
        ]
        if value is None or None in values:
            return math.inf
        if term.operation in ("max", "min"):
            error = _of_chosen(value, values, errors)
        else:
            error = self._propagated(term.operation, abs(value), np.abs(values), errors)
        # Not so either where it is NaN, as of 0 times what has no bound.
        return error if abs(value) + error <= self._greatest else math.inf

    def _from_host(self, value: float | None) -> float:
        """The error of a number that comes from the host; these small ones are exact."""
        if value is None or abs(value) > self._greatest:
            return math.inf
        return 0.0 if value in (0.0, 1.0, 2.0) else self._of_host * self._at_least_normal(value)

    def _at_least_normal(self, value: float) -> float:
        """Below the least normal number all are as far apart as there; 0 is exact."""
        return max(abs(value), self._least_normal) if value else 0.0

    def _propagated(self, operation: str, result: float, values: Any, errors: list[float]) -> float:
        x, y = (*values, 0.0)[:2]
        ex, ey = (*errors, 0.0)[:2]
        own = self._roundoff * self._at_least_normal(result)
        match operation:
            case "+" | "-":
                return ex + ey + own
            case "*" | "matmul":  # of matrices only the outer product has an element for each
                return _times(x, ey) + _times(y + ey, ex) + own
            case "/" if ey:
                return (ex + _times(result, ey)) / (y - ey) + own if ey < y else math.inf
            case "/":
                return _times(1 / y, ex) + own
            case "**":
                by_base = _times(y * x ** (y - 1), ex)
                return by_base + _times(result * abs(np.log(x)), ey) + own
            case "sqrt":
                both = result + np.sqrt(np.maximum(x - ex, 0.0))
                return min(_times(1 / both, ex), math.sqrt(ex)) + own
            case "neg" | "abs":
                return ex
            case "sign":
                return 2.0 if x <= ex and ex else 0.0
            case _:
                return _OF_SUMS * own


def _of_chosen(value: float, values: list[float], errors: list[float]) -> float:
    """The error of the greater or lesser of two; of either if each might be it."""
    (x, y), (ex, ey) = values, errors
    if abs(x - y) <= ex + ey:
        return max(ex, ey)
    return ex if value == x else ey


def _times(factor: float, error: float) -> float:
    """A product in which no error stays none, whatever it is multiplied by."""
    return factor * error if error else 0.0
