"""Optimizers that step inside of a backward, as soon as a gradient is there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradscope
from gradscope.rules.finding import Severity
from gradscope.scope import Scope

N_STEPS = 6


def train(*, clears: bool = True, with_hook: tuple[int, ...] = (0, 1, 2, 3)) -> tuple[Scope, list]:
    """Train with an optimizer for each parameter; those without a hook step after the backward."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    parameters = list(model.parameters())
    optimizers = [torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in parameters]
    norms: list[float] = []

    def step_at_once(parameter: torch.Tensor) -> None:
        norms.append(float(parameter.grad.norm()))
        optimizer = optimizers[next(i for i, p in enumerate(parameters) if p is parameter)]
        optimizer.step()
        if clears:
            optimizer.zero_grad()

    for place in with_hook:
        parameters[place].register_post_accumulate_grad_hook(step_at_once)
    losses = []
    with gradscope.watch(model, optimizers, on_error="raise") as scope:
        for _ in range(N_STEPS):
            if not clears:
                model.zero_grad()
            loss = model(torch.randn(3, 4)).square().mean()
            losses.append(loss.item())
            loss.backward()
            for place in range(4):
                if place not in with_hook:
                    norms.append(float(parameters[place].grad.norm()))
                    optimizers[place].step()
                    optimizers[place].zero_grad()
    return scope, [losses, norms]


@pytest.mark.parametrize("clears", [True, False])
@pytest.mark.parametrize("with_hook", [(0, 1, 2, 3), (1, 3), (2,)])
def test_each_step_has_the_backward_that_it_was_in(
    clears: bool, with_hook: tuple[int, ...]
) -> None:
    scope, (losses, norms) = train(clears=clears, with_hook=with_hook)
    steps = scope.steps
    assert (steps["outcome"] == "stepped").all()
    assert steps["loss"].tolist() == pytest.approx([loss for loss in losses for _ in range(4)])
    assert (steps["n_backward"] == 1).all()
    assert steps["backwards"].tolist() == [str(n) for n in range(N_STEPS) for _ in range(4)]
    assert steps["grad_norm"].tolist() == pytest.approx(norms)
    assert set(scope.grads["status"]) == {"fresh"}
    assert steps["order"].str.endswith("forward, backward, step").all()
    assert scope.params["reached"].all()
    assert (scope.backwards["n_reached"] == 4).all()
    assert [f.code for f in scope.findings if f.severity is not Severity.INFO] == []


def test_the_graph_of_the_first_backward_is_kept() -> None:
    scope, _ = train()
    (graph,) = scope._recording.graphs.values()
    assert {name for names in graph.params for name in names} == set(scope.params["param"])


def test_a_backward_that_raises_after_a_step_inside_of_it_is_told() -> None:
    model = nn.Linear(2, 1)
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in (model.weight, model.bias)]

    def step_and_raise(parameter: torch.Tensor) -> None:
        optimizers[1].step()
        optimizers[1].zero_grad()
        raise RuntimeError("of the program")

    model.bias.register_post_accumulate_grad_hook(step_and_raise)
    with gradscope.watch(model, optimizers, on_error="raise") as scope:
        with pytest.raises(RuntimeError, match="of the program"):
            model(torch.ones(1, 2)).sum().backward()
        model.bias._post_accumulate_grad_hooks.clear()
        model(torch.ones(1, 2)).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert scope.steps["outcome"].tolist() == ["stepped"] * 3
    assert scope.backwards["error"].tolist() == ["RuntimeError", ""]
