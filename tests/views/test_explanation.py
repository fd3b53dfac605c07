"""One weight's step written out: the numbers, the lines, and the verdict."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gradscope.formulas import FORMULAS
from gradscope.views.explanation import Explanation

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "Adadelta": ("Adadelta", {"weight_decay": 0.1, "maximize": True}),
    "Adafactor": ("Adafactor", {"weight_decay": 0.1}),
    "Adagrad": (
        "Adagrad",
        {"lr_decay": 0.1, "initial_accumulator_value": 0.2, "weight_decay": 0.1},
    ),
    "Adam": ("Adam", {"weight_decay": 0.1, "amsgrad": True}),
    "AdamW": ("AdamW", {"maximize": True}),
    "Adamax": ("Adamax", {"weight_decay": 0.1}),
    "ASGD": ("ASGD", {"lambd": 0.1, "t0": 2.0, "weight_decay": 0.1}),
    "Muon": ("Muon", {"lr": 0.01}),
    "NAdam": ("NAdam", {"weight_decay": 0.1}),
    "NAdam, decoupled": ("NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "RAdam": ("RAdam", {"betas": (0.8, 0.99), "weight_decay": 0.1}),
    "RMSprop": ("RMSprop", {"momentum": 0.9, "weight_decay": 0.1}),
    "RMSprop, centered": ("RMSprop", {"centered": True}),
    "Rprop": ("Rprop", {}),
    "SGD": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}),
    "SGD, Nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
}
SHAPE = (6, 5)


def steps(
    name: str, options: dict[str, Any], n: int = 6, shape: tuple[int, ...] = SHAPE
) -> list[Explanation]:
    """Let torch make some steps; explains a few weights at each."""
    torch.manual_seed(0)
    formula = FORMULAS[name]
    weight = nn.Parameter(torch.randn(shape))
    optimizer = getattr(torch.optim, name)([weight], **options)
    (group,) = optimizer.param_groups
    found = []
    for step in range(n):
        weight.grad = 10.0 ** (step % 3 - 1) * torch.randn(shape)
        before = weight.detach().clone()
        state = {key: torch.as_tensor(x).clone() for key, x in optimizer.state[weight].items()}
        optimizer.step()
        for at in {(0,) * len(shape), tuple(length // 2 for length in shape)}:

            def of(x: Any, at: tuple[int, ...] = at) -> Any:
                """What the rule is given: one number where it works element by element."""
                if x.ndim == 0:
                    return x.item()
                return x[at].item() if formula.elementwise else x.numpy()

            given = {"mu" if key == "momentum" else key: x for key, x in group.items()}
            del given["params"]
            given |= dict(zip(("beta1", "beta2"), given.pop("betas", ()), strict=False))
            for key, symbol in formula.state.items():
                given[f"{symbol}_before"] = of(state[key]) if key in state else 0.0
            given |= {"weight_before": of(before), "g": of(weight.grad), "dtype": "float32"}
            found.append(
                Explanation(
                    formula,
                    given | {"touched": 1, "is_first": not state},
                    index=at,
                    param="weight",
                    step=step,
                    optimizer="optimizer",
                    optimizer_kind=name,
                    weight_stored=of(weight.detach()),
                    stored={
                        symbol: of(optimizer.state[weight][key].clone())
                        for key, symbol in formula.state.items()
                        if key in optimizer.state[weight]
                    },
                )
            )
    return found


# -- what is written is what it says -----------------------------------------------------------

SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")


def evaluated(written: str) -> float:
    """The value of a right side in numbers, by Python's own arithmetic."""
    spelled = written.replace("−", "-").replace("·", "*").replace("√", "math.sqrt")
    spelled = re.sub(
        r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda found: f"**({found[0].translate(SUPERSCRIPTS)})", spelled
    )
    spelled = spelled.replace("^", "**").replace("@", "*")
    spelled = re.sub(r"\|([^|]*)\|", r"abs(\1)", spelled)
    return float(eval(spelled, {"math": math, "sign": np.sign}))


@pytest.mark.parametrize(("name", "options"), VARIANTS.values(), ids=VARIANTS)
def test_the_numbers_of_every_line_come_to_its_value(name: str, options: dict[str, Any]) -> None:
    explanations = steps(name, options)
    n_lines = 0
    for e in explanations:
        for line in e.lines:
            if line.value is None or "newton_schulz" in line.numbers:
                continue
            # Numbers are written with six digits; terms may cancel.
            size = max(
                (
                    abs(float(x.replace("−", "-")))
                    for x in re.findall(r"\d[\d.]*(?:e−?-?\d+)?", line.numbers)
                ),
                default=0.0,
            )
            if line.name in ("update", "weight_formula", "variance", "m", "b", "b_ahead", "delta"):
                allowed = 1e-5 * size
            else:
                allowed = 2e-4 * abs(line.value)
            assert evaluated(line.numbers) == pytest.approx(line.value, abs=allowed), str(e)
            n_lines += 1
    assert n_lines > 2 * len(explanations)


