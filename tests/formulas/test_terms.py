"""Terms against plain numbers, what is written of them read back, and the bounds of rounding."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_formulas import (
    FURTHER,
    Update,
    _float64_by_default,  # noqa: F401 (a fixture)
    as_python,
    assert_close,
    cases,
    element,
    in_float64,
    optimizer_of,
    parameters_of,
    updates,
)

from gradscope.formulas import FORMULAS
from gradscope.formulas.arithmetic import lerp, maximum, minimum, rms, sign, sqrt, where
from gradscope.formulas.notation import Notation, latex_number, number
from gradscope.formulas.rounding import RoundingErrors, unit_in_last_place
from gradscope.formulas.term import Element, Term, TracedWorksheet
from gradscope.formulas.typesetting import LatexWriter, TextWriter
from gradscope.views.explanation import Explanation

HERE = Element()


# -- a term is its value -----------------------------------------------------------------------


def traced(given: Mapping[str, Any], rule: Callable[[Any], None]) -> TracedWorksheet:
    sheet = TracedWorksheet(given)
    rule(sheet)
    return sheet


def value_of(quantity: Any) -> Any:
    return quantity.value if isinstance(quantity, Term) else getattr(quantity, "holds", quantity)


@in_float64
@pytest.mark.parametrize(("name", "arguments"), cases())
def test_terms_give_what_arrays_give(name: str, arguments: dict[str, Any]) -> None:
    """Whole arrays where the rule needs them, otherwise every element for itself."""
    for update in updates(
        optimizer_of(name, arguments, parameters_of(name, torch.float64, [(2, 2)]))
    ):
        expected = update.worked_out()
        elementwise = update.formula.elementwise
        for at in np.ndindex(2, 2) if elementwise else [...]:
            array = element(at, float) if elementwise else lambda tensor: tensor.numpy()
            sheet = traced(update.given(array, as_python), update.formula.apply)
            assert list(sheet.written) == list(expected)
            lines = [line for line, _ in sheet.lines]
            assert set(lines) == set(expected) - {"eps_dominates"}
            for quantity, values in expected.items():
                wanted = np.broadcast_to(values, (2, 2))[at] if elementwise else values
                assert_close(value_of(sheet.written[quantity]), wanted, 1e-12, quantity)


ODD = [0.0, -0.0, 1.0, -2.5, math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("x", ODD)
@pytest.mark.parametrize("y", ODD)
def test_no_value_raises_and_all_are_those_of_arrays(x: float, y: float) -> None:
    a, b = Term.named("a", x), Term.named("b", y)
    with np.errstate(all="ignore"):
        p, q = np.float64(x), np.float64(y)
        pairs = [
            (a + b, p + q),
            (a - b, p - q),
            (a * b, p * q),
            (a / b, p / q),
            (a**b, np.float_power(p, q)),
            (2 - a, 2 - p),
            (2 / a, 2 / p),
            (2**a, np.float_power(2, p)),
            (-a, -p),
            (abs(a), abs(p)),
            (sqrt(a), np.sqrt(p)),
            (sign(a), 0.0 if np.isnan(p) else np.sign(p)),
            (maximum(a, y), np.maximum(p, q)),
            (minimum(x, b), np.minimum(p, q)),
            (where(a > b, a, b), np.where(p > q, p, q)),
            (where(a <= b, a, 7), np.where(p <= q, p, 7)),
        ]
    for found, expected in pairs:
        assert isinstance(found, Term | float | int)
        np.testing.assert_array_equal(float(found), expected)


def test_arrays_and_terms_mix_from_both_sides() -> None:
    array = np.array([[1.0, -2.0], [3.0, 4.0]])
    term = Term.named("a", array)
    assert isinstance(array - term, Term)
    np.testing.assert_array_equal((array - 2 * term).value, -array)
    np.testing.assert_array_equal((np.float32(2) * term).value, 2 * array)
    np.testing.assert_array_equal((term @ term).value, array @ array)
    np.testing.assert_array_equal((term > 1).where_(term, 0).value, [[0, 0], [3, 4]])
    np.testing.assert_array_equal(((term > 1) & (term < 4)).holds, [[False, False], [True, False]])
    assert float(rms(term)) == pytest.approx(math.sqrt(30 / 4), rel=1e-15)
    with pytest.raises(TypeError):
        term + "1"


def test_a_term_of_an_average_has_its_rounding() -> None:
    """Newton and Schulz amplify it, so the matrix must be that of torch to the last bit."""
    torch.manual_seed(0)
    start, end = torch.randn(3, 2).bfloat16(), torch.randn(3, 2).bfloat16()
    expected = start.lerp(end, 0.05).float().numpy()
    a, b = (Term.named(n, t.float().numpy()) for n, t in (("a", start), ("b", end)))
    found = lerp(a, b, Term.named("w", 0.05), "bfloat16")
    np.testing.assert_array_equal(found.value, expected)
    assert TextWriter(Notation(), HERE).whole(found) == "a + w·(b − a)"
    from_nothing = lerp(0.0, b, 0.05, "bfloat16")
    np.testing.assert_array_equal(
        from_nothing.value, torch.zeros(3, 2).bfloat16().lerp(end, 0.05).float().numpy()
    )


def test_an_element_is_that_of_broadcasting() -> None:
    at = Element((2, 1), (3, 2))
    whole = np.arange(6.0).reshape(3, 2)
    for array in (whole, whole[:, :1], whole[:1], whole[0], np.float32(7), np.array(8)):
        expected = np.broadcast_to(array, (3, 2))[2, 1]
        found = at.of(array)
        assert found == expected
        assert type(found) is float or isinstance(array, np.ndarray)
    assert at.of(np.zeros((4, 2))) is None
    assert at.of(np.zeros((1, 3, 2))) is None


def test_every_line_names_those_before_it() -> None:
    def rule(s: Any) -> None:
        s.a = s.x[1] + s.n
        s.is_large = s.a > 3
        s.b = s.a * s.a

    sheet = traced({"x": (1, 2.5), "n": 1, "on": True, "text": "x", "nothing": None}, rule)
    assert [name for name, _ in sheet.lines] == ["a", "b"]
    writer = TextWriter(Notation(), HERE)
    assert [writer.whole(term) for _, term in sheet.lines] == ["x[1] + n", "a·a"]
    assert (sheet.on, sheet.text, sheet.nothing, sheet.is_large) == (True, "x", None, True)
    assert float(sheet.b) == 3.5**2


# -- what is written, read back ----------------------------------------------------------------

TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d*)?(?:e[-+]?\d+)?|inf|nan)|(?P<name>[a-z]+(?![a-z(]))"
    r"|(?P<function>max|min|sign|√)|(?P<mark>[-−+·/^(),|]))"
)
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻ᵗ", "0123456789−t")


class Reader:
    """Reads an expression by the usual precedence; a sign only stands where a sum begins."""

    def __init__(self, text: str, names: Mapping[str, float]) -> None:
        spelled = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻ᵗ]+", lambda found: f"^({found[0].translate(RAISED)})", text)
        self.names = names
        self.tokens: list[tuple[str, str]] = []
        at = 0
        while at < len(spelled):
            found = TOKEN.match(spelled, at)
            assert found, f"{spelled[at:]!r} of {text!r}"
            self.tokens.append((found.lastgroup or "", found[0].strip()))
            at = found.end()
        self.tokens.append(("end", ""))

    def read(self) -> Any:
        value = self.sum()
        assert self.tokens == [("end", "")], self.tokens
        return value

    def take(self, *wanted: str) -> str:
        return self.tokens.pop(0)[1] if self.tokens[0][1] in wanted else ""

    def sum(self) -> Any:
        value = -self.product() if self.take("−", "-") else self.product()
        while operator := self.take("+", "−", "-"):
            other = self.product()
            value = value + other if operator == "+" else value - other
        return value

    def product(self) -> Any:
        value = self.power()
        while operator := self.take("·", "/"):
            other = self.power()
            value = value * other if operator == "·" else value / other
        return value

    def power(self) -> Any:
        value = self.atom()
        return np.float_power(value, self.atom()) if self.take("^") else value

    def atom(self) -> Any:
        kind, text = self.tokens.pop(0)
        if kind == "number":
            return np.float64(text)
        if kind == "name":
            return np.float64(self.names[text])
        if kind == "function":
            assert self.take("("), "a function needs an argument"
            arguments = [self.sum()]
            while self.take(","):
                arguments.append(self.sum())
            assert self.take(")")
            function = {"max": np.maximum, "min": np.minimum, "sign": np.sign, "√": np.sqrt}[text]
            return function(*arguments)
        assert text in ("(", "|"), f"{text!r} is no quantity"
        value = self.sum()
        assert self.take(")" if text == "(" else "|")
        return abs(value) if text == "|" else value


def read(text: str, names: Mapping[str, float]) -> Any:
    with np.errstate(all="ignore"):
        return Reader(text, names).read()


def as_text(latex: str) -> str:
    """LaTeX in the notation of the reader."""
    while found := re.search(r"\\frac\{", latex):
        over, end = in_braces(latex, found.end())
        under, end = in_braces(latex, end + 1)
        # All of a fraction is one thing.
        latex = f"{latex[: found.start()]}(({over}) / ({under})){latex[end:]}"
    latex = re.sub(r"(\d) \\times 10\^\{(-?\d+)\}", r"\1e\2", latex)
    latex = re.sub(r"\\left|\\right", "", latex)
    latex = re.sub(r"\\operatorname\{sign\}", "sign", latex)
    latex = latex.replace(r"\sqrt", "√").replace(r"\cdot", "·").replace(r"\,", "·")
    latex = re.sub(r"\^(\w)", r"^(\1)", latex)
    return latex.replace("{", "(").replace("}", ")").replace("\\", "")


def in_braces(latex: str, start: int) -> tuple[str, int]:
    depth, at = 1, start
    while depth:
        depth += (latex[at] == "{") - (latex[at] == "}")
        at += 1
    return latex[start : at - 1], at


# Few digits, so that they are written in full; and many orders of magnitude.
NUMBERS = st.one_of(
    st.integers(-9, 9).map(float),
    st.builds(lambda digits, power: digits * 10.0**power, st.integers(-99, 99), st.integers(-9, 9)),
).map(lambda x: float(f"{x:.3g}"))
NAMES = "abxyt"
UNARY: list[Callable[[Any], Any]] = [lambda x: -x, abs, sqrt, sign, lambda x: x**2]
BINARY: list[Callable[[Any, Any], Any]] = [
    lambda x, y: x + y,
    lambda x, y: x - y,
    lambda x, y: x * y,
    lambda x, y: x / y,
    lambda x, y: x**y,
    maximum,
    minimum,
]


def terms(values: Mapping[str, float]) -> st.SearchStrategy[Term]:
    names = st.sampled_from(NAMES).map(lambda name: Term.named(name, values[name]))
    leaves = st.one_of(names, NUMBERS.map(Term.number))
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(lambda f, x: f(x), st.sampled_from(UNARY), inner),
            st.builds(lambda f, x, y: f(x, y), st.sampled_from(BINARY), inner, inner),
        ),
        max_leaves=8,
    )


VALUES = st.fixed_dictionaries(dict.fromkeys(NAMES, NUMBERS))


@settings(max_examples=250, deadline=None, derandomize=True)
@given(data=st.data(), values=VALUES)
def test_an_expression_read_back_has_its_value(data: st.DataObject, values: Any) -> None:
    """In symbols and in numbers, as text and as LaTeX: precedence, signs and all."""
    term = data.draw(terms(values))
    assume(not np.isnan(term.value))
    notation = Notation()
    for in_numbers in (False, True):
        text = TextWriter(notation, HERE, in_numbers).whole(term)
        latex = LatexWriter(notation, HERE, in_numbers).whole(term)
        for written in (text, as_text(latex)):
            assert_same(read(written, {} if in_numbers else values), term.value, written)


def assert_same(found: Any, expected: Any, written: str) -> None:
    # Products are associated otherwise in LaTeX.
    if np.isfinite(found) and np.isfinite(expected) and abs(expected) > 1e-290:
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9), written


@in_float64
@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_latex_has_a_name_for_everything(name: str) -> None:
    """No letter of a terminal's font, and no name as a program spells it."""
    if name == "SparseAdam":
        sparse = torch.eye(2).to_sparse()
        optimizer = torch.optim.SparseAdam(parameters_of(name, torch.float64, [(2, 2)]))
        steps = list(updates(optimizer, lambda parameter, step: sparse))
    else:
        parameters = parameters_of(name, torch.float64, [(2, 2)])
        steps = list(updates(optimizer_of(name, {}, parameters)))
    for update in steps:
        e = explained(update, (0, 1))
        latex = e.to_latex()
        assert latex.isascii()
        assert "_t_" not in latex
        assert latex.count("{") == latex.count("}")
        assert latex.count(r"\left") - latex.count(r"\left\lVert") == latex.count(
            r"\right"
        ) - latex.count(r"\right\rVert")
        assert r"\_" not in latex, "a name as the program spells it"


