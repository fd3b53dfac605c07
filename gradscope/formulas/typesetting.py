"""Expressions written out, in symbols or with a number in place of each symbol.

No more parentheses than precedence asks for, and a few for the eye where text could be misread:
``a / (b·c)``, ``(a / b)·c``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from gradscope.formulas.notation import Notation, Symbol, latex_number, number
from gradscope.formulas.term import Element, Term

_SUM, _QUOTIENT, _PRODUCT, _POWER, _ATOM = range(1, 6)
"""How tightly a part of an expression holds together."""

_SUPERSCRIPTS = str.maketrans("0123456789t−", "⁰¹²³⁴⁵⁶⁷⁸⁹ᵗ⁻")

# What has no meaning for one element alone is shown as the number that came of it.
_OF_WHOLE_ARRAYS = {"mean", "norm", "matmul", "newton_schulz"}


@dataclass(frozen=True, slots=True)
class _Written:
    """A part of an expression.

    Attributes:
        text: the part without its sign.
        holds: how tightly; beside what holds more tightly it needs parentheses.
        negative: whether a minus stands before it. Signs are kept apart until something has to
            hold them, so that ``a + (-b) * c`` is written as a difference.
    """

    text: str
    holds: int
    negative: bool = False


class TextWriter:
    """Writes expressions for a monospaced font.

    Args:
        notation: how each quantity is called.
        element: whose numbers are shown.
        in_numbers: whether to write numbers in place of symbols.
    """

    minus = "−"

    def __init__(self, notation: Notation, element: Element, in_numbers: bool = False) -> None:
        self.notation = notation
        self.element = element
        self.in_numbers = in_numbers

    def whole(self, term: Term) -> str:
        """Write an expression that stands alone."""
        return self._signed(self._part(term))

    def _part(self, term: Term) -> _Written:
        if self.in_numbers and term.operation in _OF_WHOLE_ARRAYS:
            if _is_outer_product(term):
                return self._product(*map(self._part, term.operands))
            value = self.element.of(term.value)
            if value is not None:
                return self._in_digits(value)
        match term.operation:
            case "name":
                return self._name(term)
            case "number":
                return self._constant(term)
            case "neg":
                return self._negated(self._part(term.operands[0]))
            case "+" | "-":
                x, y = map(self._part, term.operands)
                return self._sum(x, y, subtracted=term.operation == "-")
            case "*":
                return self._product(*map(self._part, term.operands))
            case "/":
                return self._quotient(term)
            case "**":
                return self._power(*map(self._part, term.operands))
            case "matmul":
                return self._matrix_product(*map(self._part, term.operands))
            case "where":
                holds = self.element.of(term.operands[0].value)
                return self._part(term.operands[1 if holds else 2])
            case _:
                return self._function(term)

    def _name(self, term: Term) -> _Written:
        value = self.element.of(term.value) if self.in_numbers else None
        if value is not None:
            return self._in_digits(value)
        return self._in_symbols(self.notation.symbol(term.label))

    def _constant(self, term: Term) -> _Written:
        value = self.element.of(term.value)
        if value is None:
            return _Written("…", _ATOM)
        written = self._in_digits(abs(value))
        return _Written(written.text, written.holds, math.copysign(1, value) < 0)

    def _negated(self, x: _Written) -> _Written:
        if x.holds == _SUM:
            return _Written(self._group(x.text), _ATOM, True)
        return _Written(x.text, x.holds, not x.negative)

    def _sum(self, x: _Written, y: _Written, *, subtracted: bool) -> _Written:
        text, negative = y.text, y.negative
        if y.holds == _SUM:
            if subtracted:
                text = self._group(text)
            elif text.startswith(self.minus):
                text, negative = text.removeprefix(self.minus), True
        sign = self.minus if negative != subtracted else "+"
        return _Written(f"{self._signed(x)} {sign} {text}", _SUM)

    def _product(self, x: _Written, y: _Written) -> _Written:
        text = self._times(self._held(x, _PRODUCT), self._held(y, _PRODUCT))
        return _Written(text, _PRODUCT, x.negative != y.negative)

    def _signed(self, x: _Written) -> str:
        return f"{self.minus}{x.text}" if x.negative else x.text

    def _held(self, x: _Written, tightly: int) -> str:
        # Without its sign, which the caller takes care of.
        return x.text if x.holds >= tightly else self._group(x.text)

    def _base(self, x: _Written) -> str:
        return self._group(self._signed(x)) if x.negative else self._held(x, _ATOM)

    # From here on text and LaTeX differ.

    def _in_symbols(self, symbol: Symbol) -> _Written:
        return _Written(symbol.text, _ATOM)

    def _in_digits(self, value: float) -> _Written:
        text = number(value)
        # A negative number is no tighter than a sum that begins with a minus.
        holds = _SUM if text.startswith(self.minus) else _POWER if "e" in text else _ATOM
        return _Written(text, holds)

    def _group(self, text: str) -> str:
        return f"({text})"

    def _times(self, x: str, y: str) -> str:
        return f"{x}·{y}"

    def _quotient(self, term: Term) -> _Written:
        x, y = map(self._part, term.operands)
        text = f"{self._held(x, _QUOTIENT)} / {self._held(y, _POWER)}"
        return _Written(text, _QUOTIENT, x.negative != y.negative)

    def _power(self, x: _Written, y: _Written) -> _Written:
        exponent = self._signed(y)
        if re.fullmatch(r"t|−?\d+", exponent):
            return _Written(self._base(x) + exponent.translate(_SUPERSCRIPTS), _POWER)
        return _Written(f"{self._base(x)}^{self._base(y)}", _POWER)

    def _matrix_product(self, x: _Written, y: _Written) -> _Written:
        text = f"{self._held(x, _PRODUCT)} @ {self._held(y, _POWER)}"
        return _Written(text, _PRODUCT, x.negative != y.negative)

    def _function(self, term: Term) -> _Written:
        x, *others = map(self.whole, term.operands)
        match term.operation:
            case "sqrt":
                return _Written(f"√({x})", _ATOM)
            case "abs":
                return _Written(f"|{x}|", _ATOM)
            case "norm":
                return _Written(f"‖{x}‖", _ATOM)
            case "mean":
                others = [f"axis {term.label}".replace("-", self.minus)]
        return _Written(f"{term.operation}({', '.join([x, *others])})", _ATOM)


class LatexWriter(TextWriter):
    """Writes expressions in math mode."""

    minus = "-"

    def _in_symbols(self, symbol: Symbol) -> _Written:
        outside = symbol.latex
        while (without := re.sub(r"\{[^{}]*\}|\([^()]*\)", "", outside)) != outside:
            outside = without
        if re.search("[-+]", outside):
            return _Written(symbol.latex, _SUM)
        if re.search(r"\\(prod|frac)(?![A-Za-z])", symbol.latex):
            return _Written(symbol.latex, _QUOTIENT)
        return _Written(symbol.latex, _POWER if "^" in outside else _ATOM)

    def _in_digits(self, value: float) -> _Written:
        text = latex_number(value)
        holds = _SUM if text.startswith(self.minus) else _PRODUCT if "times" in text else _ATOM
        return _Written(text, holds)

    def _group(self, text: str) -> str:
        return rf"\left({text}\right)" if r"\frac" in text else f"({text})"

    def _times(self, x: str, y: str) -> str:
        # Side by side as in print, unless two numbers would run into one.
        return rf"{x} \cdot {y}" if self.in_numbers or y[:1].isdigit() else rf"{x}\,{y}"

    def _quotient(self, term: Term) -> _Written:
        # Divided by one thing after the other: one fraction reads better than fractions in one.
        below: list[Term] = []
        while term.operation == "/":
            below.insert(0, term.operands[1])
            term = term.operands[0]
        x, first, *others = map(self._part, (term, *below))
        y = first
        for other in others:
            y = self._product(y, other)
        return _Written(rf"\frac{{{x.text}}}{{{y.text}}}", _PRODUCT, x.negative != y.negative)

    def _power(self, x: _Written, y: _Written) -> _Written:
        exponent = self._signed(y)
        above = exponent if len(exponent) == 1 else f"{{{exponent}}}"
        return _Written(f"{self._base(x)}^{above}", _POWER)

    def _matrix_product(self, x: _Written, y: _Written) -> _Written:
        text = rf"{self._held(x, _PRODUCT)}\,{self._held(y, _PRODUCT)}"
        return _Written(text, _PRODUCT, x.negative != y.negative)

    def _function(self, term: Term) -> _Written:
        x, *others = map(self.whole, term.operands)
        inside = ", ".join([x, *others])
        below = f"_{{{term.label}}}" if term.label else ""
        match term.operation:
            case "sqrt":
                return _Written(rf"\sqrt{{{x}}}", _ATOM)
            case "abs":
                return _Written(rf"\left|{x}\right|", _ATOM)
            case "norm":
                return _Written(rf"\left\lVert {x} \right\rVert", _ATOM)
            case "newton_schulz":
                return _Written(rf"\operatorname{{NewtonSchulz}}{below}{self._group(x)}", _ATOM)
            case "max" | "min":
                return _Written(rf"\{term.operation}{self._group(inside)}", _ATOM)
        return _Written(rf"\operatorname{{{term.operation}}}{below}{self._group(inside)}", _ATOM)


def _is_outer_product(term: Term) -> bool:
    """Whether each element is the product of one element of each."""
    return term.operation == "matmul" and term.operands[0].shape[-1:] == (1,)
