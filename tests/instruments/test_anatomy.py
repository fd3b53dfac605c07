"""Updates taken apart in blocks, on the host and as on a device, against plain float64."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from gradscope.formulas import FORMULAS
from gradscope.instruments import anatomy
from gradscope.instruments.anatomy import LARGE, Anatomy, Run, WorkedOut, work_out
from gradscope.instruments.flat_copies import FlatCopies
from gradscope.instruments.late import Known, Numbers

CPU = torch.device("cpu")
LR, BETA1, BETA2, EPS, DECAY, T = 0.05, 0.8, 0.95, 1e-3, 0.2, 5
GIVEN = {
    "lr": LR,
    "beta1": BETA1,
    "beta2": BETA2,
    "eps": EPS,
    "weight_decay": DECAY,
    "decoupled_weight_decay": True,
    "amsgrad": False,
    "maximize": False,
    "t_before": float(T - 1),
    "is_first": False,
    "touched": 1,
    "dtype": "float32",
}
ARRAYS = {"g": "g", "m_before": "m", "v_before": "v"}
# Around every size at which the parameters are cut otherwise.
SIZES = [
    *(1, 2, 100, LARGE - 1, LARGE, LARGE + 1),
    *(anatomy._BLOCK - 1, anatomy._BLOCK, anatomy._BLOCK + 1, 2 * anatomy._BLOCK + 17, 3),
    *(LARGE - 1,) * 6,
]
on_both = pytest.mark.parametrize("where", ["host", "device"])


def quantities(sizes: list[int], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Everything around a step of AdamW, one tensor per parameter."""
    torch.manual_seed(0)
    made = {
        name: [torch.randn(size, dtype=dtype) for size in sizes]
        for name in ("weight_before", "g", "m", "v")
    }
    made["v"] = [v.square() for v in made["v"]]
    made["weight_after"] = [
        (w.double() + expected(w, g, m, v)["update"]).to(dtype)
        for w, g, m, v in zip(*(made[n] for n in ("weight_before", "g", "m", "v")), strict=True)
    ]
    return made


def expected(
    weight: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor
) -> dict[str, torch.Tensor]:
    weight, g, m, v = (x.double() for x in (weight, g, m, v))
    v_after = BETA2 * v + (1 - BETA2) * g**2
    denominator = (v_after / (1 - BETA2**T)).sqrt() + EPS
    rate = LR / (1 - BETA1**T) / denominator
    parts = {
        "decay": -LR * DECAY * weight,
        "momentum": -rate * BETA1 * m,
        "fresh": -rate * (1 - BETA1) * g,
    }
    update = parts["decay"] + parts["momentum"] + parts["fresh"]
    return {**parts, "update": update, "denominator": denominator, "effective_lr": rate}


def copies_of(made: dict[str, Any], dtype: torch.dtype = torch.float32) -> FlatCopies:
    copies = FlatCopies(CPU, dtype, range(len(made["g"])), made["g"], 4)
    copies.copy_weights(made["weight_before"])
    for name in ("g", "m", "v", "weight_after"):
        copies.copy(name, made[name])
    return copies


def rows_of(copies: FlatCopies, runs: list[Run], where: str) -> dict[str, Any]:
    worked_out = (
        work_out(copies, runs) if where == "host" else Numbers(anatomy._on_device(copies, runs))
    )
    rows = worked_out.value()
    assert rows.dtype == np.float64
    return dict(zip((field.name for field in fields(Anatomy)), rows, strict=True))


def squares(x: torch.Tensor) -> float:
    return float(x.double().square().sum())


