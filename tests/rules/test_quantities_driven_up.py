"""GS603: losses whose sign is flipped, and quantities that are meant to become large."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradscope

Objective = Callable[[nn.Module, torch.Tensor], torch.Tensor]


def is_named(objective: Objective) -> bool:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(40):
            loss = objective(model, torch.rand(32, 6))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert scope.steps["loss"].iloc[-1] < scope.steps["loss"].iloc[0] - 0.01
    return any(f.code == "GS603" for f in scope.findings)


# -- meant to become large --------------------------------------------------------------------


def length_of_projections(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return -model(x).abs().mean()


def distance_between_means(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return -((model(x)[:, 0].mean() - model(2 * x)[:, 0].mean()) ** 2)


def spread(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out = model(x)
    return -10 * (out - out.mean(0)).pow(2).mean()


def norm(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return -model(x).norm(dim=1).mean()


def density_and_entropy(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    mean, log_std = model(x)[:, :2].chunk(2, 1)
    density = -F.mse_loss(mean, x[:, :1] + 2)
    return -(density + log_std.mean().sigmoid() + 8)  # below zero, as the flipped ones are


@pytest.mark.parametrize(
    "objective", [length_of_projections, distance_between_means, spread, norm, density_and_entropy]
)
def test_what_is_meant_to_become_large_is_silent(objective: Objective) -> None:
    assert not is_named(objective)


# -- flipped ------------------------------------------------------------------------------------


def size_of_errors(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return -(model(x) - x[:, :4]).abs().mean()


def squared_errors(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return -((x[:, 0] - model(x)[:, :1].squeeze(1)) ** 2).mean()


def errors_times_themselves(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    error = model(x) - x[:, :4]
    return -(error * error).sum(1).mean()


def norm_of_errors(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return -(model(x) - x[:, :4]).norm(dim=1).mean()


def bound_with_the_wrong_sign(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    mean, log_var = model(x).chunk(2, 1)
    reconstruction = F.binary_cross_entropy_with_logits(mean, x[:, :2], reduction="none").sum(1)
    divergence = 0.5 * (mean**2 + log_var.exp() - log_var - 1).sum(1)
    return -(reconstruction.mean() + divergence.mean()) / 5


@pytest.mark.parametrize(
    "objective",
    [
        size_of_errors,
        squared_errors,
        errors_times_themselves,
        norm_of_errors,
        bound_with_the_wrong_sign,
    ],
)
def test_errors_that_are_driven_up_are_named(objective: Objective) -> None:
    assert is_named(objective)
    assert not is_named(lambda model, x: -objective(model, x))
