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

import gradscope
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
    name: str, options: dict[str, Any], dtype: torch.dtype = torch.float32, n: int = 6
) -> tuple[Any, list[Explanation]]:
    """Watch some steps; returns the scope and the explanations of a few weights at each."""
    torch.manual_seed(0)
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(SHAPE, dtype=dtype))
    optimizer = getattr(torch.optim, name)(model.parameters(), **options)
    with gradscope.watch(model, optimizer, every=1, keep="*", on_error="raise") as scope:
        for step in range(n):
            model.weight.grad = 10.0 ** (step % 3 - 1) * torch.randn(SHAPE).to(dtype)
            optimizer.step()
    places = [(0, 0), (3, 2), (5, 4)]
    return scope, [scope.explain("weight", at, step) for step in range(n) for at in places]


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
    _, explanations = steps(name, options)
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
    _, explanations = steps(name, options)
    e = explanations[-1]
    known = {given.symbol for given in e.used}
    for line in e.lines:
        words = set(re.findall(r"[^\W\d][\w₀-₉ₜ₋₁]*", re.sub("[⁰¹²³⁴-⁹ᵗ⁻]", "", line.formula)))
        words -= {"max", "min", "sign", "mean", "axis", "newton_schulz", "t"}
        unexplained = {w for w in words if not any(w in s for s in known)}
        assert not unexplained, (line.formula, known)
        known.add(line.symbol)


# -- the verdict -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "options"), VARIANTS.values(), ids=VARIANTS)
def test_an_honest_step_agrees_in_every_precision(
    name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    _, explanations = steps(name, options, dtype)
    for e in explanations:
        assert e.agrees is True, str(e)
        assert all(line.agrees is not False for line in e.lines), str(e)


@pytest.mark.parametrize(("name", "options"), VARIANTS.values(), ids=VARIANTS)
def test_a_weight_that_is_off_by_a_hundredth_of_its_update_does_not_agree(
    name: str, options: dict[str, Any]
) -> None:
    scope, explanations = steps(name, options)
    n_tried = 0
    for e in explanations:
        if abs(e.update) < 1e-4 * abs(e.weight_before):
            continue  # below what float32 can show
        kept = scope._recording.kept._kept[e.step][0][0]
        kept["weight_after"][e.index] = e.weight_stored + 0.01 * e.update
        off = scope.explain("weight", e.index, e.step)
        if off.rounding < 0.005 * abs(e.update):  # Muon works in bfloat16
            assert off.agrees is False
            assert "MORE than rounding" in off.verdict
            n_tried += 1
    assert n_tried or name == "Muon"


def test_a_weight_too_large_for_its_update_did_not_move() -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1e4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        model.weight.grad = torch.ones(1, 1)
        optimizer.step()
    e = scope.explain("weight", (0, 0))
    assert e.weight_stored == e.weight_before == 1e4
    assert e.agrees is True
    assert "did NOT move" in e.verdict


def test_what_is_not_finite_is_said_to_be_so() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        model.weight.grad = torch.tensor([[math.nan, math.inf]])
        optimizer.step()
    for place in (0, 1):
        e = scope.explain("weight", (0, place))
        assert not math.isfinite(e.update)
        assert "nan" in str(e)
        assert e.agrees is True
        e._repr_html_(), e.to_latex(), json.dumps(e.to_dict())


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
    _, explanations = steps(name, options, n=2)
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
    scope, _ = steps("Adafactor", {})
    kept = scope.tensors("weight")
    e = scope.explain("weight", (3, 2))
    squares = kept["gradient"].astype(np.float64) ** 2
    weight = 6 ** VARIANTS["Adafactor"][1].get("beta2_decay", -0.8)
    row = (1 - weight) * kept["row_var_before"][3, 0] + weight * squares[3].mean()
    assert pytest.approx(row, rel=1e-6) == e.R
    assert "mean(g_squared, axis −1)" in str(e)
