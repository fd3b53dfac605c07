"""Draws the pictures of the documentation into docs/images.

python docs/pictures.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gradscope

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
sys.path.insert(0, str(ROOT / "examples"))
from architectures import ARCHITECTURES  # noqa: E402

GALLERY: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "resnet": {},
    "unet": {},
    "lstm_classifier": {},
    "unrolled_rnn": {},
    "mixture_of_experts": {"fold": "op"},
    "tied_autoencoder": {},
    "checkpointed_gpt2": {"depth": 2},
    "gradient_penalty": {},
    "recursive_tree": {},
    "detached_encoder": {"depth": 1},
}
"""The networks of examples/architectures.py, and what each picture is asked for."""


def small_network() -> None:
    """The picture in the README."""
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
    print(scope.graph().render(IMAGES / "graph.svg"))


def gallery() -> None:
    """The pictures of the page about graphs."""
    folder = IMAGES / "graphs"
    folder.mkdir(exist_ok=True)
    for name, options in GALLERY.items():
        model, loss_of = ARCHITECTURES[name]()
        with gradscope.capture(model) as c:
            loss = loss_of()
        print(c.graph(loss).render(folder / f"{name}.svg", **options))


def overlays() -> None:
    """A graph coloured by the gradients of its step, in dark."""
    torch.manual_seed(0)
    model, loss_of = ARCHITECTURES["gpt2"](n_layers=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with gradscope.watch(model, optimizer, graph=[2], every=1) as scope:
        for _ in range(3):
            optimizer.zero_grad()
            loss_of().backward()
            optimizer.step()
    path = IMAGES / "graphs" / "gpt2-grad-norm.svg"
    print(scope.graph(2).render(path, overlay="grad_norm", theme="dark"))


if __name__ == "__main__":
    small_network()
    gallery()
    overlays()
