"""One weight's step, with every number put into the formula.

The object holds plain data; ``explanation_text`` and ``explanation_html`` lay it out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradscope.formulas.formula import Formula
from gradscope.formulas.notation import Notation, number
from gradscope.formulas.rounding import RoundingErrors, unit_in_last_place
from gradscope.formulas.term import NAME, Element, Term, TracedWorksheet, Truth
from gradscope.formulas.typesetting import LatexWriter, TextWriter

# How a step is computed, not what: of no interest beside the formula.
_IMPLEMENTATIONS = {"foreach", "fused", "capturable", "differentiable", "dtype"}


@dataclass(frozen=True, slots=True)
class Given:
    """A quantity that the rule was given and used.

    Attributes:
        name: as attribute of the explanation.
        symbol: as text.
        latex: in math mode.
        what: in words; empty for a hyper-parameter.
        value: of this weight; None where it is no single number.
    """

    name: str
    symbol: str
    latex: str
    what: str
    value: float | None


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the rule.

    Attributes:
        name: as attribute of the explanation.
        symbol: as text.
        formula: the right side in symbols, as text.
        numbers: the right side in numbers, as text.
        value: what it comes to for this weight, in float64; None where it is no single number.
        key: under which the optimizer keeps it: ``exp_avg`` …, ``weight``; empty where it does not.
        stored: what is kept there after the step; None where nothing is.
        rounding: by how much rounding can explain that they differ; infinite where a quantity on
            the way is too large or too small for the dtype, NaN where nothing is known of that.
        latex: symbol, right side in symbols and in numbers, in math mode.
    """

    name: str
    symbol: str
    formula: str
    numbers: str
    value: float | None
    key: str
    stored: float | None
    rounding: float
    latex: tuple[str, str, str]

    @property
    def agrees(self) -> bool | None:
        """Whether rounding explains how the stored value differs; None where it cannot be told."""
        if self.value is None or self.stored is None:
            return None
        if self.value == self.stored or (math.isnan(self.value) and math.isnan(self.stored)):
            return True
        if not math.isfinite(self.value):
            return False
        return abs(self.difference) <= self.rounding if math.isfinite(self.rounding) else None

    @property
    def difference(self) -> float:
        """What is stored, less what the formula gives; NaN where either is unknown."""
        if self.value is None or self.stored is None:
            return math.nan
        return self.stored - self.value


