"""Small loops whose recordings are written, opened, damaged and killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import gradscope
from gradscope.scope import Scope


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def train(
    scope: Scope, model: nn.Module, optimizer: Any, steps: int = 20, *, clears: bool = True
) -> Scope:
    """Train under a scope that is entered here."""
    with scope:
        for _ in range(steps):
            x = torch.randn(16, 6)
            if clears:
                optimizer.zero_grad()
            F.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
            optimizer.step()
    return scope


def recorded(path: Path, steps: int = 20, *, clears: bool = True, **options: Any) -> Scope:
    """Train a small model with AdamW, written to a directory; returns the scope."""
    model = perceptron()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scope = gradscope.watch(model, optimizer, save=path, **options)
    return train(scope, model, optimizer, steps, clears=clears)