@pytest.mark.parametrize(
    ("value", "text", "latex"),
    [
        (0.0, "0", "0"),
        (-0.0, "0", "0"),
        (3.0, "3", "3"),
        (-1e6, "−1000000", "-1000000"),
        (0.1, "0.1", "0.1"),
        (1e-8, "1e-08", r"1 \times 10^{-8}"),
        (-2.5e-7, "−2.5e-07", r"-2.5 \times 10^{-7}"),
        (1 / 3, "0.333333", "0.333333"),
        (6.02214076e23, "6.02214e+23", r"6.02214 \times 10^{23}"),
        (math.inf, "inf", r"\infty"),
        (-math.inf, "−inf", r"-\infty"),
        (math.nan, "nan", r"\mathrm{NaN}"),
        (np.float32(0.5), "0.5", "0.5"),
    ],
)
def test_numbers_are_short(value: float, text: str, latex: str) -> None:
    assert number(value) == text
    assert latex_number(value) == latex


@given(st.floats(-1e300, 1e300), st.integers(2, 12))
def test_a_number_keeps_its_digits(value: float, digits: int) -> None:
    found = float(number(value, digits).replace("−", "-"))
    assert abs(found - value) <= 0.5001 * 10 ** (1 - digits) * abs(value)


def test_names_follow_the_step_and_the_paper() -> None:
    adam, plain = Notation(FORMULAS["Adam"]), Notation()
    assert (adam.symbol("m").text, adam.symbol("m").latex) == ("mₜ", "m_t")
    assert adam.symbol("m_before").latex == "m_{t-1}"
    assert plain.symbol("m").text == "m"
    assert (adam.symbol("beta1").text, adam.symbol("beta1").latex) == ("β₁", r"\beta_1")
    assert Notation(FORMULAS["Muon"]).symbol("b_before").latex == "B_{t-1}"
    assert Notation(FORMULAS["Rprop"]).symbol("etas[0]").text == "etas[0]"
    assert plain.symbol("new_thing").latex == r"\mathrm{new\_thing}"