@pytest.mark.parametrize(("name", "options"), VARIANTS.values(), ids=VARIANTS)
def test_symbols_are_explained_before_they_are_used(name: str, options: dict[str, Any]) -> None:
    explanations = steps(name, options)
    e = explanations[-1]
    known = {given.symbol for given in e.used}
    for line in e.lines:
        words = set(re.findall(r"[^\W\d][\w₀-₉ₜ₋₁]*", re.sub("[⁰¹²³⁴-⁹ᵗ⁻]", "", line.formula)))
        words -= {"max", "min", "sign", "mean", "axis", "newton_schulz", "t"}
        unexplained = {w for w in words if not any(w in s for s in known)}
        assert not unexplained, (line.formula, known)
        known.add(line.symbol)


# -- the verdict -------------------------------------------------------------------------------


def by_sgd(weight_before: float, g: float, weight_stored: float, **changes: Any) -> Explanation:
    given = {"lr": 0.5, "weight_before": weight_before, "g": g, "is_first": True}
    return Explanation(
        FORMULAS["SGD"],
        given | changes.pop("given", {}),
        index=3,
        param="weight",
        step=0,
        optimizer="optimizer",
        optimizer_kind="SGD",
        weight_stored=weight_stored,
        stored={},
        **changes,
    )


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_a_weight_that_is_as_near_as_its_dtype_allows_agrees(dtype: str) -> None:
    unit = torch.finfo(getattr(torch, dtype)).eps
    exact = by_sgd(1.0, -0.5, 1.25, dtype=dtype)
    assert (exact.agrees, exact.residual) == (True, 0)
    assert exact.verdict == "The stored weight is exactly what the formula gives."
    near = by_sgd(1.0, -0.5, 1.25 + unit, dtype=f"torch.{dtype}")
    assert (near.agrees, near.residual) == (True, unit)
    assert "That is 1 units in the last place" in near.verdict
    off = by_sgd(1.0, -0.5, 1.25 + 50 * unit, dtype=dtype)
    assert (off.agrees, off.residual) == (False, 50 * unit)
    assert "MORE than rounding" in off.verdict
    assert "MORE than rounding" in str(off).split("\n\n")[-2], "not beside the weight"


def test_of_an_unknown_dtype_it_cannot_be_told() -> None:
    e = by_sgd(1.0, -0.5, 1.26, dtype="float8_e4m3fn")
    assert e.agrees is None
    assert math.isnan(e.rounding)
    assert "unknown for float8_e4m3fn" in e.verdict
    assert by_sgd(1.0, -0.5, 1.25, dtype="float8_e4m3fn").agrees is True


def test_a_weight_too_large_for_its_update_did_not_move() -> None:
    e = by_sgd(1e4, 2e-6, 1e4)
    assert e.weight_stored == e.weight_before == 1e4
    assert e.agrees is True
    assert "did NOT move" in e.verdict


