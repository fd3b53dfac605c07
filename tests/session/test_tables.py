"""Numbers in the tables against numbers computed by hand in the same loop."""

from __future__ import annotations

import gc
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradscope


def norm(tensor: torch.Tensor) -> float:
    return float(tensor.detach().double().norm())


def test_every_number_of_an_adamw_step_equals_the_one_computed_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    lr, betas, eps, weight_decay = 3e-3, (0.8, 0.95), 1e-6, 0.1
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
    )
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    by_hand: list[dict[str, dict[str, float]]] = []
    losses, rates = [], []
    with gradscope.watch(model, optimizer, every=1, on_error="raise") as scope:
        for _ in range(5):
            loss = F.cross_entropy(model(torch.randn(5, 6)), torch.randint(0, 3, (5,)))
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss.item())
            rates.append(optimizer.param_groups[0]["lr"])
            seen = {}
            before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
            old = {
                name: {k: v.clone() for k, v in optimizer.state.get(p, {}).items()}
                for name, p in model.named_parameters()
            }
            optimizer.step()
            for name, p in model.named_parameters():
                grad, state = p.grad.double(), optimizer.state[p]
                count = float(state["step"])
                denominator = (state["exp_avg_sq"].double() / (1 - betas[1] ** count)).sqrt() + eps
                rate = rates[-1] / (1 - betas[0] ** count) / denominator
                seen[name] = {
                    "norm": norm(p.grad),
                    "mean": float(grad.mean()),
                    "std": float(grad.std(correction=0)),
                    "abs_max": float(grad.abs().max()),
                    "exp_avg_norm_before": norm(old[name]["exp_avg"]) if old[name] else 0.0,
                    "exp_avg_norm_after": norm(state["exp_avg"]),
                    "exp_avg_sq_norm_before": norm(old[name]["exp_avg_sq"]) if old[name] else 0.0,
                    "exp_avg_sq_norm_after": norm(state["exp_avg_sq"]),
                    "step_count": count,
                    "bias_correction1": 1 - betas[0] ** count,
                    "bias_correction2": 1 - betas[1] ** count,
                    "denominator_min": float(denominator.min()),
                    "denominator_max": float(denominator.max()),
                    "effective_lr_min": float(rate.min()),
                    "effective_lr_max": float(rate.max()),
                    "weight_norm_before": norm(before[name]),
                    "weight_norm_after": norm(p),
                    "update_norm": norm(p.detach().double() - before[name]),
                    "update_ratio": norm(p.detach().double() - before[name]) / norm(before[name]),
                }
            by_hand.append(seen)
            scheduler.step()

    for table in ("grads", "moments", "updates"):
        frame = getattr(scope, table)
        assert len(frame) == 5 * 4
        for row in frame.to_dict("records"):
            for column, value in by_hand[row["step"]][row["param"]].items():
                if column in row:
                    assert row[column] == pytest.approx(value, rel=1e-4, abs=1e-7), column

    steps = scope.steps
    assert steps["loss"].tolist() == pytest.approx(losses)
    totals = [math.sqrt(sum(p["norm"] ** 2 for p in seen.values())) for seen in by_hand]
    assert steps["grad_norm"].tolist() == pytest.approx(totals, rel=1e-6)
    groups = scope.groups
    assert groups["lr"].tolist() == pytest.approx(rates)
    assert groups[["weight_decay", "beta1", "beta2", "eps"]].iloc[0].tolist() == [
        0.1,
        0.8,
        0.95,
        1e-6,
    ]
    assert "scheduler" in steps["order"].iloc[1]

    state = scope.state
    assert set(state["key"]) == {"step", "exp_avg", "exp_avg_sq"}
    before = state.loc[(state["when"] == "before") & (state["key"] == "exp_avg")]
    assert set(before["step"]) == {1, 2, 3, 4}
    after = state.loc[(state["when"] == "after") & (state["key"] == "exp_avg_sq")]
    for row in after.to_dict("records"):
        expected = by_hand[row["step"]][row["param"]]["exp_avg_sq_norm_after"]
        assert row["norm"] == pytest.approx(expected, rel=1e-5)
    counts = state.loc[(state["key"] == "step") & (state["when"] == "after")]
    assert counts["value"].tolist() == [step + 1 for step in range(5) for _ in range(4)]


