"""Every optimizer of torch, with torch's own test inputs, watched at every step."""

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
from torch.testing._internal.common_optimizers import optim_db

import gradscope
from gradscope.formulas import FORMULAS
from gradscope.instruments import anatomy, flat_copies, optimizer_state, step_copies
from gradscope.instruments.late import Numbers

CPU = torch.device("cpu")
INFOS = {info.optim_cls.__name__: info for info in optim_db}
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "Muon": [(4, 3), (3, 5), (120, 90)],
    "Adafactor": [(1,), (7,), (4, 3), (2, 3, 4), (10_000,)],
    # Adafactor's means are none of nothing, and torch divides by the number of elements.
}
ANY_SHAPE = [(), (1,), (0,), (7,), (4, 3), (2, 3, 4), (10_000,)]


def cases() -> list[Any]:
    """Each optimizer with each of torch's inputs and each implementation that it has on the CPU.

    LBFGS, which steps by a closure, has a test of its own.
    """
    found = []
    for name, info in INFOS.items():
        if name == "LBFGS":
            continue
        implementations = [i for i in info.supported_impls if i in ("foreach", "fused")]
        if "cpu" not in info.supports_fused_on and "fused" in implementations:
            implementations.remove("fused")
        for one in info.optim_inputs_func(device=CPU):
            found += [
                pytest.param(name, one.kwargs, each, id=f"{name}-{one.desc}-{each}")
                for each in ("for-loop", *implementations)
            ]
    return found


def build(name: str, arguments: dict[str, Any], implementation: str) -> Any:
    """An optimizer and the module that holds its parameters, the same at every call."""
    torch.manual_seed(0)
    shapes = [(6, 3), (9,)] if name == "SparseAdam" else SHAPES.get(name, ANY_SHAPE)
    model = holder([nn.Parameter(torch.randn(shape)) for shape in shapes])
    flags = {f: f == implementation for f in ("foreach", "fused")}
    flags = {f: on for f, on in flags.items() if f in INFOS[name].supported_impls}
    return INFOS[name].optim_cls(model.parameters(), **copy.deepcopy(arguments), **flags), model


def gradient_for(name: str) -> Any:
    """Gradients that are now and then absent, or sparse."""

    def sparse(parameter: torch.Tensor, step: int) -> torch.Tensor:
        rows = torch.tensor([[0, step % 4, 4]])
        values = torch.randn(3, *parameter.shape[1:])
        return torch.sparse_coo_tensor(rows, values, parameter.shape, check_invariants=True)

    def sometimes_absent(parameter: torch.Tensor, step: int) -> torch.Tensor | None:
        made = noise(parameter, step)
        return None if step == 2 and parameter.shape == (4, 3) else made

    return sparse if name == "SparseAdam" else sometimes_absent


def norm(values: Any) -> float:
    return float(torch.as_tensor(values).detach().double().norm())


def rows_of(table: pd.DataFrame, seen: Seen) -> pd.DataFrame:
    return table[(table["step"] == seen.step) & (table["param"] == seen.name)]


def assert_state_is_complete(state: pd.DataFrame, seen: Seen) -> None:
    rows = rows_of(state, seen)
    for when, held in (("before", seen.state_before), ("after", seen.state_after)):
        own = rows[rows["when"] == when].set_index("key")
        plain = {k: v for k, v in held.items() if isinstance(v, torch.Tensor | int | float)}
        assert set(own.index) == set(plain), (seen, when)
        for key, value in plain.items():
            if isinstance(value, torch.Tensor) and value.ndim:
                assert own.loc[key, "norm"] == pytest.approx(norm(value), rel=1e-5, abs=1e-30)
            else:
                assert own.loc[key, "value"] == pytest.approx(float(value))