def test_a_symbol_of_several_letters_is_held_together() -> None:
    """NAdam's product over all steps, times something, is not a product of both."""
    notation = Notation(FORMULAS["NAdam"])
    product = Term.named("mu_product", 0.5) * Term.named("mu_next", 0.4)
    assert LatexWriter(notation, HERE).whole(product) == r"(\prod_{i=1}^{t} \mu_i)\,\mu_{t+1}"


def test_numbers_of_an_array_are_those_of_the_element() -> None:
    a = Term.named("a", np.array([[1.0, 2.0], [3.0, 4.0]]))
    writer = TextWriter(Notation(), Element((1, 0), (2, 2)), in_numbers=True)
    row, column = a.mean(-1, True), a.mean(-2, True)
    assert writer.whole(a + 1) == "3 + 1"
    assert writer.whole(row @ column) == "3.5·2"
    assert writer.whole(a @ a) == "15"  # 3·1 + 4·3
    assert writer.whole(a.norm() / 2) == "5.47723 / 2"
    assert writer.whole((a > 3.5).where_(a, -a)) == "−3"
    assert TextWriter(Notation(), HERE).whole(row) == "mean(a, axis −1)"


# -- the bounds of rounding --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_unit_in_the_last_place_is_that_of_torch(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    unit = unit_in_last_place(1.0, name)
    assert unit == torch.finfo(dtype).eps
    assert unit_in_last_place(-3.9, name) == 2 * unit
    assert unit_in_last_place(0.49, name) == unit / 4
    assert unit_in_last_place(0.0, name) == torch.finfo(dtype).smallest_normal * unit
    assert math.isnan(unit_in_last_place(1.0, "float8_e4m3fn"))
    assert math.isnan(unit_in_last_place(math.inf, name))


