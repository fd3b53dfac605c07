"""Ranks compared while they train, with one collective; only where the program asks for it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch


def ranks_apart(
    names: Sequence[str], weights: Any, gradients: Any, *, are_replicas: bool
) -> list[int]:
    """Return the ranks that are meant to hold the same weights and do not; nothing if all do.

    All ranks of the group have to call it. They are meant to where they have the same parameters,
    and either the same gradients, or a wrapper that keeps them alike.

    Args:
        names: of the parameters of one optimizer.
        weights: int64[n], their checksums; negative where there is none.
        gradients: likewise; 0 for gradients of zeros.
        are_replicas: whether a wrapper of torch's keeps all of them alike.
    """
    own = [
        _number("\n".join(names).encode()),
        _number(weights.tobytes()),
        _number(gradients.tobytes()) if (gradients > 0).any() else 0,
        int(are_replicas),
    ]
    told = _gathered(own)
    meant: dict[tuple[int, int], list[int]] = {}
    for rank, (who, _, gradient, is_replica) in enumerate(told):
        if gradient:
            meant.setdefault((who, gradient), []).append(rank)
        if is_replica:
            meant.setdefault((who, 0), []).append(rank)
    for ranks in meant.values():
        if len({told[rank][1] for rank in ranks}) > 1:
            return ranks
    return []


def _gathered(numbers: list[int]) -> list[list[int]]:
    """The numbers of all ranks, by rank."""
    distributed = torch.distributed
    is_nccl = distributed.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if is_nccl else "cpu"
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    parts = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, own)
    return [part.tolist() for part in parts]


def _number(content: bytes) -> int:
    """A number of 62 bits made of some bytes, and never 0."""
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2 or 1