class Explanation:
    """One weight's step: what was given, every line of the rule, and what was stored.

    Every quantity of the rule is an attribute with a plain number for value, under its name on the
    :class:`~gradscope.formulas.worksheet.Worksheet`: ``e.g``, ``e.m_before``, ``e.m``, ``e.lr``,
    ``e.update``; ``dir(e)`` lists them. The parts ``decay``, ``momentum`` and ``fresh`` are 0.0
    where the rule has no such part.

    Args:
        formula: the rule; None if gradscope knows none of this optimizer.
        given: what the rule is given, by name: numbers, switches and tuples; whole arrays for a
            rule that does not work element by element.
        index: of the weight in its parameter.
        param: the parameter's name.
        step: the attempt.
        optimizer: its name.
        optimizer_kind: its class.
        weight_stored: the weight after the step.
        stored: what the optimizer's state holds after the step, under the rule's names.
        note: a remark to show with it.
        dtype: of the weight.

    Attributes:
        rule: the name of the rule; empty without one.
        source: paper and algorithm of the rule.
        used: the quantities that the rule was given and used.
        options: the switches that were on, and other choices that are no numbers.
        lines: the rule, line by line; last ``weight_formula``, the weight after the step.
        quantities: every attribute that is a quantity of the rule.
    """

    param: str
    index: tuple[int, ...]
    step: int
    optimizer: str
    optimizer_kind: str
    dtype: str
    note: str
    rule: str
    source: str
    used: tuple[Given, ...]
    options: tuple[str, ...]
    lines: tuple[Line, ...]
    stored: dict[str, float | None]
    quantities: dict[str, Any]

    def __init__(
        self,
        formula: Formula | None,
        given: Mapping[str, Any],
        *,
        index: int | Iterable[int],
        param: str,
        step: int,
        optimizer: str,
        optimizer_kind: str,
        weight_stored: Any,
        stored: Mapping[str, Any],
        note: str = "",
        dtype: str = "float32",
    ) -> None:
        self.param = param
        self.index = (int(index),) if isinstance(index, int) else tuple(int(i) for i in index)
        self.step = step
        self.optimizer = optimizer
        self.optimizer_kind = optimizer_kind
        self.dtype = dtype.removeprefix("torch.")
        self.note = note
        self.rule = formula.name if formula else ""
        self.source = formula.source if formula else ""
        shape = np.shape(given.get("weight_before", 0.0))
        element = Element(self.index, shape) if shape else Element()
        self.stored = {name: element.of(value) for name, value in stored.items()}
        self.options = tuple(_options(given))
        sheet = TracedWorksheet(given)
        if formula:
            formula.apply(sheet)
            sheet.weight_formula = sheet.weight_before + sheet.update
        self.lines = tuple(self._lines(formula, sheet, element, weight_stored))
        self.used = tuple(_used(formula, sheet, element))
        self.quantities = self._quantities(sheet, element, weight_stored)

    def _lines(
        self, formula: Formula | None, sheet: TracedWorksheet, element: Element, weight_stored: Any
    ) -> Iterator[Line]:
        keys = _keys(formula) | {"weight_formula": "weight"}
        stored = {**self.stored, "weight_formula": element.of(weight_stored)}
        last = {name: place for place, (name, _) in enumerate(sheet.lines)}
        errors = _rounding_errors(formula, sheet, element, self.dtype)
        notation = Notation(formula)
        text = TextWriter(notation, element)
        text_in_numbers = TextWriter(notation, element, in_numbers=True)
        latex = LatexWriter(notation, element)
        latex_in_numbers = LatexWriter(notation, element, in_numbers=True)
        for place, (name, expression) in enumerate(sheet.lines):
            symbol = notation.symbol(name)
            yield Line(
                name=name,
                symbol=symbol.text,
                formula=text.whole(expression),
                numbers=text_in_numbers.whole(expression),
                value=element.of(expression.value),
                key=keys.get(name, ""),
                stored=stored.get(name) if last[name] == place else None,
                rounding=errors.bound(name, expression),
                latex=(
                    symbol.latex,
                    latex.whole(expression),
                    latex_in_numbers.whole(expression),
                ),
            )

    def _quantities(
        self, sheet: TracedWorksheet, element: Element, weight_stored: Any
    ) -> dict[str, Any]:
        quantities: dict[str, Any] = {} if self.lines else dict(self.stored)
        every = {**sheet.given, **sheet.written, "weight_stored": weight_stored}
        for name, value in every.items():
            plain = _plain(value, element)
            # What has no element for this weight is no attribute; an option may well be None.
            if plain is not None or value is None:
                quantities[name] = plain
        if self.lines:
            for part in ("decay", "momentum", "fresh"):
                quantities.setdefault(part, 0.0)
        return quantities

    def __getattr__(self, name: str) -> Any:
        # Reached only for what is no attribute of the object; copies ask before there is any.
        quantities = self.__dict__.get("quantities", {})
        if name in quantities:
            return quantities[name]
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(
            f"this explanation has no {name!r}; it has {', '.join(sorted(quantities))}"
        )

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.quantities})

    @property
    def where(self) -> str:
        """The weight as a program would spell it: ``head.weight[3, 7]``."""
        return f"{self.param}[{', '.join(map(str, self.index))}]" if self.index else self.param

    @property
    def context(self) -> tuple[str, ...]:
        """Which optimizer stepped, by which rule, and its own count of steps."""
        parts = [self.optimizer]
        if self.rule and self.rule != self.optimizer_kind:
            parts.append(f"by the rule of {self.rule}")
        if "t" in self.quantities:
            parts.append(f"own step count {number(self.quantities['t'])}")
        return tuple(parts)

    @property
    def remarks(self) -> tuple[str, ...]:
        """The verdict, what else deserves a look, and the note."""
        eps = "ε is the larger part of the denominator: it damps this update."
        remarks = (
            self.verdict,
            eps if self.quantities.get("eps_dominates") is True else "",
            self.note,
        )
        return tuple(remark for remark in remarks if remark)

    @property
    def residual(self) -> float:
        """The weight as stored, less the weight of the formula; NaN without a formula."""
        return self.lines[-1].difference if self.lines else math.nan

    @property
    def rounding(self) -> float:
        """By how much rounding in the weight's dtype can explain the residual; NaN if unknown."""
        return self.lines[-1].rounding if self.lines else math.nan

    @property
    def agrees(self) -> bool | None:
        """Whether rounding explains the residual; None where it cannot be told."""
        return self.lines[-1].agrees if self.lines else None

    @property
    def compared(self) -> tuple[Line, ...]:
        """The lines of which the optimizer keeps a value."""
        return tuple(line for line in self.lines if line.stored is not None)

    @property
    def verdict(self) -> str:
        """What the comparison with the stored weight comes to, in a sentence or two."""
        return _verdict(self)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON, which has no numbers but finite ones.

        Others are the texts ``nan``, ``inf`` and ``-inf``, of which ``float()`` makes them again.
        """
        plain = {
            "param": self.param,
            "index": list(self.index),
            "step": self.step,
            "optimizer": self.optimizer,
            "optimizer_kind": self.optimizer_kind,
            "dtype": self.dtype,
            "rule": self.rule,
            "source": self.source,
            "quantities": self.quantities,
            "stored": self.stored,
            "lines": [
                {
                    "name": line.name,
                    "symbol": line.symbol,
                    "formula": line.formula,
                    "numbers": line.numbers,
                    "value": line.value,
                    "stored": line.stored,
                }
                for line in self.lines
            ],
            "residual": self.residual,
            "rounding": self.rounding,
            "agrees": self.agrees,
            "verdict": self.verdict,
            "note": self.note,
        }
        return {name: for_json(value) for name, value in plain.items()}

    def to_latex(self) -> str:
        """Return the lines as an ``aligned`` environment, for math mode."""
        from gradscope.views.explanation_latex import latex

        return latex(self)

    def to_text(self, width: int = 100) -> str:
        """Return it as text for a monospaced font, in lines of at most ``width`` characters."""
        from gradscope.views.explanation_text import text

        return text(self, width)

    def __str__(self) -> str:
        return self.to_text()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from gradscope.views.explanation_html import html

        return html(self)


def _options(given: Mapping[str, Any]) -> Iterator[str]:
    for name, value in given.items():
        if name in _IMPLEMENTATIONS:
            continue
        if isinstance(value, str):
            yield f"{name} = {value!r}"
        elif isinstance(value, bool | np.bool_) and value:
            yield "first step" if name == "is_first" else name


def _used(formula: Formula | None, sheet: TracedWorksheet, element: Element) -> Iterator[Given]:
    """The given quantities that occur on the lines; without any lines, all of them."""
    keys = _keys(formula)
    notation = Notation(formula)
    terms = [
        term
        for value in sheet.given.values()
        for term in (value if isinstance(value, tuple) else (value,))
        if isinstance(term, Term)
    ]
    if sheet.lines:
        place = _places(expression for _, expression in sheet.lines)
        terms = [term for term in terms if term.label in place]
        # The gradient and the weight first, as everything starts from them; then the learning rate.
        first = {"g": -3, "weight_before": -2, "lr": -1}
        terms.sort(key=lambda term: first.get(term.label, place[term.label]))
    for term in terms:
        symbol = notation.symbol(term.label)
        what = _in_words(term.label, keys)
        yield Given(term.label, symbol.text, symbol.latex, what, element.of(term.value))


def _keys(formula: Formula | None) -> dict[str, str]:
    """The key of the optimizer's state that each quantity is kept under."""
    return {name: key for key, name in formula.state.items()} if formula else {}


