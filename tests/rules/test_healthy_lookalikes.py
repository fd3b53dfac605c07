"""Healthy loops that share a sign with a defect, and must not be named."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

import gradscope

Loss = Callable[[nn.Module, int], torch.Tensor]


def alarms(model: nn.Module, loss: Loss, steps: int = 12, lr: float = 0.05) -> list[str]:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for i in range(steps):
            value = loss(model, i)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    return [f.code for f in scope.findings if f.severity > 0]


def test_adversarial_examples_made_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

    def loss(model: nn.Module, i: int) -> torch.Tensor:
        x = torch.randn(32, 6)
        y = x[:, :3].argmax(1)
        model.eval()
        delta = torch.zeros_like(x, requires_grad=True)
        F.cross_entropy(model(x + delta), y).backward()
        model.train()
        assert delta.grad is not None
        return F.cross_entropy(model(x + 0.05 * delta.grad.sign()), y)

    assert not alarms(model, loss)


def test_images_from_images_one_at_a_time() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 1)
    )

    def loss(model: nn.Module, i: int) -> torch.Tensor:
        x = torch.rand(1, 1, 8, 8)
        return F.l1_loss(model(x), -x)

    assert not alarms(model, loss)


def test_a_choice_among_moments() -> None:
    torch.manual_seed(0)

    def loss(model: nn.Module, i: int) -> torch.Tensor:
        x = torch.randn(7, 16, 8)
        scores = F.log_softmax(model(x).squeeze(-1), dim=0)
        return -scores.gather(0, x[..., 0].argmax(0)[None]).mean()

    assert not alarms(nn.Linear(8, 1), loss)


def test_more_classes_than_examples_so_far() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(800, 16), nn.Linear(16, 800))

    def loss(model: nn.Module, i: int) -> torch.Tensor:
        x = torch.randint(800, (8,))
        return F.cross_entropy(model(x), (x * 7 + 1) % 800)

    assert not alarms(model, loss, steps=60, lr=0.5)