@pytest.mark.parametrize("g", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_said_to_be_so(g: float) -> None:
    e = by_sgd(1.0, g, 1.0 - 0.5 * g)
    assert e.agrees is True
    assert "as the formula says" in e.verdict
    stays = by_sgd(1.0, g, 1.0)
    assert stays.agrees is False
    assert "the formula says" in stays.verdict
    for each in (e, stays):
        assert str(each.update).removeprefix("-") in str(each)
        assert each.verdict in each._repr_html_()
        assert (r"\mathrm{NaN}" if math.isnan(g) else r"\infty") in each.to_latex()


def test_a_weight_that_broke_is_not_what_the_formula_gives() -> None:
    for broken in (math.nan, math.inf):
        e = by_sgd(1.0, -0.5, broken)
        assert e.agrees is False
        assert f"is {broken}, the formula says 1.25" in e.verdict


def test_where_a_number_leaves_the_range_it_cannot_be_told() -> None:
    """Adam in float16: there 1e-8 is 0, and so is the denominator."""
    given = {"t_before": 0.0, "m_before": 0.0, "v_before": 0.0, "g": 0.0, "is_first": True}
    e = by_hand(given=given, dtype="float16", weight_stored=math.nan, stored={})
    assert math.isfinite(e.update)
    assert e.agrees is None
    assert "leaves the range of float16" in e.verdict
    assert by_hand(given=given, dtype="float32", weight_stored=math.nan, stored={}).agrees is False


# -- the object --------------------------------------------------------------------------------


def by_hand(**changes: Any) -> Explanation:
    given = {
        "lr": 0.1,
        "beta1": 0.9,
        "beta2": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.5,
        "decoupled_weight_decay": True,
        "amsgrad": False,
        "maximize": False,
        "foreach": None,
        "t_before": 3.0,
        "is_first": False,
        "m_before": 0.2,
        "v_before": 0.3,
        "g": -0.4,
        "weight_before": 2.0,
        "touched": 1,
        "dtype": "float32",
    }
    options = {
        "index": (3, 7),
        "param": "head.weight",
        "step": 12,
        "optimizer": "opt",
        "optimizer_kind": "AdamW",
        "weight_stored": 1.87,
        "stored": {"m": 0.14},
        **changes,
    }
    given |= options.pop("given", {})
    return Explanation(options.pop("formula", FORMULAS["AdamW"]), given, **options)


def test_attributes_are_the_numbers_of_a_computation_by_hand() -> None:
    e = by_hand()
    m = 0.9 * 0.2 + 0.1 * -0.4
    v = 0.99 * 0.3 + 0.01 * 0.16
    denominator = math.sqrt(v / (1 - 0.99**4)) + 1e-8
    update = -0.1 * 0.5 * 2.0 - 0.1 / (1 - 0.9**4) * m / denominator
    assert (e.g, e.m_before, e.v_before, e.lr, e.t, e.weight_before) == (-0.4, 0.2, 0.3, 0.1, 4, 2)
    assert e.m == pytest.approx(m, rel=1e-14)
    assert e.v == pytest.approx(v, rel=1e-14)
    assert e.denominator == pytest.approx(denominator, rel=1e-14)
    assert e.decay == pytest.approx(-0.1, rel=1e-14)
    assert e.update == pytest.approx(update, rel=1e-13)
    assert e.weight_formula == pytest.approx(2.0 + update, rel=1e-14)
    assert e.weight_stored == 1.87
    assert e.residual == pytest.approx(1.87 - 2.0 - update, rel=1e-12)
    assert e.momentum + e.fresh + e.decay == pytest.approx(e.update, rel=1e-14)
    assert e.stored == {"m": 0.14}
    assert all(type(value) in (float, bool, str, type(None)) for value in e.quantities.values())


def test_it_can_be_listed_copied_pickled_and_written_as_json() -> None:
    e = by_hand()
    assert {"g", "m", "update", "lines", "verdict"} <= set(dir(e))
    for other in (copy.deepcopy(e), pickle.loads(pickle.dumps(e))):
        assert str(other) == str(e)
        assert other.update == e.update
    plain = json.loads(json.dumps(e.to_dict()))
    assert plain["quantities"]["update"] == e.update
    assert plain["lines"][-1]["stored"] == 1.87
    assert plain["index"] == [3, 7]


def test_a_name_that_is_no_quantity_lists_those_that_are() -> None:
    with pytest.raises(AttributeError, match=r"no 'grad'; it has .*\bg\b.*\bupdate\b"):
        _ = by_hand().grad
    assert not hasattr(by_hand(), "_ipython_display_")


def test_the_text_fits_and_names_what_it_is_about() -> None:
    text = str(by_hand(note="A remark that is shown with it."))
    assert max(map(len, text.splitlines())) <= 100
    assert text.startswith("AdamW, step 12 of head.weight[3, 7]")
    assert "Loshchilov and Hutter (2019)" in text
    assert "A remark that is shown with it." in text
    assert "mₜ" in text
    assert "β₁·mₜ₋₁ + (1 − β₁)·gₜ" in text
    assert "0.9·0.2 + (1 − 0.9)·(−0.4)" in text


class Tags(HTMLParser):
    """Collects tags and text; HTML that does not nest is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(("name", "options"), VARIANTS.values(), ids=VARIANTS)
def test_html_nests_and_latex_balances(name: str, options: dict[str, Any]) -> None:
    explanations = steps(name, options, n=2)
    for e in explanations:
        tags = Tags()
        tags.feed(e._repr_html_())
        assert tags.open == []
        assert e.verdict in tags.text
        latex = e.to_latex()
        assert latex.count("{") == latex.count("}")
        assert latex.count(r"\left") - latex.count(r"\left\lVert") >= 0
        assert latex.count(r"\begin{aligned}") == latex.count(r"\end{aligned}") == 1
        assert re.search("[₀-₉ₜθα-ω−·√]", latex) is None


def test_names_from_the_program_are_escaped() -> None:
    name = "<script>alert(1)</script> & $x$"
    tags = Tags()
    tags.feed(by_hand(param=name, optimizer=name, optimizer_kind=name, note=name)._repr_html_())
    assert "script" not in tags.seen
    assert tags.text.count(name) >= 3


def test_without_a_rule_it_is_what_was_measured() -> None:
    e = by_hand(formula=None, optimizer_kind="OwnSteps", stored={"speed": 0.5})
    assert e.lines == ()
    assert e.agrees is None
    assert math.isnan(e.residual)
    assert math.isnan(e.rounding)
    assert (e.weight_before, e.weight_stored, e.speed) == (2.0, 1.87, 0.5)
    assert "knows no formula for a step of OwnSteps" in str(e)
    tags = Tags()
    tags.feed(e._repr_html_())
    assert tags.open == []
    json.dumps(e.to_dict())


def test_of_a_matrix_rule_the_element_is_shown() -> None:
    e = steps("Adafactor", {})[-1]
    assert e.index == (3, 2) or e.index == (0, 0)
    # Rebuilt without any of gradscope: the rows' means of squares, weighted by the step.
    torch.manual_seed(0)
    torch.randn(SHAPE)
    rows, columns = np.zeros(6), np.zeros(5)
    for step in range(6):
        squares = (10.0 ** (step % 3 - 1) * torch.randn(SHAPE)).numpy().astype(np.float64) ** 2
        weight = (step + 1) ** -0.8
        rows = (1 - weight) * rows + weight * squares.mean(axis=1)
        columns = (1 - weight) * columns + weight * squares.mean(axis=0)
    row, column = e.index
    assert pytest.approx(rows[row], rel=1e-5) == e.R
    assert pytest.approx(columns[column], rel=1e-5) == e.C
    assert pytest.approx(rows[row] * columns[column] / rows.mean(), rel=1e-5) == e.V_hat
    assert "mean(g_squared, axis −1)" in str(e)
    assert all(line.value is not None for line in e.lines)


@pytest.mark.parametrize("name", sorted(set(FORMULAS) - {"Muon", "SparseAdam"}))
def test_a_parameter_of_one_number_has_no_index(name: str) -> None:
    for e in steps(name, {}, n=2, shape=()):
        assert e.index == ()
        assert e.where == "weight"
        assert e.agrees is True
        assert type(e.update) is float


@pytest.mark.parametrize(
    ("index", "where"),
    [(5, "w[5]"), ((5,), "w[5]"), ((4, 1), "w[4, 1]"), (np.array([4, 0]), "w[4, 0]"), ((), "w")],
)
def test_a_weight_is_spelled_as_in_a_program(index: Any, where: str) -> None:
    """Of a complex weight, the last number tells its real part from its imaginary one."""
    e = by_hand(index=index, param="w")
    assert e.where == where
    assert all(type(i) is int for i in e.index)
    assert where in str(e).splitlines()[0]


def test_its_plain_data_is_json_to_the_letter() -> None:
    """Which knows no NaN: not what JavaScript or a database would stumble over."""
    e = by_hand(
        given={"g": np.float32("nan"), "m_before": np.float64(0.2), "bounds": (None, math.inf)},
        weight_stored=np.float32(1.5),
        stored={"m": np.float32("-inf"), "t": np.int64(4)},
    )
    plain = json.loads(json.dumps(e.to_dict(), allow_nan=False))
    assert plain["quantities"]["g"] == "nan"
    assert math.isnan(float(plain["quantities"]["update"]))
    assert plain["quantities"]["bounds"] == [None, "inf"]
    assert plain["stored"] == {"m": "-inf", "t": 4}
    assert plain["lines"][-1]["stored"] == 1.5
    assert plain["verdict"] == e.verdict


def test_colours_and_marks_tell_what_agrees() -> None:
    honest, broken = by_sgd(1.0, -0.5, 1.25)._repr_html_(), by_sgd(1.0, -0.5, 1.3)._repr_html_()
    assert (honest.count("✓"), honest.count("✗")) == (2, 0)
    assert (broken.count("✓"), broken.count("✗")) == (0, 2)
    unknown = by_sgd(1.0, -0.5, 1.3, dtype="float8_e4m3fn")._repr_html_()
    assert "✓" not in unknown
    assert "✗" not in unknown
    # Before everything else, but for the title.
    assert broken.index("✗") < broken.index("weight before")


def test_powers_are_raised() -> None:
    e = steps("NAdam", {})[-1]
    shown = e._repr_html_()
    assert "^" not in shown.split("<details")[0]
    assert ">(<i>t</i> + 1)·momentum_decay</sup>" in shown
    assert re.search("[₀-₉ₜ₋⁰¹²³⁴-⁹ᵗ⁻]", shown) is None


def test_eps_that_damps_an_update_is_pointed_out() -> None:
    assert "ε is the larger part" in str(by_hand(given={"eps": 100.0}))
    assert "ε is the larger part" not in str(by_hand())


def test_what_the_rule_did_not_use_is_not_shown() -> None:
    e = by_hand(given={"momentum_of_inertia": 3.0, "amsgrad": False})
    assert "inertia" not in str(e)
    assert e.momentum_of_inertia == 3.0
    assert e.options == ("decoupled_weight_decay",)
    assert [each.name for each in e.used][:3] == ["g", "weight_before", "lr"]
