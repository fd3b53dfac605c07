"""What is known of weights as a whole: their norms, and whether two began as copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gradscope.instruments.late import Known, Late, Numbers
from gradscope.instruments.local import local
from gradscope.instruments.tensor_summary import is_readable


class Norms(Late[dict[int, float]]):
    """L2 norms by key, whose values may still be under way."""

    def __init__(self, parts: Sequence[tuple[Sequence[int], Late[Any]]]) -> None:
        self._parts = tuple(parts)

    def ready(self) -> bool:
        """Whether all norms are there."""
        return all(late.ready() for _, late in self._parts)

    def value(self) -> dict[int, float]:
        """Return the norms."""
        return {
            key: norm
            for keys, late in self._parts
            for key, norm in zip(keys, late.value().tolist(), strict=True)
        }


def read_norms(tensors: Sequence[tuple[int, torch.Tensor]]) -> Late[dict[int, float]]:
    """Read the L2 norms of dense real tensors; others are left out.

    Of one that is spread over ranks that of this rank's part.

    Args:
        tensors: a key and a tensor each.
    """
    by_place: dict[Any, list[tuple[int, torch.Tensor]]] = {}
    for key, each in tensors:
        tensor = local(each)
        if is_readable(tensor) and tensor.is_floating_point():
            by_place.setdefault((tensor.device, tensor.dtype), []).append((key, tensor.detach()))
    parts: list[tuple[list[int], Late[Any]]] = []
    for members in by_place.values():
        norms = torch._foreach_norm([tensor for _, tensor in members])
        parts.append(([key for key, _ in members], Numbers(torch.stack(list(norms)))))
    return Norms(parts) if parts else Known({})


def are_copies(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of chance hold the very same values in memory of their own."""
    if first is second or first.shape != second.shape or first.dtype != second.dtype:
        return False
    if first.device != second.device or not (is_readable(first) and is_readable(second)):
        return False
    first, second = first.detach(), second.detach()
    sample = first.reshape(-1)[:2]
    if len(sample) < 2 or torch.equal(sample[:1], sample[1:]):
        return False  # constants are equal without having been copied
    return torch.equal(first, second)
