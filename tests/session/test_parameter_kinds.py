"""Parameters of every dtype, layout and place: told truly or not at all, and never an error."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from stepping import Seen, holder, noise, watched_steps
from torch import nn

import gradscope
from gradscope.errors import ScopeStateError, UsageError

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Adam": ("Adam", {"lr": 0.05, "weight_decay": 0.1}),
    "AdamW": ("AdamW", {"lr": 0.05, "weight_decay": 0.1}),
    "AdamW, amsgrad": ("AdamW", {"lr": 0.05, "amsgrad": True}),
    "AdamW, fused": ("AdamW", {"lr": 0.05, "fused": True}),
    "SGD": ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "Adafactor": ("Adafactor", {"lr": 0.1}),
    "RMSprop": ("RMSprop", {"lr": 0.05, "momentum": 0.5}),
    "Rprop": ("Rprop", {"lr": 0.05}),
}


def of_every_kind_but(*others: str) -> Any:
    cases = [case for case in OPTIMIZERS if case not in others]
    return pytest.mark.parametrize(
        ("name", "options"), [OPTIMIZERS[case] for case in cases], ids=cases
    )


of_every_kind = of_every_kind_but()


def optimizer_of(name: str, options: dict[str, Any], parameters: Any) -> torch.optim.Optimizer:
    return getattr(torch.optim, name)(parameters, **options)


def norm(tensor: torch.Tensor) -> float:
    dense = tensor.detach().to_dense()
    dense = torch.view_as_real(dense) if dense.is_complex() else dense
    return float(dense.double().norm())


def rows_of(table: pd.DataFrame, seen: Seen) -> Any:
    (row,) = table[(table["step"] == seen.step) & (table["param"] == seen.name)].to_dict("records")
    return row


def assert_measured(scope: gradscope.Scope, seen: list[Seen], relative: float = 1e-5) -> None:
    """Gradients, weights and updates as the test saw them; complex ones as pairs of real ones."""
    tables = scope.tables
    for each in seen:
        before, after = (t.to_dense().to(wide_of(t)) for t in (each.before, each.after))
        row = rows_of(tables["updates"], each)
        slack = 1e-7 * norm(before)
        assert row["weight_norm_before"] == pytest.approx(norm(before), rel=relative)
        assert row["weight_norm_after"] == pytest.approx(norm(after), rel=relative)
        change = norm(after - before)
        assert row["update_norm"] == pytest.approx(change, rel=relative, abs=slack)
        if norm(before):
            ratio = pytest.approx(change / norm(before), rel=10 * relative, abs=1e-7)
            assert row["update_ratio"] == ratio
        gradient = rows_of(tables["grads"], each)
        if each.gradient is None:
            assert gradient["status"] == "none"
            assert math.isnan(gradient["norm"])
        else:
            assert gradient["norm"] == pytest.approx(norm(each.gradient), rel=relative)


def wide_of(tensor: torch.Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


def assert_explained(
    scope: gradscope.Scope, each: Seen, index: tuple[int, ...], *, agrees: bool = True
) -> None:
    """Of a complex parameter the index ends with 0 or 1."""

    def pick(tensor: torch.Tensor) -> float:
        dense = tensor.to_dense()
        dense = torch.view_as_real(dense) if dense.is_complex() else dense
        return dense[index].item()

    e = scope.explain(each.name, index, each.step)
    assert e.weight_before == pick(each.before)
    assert e.weight_stored == pick(each.after)
    if each.gradient is not None:
        assert e.g == pick(each.gradient)
    if agrees:
        assert e.agrees is True, str(e)
    str(e), e._repr_html_(), e.to_latex(), e.to_dict()
    text = str(scope.explain(each.name, step=each.step))
    assert each.name in text


def some_indices(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    n = math.prod(shape)
    return [tuple(map(int, np.unravel_index(at, shape))) for at in {0, n // 2, n - 1}]


HALVES = [torch.bfloat16, torch.float16]


@of_every_kind
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shapes = ((7,), (4, 3), (9_000,))
    model = holder([nn.Parameter(torch.randn(s).to(dtype)) for s in shapes])
    if name in ("Adam", "AdamW", "RMSprop"):
        # 1e-8 is nothing in float16.
        options = {**options, "eps": 1e-3}
    optimizer = optimizer_of(name, options, model.parameters())
    scope, seen = watched_steps(optimizer, model, keep="*", gradient=half_of_noise)
    assert_measured(scope, seen)
    updates = scope.updates
    # Every operation is rounded to the weight's few digits; the last alone is in the column.
    roundoff = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    largest = np.fmax(updates["update_norm"], 1e-30)
    expected = roundoff * updates["weight_norm_after"] / largest
    assert (updates["rounding"] <= expected * 1.01 + 1e-12).all()
    bound = np.maximum(6 * roundoff, 4 * updates["rounding"])
    assert (updates["residual"] <= bound).all(), updates[["residual", "rounding"]]
    for each in seen:
        for index in some_indices(each.before.shape):
            assert_explained(scope, each, index)
    arrays = scope.tensors("p.1", seen[-1].step)
    assert arrays["weight_after"].dtype == np.float32
    assert np.array_equal(arrays["weight_after"], seen[-2].after.float().numpy())


def half_of_noise(parameter: torch.Tensor, step: int) -> torch.Tensor:
    # Of less than about 0.1 float16 cannot hold a thousandth of the square.
    made = torch.randn_like(parameter)
    return 2.0 ** (step % 2) * (0.5 * made.sign() + made)


@of_every_kind_but("Adafactor", "AdamW, fused")  # torch has none of them for complex numbers
def test_complex_numbers(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    shapes = ((), (7,), (4, 3), (5_000,))
    own = [nn.Parameter(torch.randn(s, dtype=torch.complex64)) for s in shapes]
    model = holder([*own, nn.Parameter(torch.randn(3))])
    optimizer = optimizer_of(name, options, model.parameters())
    scope, seen = watched_steps(optimizer, model, keep="*")
    assert_measured(scope, seen)
    assert (scope.updates["residual"] <= 1e-3).all()
    for each in seen:
        shape = (*each.before.shape, 2) if each.before.is_complex() else each.before.shape
        for index in some_indices(shape):
            assert_explained(scope, each, index)
    with pytest.raises(UsageError, match="0 for the real part, 1 for the imaginary"):
        scope.explain("p.2", (1, 2))
    state = scope.state
    for each in seen:
        held = each.state_after
        own_rows = state[(state["param"] == each.name) & (state["step"] == each.step)]
        rows = own_rows[own_rows["when"] == "after"].set_index("key")
        for key, value in held.items():
            if isinstance(value, torch.Tensor) and value.ndim:
                assert rows.loc[key, "norm"] == pytest.approx(norm(value), rel=1e-5)
    # With no keep= the sixteen tracked weights, and of the last step any.
    optimizer = optimizer_of(name, options, model.parameters())
    scope, seen = watched_steps(optimizer, model)
    e = scope.explain("p.2", (0, 0, 1), 2)
    (each,) = (s for s in seen if (s.step, s.name) == (2, "p.2"))
    assert e.weight_stored == each.after[0, 0].imag.item()
    e = scope.explain("p.3", (4_321, 0))
    (each,) = (s for s in seen if (s.step, s.name) == (4, "p.3"))
    assert e.weight_stored == each.after[4_321].real.item()


@of_every_kind
def test_double_precision(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    shapes = ((1,), (7,), (4, 3), (9_000,))
    model = holder([nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in shapes])
    optimizer = optimizer_of(name, options, model.parameters())
    scope, seen = watched_steps(optimizer, model, keep="*")
    assert_measured(scope, seen, relative=1e-12)
    assert (scope.updates["residual"] <= 1e-6).all()
    if name in ("Adam", "AdamW", "SGD"):
        assert (scope.updates["residual"] <= 1e-11).all()
    for each in seen:
        for index in some_indices(each.before.shape):
            assert_explained(scope, each, index)


def test_parameters_of_several_dtypes_in_one_optimizer() -> None:
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.float32)
    model = holder([nn.Parameter(torch.randn(5, dtype=dtype)) for dtype in dtypes])
    scope, seen = watched_steps(torch.optim.AdamW(model.parameters(), lr=0.05), model)
    assert_measured(scope, seen)
    assert scope.updates["param"].tolist()[:5] == [f"p.{i}" for i in range(5)]
    bound = np.maximum(1e-3, 4 * scope.updates["rounding"])
    assert (scope.updates["residual"] <= bound).all()
    for each in seen:
        assert_explained(scope, each, (2, 1) if each.before.is_complex() else (2,))


LAYOUTS = {
    "transposed": lambda: torch.randn(6, 4).T,
    "expanded, then cloned": lambda: torch.randn(6, 1).expand(6, 4).clone(),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "a slice": lambda: torch.randn(9, 8)[::2, 1::3],
    "large and transposed": lambda: torch.randn(120, 90).T,
    "0-dimensional": lambda: torch.randn(()),
    "one element": lambda: torch.randn(1, 1, 1),
}


@pytest.mark.parametrize(
    ("layout", "case"),
    [
        (layout, case)
        for layout in LAYOUTS
        for case in ("AdamW", "AdamW, fused", "SGD", "Adafactor")
        # Of a slice torch moves other elements; see below.
        if (layout, case) != ("a slice", "AdamW, fused")
    ],
)
def test_layouts(layout: str, case: str) -> None:
    name, options = OPTIMIZERS[case]
    torch.manual_seed(0)
    model = holder([nn.Parameter(torch.randn(3)), nn.Parameter(LAYOUTS[layout]())])
    scope, seen = watched_steps(
        optimizer_of(name, options, model.parameters()), model, keep="p.1", steps=3
    )
    assert_measured(scope, seen)
    assert (scope.updates["residual"] <= 1e-3).all()
    for each in seen:
        if each.name == "p.1":
            for index in some_indices(each.before.shape):
                assert_explained(scope, each, index)
            kept = scope.tensors("p.1", each.step)
            assert np.array_equal(kept["weight_before"], each.before.numpy())
            assert np.array_equal(kept["weight_after"], each.after.numpy())
            assert np.array_equal(kept["gradient"], each.gradient.numpy())


def transposed(parameter: torch.Tensor, step: int) -> torch.Tensor:
    return torch.randn(parameter.shape[::-1]).T


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "a slice"])
@pytest.mark.parametrize("gradient", [noise, transposed])
def test_where_a_fused_step_goes_wrong_it_stands_out(layout: str, gradient: Any) -> None:
    """The kernel walks through memory as if everything lay there alike (torch 2.13, on the CPU)."""
    after, scopes = [], []
    for fused in (False, True):
        torch.manual_seed(0)
        weight = LAYOUTS[layout]() if layout in LAYOUTS else torch.randn(6, 4)
        model = holder([nn.Parameter(weight)])
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused)
        scope, _ = watched_steps(optimizer, model, gradient=gradient, steps=1, keep="*")
        after.append(next(model.parameters()).detach().clone())
        scopes.append(scope)
    is_right = torch.allclose(*after, atol=1e-4)
    for scope, right in zip(scopes, (True, is_right), strict=True):
        residual = scope.updates["residual"].item()
        assert residual < 1e-3 if right else residual > 0.1
        weights = [scope.explain("p.0", at).agrees for at in np.ndindex(*after[0].shape)]
        assert all(weights) == right


def test_gradients_laid_out_otherwise_than_their_parameter() -> None:
    torch.manual_seed(0)
    model = holder([nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(100, 90))])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scope, seen = watched_steps(optimizer, model, gradient=transposed)
    assert_measured(scope, seen)
    assert (scope.updates["residual"] <= 1e-3).all()
    for each in seen[-2:]:
        assert_explained(scope, each, (4, 1))


@of_every_kind_but("Adafactor")  # torch divides by the number of elements
def test_empty_parameters(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = holder([nn.Parameter(torch.randn(s)) for s in ((0,), (3,), (4, 0), (2, 2))])
    scope, _ = watched_steps(optimizer_of(name, options, model.parameters()), model)
    updates = scope.updates
    empty = updates[updates["param"].isin(["p.0", "p.2"])]
    for column in ("weight_norm_before", "weight_norm_after", "update_norm", "residual"):
        assert (empty[column] == 0).all()
    assert empty["update_ratio"].isna().all()
    assert (updates["residual"] <= 1e-3).all()
    assert "p.0" in str(scope.explain("p.0"))
    with pytest.raises(UsageError, match=r"has the shape \(0,\)"):
        scope.explain("p.0", 0)


def test_parameters_on_meta_are_left_out_of_the_numbers() -> None:
    torch.manual_seed(0)
    model = holder([nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3, device="meta"))])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    with gradscope.watch(model, optimizer, every=1, keep="*", on_error="raise") as scope:
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    updates = scope.updates.set_index(["param", "step"])
    numbers = ["weight_norm_before", "weight_norm_after", "update_norm", "residual", "decay_norm"]
    assert updates.loc["p.1", numbers].isna().all(axis=None)
    assert updates.loc["p.0", numbers[:4]].notna().all(axis=None)
    assert updates.loc["p.0", "update_norm"].tolist() == pytest.approx(
        [0.1 * 3**0.5 * factor for factor in (1, 1.9, 2.71)], rel=1e-5
    )
    state = scope.state
    assert state[state["param"] == "p.1"]["norm"].isna().all()
    with pytest.raises(ScopeStateError, match=r"nothing was kept of p\.1\[1\]"):
        scope.explain("p.1", 1)
    assert scope.explain("p.0", 1).agrees is True


def sparse(parameter: torch.Tensor, step: int) -> torch.Tensor:
    """Some rows, one of them twice; once no row at all."""
    rows = torch.tensor([[], [0, 0, 2], [5, 1], [3], [4, 0, 4, 2]][step % 5], dtype=torch.int64)
    values = torch.randn(len(rows), *parameter.shape[1:])
    return torch.sparse_coo_tensor(rows[None], values, parameter.shape, check_invariants=True)


def sparse_in_both(parameter: torch.Tensor, step: int) -> torch.Tensor:
    """Single elements, not rows; one of them twice."""
    at = torch.tensor([[0, 5, 5, step % 6], [1, 0, 0, 2]])
    if parameter.dim() == 1:
        at = at[:1]
    return torch.sparse_coo_tensor(at, torch.randn(4), parameter.shape, check_invariants=True)


SPARSE_OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 0.1}),
    "SGD, momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "Adagrad": ("Adagrad", {"lr": 0.1}),
    "SparseAdam": ("SparseAdam", {"lr": 0.1}),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("gradient", [sparse, sparse_in_both], ids=["rows", "elements"])
@pytest.mark.parametrize(
    ("name", "options"), SPARSE_OPTIMIZERS.values(), ids=list(SPARSE_OPTIMIZERS)
)
def test_sparse_gradients(name: str, options: dict[str, Any], gradient: Any) -> None:
    torch.manual_seed(0)
    model = holder([nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(6))])
    scope, seen = watched_steps(
        optimizer_of(name, options, model.parameters()),
        model,
        gradient=gradient,
        keep="*",
        steps=6,
    )
    updates = scope.updates
    assert (updates["residual"] <= 1e-4).all()
    assert_measured(scope, seen)
    for each in seen:
        dense = each.gradient.to_dense()
        touched = np.zeros(dense.shape, np.bool_)
        touched[tuple(each.gradient._indices().numpy())] = True
        kept = scope.tensors(each.name, each.step)
        assert np.array_equal(kept["gradient"], dense.numpy())
        assert np.array_equal(kept["touched"], touched)
        row = rows_of(updates, each)
        gradient_norm = norm(dense)
        if gradient_norm and norm(each.after - each.before):
            change = each.after.double() - each.before.double()
            cosine = -float((change * dense).sum()) / norm(change) / gradient_norm
            assert row["update_gradient_cosine"] == pytest.approx(cosine, abs=1e-4)
        for index in np.ndindex(*dense.shape):
            e = scope.explain(each.name, index, each.step)
            assert e.agrees is True
            assert e.weight_stored == each.after[index].item()
            assert e.g == dense[index].item()


def test_frozen_parameters_and_such_without_gradient_do_not_move() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.3)
    with gradscope.watch(model, optimizer, every=1, keep="*", on_error="raise") as scope:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
    own = scope.updates[scope.updates["param"] == "0.weight"]
    zeros = ["update_norm", "decay_norm", "momentum_norm", "fresh_norm", "residual", "rounding"]
    assert (own[zeros[:5]] == 0).all(axis=None)
    assert own["weight_norm_after"].tolist() == pytest.approx([norm(model[0].weight)] * 3)
    assert set(scope.moments["param"]) == {"0.bias", "1.weight", "1.bias"}
    e = scope.explain("0.weight", (1, 2))
    assert e.weight_before == e.weight_stored == model[0].weight[1, 2].item()
    assert "g" not in e.quantities
    assert (e.update, e.decay, e.momentum, e.fresh, e.agrees) == (0, 0, 0, 0, True)
    assert "no gradient" in str(e)
    e._repr_html_(), e.to_latex(), e.to_dict()
    assert "gradient" not in scope.tensors("0.weight")


def test_parameters_held_under_two_names_are_told_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(x))

    torch.manual_seed(0)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    befores, afters, gradients = [], [], []
    with gradscope.watch(model, optimizer, every=1, keep="head.*", on_error="raise") as scope:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.arange(5)).square().mean().backward()
            befores.append(model.head.weight.detach().clone())
            gradients.append(model.head.weight.grad.clone())
            optimizer.step()
            afters.append(model.head.weight.detach().clone())
    assert scope.updates["param"].tolist() == ["embedding.weight"] * 3
    changes = [norm(b.double() - a.double()) for a, b in zip(befores, afters, strict=True)]
    assert scope.updates["update_norm"].tolist() == pytest.approx(changes, rel=1e-5)
    for step in range(3):
        for called in ("head.weight", "embedding.weight"):
            e = scope.explain(called, (3, 1), step)
            assert (e.g, e.weight_stored) == (gradients[step][3, 1], afters[step][3, 1])
            assert np.array_equal(scope.tensors(called, step)["gradient"], gradients[step])


def test_shared_memory_of_two_parameters() -> None:
    """Views of one another: each is told as it is seen around the step, and none of it fails."""
    base = torch.randn(6)
    model = holder([nn.Parameter(base[:4]), nn.Parameter(base[2:])])
    scope, seen = watched_steps(torch.optim.SGD(model.parameters(), lr=0.1), model)
    assert_measured(scope, seen)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38, 1e-40])
@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adafactor", "Rprop"])
def test_numbers_at_the_ends_of_the_range(name: str, value: float) -> None:
    torch.manual_seed(0)
    model = holder([nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(9_000))])

    def extreme(parameter: torch.Tensor, step: int) -> torch.Tensor:
        made = noise(parameter, step)
        made.reshape(-1)[1] = value
        return made if parameter.dim() > 1 else torch.full_like(made, value)

    twin = copy.deepcopy(model)
    optimizer = optimizer_of(name, {"lr": 0.01}, model.parameters())
    scope, seen = watched_steps(optimizer, model, gradient=extreme, keep="*", steps=3)
    for each in seen:
        row = rows_of(scope.updates, each)
        before, after = each.before.double(), each.after.double()
        change = float((after - before).norm())
        if math.isfinite(change):
            assert row["update_norm"] == pytest.approx(change, rel=1e-4, abs=1e-6)
            if name == "SGD":  # others square it, or multiply it by the last one
                assert row["residual"] <= max(1e-3, 4 * row["rounding"])
        else:
            assert not math.isfinite(row["update_norm"])
        nonfinite = int((~torch.isfinite(each.gradient)).sum())
        assert rows_of(scope.grads, each)["nonfinite"] == nonfinite
        index = (0, 1) if each.before.dim() > 1 else (8_999,)
        e = scope.explain(each.name, index, each.step)
        assert repr(e.weight_stored) == repr(each.after[index].item())
        str(e), e._repr_html_(), e.to_dict(), e.to_latex()
    optimizer = optimizer_of(name, {"lr": 0.01}, twin.parameters())
    torch.manual_seed(0)
    torch.randn(4, 3), torch.randn(9_000)
    for step in range(3):
        for parameter in twin.parameters():
            parameter.grad = extreme(parameter, step)
        optimizer.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.nan_to_num(nan=7.0), other.nan_to_num(nan=7.0))
