"""A small GPT over characters: large enough to be a real transformer, small enough for one core."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody gives it
from torch import Tensor, nn


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and what came before it.

    Args:
        width: features of each position; divided evenly among the heads.
        n_heads: number of heads.
        dropout: probability with which an attention weight, and an output feature, is dropped
            while training.
    """

    def __init__(self, width: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        if width % n_heads:
            raise ValueError(f"width {width} cannot be divided among {n_heads} heads")
        self.n_heads = n_heads
        self.attention_dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Mix positions; float ``(batch, time, width)`` in and out."""
        # (batch, time, 3 * width) -> three of (batch, heads, time, width / heads)
        query, key, value = (
            self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        )
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=self.attention_dropout if self.training else 0.0,
            is_causal=True,
        )
        projected: Tensor = self.proj(mixed.transpose(1, 2).flatten(-2))
        dropped: Tensor = self.dropout(projected)
        return dropped


class MLP(nn.Module):
    """The position-wise half of a block: four times as wide inside, GELU between."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 4 * width)
        self.proj = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position by itself; float ``(batch, time, width)`` in and out."""
        dropped: Tensor = self.dropout(self.proj(F.gelu(self.expand(x))))
        return dropped


class Block(nn.Module):
    """Attention, then the MLP; each reads a normalised copy and adds to the residual stream."""

    def __init__(self, width: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = CausalSelfAttention(width, n_heads, dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = MLP(width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Add to the residual stream; float ``(batch, time, width)`` in and out."""
        x = x + self.attention(self.attention_norm(x))
        mixed: Tensor = x + self.mlp(self.mlp_norm(x))
        return mixed


class CharGPT(nn.Module):
    """A decoder-only transformer over characters.

    With the default sizes and a vocabulary of a hundred characters it has about 0.8 million
    parameters in 54 tensors.

    Args:
        vocab_size: number of distinct characters.
        block_size: longest input, in characters.
        n_layers: number of blocks.
        n_heads: attention heads in each block.
        width: features of each position in the residual stream.
        dropout: probability of dropping an element while training.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        block_size: int = 64,
        n_layers: int = 4,
        n_heads: int = 4,
        width: int = 128,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.block_size = block_size
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Embedding(block_size, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, n_heads, dropout) for _ in range(n_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size)
        self._initialise(n_layers)

    def _initialise(self, n_layers: int) -> None:
        """Small normal weights, as GPT-2 has them, so that the first loss is about log(vocab)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                # Each of the 2 * n_layers projections adds to the same residual stream; without
                # the division its variance would grow with depth.
                depth = 2 * n_layers if name.endswith(".proj") else 1
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(depth))
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Predict the next character at every position.

        Args:
            idx: characters as int64 ``(batch, time)``, ``time`` at most ``block_size``.
            targets: the characters that follow, int64 ``(batch, time)``.

        Returns:
            The logits, float ``(batch, time, vocab_size)``, and the mean cross-entropy per
            character in nats, a float scalar, or None without targets.

        Raises:
            ValueError: the input is longer than ``block_size``.
        """
        time = idx.shape[1]
        if time > self.block_size:
            raise ValueError(f"{time} characters do not fit into a block of {self.block_size}")
        positions = torch.arange(time, device=idx.device)
        x = self.dropout(self.token_embedding(idx) + self.position_embedding(positions))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
