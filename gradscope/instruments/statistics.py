"""Norms and other statistics of many tensors at once.

Small ones are read together (``small_tensors.py``), large ones in blocks, whose sums are added in
double precision (a float32 sum of squares over four million elements is off by 1e-4, over a block
of 2¹⁵ by 2e-8; how much in a larger block depends on the machine, and bfloat16 is worst).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.parameter import UninitializedParameter

from gradscope.instruments.late import Known, Late, Numbers
from gradscope.instruments.local import local
from gradscope.instruments.segments import ones_like
from gradscope.instruments.small_tensors import (
    HUGE,
    TINY,
    Singles,
    SmallTensors,
    sums_of_squares,
)

Reals = npt.NDArray[np.float64]

_BLOCK = 32_768
"""Elements read at a time: few enough to stay in a core's cache until all is read of them."""


@dataclass(slots=True)
class Statistics:
    """Statistics of n tensors, one entry each; of an absent or unreadable tensor all are NaN.

    Attributes:
        numel: float64[n], number of elements (of the stored ones for a sparse tensor).
        sum: float64[n].
        sum_of_squares: float64[n]; of magnitudes for complex tensors.
        min, max: float64[n]; NaN for complex and empty tensors.
        n_zero: float64[n], exact zeros.
        n_nonfinite: float64[n], NaN and infinities.
    """

    numel: Reals
    sum: Reals
    sum_of_squares: Reals
    min: Reals
    max: Reals
    n_zero: Reals
    n_nonfinite: Reals

    @classmethod
    def empty(cls, n: int) -> Statistics:
        """Return statistics of which nothing is known."""
        return cls(*(np.full(n, np.nan) for _ in fields(cls)))

    @property
    def norm(self) -> Reals:
        """float64[n], L2 norm."""
        return np.sqrt(self.sum_of_squares)

    @property
    def mean(self) -> Reals:
        """float64[n]."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(self.sum / self.numel)

    @property
    def std(self) -> Reals:
        """float64[n], population standard deviation."""
        with np.errstate(invalid="ignore", divide="ignore"):
            variance = self.sum_of_squares / self.numel - self.mean**2
            return np.sqrt(np.maximum(variance, 0.0))

    @property
    def abs_max(self) -> Reals:
        """float64[n]."""
        return np.maximum(np.abs(self.min), np.abs(self.max))

    @property
    def zero_fraction(self) -> Reals:
        """float64[n]."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(self.n_zero / self.numel)


class StatisticsReader:
    """Reads statistics of lists of tensors that are shaped like a fixed list of parameters.

    Args:
        like: the parameters, or None for one that is gone; of each only shape, dtype and device
            are remembered.
    """

    def __init__(self, like: Sequence[torch.Tensor | None]) -> None:
        self.n = len(like)
        self._small = SmallTensors(like)

    def sums_of_squares(self, tensors: Sequence[torch.Tensor | None]) -> Late[Reals]:
        """Return float64[n]: the sum of squares of each tensor, NaN where there is none."""
        result = np.full(self.n, np.nan)
        single = list(self._small.others)
        self._small.sums_of_squares(tensors, result, single)
        at: list[int] = []
        readings: list[Late[Reals]] = []
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            for i in single:
                tensor = tensors[i]
                if tensor is None or (plain := _plain(tensor)) is None:
                    continue
                if plain.device.type == "cpu":
                    result[i] = _sum_of_squares_on_host(plain)
                else:
                    at.append(i)
                    readings.append(_sum_of_squares_on_device(plain))
        if not at:
            return Known(result)
        return _Filled(
            result, at, readings, lambda target, at, values: target.__setitem__(at, values[0])
        )

    def statistics(
        self, tensors: Sequence[torch.Tensor | None], *, count_zeros: bool = True
    ) -> Late[Statistics]:
        """Return all statistics of each tensor; without ``count_zeros`` ``n_zero`` stays NaN."""
        result = Statistics.empty(self.n)
        single = list(self._small.others)
        reduced = [
            (places, _reduced(rows, count_zeros))
            for places, rows in self._small.rows(tensors, single)
        ]
        if reduced:
            _put_statistics(
                result,
                np.concatenate([places for places, _ in reduced]),
                np.concatenate([values for _, values in reduced], axis=1),
            )
        at, plain = _those_there_are(tensors, single)
        readings = [_all_statistics(tensor, count_zeros) for tensor in plain]
        return _Filled(result, at, readings, _put_statistics)