def assert_update_is_measured(updates: pd.DataFrame, seen: Seen) -> None:
    (row,) = rows_of(updates, seen).to_dict("records")
    change = norm(seen.after.double() - seen.before.double())
    # Single precision rounds the difference of two weights no further than they are rounded.
    slack = 1e-7 * norm(seen.before)
    assert row["weight_norm_before"] == pytest.approx(norm(seen.before), rel=1e-5)
    assert row["weight_norm_after"] == pytest.approx(norm(seen.after), rel=1e-5)
    assert row["update_norm"] == pytest.approx(change, rel=1e-5, abs=slack)
    if norm(seen.before):
        assert row["update_ratio"] == pytest.approx(change / norm(seen.before), rel=1e-4, abs=1e-7)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(("name", "arguments", "implementation"), cases())
def test_what_was_seen_is_what_happened(
    name: str, arguments: dict[str, Any], implementation: str
) -> None:
    optimizer, model = build(name, arguments, implementation)
    torch.manual_seed(1)
    scope, seen = watched_steps(optimizer, model, gradient=gradient_for(name))
    tables = scope.tables
    for each in seen:
        assert_state_is_complete(tables["state"], each)
        assert_update_is_measured(tables["updates"], each)

    updates = tables["updates"]
    assert not updates["residual"].isna().any()
    is_above_rounding = updates["rounding"] < 1e-3
    assert is_above_rounding.any()
    assert (updates["residual"][is_above_rounding] <= 1e-3).all()
    assert (updates["residual"] <= np.maximum(1e-3, 4 * updates["rounding"])).all()

    assert_twin_is_identical(name, arguments, implementation, optimizer)


def assert_twin_is_identical(
    name: str, arguments: dict[str, Any], implementation: str, watched: torch.optim.Optimizer
) -> None:
    """Weights, state and random numbers of a run that nobody watches are the same to the bit."""
    random_state = torch.get_rng_state()
    optimizer, model = build(name, arguments, implementation)
    torch.manual_seed(1)
    gradient = gradient_for(name)
    for step in range(5):
        for parameter in model.parameters():
            parameter.grad = gradient(parameter, step)
        optimizer.step()
    assert torch.equal(torch.get_rng_state(), random_state)
    one, other = (each.param_groups[0]["params"] for each in (optimizer, watched))
    for p, q in zip(one, other, strict=True):
        assert torch.equal(p, q)
        assert list(optimizer.state[p]) == list(watched.state[q])
        for key, value in optimizer.state[p].items():
            assert np.array_equal(torch.as_tensor(value), torch.as_tensor(watched.state[q][key]))