LARGE = st.floats(2.0**-20, 2.0**20, width=32)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(data=st.data(), values=st.fixed_dictionaries(dict.fromkeys(NAMES, LARGE)))
def test_a_bound_holds_for_single_precision(data: st.DataObject, values: Any) -> None:
    """Every operation in float32, one after the other, against the same ones in float64."""
    term = data.draw(terms(values))
    bound = RoundingErrors("float32", HERE, set(NAMES)).bound("it", term)
    with np.errstate(all="ignore"):
        error = abs(float(in_single(term)) - float(term.value))
    assert not error > bound


def in_single(term: Term) -> np.float32:
    if not is_of_tensors(term):  # worked out in double precision
        return np.float32(term.value)
    operands = [in_single(operand) for operand in term.operands]
    functions: dict[str, Any] = {
        "neg": np.negative,
        "+": np.add,
        "-": np.subtract,
        "*": np.multiply,
        "/": np.divide,
        "**": np.power,
        "max": np.maximum,
        "min": np.minimum,
        "abs": np.abs,
        "sqrt": np.sqrt,
        "sign": np.sign,
    }
    return functions[term.operation](*operands) if operands else np.float32(term.value)


def is_of_tensors(term: Term) -> bool:
    return term.operation == "name" or any(map(is_of_tensors, term.operands))


