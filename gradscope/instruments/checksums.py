"""Checksums of tensors by which processes can be compared: equal exactly if the values are.

They are sums of integers, so that the order in which a device adds does not matter, and two ranks
with the same values come to the same number to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import UninitializedParameter

from gradscope.instruments.late import Late, Numbers
from gradscope.instruments.local import local

_BLOCK = 1 << 16
_BLOCKS_AT_ONCE = 256
"""On an accelerator; on the host one after the other, which stays in the processor's cache."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SEED = 20230717
_LARGEST = np.int64(2**63 - 1)


class Checksums:
    """Checksums of lists of tensors. The factors that tell places apart are made once a device."""

    def __init__(self) -> None:
        self._factors: dict[torch.device, torch.Tensor] = {}

    def read(self, tensors: Sequence[torch.Tensor | None]) -> Late[Any]:
        """Return int64[n]: of each tensor a number of 63 bits, 0 for zeros; -1 if it has none.

        None has none, and neither has a tensor that is sparse or of which this process holds but a
        part. ``-0.0`` counts as ``0.0``.
        """
        sums: dict[torch.device, list[tuple[int, torch.Tensor]]] = {}
        for place, tensor in enumerate(tensors):
            whole = None if tensor is None else _whole(tensor)
            if whole is not None:
                sums.setdefault(whole.device, []).append((place, self._sum(whole)))
        parts = [
            (
                [place for place, _ in members],
                Numbers(torch.stack([each for _, each in members]), torch.int64),
            )
            for members in sums.values()
        ]
        return _Gathered(len(tensors), parts)

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.reshape(-1)
        device, n_whole = tensor.device, flat.numel() // _BLOCK
        total = torch.zeros((), dtype=torch.int64, device=device)
        at_once = 1 if device.type == "cpu" else _BLOCKS_AT_ONCE
        for first in range(0, n_whole, at_once):
            last = min(first + at_once, n_whole)
            total += self._of_blocks(flat[first * _BLOCK : last * _BLOCK].view(-1, _BLOCK), first)
        if flat.numel() > n_whole * _BLOCK:
            total += self._of_blocks(flat[n_whole * _BLOCK :].view(1, -1), n_whole)
        return total

    def _of_blocks(self, blocks: torch.Tensor, first: int) -> torch.Tensor:
        """The sum of some blocks, the first of which has a number."""
        if blocks.is_floating_point():
            blocks = blocks + 0  # -0.0 becomes 0.0
        integers = blocks.view(_INTEGERS[blocks.element_size()]).to(torch.int64)
        n, width = integers.shape
        # Integers wrap round, so that nothing is lost to the order of the additions.
        sums = (integers * self._factors_on(blocks.device, width)[:width]).sum(1)
        odd = torch.arange(2 * first + 1, 2 * (first + n), 2, device=blocks.device)
        return (sums * odd).sum()

    def _factors_on(self, device: torch.device, n: int) -> torch.Tensor:
        known = self._factors.get(device)
        if known is None or len(known) < n:
            numbers = np.random.RandomState(_SEED).randint(-(2**62), 2**62, _BLOCK, np.int64)
            known = self._factors[device] = torch.from_numpy(numbers[:n] | 1).to(device)
        return known


class _Gathered(Late[Any]):
    def __init__(self, n: int, parts: Sequence[tuple[list[int], Numbers]]) -> None:
        self._n = n
        self._parts = parts

    def ready(self) -> bool:
        return all(late.ready() for _, late in self._parts)

    def value(self) -> Any:
        result = np.full(self._n, -1, np.int64)
        for places, late in self._parts:
            result[places] = late.value() & _LARGEST
        return result


def _whole(tensor: torch.Tensor) -> torch.Tensor | None:
    """The values of a tensor if this process holds all of them; None for any other."""
    if isinstance(tensor, UninitializedParameter):
        return None
    placements = getattr(tensor, "placements", None) or ()
    if not all(placement.is_replicate() for placement in placements):
        return None
    tensor = local(tensor.detach())
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized:
        return None
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor if tensor.element_size() in _INTEGERS else None