@pytest.mark.parametrize(
    ("name", "arguments", "implementation"),
    [case for case in cases() if case.values[2] == "for-loop"],
)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_the_parts_of_an_update_add_up(
    name: str, arguments: dict[str, Any], implementation: str
) -> None:
    """By the explanation of single weights: 16 of each parameter at every step."""
    optimizer, model = build(name, arguments, implementation)
    torch.manual_seed(1)
    scope, seen = watched_steps(optimizer, model, gradient=gradient_for(name), keep="*")
    for each in seen:
        if each.gradient is None or not each.before.numel():
            continue
        dense = each.gradient.to_dense()
        for flat in {0, each.before.numel() // 2, each.before.numel() - 1}:
            index = tuple(map(int, np.unravel_index(flat, each.before.shape)))
            e = scope.explain(each.name, index, each.step)
            spacing = float(np.spacing(np.float32(max(abs(e.weight_before), abs(e.update)))))
            assert e.g == dense[index].item()
            assert e.weight_before == each.before[index].item()
            assert e.weight_stored == each.after[index].item()
            assert e.weight_formula == pytest.approx(e.weight_stored, rel=1e-5, abs=8 * spacing)
            assert e.agrees is True, str(e)
            if name not in ("Rprop", "Muon"):
                assert e.decay + e.momentum + e.fresh == pytest.approx(e.update, rel=1e-12)
            for key, quantity in FORMULAS[name].state.items():
                stored = each.state_after.get(key)
                if isinstance(stored, torch.Tensor) and stored.shape == each.before.shape:
                    assert e.stored[quantity] == stored[index].item()
                    assert getattr(e, quantity) == pytest.approx(
                        stored[index].item(), rel=1e-3, abs=1e-6 * float(stored.abs().max())
                    )


def test_lbfgs_is_measured_without_a_formula() -> None:
    for one in INFOS["LBFGS"].optim_inputs_func(device=CPU):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.LBFGS(model.parameters(), **one.kwargs)
        x, befores, afters, states = torch.randn(8, 3), [], [], []

        def closure(model: nn.Module = model, x: torch.Tensor = x) -> torch.Tensor:
            model.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        with gradscope.watch(model, optimizer, every=1, on_error="raise") as scope:
            for _ in range(3):
                befores.append(model.weight.detach().clone())
                optimizer.step(closure)
                afters.append(model.weight.detach().clone())
                states.append(dict(optimizer.state[model.weight]))
        updates = scope.updates[scope.updates["param"] == "weight"]
        assert updates["residual"].isna().all()
        for row, before, after in zip(updates.to_dict("records"), befores, afters, strict=True):
            assert row["update_norm"] == pytest.approx(norm(after - before), rel=1e-4, abs=1e-7)
        # Its state is flat over all parameters, and kept with the first.
        after = scope.state[scope.state["when"] == "after"]
        for step, held in enumerate(states):
            rows = after[after["step"] == step].set_index("key")
            assert set(rows["param"]) == {"weight"}
            assert rows.loc["n_iter", "value"] == held["n_iter"]
            assert rows.loc["d", "norm"] == pytest.approx(norm(held["d"]), rel=1e-5)
        e = scope.explain("weight", (0, 0))
        assert (e.weight_before, e.weight_stored) == (befores[-1][0, 0], afters[-1][0, 0])
        assert math.isnan(e.residual)


ADAM_LIKE = ["Adam", "AdamW", "NAdam", "RAdam", "Adamax"]


@pytest.mark.parametrize(
    ("name", "amsgrad"),
    [*((name, False) for name in ADAM_LIKE), ("Adam", True), ("AdamW", True)],
)
def test_moments_are_those_of_a_computation_in_double_precision(name: str, amsgrad: bool) -> None:
    options = {"amsgrad": True} if amsgrad else {}
    torch.manual_seed(0)
    model = holder([nn.Parameter(torch.randn(s)) for s in ((), (5, 4), (9_000,))])
    optimizer = getattr(torch.optim, name)(
        model.parameters(), lr=0.02, betas=(0.8, 0.95), eps=1e-3, **options
    )
    scope, seen = watched_steps(optimizer, model, steps=9)
    moments = scope.moments
    assert len(moments) == len(seen)
    for each in seen:
        (row,) = rows_of(moments, each).to_dict("records")
        t = each.step + 1
        m, m_before = each.state_after["exp_avg"].double(), each.state_before.get("exp_avg")
        c1, c2 = 1 - 0.8**t, 1 - 0.95**t
        assert row["step_count"] == t
        assert row["bias_correction1"] == pytest.approx(c1)
        assert row["bias_correction2"] == pytest.approx(c2)
        assert row["exp_avg_norm_after"] == pytest.approx(norm(m), rel=1e-5)
        expected = 0.0 if m_before is None else norm(m_before)
        assert row["exp_avg_norm_before"] == pytest.approx(expected, rel=1e-5)
        if m_before is not None:
            g = each.gradient.double()
            cosine = float((m_before.double() * g).sum()) / (norm(m_before) * norm(g))
            assert row["momentum_gradient_cosine"] == pytest.approx(cosine, abs=1e-5)
        if name == "Adamax":
            denominator = each.state_after["exp_inf"].double()
            rate = 0.02 / c1 / denominator
        else:
            v = each.state_after["exp_avg_sq"].double()
            assert row["exp_avg_sq_norm_after"] == pytest.approx(norm(v), rel=1e-5)
            if amsgrad:
                v = each.state_after["max_exp_avg_sq"].double()
                assert row["max_exp_avg_sq_norm_after"] == pytest.approx(norm(v), rel=1e-5)
            denominator = (v / c2).sqrt() + 1e-3
            rate = 0.02 / c1 / denominator
            if name == "NAdam":
                rate = 0.02 / denominator
            if name == "RAdam":
                continue  # in the explanation of every weight, and while it is not adaptive none
        for column, values in (("denominator", denominator), ("effective_lr", rate)):
            assert row[f"{column}_min"] == pytest.approx(float(values.min()), rel=1e-5)
            assert row[f"{column}_mean"] == pytest.approx(float(values.mean()), rel=1e-5)
            assert row[f"{column}_max"] == pytest.approx(float(values.max()), rel=1e-5)


def test_parts_of_adamw_and_sgd_have_the_norms_of_a_computation_in_double_precision() -> None:
    torch.manual_seed(0)
    shapes = ((5, 4), (9_000,), (33_000,))
    model = holder([nn.Parameter(torch.randn(s)) for s in shapes])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.3)
    scope, seen = watched_steps(optimizer, model, steps=4)
    for each in seen:
        (row,) = rows_of(scope.updates, each).to_dict("records")
        t, g, w = each.step + 1, each.gradient.double(), each.before.double()
        v = each.state_after["exp_avg_sq"].double()
        m = torch.as_tensor(each.state_before.get("exp_avg", 0.0)).double()
        rate = 0.02 / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        update = each.after.double() - w
        assert row["decay_norm"] == pytest.approx(norm(0.02 * 0.3 * w), rel=1e-5)
        assert row["momentum_norm"] == pytest.approx(norm(rate * 0.9 * m), rel=1e-4)
        assert row["fresh_norm"] == pytest.approx(norm(rate * 0.1 * g), rel=1e-4)
        cosine = -float((update * g).sum()) / (norm(update) * norm(g))
        assert row["update_gradient_cosine"] == pytest.approx(cosine, abs=1e-5)

    model = holder([nn.Parameter(torch.randn(s)) for s in shapes])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.3)
    scope, seen = watched_steps(optimizer, model, steps=3)
    for each in seen:
        (row,) = rows_of(scope.updates, each).to_dict("records")
        b = torch.as_tensor(each.state_before.get("momentum_buffer", 0.0)).double()
        assert row["decay_norm"] == pytest.approx(norm(0.1 * 0.3 * each.before), rel=1e-5)
        assert row["momentum_norm"] == pytest.approx(norm(0.1 * 0.9 * b), rel=1e-5)
        assert row["fresh_norm"] == pytest.approx(norm(0.1 * each.gradient), rel=1e-5)