def _reduced(rows: Singles, count_zeros: bool) -> Reals:
    """float64[7, k], the fields of Statistics of the tensors that are the k rows of ``rows``."""
    found = np.zeros((7, len(rows)))
    numel, sums, squares, least, greatest, n_zero, n_nonfinite = found
    with np.errstate(over="ignore", invalid="ignore"):
        sums[:] = np.matmul(rows, ones_like(rows[0]))
        # Along an axis NumPy takes twice as long.
        flat, starts = rows.reshape(-1), np.arange(0, rows.size, rows.shape[1])
        least[:] = np.minimum.reduceat(flat, starts)
        greatest[:] = np.maximum.reduceat(flat, starts)
    if not np.isfinite(sums).all():
        for i in np.flatnonzero(~np.isfinite(sums)).tolist():
            sums[i] = rows[i].sum(dtype=np.float64)
    numel[:] = rows.shape[1]
    squares[:] = sums_of_squares(rows)
    n_zero[:] = np.count_nonzero(rows == 0, axis=1) if count_zeros else math.nan
    # Their squares cannot overflow in double: where the sum is not finite, an element is not.
    if not np.isfinite(squares).all():
        for i in np.flatnonzero(~np.isfinite(squares)).tolist():
            n_nonfinite[i] = np.count_nonzero(~np.isfinite(rows[i]))
    return found


def _those_there_are(
    tensors: Sequence[torch.Tensor | None], at: list[int]
) -> tuple[list[int], list[torch.Tensor]]:
    """Those of some tensors that there are and that can be read, and their places."""
    readable = [
        (i, plain) for i in at if (t := tensors[i]) is not None and (plain := _plain(t)) is not None
    ]
    return [i for i, _ in readable], [plain for _, plain in readable]


class _Filled(Late[Any]):
    """A result whose buffered part is there, and whose other entries may still be under way."""

    def __init__(
        self, result: Any, at: list[int], readings: list[Late[Any]], put: Callable[..., None]
    ) -> None:
        self._result, self._at, self._readings, self._put = result, at, readings, put

    def ready(self) -> bool:
        return all(reading.ready() for reading in self._readings)

    def value(self) -> Any:
        for at, reading in zip(self._at, self._readings, strict=True):
            self._put(self._result, at, np.atleast_1d(reading.value()))
        self._at, self._readings = [], []
        return self._result


def _put_statistics(result: Statistics, at: Any, values: Reals) -> None:
    for field, value in zip(fields(Statistics), values, strict=True):
        getattr(result, field.name)[at] = value


def _plain(tensor: torch.Tensor) -> torch.Tensor | None:
    """The numbers of a tensor as a dense one without graph; None if they cannot be read."""
    if type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.is_meta:
        return tensor.detach()  # as good as always
    if isinstance(tensor, UninitializedParameter):
        return None
    tensor = local(tensor.detach())
    if tensor.layout is torch.sparse_coo:
        # A row may be stored several times; its parts add up.
        tensor = tensor.coalesce().values()
    if tensor.is_meta or tensor.layout is not torch.strided:
        return None
    return tensor


def _sum_of_squares_on_device(tensor: torch.Tensor) -> Late[Reals]:
    # Without a look at the value, the safe way is to accumulate in double at once.
    return Numbers(torch.linalg.vector_norm(_as_real(tensor), dtype=_widest(tensor)) ** 2)