@on_both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_number_against_float64(where: str, dtype: torch.dtype) -> None:
    made = quantities(SIZES, dtype)
    copies = copies_of(made, dtype)
    cut = 4
    runs = [Run(a, b, FORMULAS["AdamW"], GIVEN, ARRAYS) for a, b in ((0, cut), (cut, len(SIZES)))]
    rows = rows_of(copies, runs, where)
    close = 1e-5 if dtype is torch.float32 else 1e-12
    for i in range(len(SIZES)):
        before, after, g, m, v = (
            made[name][i] for name in ("weight_before", "weight_after", "g", "m", "v")
        )
        by_hand = expected(before, g, m, v)
        change = after.double() - before.double()
        numbers = {
            "weight_before": squares(before),
            "weight_after": squares(after),
            "update": squares(change),
            "gradient": squares(g),
            "first_moment": squares(m),
            "formula": squares(by_hand["update"]),
            **{part: squares(by_hand[part]) for part in ("decay", "momentum", "fresh")},
        }
        for name in ("denominator", "effective_lr"):
            numbers[name] = float(by_hand[name].sum())
            numbers[f"{name}_min"] = float(by_hand[name].min())
            numbers[f"{name}_max"] = float(by_hand[name].max())
        for name, number in numbers.items():
            assert rows[name][i] == pytest.approx(number, rel=close), (name, SIZES[i])
        for name, (x, y) in {"update_gradient": (change, g), "momentum_gradient": (m, g)}.items():
            slack = 1e-6 * (squares(x) * squares(y)) ** 0.5
            product = float((x.double() * y.double()).sum())
            assert rows[name][i] == pytest.approx(product, abs=slack), name
        spacing = torch.finfo(dtype).eps
        assert rows["residual"][i] <= (2 * spacing) ** 2 * squares(before)
        unchanged = int(((change == 0) & (by_hand["update"] != 0)).sum())
        assert rows["unchanged"][i] == unchanged
        assert rows["eps_dominates"][i] == int((by_hand["denominator"] < 2 * EPS).sum())


@on_both
def test_one_wrong_element_in_any_block_is_found(where: str) -> None:
    made = quantities(SIZES)
    for i, after in enumerate(made["weight_after"]):
        after[-1 if i % 2 else 0] += 0.25
    rows = rows_of(copies_of(made), [run_of_all()], where)
    assert rows["residual"] == pytest.approx(np.full(len(SIZES), 0.0625), rel=1e-3)


def run_of_all(**changes: Any) -> Run:
    return Run(0, len(SIZES), FORMULAS["AdamW"], {**GIVEN, **changes}, ARRAYS)


@on_both
def test_parameters_without_gradient_are_to_stay(where: str) -> None:
    made = quantities(SIZES)
    made["weight_after"] = [w.clone() for w in made["weight_before"]]
    made["weight_after"][3] += 0.5
    run = Run(0, len(SIZES), FORMULAS["AdamW"], GIVEN, {}, has_gradient=False)
    rows = rows_of(copies_of(made), [run], where)
    moved = np.arange(len(SIZES)) == 3
    assert rows["residual"] == pytest.approx(np.where(moved, 0.25 * SIZES[3], 0), rel=1e-5)
    for name in ("formula", "decay", "momentum", "fresh", "unchanged"):
        assert (rows[name] == 0).all()
    assert np.isnan(rows["gradient"]).all()
    assert np.isnan(rows["denominator"]).all()


@on_both
def test_without_a_rule_there_is_only_what_can_be_measured(where: str) -> None:
    made = quantities(SIZES)
    rows = rows_of(copies_of(made), [Run(0, len(SIZES), None, {}, {"g": "g"})], where)
    for i in range(len(SIZES)):
        change = made["weight_after"][i].double() - made["weight_before"][i].double()
        assert rows["update"][i] == pytest.approx(squares(change), rel=1e-5)
        assert rows["gradient"][i] == pytest.approx(squares(made["g"][i]), rel=1e-5)
        assert rows["unchanged"][i] == int(((change == 0) & (made["g"][i] != 0)).sum())
    for name in ("formula", "residual", "decay", "fresh", "denominator", "effective_lr"):
        assert np.isnan(rows[name]).all()