def test_shares_of_elements_that_rounding_and_eps_decide() -> None:
    model = holder([nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(9_000))])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-4)

    def gradient(parameter: torch.Tensor, step: int) -> torch.Tensor:
        made = torch.ones_like(parameter)
        made[: len(made) // 4] = 1e-5  # below eps, which is then the larger part
        made[0] = 1e-9  # moves 1.0 by 1e-8, less than half of what float32 can hold there
        return made

    scope, _ = watched_steps(optimizer, model, steps=1, gradient=gradient)
    assert scope.updates["eps_fraction"].tolist() == [2 / 8, 2_250 / 9_000]
    assert scope.updates["unchanged_fraction"].tolist() == [1 / 8, 1 / 9_000]


def test_hyperparameters_are_those_of_the_step() -> None:
    torch.manual_seed(0)
    model = holder([nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))])
    first, second = model.parameters()
    rate = torch.tensor(0.1)
    optimizer = torch.optim.AdamW(
        [{"params": [first], "lr": rate}, {"params": [second], "lr": 0.5, "betas": (0.5, 0.6)}],
        foreach=False,
    )
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    scope, _ = watched_steps(optimizer, model, steps=3, between=lambda step: scheduler.step())
    groups = scope.groups
    assert groups[groups["group"] == 0]["lr"].tolist() == pytest.approx([0.1, 0.05, 0.025])
    assert groups[groups["group"] == 1]["lr"].tolist() == pytest.approx([0.5, 0.25, 0.125])
    assert groups[groups["group"] == 1]["beta1"].tolist() == [0.5] * 3
    assert (scope.updates["residual"] < 1e-5).all()
    assert scope.explain("p.0", 0, step=1).lr == pytest.approx(0.05)


