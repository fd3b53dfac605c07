"""A network of blocks that may be computed again in the backward, which several tests train."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Residual(nn.Module):
    def __init__(self, *, use_reentrant: bool | None = None) -> None:
        super().__init__()
        self.inside = nn.Linear(6, 12)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Dropout(0.2)) for _ in range(3)
        )
        self.outside = nn.Linear(12, 3)
        self._use_reentrant = use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inside(x)
        for block in self.blocks:
            if self._use_reentrant is None or not self.training:
                x = x + block(x)
            else:
                x = x + checkpoint(block, x, use_reentrant=self._use_reentrant)
        return self.outside(x)
