"""The trainings whose steps are timed: a model, its optimizer, and the loss of a fresh batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

WORKLOADS = {
    "gpt": "character GPT, 0.8 M parameters in 54 tensors, batch 16 x 64, AdamW",
    "mlp": "100 x Linear(32, 32), 200 tensors, batch 64, AdamW",
    "gpt25m": "GPT, 25 M parameters in 100 tensors, batch 4 x 128, AdamW",
    "conv": "convolutional net with batch normalisation, 32 tensors, batch 32 x 3 x 32 x 32, SGD",
}

STEPS = {"gpt": (120, 40), "mlp": (400, 50), "gpt25m": (30, 10), "conv": (150, 50)}
"""How many steps each is trained for, and how many of them are the first, told apart."""


def build(workload: str) -> tuple[Any, Any, Callable[[], Any]]:
    """Return a model, its optimizer, and a function that gives the loss of a fresh batch."""
    import torch

    torch.manual_seed(0)
    model, compute_loss = {"gpt": _gpt, "mlp": _mlp, "gpt25m": _gpt25m, "conv": _conv}[workload]()
    if workload == "conv":
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return model, optimizer, compute_loss


def _gpt() -> tuple[Any, Callable[[], Any]]:
    from gradscope.demo.char_gpt import CharGPT
    from gradscope.demo.text import CharText

    text = CharText()
    model = CharGPT(text.vocab_size)

    def compute_loss() -> Any:
        xb, yb = text.get_batch("train")
        return model(xb, yb)[1]

    return model, compute_loss


def _mlp() -> tuple[Any, Callable[[], Any]]:
    import torch
    from torch import nn

    layers: list[nn.Module] = []
    for _ in range(100):
        linear = nn.Linear(32, 32)
        # Keeps the scale of signals and gradients through a hundred layers: vanishing ones
        # would become denormal numbers, whose arithmetic is slow for reasons of its own.
        nn.init.orthogonal_(linear.weight)
        layers += [linear, nn.Tanh()]
    model = nn.Sequential(*layers)
    inputs, targets = torch.randn(64, 32), torch.randn(64, 32)
    return model, lambda: nn.functional.mse_loss(model(inputs), targets)


def _gpt25m() -> tuple[Any, Callable[[], Any]]:
    import torch
    from torch import nn

    width, n_layers, n_tokens, length = 512, 8, 96, 128

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(n_tokens, width)
            self.positions = nn.Embedding(length, width)
            layer = nn.TransformerEncoderLayer(
                width, 8, 4 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            self.blocks = nn.TransformerEncoder(layer, n_layers, enable_nested_tensor=False)
            self.head = nn.Linear(width, n_tokens)
            self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

        def forward(self, ids: Any) -> Any:
            x = self.tokens(ids) + self.positions.weight
            return self.head(self.blocks(x, mask=self.mask, is_causal=True))

    model = GPT()

    def compute_loss() -> Any:
        ids = torch.randint(n_tokens, (4, length))
        return nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.roll(-1, 1).flatten())

    return model, compute_loss


def _conv() -> tuple[Any, Callable[[], Any]]:
    import torch
    from torch import nn

    layers: list[nn.Module] = []
    n_channels = 3
    for width in (16, 16, 32, 32, 64, 64, 64):
        layers += [
            nn.Conv2d(n_channels, width, 3, padding=1, bias=True),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        if width != n_channels and n_channels != 3:
            layers.append(nn.MaxPool2d(2))
        n_channels = width
    model = nn.Sequential(
        *layers,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(n_channels, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )
    inputs, targets = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    return model, lambda: nn.functional.cross_entropy(model(inputs), targets)