def test_parameters_are_told_with_their_aliases_holders_and_strangers() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embedding.weight
            self.frozen = nn.Linear(2, 2)
            self.frozen.requires_grad_(False)
            self.unheld = nn.Linear(2, 2)

        def forward(self, idx: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(idx))

    model = Tied()
    stranger = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD(
        [{"params": [model.embedding.weight]}, {"params": [stranger], "lr": 0.5}], lr=0.1
    )
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        (model(torch.tensor([1, 2])).sum() + stranger.sum()).backward()
        optimizer.step()
    params = scope.params.set_index("param")
    assert params.loc["embedding.weight", "aliases"] == "head.weight"
    assert params.loc["embedding.weight", "optimizer"] == "optimizer"
    assert params.loc["embedding.weight", "module_type"] == "Embedding"
    assert params.loc["unheld.weight", "optimizer"] == ""
    assert not params.loc["frozen.weight", "requires_grad"]
    name = "optimizer.param_groups[1]['params'][0]"
    assert params.loc[name, "group"] == 1
    assert params["reached"].to_dict() == {
        "embedding.weight": True, "frozen.weight": False, "frozen.bias": False,
        "unheld.weight": False, "unheld.bias": False, name: True,
    }  # fmt: skip
    text = str(scope)
    assert "missed by every optimizer: 2 (unheld.weight, unheld.bias); frozen: 2" in text
    assert f"held, but in no watched model: 1 ({name})" in text


def test_a_parameter_group_added_and_a_parameter_frozen_in_the_middle_are_seen() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with gradscope.watch(model, optimizer, every=1, on_error="raise") as scope:
        for i in range(4):
            if i == 2:
                optimizer.add_param_group({"params": list(model[1].parameters())})
                model[0].bias.requires_grad_(False)
            optimizer.zero_grad()
            model(torch.randn(2, 3)).sum().backward()
            optimizer.step()
    assert scope.grads.groupby("step").size().tolist() == [2, 2, 4, 4]
    assert scope.params.set_index("param").loc["0.bias", "requires_grad_changed"] == 2
    last = scope.grads.loc[scope.grads["step"] == 3].set_index("param")["status"]
    assert last.to_dict() == {
        "0.weight": "fresh", "0.bias": "none", "1.weight": "fresh", "1.bias": "fresh"
    }  # fmt: skip


def test_patterns_choose_the_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for options, names in (
        ({"params": "1.*"}, {"1.weight", "1.bias"}),
        ({"exclude": ["*.bias"]}, {"0.weight", "1.weight"}),
    ):
        with gradscope.watch(model, optimizer, on_error="raise", **options) as scope:
            optimizer.zero_grad()
            model(torch.randn(2, 3)).sum().backward()
            optimizer.step()
        assert set(scope.grads["param"]) == names
        assert not scope.findings


@pytest.mark.parametrize(
    "optimizer_class",
    [torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.Adafactor,
     torch.optim.Adamax, torch.optim.NAdam, torch.optim.Rprop, torch.optim.ASGD],
)  # fmt: skip
def test_the_state_of_any_optimizer_is_in_the_table(
    optimizer_class: type[torch.optim.Optimizer],
) -> None:
    model = nn.Linear(4, 3)
    optimizer = optimizer_class(model.parameters(), lr=0.01)
    with gradscope.watch(model, optimizer, every=1, on_error="raise") as scope:
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(2, 4)).pow(2).sum().backward()
            optimizer.step()
    keys = {
        key
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor | int | float)
    }
    state = scope.state
    assert set(state["key"]) == keys
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            last = state.loc[
                (state["param"] == name) & (state["key"] == key) & (state["when"] == "after")
            ].iloc[-1]
            if isinstance(value, torch.Tensor) and value.dim():
                assert last["norm"] == pytest.approx(norm(value), rel=1e-5)
            elif isinstance(value, torch.Tensor | int | float):
                assert last["value"] == pytest.approx(float(value))
    assert len(scope.updates) == 4
    assert not scope.updates["update_norm"].isna().any()