@on_both
@pytest.mark.parametrize("scale", [1e-18, 1e-30, 1e15])
def test_where_single_precision_is_not_enough_double_is_used(where: str, scale: float) -> None:
    """Squares of such gradients do not fit into float32 (on a device all is done in float64)."""
    made = quantities([5, LARGE + 3, 40_000])
    made["g"] = [g * scale for g in made["g"]]
    rule = FORMULAS["SGD"]
    given = {"lr": 0.5, "mu": 0.0, "weight_decay": 0.0, "dampening": 0.0, "nesterov": False}
    given |= {"maximize": False, "is_first": True, "touched": 1, "dtype": "float32"}
    made["weight_before"] = [w * scale for w in made["weight_before"]]
    made["weight_after"] = [
        w - 0.5 * g for w, g in zip(made["weight_before"], made["g"], strict=True)
    ]
    rows = rows_of(copies_of(made), [Run(0, 3, rule, given, {"g": "g"})], where)
    for i, g in enumerate(made["g"]):
        assert rows["gradient"][i] == pytest.approx(squares(g), rel=1e-5)
        assert rows["fresh"][i] == pytest.approx(squares(0.5 * g.double()), rel=1e-5)
        assert rows["residual"][i] <= 1e-12 * rows["update"][i]
        assert rows["effective_lr_min"][i] == rows["effective_lr_max"][i] == 0.5
        assert rows["effective_lr"][i] == pytest.approx(0.5 * g.numel())


def test_hyperparameters_that_lie_on_a_device() -> None:
    """Numbers as tensors, as capturable optimizers have them."""
    made = quantities([5, LARGE + 3])
    copies = copies_of(made)
    as_tensors = {n: torch.tensor(v) if isinstance(v, float) else v for n, v in GIVEN.items()}
    del as_tensors["t_before"]
    copies.spread("t", [torch.tensor(T - 1.0)] * 2)
    run = Run(0, 2, FORMULAS["AdamW"], as_tensors, {**ARRAYS, "t_before": "t"})
    found = rows_of(copies, [run], "device")
    plain = rows_of(copies, [Run(0, 2, FORMULAS["AdamW"], GIVEN, ARRAYS)], "host")
    for name, numbers in plain.items():
        if name != "residual":
            assert found[name] == pytest.approx(numbers, rel=1e-4, nan_ok=True), name
    assert (found["residual"] <= 1e-10 * found["update"]).all()


def test_rules_for_whole_matrices_are_given_them_in_their_shape() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 4))
    optimizer = torch.optim.Adafactor([weight], lr=0.1)
    before, weight.grad = weight.detach().clone(), torch.randn(6, 4)
    optimizer.step()
    copies = FlatCopies(CPU, torch.float32, [0], [weight], 4)
    copies.copy_weights([before])
    copies.copy("weight_after", [weight.detach()])
    copies.copy("g", [weight.grad])
    (group,) = optimizer.param_groups
    given = {name: value for name, value in group.items() if name != "params"}
    given |= {"t_before": 0.0, "is_first": True, "touched": 1, "dtype": "float32"}
    given |= {"R_before": 0.0, "C_before": 0.0}
    run = Run(0, 1, FORMULAS["Adafactor"], given, {"g": "g"})
    for where in ("host", "device"):
        rows = rows_of(copies, [run], where)
        assert rows["residual"][0] < 1e-10 * rows["update"][0]
        assert rows["update"][0] == pytest.approx(squares(weight.detach() - before), rel=1e-5)


def test_parts_of_several_devices_and_empty_parameters_are_put_together() -> None:
    copies = [
        FlatCopies(CPU, torch.float32, places, [torch.zeros(1)] * len(places), 1)
        for places in ([3, 0], [1])
    ]
    n_rows = len(fields(Anatomy))
    numbers = [Known(np.tile([3.0, 0.0], (n_rows, 1))), Known(np.ones((n_rows, 1)))]
    together = WorkedOut(5, [2], list(zip(copies, numbers, strict=True)))
    assert together.ready()
    found = together.value()
    for field in fields(Anatomy):
        values = getattr(found, field.name)
        assert values[[0, 1, 3]].tolist() == [0, 1, 3]
        assert np.isnan(values[4])
        is_zero = field.name in ("weight_before", "weight_after", "update", "formula", "residual")
        assert values[2] == 0 if is_zero else np.isnan(values[2])
