"""One small training loop, and the same with one thing changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import gradscope
from gradscope.scope import Scope


class Classifier(nn.Module):
    """Two blocks and a head over a little table of numbers."""

    def __init__(self, p: float, width: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, width)
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(p)
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor, *, cut: bool = False) -> torch.Tensor:
        hidden = self.norm(F.gelu(self.encoder(x)))
        return self.head(self.drop(hidden.detach() if cut else hidden))


@dataclass(frozen=True)
class Loop:
    """A training loop; what is left alone is what its twin does, too.

    ``usual`` is what the twin does differently, if it is not the usual loop.
    """

    seed: int = 0
    steps: int = 12
    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    p: float = 0.1
    width: int = 8
    dtype: torch.dtype = torch.float32
    kind: str = "AdamW"
    first_weight: float = 0.0
    data_seed: int = 1
    data_from: int = 0
    scale: float = 1.0
    no_zero_grad_from: int | None = None
    cut_from: int | None = None
    softmax: bool = False
    clip: float | None = None
    clip_from: int = 0
    eval_from: int | None = None
    anew_at: int | None = None
    emptied_at: int | None = None
    lr_from: tuple[int, float] | None = None
    two_groups: bool = False
    frozen: str = ""
    frozen_from: int | None = None
    nudge: tuple[int, float] | None = None
    gradient_factor: tuple[int, float] | None = None
    reduction: str = "mean"
    raises_in: int | None = None
    usual: dict[str, Any] | None = None


def run(loop: Loop, path: Path | None = None, **options: Any) -> Scope:
    """Train, watched and recorded; ``every=1`` unless told otherwise."""
    torch.manual_seed(loop.seed)
    model = Classifier(loop.p, loop.width).to(loop.dtype)
    with torch.no_grad():
        model.head.weight[1, 2] += loop.first_weight
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name != loop.frozen
    optimizer = _optimizer(loop, model)
    data = torch.Generator().manual_seed(loop.data_seed)
    options = {"every": 1, **options}
    with gradscope.watch(model, optimizer, save=path, **options) as scope:
        for step in range(loop.steps):
            if step == loop.data_from:
                data.manual_seed(loop.data_seed + 100 * step)
            x = torch.randn(16, 6, generator=data).to(loop.dtype) * loop.scale
            y = x[:, :3].argmax(1)
            if step == loop.eval_from:
                model.eval()
            if step == loop.frozen_from:
                model.encoder.bias.requires_grad = False
            if step == loop.anew_at:
                optimizer = _optimizer(loop, model)
            if step == loop.emptied_at:
                optimizer.state.clear()
            if loop.lr_from is not None and step == loop.lr_from[0]:
                optimizer.param_groups[0]["lr"] = loop.lr_from[1]
            if loop.nudge is not None and step == loop.nudge[0]:
                with torch.no_grad():
                    model.encoder.weight[0, 0] += loop.nudge[1]
            if loop.no_zero_grad_from is None or step < loop.no_zero_grad_from:
                optimizer.zero_grad()
            logits = model(x, cut=loop.cut_from is not None and step >= loop.cut_from)
            if loop.softmax:
                logits = F.softmax(logits, dim=1)
            F.cross_entropy(logits, y, reduction=loop.reduction).backward()
            if loop.gradient_factor is not None and step == loop.gradient_factor[0]:
                model.norm.weight.grad.mul_(loop.gradient_factor[1])
            if loop.clip is not None and step >= loop.clip_from:
                nn.utils.clip_grad_norm_(model.parameters(), loop.clip)
            if step == loop.raises_in:
                raise RuntimeError("stopped")
            optimizer.step()
    return scope


def _optimizer(loop: Loop, model: nn.Module) -> Any:
    groups: Any = list(model.parameters())
    if loop.two_groups:
        groups = [{"params": groups[:-1]}, {"params": groups[-1:]}]
    options: dict[str, Any] = {"lr": loop.lr, "weight_decay": loop.weight_decay}
    if "Adam" in loop.kind:
        options["betas"] = loop.betas
    else:
        options["momentum"] = 0.9
    return getattr(torch.optim, loop.kind)(groups, **options)


def changed(**what: Any) -> Loop:
    """The usual loop with something changed."""
    return replace(Loop(), **what)