def test_a_bound_is_no_larger_than_it_needs_to_be() -> None:
    x, y = Term.named("x", 3.0), Term.named("y", 7.0)
    errors = RoundingErrors("float32", HERE, {"x", "y"})
    roundoff = 2.0**-24
    assert errors.bound("sum", x + y) == pytest.approx(4 * 10 * roundoff, rel=1e-6)
    assert errors.bound("copy", x) < 1e-40
    # A sum's error is that of what it is made from, too.
    again = Term.named("sum", 10.0) - x
    assert errors.bound("again", again) == pytest.approx(4 * (10 + 7) * roundoff, rel=1e-6)
    assert math.isnan(RoundingErrors("float8_e4m3fn", HERE, {"x"}).bound("x", x + 1))


def test_what_leaves_the_range_has_no_bound() -> None:
    g, eps = Term.named("g", 1e-5), Term.named("eps", 1e-9)
    half = RoundingErrors("float16", HERE, {"g"})
    assert half.bound("large", g * 1e11) == math.inf
    assert half.bound("quotient", g / (abs(g) * 0.001 + eps)) == math.inf  # divides by 0 there
    single = RoundingErrors("float32", HERE, {"g"})
    assert single.bound("large", g * 1e11) < 1
    assert single.bound("quotient", g / (abs(g) * 0.001 + eps)) < 1


def explained(update: Update, at: tuple[int, ...], **changes: Any) -> Explanation:
    """What a step of torch comes to for one weight; for whole arrays where the rule needs them."""

    def array(tensor: torch.Tensor) -> Any:
        wide = tensor if tensor.dtype == torch.float64 else tensor.float()
        return wide[at].item() if update.formula.elementwise else wide.numpy()

    stored = {
        name: as_python(value) if name in update.formula.scalars else array(value)
        for key, name in update.formula.state.items()
        if (value := update.state_after.get(key)) is not None
    }
    return Explanation(
        update.formula,
        update.given(array, as_python) | changes.pop("given", {}),
        index=at,
        param="weight",
        step=0,
        optimizer="optimizer",
        optimizer_kind=update.formula.name,
        weight_stored=array(update.weight_after) + changes.pop("off", 0.0),
        stored=stored,
        dtype=str(update.weight_before.dtype),
    )


