"""Draws the pictures of the documentation into docs/images.

python docs/pictures.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import gradscope

torch.manual_seed(0)
model = nn.Sequential()
model.add_module("hidden", nn.Linear(8, 16))
model.add_module("relu", nn.ReLU())
model.add_module("head", nn.Linear(16, 3))
optimizer = torch.optim.AdamW(model.parameters())
with gradscope.watch(model, optimizer) as scope:
    loss = nn.functional.cross_entropy(model(torch.randn(4, 8)), torch.randint(0, 3, (4,)))
    loss.backward()
    optimizer.step()
print(scope.graph().render(Path(__file__).parent / "images" / "graph.svg"))