def _sum_of_squares_on_host(tensor: torch.Tensor) -> float:
    """To be called where numpy ignores what overflows."""
    # What NumPy has seen torch can resize no more, as it does with a sparse gradient of no rows.
    if not tensor.numel():
        return 0.0
    if tensor.is_complex():
        tensor = _as_real(tensor)
    elements = _elements(tensor)
    total = 0.0
    for start in range(0, len(elements), _BLOCK):
        block = elements[start : start + _BLOCK]
        total += float(np.dot(block, block))
    if not TINY < total < HUGE and (total != 0.0 or elements.any()):
        return _squares_in_double(elements)
    return total


def _as_real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _elements(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """The elements of a dense tensor on the host in any order, in float32 or float64."""
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.to(torch.float32)
    # In the order in which they lie in memory, whatever was transposed, so without a copy.
    return tensor.numpy().ravel(order="K")


def _squares_in_double(elements: npt.NDArray[Any]) -> float:
    return float(np.linalg.norm(elements.astype(np.float64))) ** 2


def _all_statistics(tensor: torch.Tensor, count_zeros: bool) -> Late[Reals]:
    """float64[7] in the order of the fields of Statistics."""
    numel = tensor.numel()
    if numel == 0:
        return Known(np.array([0.0, 0.0, 0.0, math.nan, math.nan, 0.0, 0.0]))
    if tensor.device.type != "cpu":
        return Numbers(_statistics_on_device(tensor))
    if tensor.is_complex():
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            squares = _sum_of_squares_on_host(tensor)
        zeros = numel - int(torch.count_nonzero(tensor))
        nonfinite = 0 if math.isfinite(squares) else int((~torch.isfinite(tensor)).sum())
        return Known(np.array([numel, math.nan, squares, math.nan, math.nan, zeros, nonfinite]))
    return Known(_statistics_on_host(_elements(tensor), count_zeros))


def _statistics_on_host(elements: npt.NDArray[Any], count_zeros: bool) -> Reals:
    total = squares = 0.0
    zeros: float = 0 if count_zeros else math.nan
    least, greatest = [], []
    with np.errstate(all="ignore"):
        for start in range(0, len(elements), _BLOCK):
            block = elements[start : start + _BLOCK]
            total += float(np.dot(block, ones_like(block)))
            squares += float(np.dot(block, block))
            least.append(np.minimum.reduce(block))
            greatest.append(np.maximum.reduce(block))
            if count_zeros:
                zeros += np.count_nonzero(block == 0)
        ends = float(np.minimum.reduce(least)), float(np.maximum.reduce(greatest))
        if not TINY < squares < HUGE and ends != (0.0, 0.0):
            squares = _squares_in_double(elements)
        if not math.isfinite(total):
            total = float(elements.sum(dtype=np.float64))
    unfit = 0 if math.isfinite(squares) else np.count_nonzero(~np.isfinite(elements))
    return np.array([len(elements), total, squares, *ends, zeros, unfit])


def _statistics_on_device(tensor: torch.Tensor) -> torch.Tensor:
    wide = _widest(tensor)
    nonzero = torch.count_nonzero(tensor).to(wide)
    nonfinite = (tensor.numel() - torch.isfinite(tensor).sum()).to(wide)
    numel = torch.full_like(nonzero, tensor.numel())
    nan = torch.full_like(nonzero, math.nan)
    if tensor.is_complex():
        squares = torch.linalg.vector_norm(_as_real(tensor), dtype=wide) ** 2
        return torch.stack([numel, nan, squares, nan, nan, numel - nonzero, nonfinite])
    least, greatest = torch.aminmax(tensor)
    squares = torch.linalg.vector_norm(tensor, dtype=wide) ** 2
    return torch.stack(
        [
            numel,
            tensor.sum(dtype=wide),
            squares,
            least.to(wide),
            greatest.to(wide),
            numel - nonzero,
            nonfinite,
        ]
    )


def _widest(tensor: torch.Tensor) -> torch.dtype:
    # Apple's device has no float64.
    return torch.float32 if tensor.device.type == "mps" else torch.float64