class OwnSteps(torch.optim.Optimizer):
    """A user's optimizer, of which gradscope knows nothing."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state.setdefault("speed", torch.zeros_like(parameter)).add_(parameter.grad)
                state["n"] = state.get("n", 0) + 1
                state["note"] = "anything"
                parameter.sub_(group["lr"] * state["speed"])


class OwnAdamW(torch.optim.AdamW):
    """A subclass that steps as its base does."""


class OwnStepOfAdamW(torch.optim.AdamW):
    """A subclass that does not."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.mul_(0.9)
        return loss


def test_an_unknown_optimizer_has_its_state_and_updates_measured() -> None:
    torch.manual_seed(0)
    model = holder([nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(10_000))])
    scope, seen = watched_steps(OwnSteps(model.parameters()), model, keep="*")
    for each in seen:
        each.state_before.pop("note", None), each.state_after.pop("note")
        assert_state_is_complete(scope.state, each)
        assert_update_is_measured(scope.updates, each)
        index = (1, 2) if each.before.ndim == 2 else 5
        e = scope.explain(each.name, index, each.step)
        assert e.weight_stored == each.after[index].item()
        assert e.stored["speed"] == each.state_after["speed"][index].item()
        assert e.agrees is None
    assert scope.updates["residual"].isna().all()
    assert scope.updates["decay_norm"].isna().all()


def test_a_subclass_follows_the_rule_if_it_keeps_the_step() -> None:
    torch.manual_seed(0)
    for kind, is_known in ((OwnAdamW, True), (OwnStepOfAdamW, False)):
        model = holder([nn.Parameter(torch.randn(4, 3))])
        scope, _ = watched_steps(kind(model.parameters()), model)
        assert scope.updates["residual"].notna().all() == is_known
        assert (scope.explain("p.0", (0, 0)).rule == "AdamW") == is_known


def test_a_differentiable_optimizer_is_refused_with_a_word() -> None:
    model = nn.Linear(2, 2)
    weight = model.weight.detach().clone().requires_grad_().clone()
    optimizer = torch.optim.Adam([weight], differentiable=True)
    with gradscope.watch(model, optimizer, every=1, keep="weight", on_error="raise") as scope:
        for _ in range(2):
            weight.grad = torch.ones(2, 2)
            optimizer.step()
    (detail,) = scope.events[scope.events["event"] == "unobserved"]["detail"]
    assert "optimizer is differentiable" in detail
    assert scope.steps["outcome"].tolist() == ["stepped", "stepped"]
    assert not scope.steps["recorded"].any()
    assert len(scope.updates) == len(scope.state) == 0


# -- the path that values on a device take, with values on the host ------------------------------


def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every value be one that the host would have to wait for."""

    def is_elsewhere(value: Any) -> bool:
        return isinstance(value, torch.Tensor)

    for module in (flat_copies, step_copies, optimizer_state):
        monkeypatch.setattr(module, "is_elsewhere", is_elsewhere)
    monkeypatch.setattr(
        step_copies, "work_out", lambda copies, runs: Numbers(anatomy._on_device(copies, runs))
    )


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    ("name", "arguments", "implementation"),
    [case for case in cases() if case.values[2] == "for-loop"],
)
def test_on_a_device_the_same_is_found_as_on_the_host(
    name: str, arguments: dict[str, Any], implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tables() -> dict[str, pd.DataFrame]:
        optimizer, model = build(name, arguments, implementation)
        torch.manual_seed(1)
        return watched_steps(optimizer, model, gradient=gradient_for(name))[0].tables

    on_host = tables()
    as_on_a_device(monkeypatch)
    on_device = tables()
    for table in ("state", "moments", "updates"):
        one, other = on_host[table], on_device[table]
        if table == "updates":
            # Rounding itself depends on the order of the arithmetic.
            assert (other["residual"] <= np.maximum(1e-3, 4 * other["rounding"])).all()
            one, other = one.drop(columns="residual"), other.drop(columns="residual")
            if name == "RAdam":
                # While it divides by nothing: a device is not asked whether it does.
                one["eps_fraction"] = one["eps_fraction"].fillna(other["eps_fraction"] * 0)
        # Where a gradient and a weight decay cancel, single precision has few digits to lose.
        pd.testing.assert_frame_equal(one, other, rtol=2e-3, atol=1e-9)