def test_parameters_of_unusual_kinds_are_watched_without_a_word() -> None:
    torch.manual_seed(0)
    holder = nn.ParameterDict(
        {
            "bfloat16_": nn.Parameter(torch.randn(3).to(torch.bfloat16)),
            "float64_": nn.Parameter(torch.randn(3, dtype=torch.float64)),
            "complex": nn.Parameter(torch.randn(3, dtype=torch.complex64)),
            "empty": nn.Parameter(torch.zeros(0)),
            "scalar": nn.Parameter(torch.tensor(2.0)),
            "transposed": nn.Parameter(torch.randn(4, 3).t()),
        }
    )
    optimizer = torch.optim.SGD(holder.parameters(), lr=0.1, momentum=0.9)
    with gradscope.watch(holder, optimizer, every=1, on_error="raise") as scope:
        for _ in range(2):
            optimizer.zero_grad()
            sum((p.abs() ** 2).sum().double() for p in holder.values()).backward()
            expected = {name: float(p.grad.abs().double().norm()) for name, p in holder.items()}
            optimizer.step()
    last = scope.grads.loc[scope.grads["step"] == 1].set_index("param")
    for name, value in expected.items():
        assert last.loc[name, "norm"] == pytest.approx(value, rel=1e-5), name
    assert np.isfinite(scope.updates["update_norm"]).all()


def test_sparse_gradients_are_read() -> None:
    model = nn.Embedding(10, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.01)
    with gradscope.watch(model, optimizer, every=1, on_error="raise") as scope:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.tensor([1, 2, 2])).pow(2).sum().backward()
            expected = norm(model.weight.grad.to_dense())
            optimizer.step()
    assert scope.grads["norm"].iloc[-1] == pytest.approx(expected, rel=1e-5)
    assert (scope.grads["status"] == "fresh").all()


def test_the_latest_numbers_are_plain_and_of_the_last_step() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    scope = gradscope.watch(model, optimizer, on_error="raise")
    assert scope.latest == {}
    with scope:
        for i in range(3):
            optimizer.zero_grad()
            loss = model(torch.randn(2, 3)).pow(2).sum()
            loss.backward()
            optimizer.step()
            assert scope.latest["step"] == i
            assert scope.latest["loss"] == pytest.approx(loss.item())
            assert scope.latest["lr"] == 0.25
    assert all(type(value) is float for value in scope.latest.values())


def test_the_last_steps_of_an_optimizer_that_is_gone_are_there() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(21):
            optimizer.zero_grad()
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        del optimizer
        gc.collect()
    assert len(scope.steps) == 21
    assert len(scope.grads) == 42


def test_modes_are_told_once_a_call_with_their_line() -> None:
    model, stranger = nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.Dropout())), nn.Dropout()

    class Own(nn.Sequential):
        def train(self, mode: bool = True) -> Own:
            super().train(mode)
            self[1].train(False)
            return self

    model = Own(*model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        stranger.eval()
        model.eval()
        assert not model.training
        model.train()
        assert model.training
        assert not model[1].training
        model[1].train()
    told = scope.events.query("event == 'mode'")
    of_a_part = "eval Sequential"  # by the model's own method
    expected = ["eval Own", of_a_part, "train Own", of_a_part, "train Sequential"]
    assert told["detail"].tolist() == expected
    assert set(told["file"]) == {__file__}