def a_few_steps(name: str, arguments: dict[str, Any], dtype: torch.dtype) -> Iterator[Update]:
    def gradient(parameter: torch.Tensor, step: int) -> torch.Tensor:
        size = 10.0 ** (step % 3 - 1)
        kept = torch.rand(parameter.shape) < 0.9
        return (size * torch.randn(parameter.shape) * kept).to(dtype)

    shape = (2,) if FORMULAS[name].elementwise else (3, 2)
    yield from updates(
        optimizer_of(name, arguments, parameters_of(name, dtype, [shape])), gradient, steps=6
    )


USUAL, OTHER = (torch.float32, torch.bfloat16), (torch.float64, torch.float16)
# The arguments that make most of a rule.
TELLING = [case for case in cases() if str(case.id) in FURTHER or "default" in str(case.id)]
IN_DTYPES = [
    pytest.param(*case.values, dtype, id=f"{case.id}-{str(dtype).removeprefix('torch.')}")
    for case in cases()
    for dtype in USUAL + (OTHER if case.id in {each.id for each in TELLING} else ())
]


@pytest.mark.parametrize(("name", "arguments", "dtype"), IN_DTYPES)
def test_an_honest_step_agrees(name: str, arguments: dict[str, Any], dtype: torch.dtype) -> None:
    # Until torch 2.13 Muon divides a bfloat16 buffer itself by its norm, as no copy is made of it.
    spoilt = {"b"} if dtype == torch.bfloat16 and arguments.get("nesterov") is False else set()
    n_told = 0
    for update in a_few_steps(name, arguments, dtype):
        for at in np.ndindex(*update.weight_before.shape):
            e = explained(update, at)
            assert [line.name for line in e.compared][-1] == "weight_formula"
            for line in e.compared:
                if dtype == torch.float16 and math.isinf(line.rounding):
                    assert line.agrees is not False
                elif line.name not in spoilt:
                    assert line.agrees is True, f"{line.name} of\n{e}"
                    n_told += 1
    assert n_told > 6


@pytest.mark.parametrize(
    ("name", "arguments"), [case for case in TELLING if case.values[0] != "Muon"]
)
def test_a_weight_off_by_a_hundredth_of_its_update_does_not_agree(
    name: str, arguments: dict[str, Any]
) -> None:
    n_tried = 0
    for update in a_few_steps(name, arguments, torch.float32):
        for at in np.ndindex(*update.weight_before.shape):
            honest = explained(update, at)
            parts = honest.decay, honest.momentum, honest.fresh
            cancels = abs(honest.update) < 0.1 * max(map(abs, parts))
            # The rounding of the weight is 6e-8 of it.
            if cancels or abs(honest.update) < 2e-4 * abs(honest.weight_before):
                continue
            off = explained(update, at, off=(-1) ** n_tried * 0.01 * honest.update)
            assert off.agrees is False, str(off)
            assert "MORE than rounding" in off.verdict
            n_tried += 1
    assert n_tried


@pytest.mark.parametrize("name", sorted(set(FORMULAS) - {"SparseAdam", "Rprop"}))
def test_another_learning_rate_does_not_agree(name: str) -> None:
    n_tried = 0
    for update in a_few_steps(name, {}, torch.float32):
        if name == "ASGD" and not update.is_first:
            continue  # steps by the rate of the step before
        honest = explained(update, at := (0,) * update.weight_before.ndim)
        if abs(honest.update) > 1e-4 * abs(honest.weight_before):
            wrong = explained(update, at, given={"lr": 1.1 * update.group["lr"]})
            if name != "Muon" or abs(honest.update) > 0.3 * update.group["lr"]:
                assert wrong.agrees is False, str(wrong)
                n_tried += 1
    assert n_tried