def _places(expressions: Iterable[Term]) -> dict[str, int]:
    """The names in some expressions, numbered in the order in which they are read."""
    places: dict[str, int] = {}
    for expression in expressions:
        ahead = [expression]
        while ahead:
            term = ahead.pop()
            if term.operation == NAME:
                places.setdefault(term.label, len(places))
            ahead.extend(reversed(term.operands))
    return places


def _in_words(name: str, keys: Mapping[str, str]) -> str:
    match name:
        case "g":
            return "gradient"
        case "weight_before":
            return "weight before"
        case "touched":
            return "has a gradient here"
    if name.endswith("_before"):
        state = name.removesuffix("_before")
        key = keys.get(state, state)
        return f"{'step count' if key == 'step' else key} before"
    return ""


def _rounding_errors(
    formula: Formula | None, sheet: TracedWorksheet, element: Element, dtype: str
) -> RoundingErrors:
    if sheet.get("capturable"):
        # Counters and what comes of them are on the device, in float32.
        computed_in = "float32" if dtype == "float64" else dtype
        return RoundingErrors(computed_in, element, set(sheet.given))
    states = set(formula.state.values()) - {"t"} if formula else set()
    in_tensors = {"weight_before", "g", "touched", *(f"{state}_before" for state in states)}
    # torch keeps what a schedule leaves for the next step in float32.
    has_schedule = formula is not None and not states.isdisjoint(formula.scalars)
    return RoundingErrors(dtype, element, in_tensors, "float32" if has_schedule else "float64")


