"""What this rank holds of tensors that are spread over several (DTensors)."""

from __future__ import annotations

from typing import Any

import torch


def is_spread(value: Any) -> bool:
    """Whether a value is a DTensor."""
    return isinstance(value, torch.Tensor) and hasattr(value, "to_local")


def local(value: Any) -> Any:
    """Return this rank's part of a DTensor, without graph; anything else as it is."""
    return value.detach().to_local() if is_spread(value) else value


def placements_of(tensor: torch.Tensor) -> str:
    """Return how a tensor is spread over ranks, as in ``Shard(dim=0) of 4``; nothing if it is not.

    One word for each dimension of the mesh of ranks, and how many ranks that has.
    """
    placements, mesh = getattr(tensor, "placements", None), getattr(tensor, "device_mesh", None)
    if placements is None or mesh is None:
        return ""
    return ", ".join(
        f"{placement!r} of {size}" for placement, size in zip(placements, mesh.shape, strict=False)
    )
