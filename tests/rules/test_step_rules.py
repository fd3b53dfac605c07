"""Rules about the step, the clearing and the parameters: broken loops and healthy look-alikes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradscope

Loop = Callable[[nn.Module, torch.optim.Optimizer], None]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def loss_of(model: nn.Module) -> torch.Tensor:
    return F.cross_entropy(model(torch.randn(5, 6)), torch.randint(0, 3, (5,)))


def codes(loop: Loop, steps: int = 12, **options: float) -> set[str]:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), **{"lr": 0.1, **options})
    with gradscope.watch(model, optimizer, on_error="raise", every=1) as scope:
        for _ in range(steps):
            loop(model, optimizer)
    assert not scope.findings.unchecked
    return {finding.code for finding in scope.findings if finding.severity > 0}


def usual(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


def no_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss_of(model).backward()


def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    no_step(model, optimizer)
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad


def cleared_too_early(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss_of(model).backward()
    optimizer.zero_grad()
    optimizer.step()


def micro_batches_cleared(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        (loss_of(model) / 3).backward()
    optimizer.step()


def sharpness_aware(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


def shrunk(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    usual(model, optimizer)
    for p in model.parameters():
        p.data.mul_(0.5)


def clamped_without_effect(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    usual(model, optimizer)
    for p in model.parameters():
        p.data.clamp_(-100, 100)


@pytest.mark.parametrize(
    ("loop", "options", "code"),
    [
        (no_step, {}, "GS501"),
        (usual, {"lr": 0.0}, "GS503"),
        (cleared_too_early, {}, "GS202"),
        (micro_batches_cleared, {}, "GS202"),
        (shrunk, {}, "GS512"),
    ],
)
def test_broken(loop: Loop, options: dict[str, float], code: str) -> None:
    assert code in codes(loop, **options)


@pytest.mark.parametrize("loop", [usual, by_hand, sharpness_aware, clamped_without_effect])
def test_healthy(loop: Loop) -> None:
    assert not codes(loop)