def _plain(value: Any, element: Element) -> Any:
    match value:
        case tuple() | list():
            return tuple(_plain(part, element) for part in value)
        case Term():
            plain = element.of(value.value)
        case Truth():
            plain = element.of(value.holds)
        case None | str():
            return value
        case _:
            plain = element.of(value)
    return float(plain) if isinstance(plain, int) and not isinstance(plain, bool) else plain


def for_json(value: Any) -> Any:
    """Return plain data for JSON: not finite numbers as texts, and pandas' NA as None."""
    match value:
        case Mapping():
            return {name: for_json(part) for name, part in value.items()}
        case tuple() | list():
            return [for_json(part) for part in value]
        case np.generic():
            return for_json(value.item())
        case float() if not math.isfinite(value):
            return str(value)
    return None if str(value) == "<NA>" else value


def _verdict(e: Explanation) -> str:
    if not e.lines:
        return (
            f"gradscope knows no formula for a step of {e.optimizer_kind}: this is what was "
            "measured before and after it."
        )
    weight = e.lines[-1]
    if weight.stored is None or weight.value is None:
        return ""
    if not (math.isfinite(weight.value) and math.isfinite(weight.stored)):
        says = (
            "as the formula says" if weight.agrees else f"the formula says {number(weight.value)}"
        )
        off = f"The stored weight is {number(weight.stored)}, {says}"
    elif weight.value == weight.stored:
        return "The stored weight is exactly what the formula gives."
    else:
        off = f"The stored weight is off by {number(abs(weight.difference), 3)}"
        update = abs(e.quantities["update"])
        if update:
            off += f", {number(100 * abs(weight.difference) / update, 2)} % of the update"
    if weight.agrees is None:
        return f"{off}. {_unknown(weight.rounding, e.dtype)}"
    allowed = f"rounding explains up to {number(weight.rounding, 3)}"
    if not weight.agrees:
        more = f"MORE than rounding; {allowed}. " if math.isfinite(weight.rounding) else ""
        return (
            f"{off}: {more}Something besides this rule changed the weight "
            "during the step, or this optimizer follows another rule."
        )
    if not math.isfinite(weight.value):
        return f"{off}."
    if weight.stored == e.quantities["weight_before"] and e.quantities["update"]:
        return (
            f"{off}: the weight did NOT move. The update is smaller than the rounding of a "
            f"{e.dtype} of this size."
        )
    ulps = abs(weight.difference) / unit_in_last_place(weight.stored, e.dtype)
    return f"{off}: rounding. That is {number(ulps, 2)} units in the last place; {allowed}."


def _unknown(rounding: float, dtype: str) -> str:
    """Why it cannot be told how much of a difference is rounding."""
    if math.isinf(rounding):
        return f"Rounding explains any difference: a number on the way leaves the range of {dtype}."
    return f"How much of that is rounding is unknown for {dtype}."
