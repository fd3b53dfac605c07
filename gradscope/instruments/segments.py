"""Reductions of flat arrays, one result per segment: NumPy on the CPU, torch elsewhere."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from gradscope.instruments.flat_copies import Integers


class Segments(Protocol):
    """A flat array of some length, cut into segments of at least one element each."""

    def stretched(self, values: Any) -> Any:
        """Return an array, or a number for every element, as an array of the whole length."""

    def total(self, values: Any) -> Any:
        """Return the sum of each segment."""

    def product(self, left: Any, right: Any) -> Any:
        """Return the sum of the products of each segment."""

    def least(self, values: Any) -> Any:
        """Return the least element of each segment."""

    def greatest(self, values: Any) -> Any:
        """Return the greatest element of each segment."""

    def count(self, flags: Any) -> Any:
        """Return how many elements of each segment are true."""


_MOST_ONES = 32_768
"""How many ones are kept at most: those for a block."""

_ONES: dict[np.dtype[Any], npt.NDArray[Any]] = {}


def ones_like(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return as many ones, to be read and not kept.

    The product with them is a sum that takes a third of the time of NumPy's own. BLAS adds in
    several lanes, so that of a block's sum in float32 about six digits are right.
    """
    ones = _ONES.get(values.dtype)
    if ones is None or len(ones) < len(values):
        ones = _ONES[values.dtype] = np.ones(len(values), values.dtype)
    return ones[: len(values)]


class HostWhole:
    """A NumPy array that is one segment; each result is a single number.

    Args:
        length: of the array.

    Attributes:
        lengths: of the segment.
        ones: a 1 for it.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self.lengths, self.ones = length, 1

    def stretched(self, values: Any) -> Any:
        """Return an array of the whole length."""
        return values if np.ndim(values) else np.broadcast_to(values, (self._length,))

    def total(self, values: Any) -> Any:
        """Return the sum."""
        if len(values) > _MOST_ONES:
            return values.sum()
        return np.dot(values, ones_like(values))

    def product(self, left: Any, right: Any) -> Any:
        """Return the dot product."""
        return np.dot(left, right)

    def least(self, values: Any) -> Any:
        """Return the least element."""
        return np.minimum.reduce(values)

    def greatest(self, values: Any) -> Any:
        """Return the greatest element."""
        return np.maximum.reduce(values)

    def count(self, flags: Any) -> Any:
        """Return how many elements are true."""
        return np.count_nonzero(flags) if np.ndim(flags) else self._length * bool(flags)


class HostSegments:
    """Several segments of NumPy arrays; each result has one entry per segment.

    Args:
        starts: int64[k], where each segment begins; the first at 0.
        length: of the whole array.

    Attributes:
        lengths: int64[k], of each segment.
        ones: int64[k], a 1 for each.
    """

    def __init__(self, starts: Integers, length: int) -> None:
        self._starts = starts
        self._length = length
        self.lengths = np.diff(starts, append=length)
        self.ones = np.ones(len(starts), np.int64)
        # Equal ones are the rows of a matrix, whose products are one call of BLAS.
        each = int(self.lengths[0])
        self._each = each if each * len(starts) == length and (self.lengths == each).all() else 0

    def stretched(self, values: Any) -> Any:
        """Return an array of the whole length."""
        return values if np.ndim(values) else np.broadcast_to(values, (self._length,))

    def total(self, values: Any) -> Any:
        """Return real[k]."""
        if self._each:
            return np.matmul(values.reshape(-1, self._each), ones_like(values)[: self._each])
        # numpy adds pairwise, so float32 loses no more than a few digits of its last place.
        return np.add.reduceat(values, self._starts)

    def product(self, left: Any, right: Any) -> Any:
        """Return real[k]."""
        if self._each:
            rows, columns = (-1, 1, self._each), (-1, self._each, 1)
            return np.matmul(left.reshape(rows), right.reshape(columns)).reshape(-1)
        return np.add.reduceat(left * right, self._starts)

    def least(self, values: Any) -> Any:
        """Return real[k]."""
        return np.minimum.reduceat(values, self._starts)

    def greatest(self, values: Any) -> Any:
        """Return real[k]."""
        return np.maximum.reduceat(values, self._starts)

    def count(self, flags: Any) -> Any:
        """Return int[k]."""
        if not np.any(flags):  # the usual case, at a fraction of the cost
            return np.zeros(self._starts.shape, np.int64)
        return np.add.reduceat(self.stretched(flags), self._starts, dtype=int)


class DeviceSegments:
    """Segments of torch tensors; the arguments as for :class:`HostSegments`."""

    def __init__(self, starts: Integers, length: int, device: torch.device) -> None:
        sizes = np.diff(np.append(starts, length))
        self._length = length
        # A copy from unpinned memory makes the host wait for the device.
        host = torch.from_numpy(sizes)
        if device.type == "cuda":
            host = host.pin_memory()
        self._sizes = host.to(device, non_blocking=True)

    def stretched(self, values: Any) -> Any:
        """Return a tensor of the whole length."""
        if not isinstance(values, torch.Tensor):
            values = torch.full((), values, dtype=torch.float32, device=self._sizes.device)
        return values.expand(self._length) if values.dim() == 0 else values

    def total(self, values: Any) -> Any:
        """Return a tensor[k]."""
        return self._reduce(values, "sum")

    def product(self, left: Any, right: Any) -> Any:
        """Return a tensor[k]."""
        return self._reduce(left * right, "sum")

    def least(self, values: Any) -> Any:
        """Return a tensor[k]."""
        return self._reduce(values, "min")

    def greatest(self, values: Any) -> Any:
        """Return a tensor[k]."""
        return self._reduce(values, "max")

    def count(self, flags: Any) -> Any:
        """Return a tensor[k]."""
        return self._reduce(self.stretched(flags).to(torch.float32), "sum")

    def _reduce(self, values: Any, reduction: str) -> Any:
        # ``unsafe`` leaves out a check of the sizes that would wait for the device.
        return torch.segment_reduce(
            values.contiguous(), reduction, lengths=self._sizes, unsafe=True
        )
