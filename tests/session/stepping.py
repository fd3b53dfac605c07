"""Watched steps on parameters of chosen shapes, with everything around them cloned by the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import gradscope
from gradscope.scope import Scope

Gradient = Callable[[torch.Tensor, int], torch.Tensor | None]


@dataclass
class Seen:
    """One parameter around one step, as the test itself saw it.

    Attributes:
        name, step: of the parameter, of the step.
        before, after: the weight.
        gradient: what ``.grad`` held when ``step`` was called; None if it was absent.
        state_before, state_after: of the optimizer.
        group: the hyper-parameters.
    """

    name: str
    step: int
    before: torch.Tensor
    gradient: torch.Tensor | None
    state_before: dict[str, Any]
    group: dict[str, Any]
    after: torch.Tensor = field(default_factory=torch.Tensor)
    state_after: dict[str, Any] = field(default_factory=dict)


def holder(parameters: list[torch.Tensor]) -> nn.Module:
    """A module with these parameters, called ``p.0``, ``p.1`` …"""
    module = nn.Module()
    module.p = nn.ParameterList(parameters)
    return module


def noise(parameter: torch.Tensor, step: int) -> torch.Tensor:
    """A gradient whose size changes from step to step."""
    return 10.0 ** (step % 3 - 1) * torch.randn_like(parameter)


def watched_steps(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    *,
    steps: int = 5,
    gradient: Gradient = noise,
    between: Callable[[int], None] = lambda step: None,
    **options: Any,
) -> tuple[Scope, list[Seen]]:
    """Let an optimizer make watched steps with gradients made up for it.

    Args:
        optimizer: of the model's parameters.
        model: the model.
        steps: how many.
        gradient: gives the gradient of a parameter at a step.
        between: called after every step.
        options: of the watch; every step is recorded unless they say otherwise.
    """
    seen: list[Seen] = []
    options = {"every": 1, "on_error": "raise", **options}
    with gradscope.watch(model, optimizer, **options) as scope:
        for step in range(steps):
            for parameter in model.parameters():
                parameter.grad = gradient(parameter, step)
            now = list(_look(optimizer, model, step))
            optimizer.step()
            for each, parameter in zip(now, model.parameters(), strict=True):
                each.after = parameter.detach().clone()
                each.state_after = _state(optimizer, parameter)
            seen += now
            between(step)
    return scope, seen


def _look(optimizer: torch.optim.Optimizer, model: nn.Module, step: int) -> Iterator[Seen]:
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        group = groups[id(parameter)]
        yield Seen(
            name,
            step,
            parameter.detach().clone(),
            None if parameter.grad is None else parameter.grad.detach().clone(),
            _state(optimizer, parameter),
            {key: value for key, value in group.items() if key != "params"},
        )


def _state(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, Any]:
    state = optimizer.state.get(parameter, {})
    return {
        key: value.detach().clone() if isinstance(value, torch.Tensor) else value
        for key, value in state.items()
    }
