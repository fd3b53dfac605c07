"""Norms and other statistics of many tensors at once.

What dominates is the number of calls, not of bytes: one call of torch on a small tensor costs more
than reading it. So small tensors are copied into one flat buffer with a single call and reduced
there by numpy; large ones are read in blocks, whose sums are added in double precision (a float32
sum of squares over four million elements is off by 1e-4, over a block of 2¹⁵ by 2e-8; how much in a
larger block depends on the machine, and bfloat16 is worst).
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

Reals = npt.NDArray[np.float64]

_SMALL = 16_384
_BLOCK = 32_768
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Outside of these a float32 sum of squares has lost digits to underflow or overflow.
_TINY, _HUGE = 1e-30, 1e37


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
        shapes = {i: t.shape for i, t in enumerate(like) if t is not None and _is_small(t)}
        sizes = [shape.numel() for shape in shapes.values()]
        # Where the program has set a default device, it is not meant for us.
        flat = torch.zeros(sum(sizes), dtype=torch.float32, device="cpu")
        self._small = np.array(list(shapes), np.int64)
        self._small_list = list(shapes)
        self._all_present = np.ones(len(shapes), np.bool_)
        self._rest = [i for i in range(self.n) if i not in shapes]
        self._sizes = np.array(sizes, np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._views = (
            [
                part.view(shape)
                for part, shape in zip(flat.split(sizes), shapes.values(), strict=True)
            ]
            if sizes
            else []
        )
        self._flat = flat.numpy()
        self._scratch = np.zeros(len(self._flat), np.float32)
        self._is_zero = np.zeros(len(self._flat), np.bool_)

    def sums_of_squares(self, tensors: Sequence[torch.Tensor | None]) -> Late[Reals]:
        """Return float64[n]: the sum of squares of each tensor, NaN where there is none."""
        result = np.full(self.n, np.nan)
        present, others = self._flatten(tensors)
        if len(self._small):
            result[self._small[present]] = self._squares()[present]
        readings = [_sum_of_squares(plain) for _, plain in others]
        return _Filled(
            result,
            [i for i, _ in others],
            readings,
            lambda target, at, values: target.__setitem__(at, values[0]),
        )

    def statistics(
        self, tensors: Sequence[torch.Tensor | None], *, count_zeros: bool = True
    ) -> Late[Statistics]:
        """Return all statistics of each tensor; without ``count_zeros`` ``n_zero`` stays NaN."""
        result = Statistics.empty(self.n)
        present, others = self._flatten(tensors)
        if len(self._small):
            with np.errstate(invalid="ignore"):
                self._reduce_flat(result, present, count_zeros)
        readings = [_all_statistics(plain, count_zeros) for _, plain in others]
        return _Filled(result, [i for i, _ in others], readings, _put_statistics)

    def _flatten(
        self, tensors: Sequence[torch.Tensor | None]
    ) -> tuple[npt.NDArray[np.bool_], list[tuple[int, torch.Tensor]]]:
        """Copy the small tensors into the buffer.

        Returns:
            Which of them there are, and the tensors that have to be read one by one.
        """
        rest = self._rest
        sources = [tensors[i] for i in self._small_list] if rest else tensors
        present = self._all_present
        if self._views:
            try:
                with torch.no_grad():
                    torch._foreach_copy_(self._views, sources)  # type: ignore[arg-type]
            except (TypeError, RuntimeError):  # one is absent, or sparse
                present, irregular = self._flatten_those_there_are(sources)
                rest = rest + irregular
        others = [(i, _plain(t)) for i in rest if (t := tensors[i]) is not None]
        return present, [(i, t) for i, t in others if t is not None]

    def _flatten_those_there_are(
        self, sources: Sequence[torch.Tensor | None]
    ) -> tuple[npt.NDArray[np.bool_], list[int]]:
        regular = [t is not None and t.layout is torch.strided for t in sources]
        views = [view for view, use in zip(self._views, regular, strict=True) if use]
        dense = [t for t, use in zip(sources, regular, strict=True) if t is not None and use]
        if dense:
            with torch.no_grad():
                torch._foreach_copy_(views, dense)
        irregular = [
            i
            for i, t, use in zip(self._small_list, sources, regular, strict=True)
            if t is not None and not use
        ]
        return np.array(regular, np.bool_), irregular

    def _squares(self) -> Reals:
        """float64[k], the sums of squares of the buffered tensors."""
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            np.multiply(self._flat, self._flat, out=self._scratch)
            # numpy adds pairwise, so that float32 loses no more than its last digit.
            squares = np.add.reduceat(self._scratch, self._starts).astype(np.float64)
            for i in np.flatnonzero(~((squares > _TINY) & (squares < _HUGE))).tolist():
                part = self._part(i).astype(np.float64)
                squares[i] = np.dot(part, part)
        return squares

    def _part(self, i: int) -> npt.NDArray[np.float32]:
        return self._flat[self._starts[i] : self._starts[i] + self._sizes[i]]

    def _reduce_flat(
        self, result: Statistics, present: npt.NDArray[np.bool_], count_zeros: bool
    ) -> None:
        at, starts = self._small[present], self._starts
        result.numel[at] = self._sizes[present]
        result.min[at] = np.minimum.reduceat(self._flat, starts)[present]
        result.max[at] = np.maximum.reduceat(self._flat, starts)[present]
        with np.errstate(over="ignore"):
            sums = np.add.reduceat(self._flat, starts).astype(np.float64)
        for i in np.flatnonzero(np.isinf(sums)).tolist():
            sums[i] = self._part(i).sum(dtype=np.float64)
        result.sum[at] = sums[present]
        squares = self._squares()
        result.sum_of_squares[at] = squares[present]
        if count_zeros:
            np.equal(self._flat, 0, out=self._is_zero)
            result.n_zero[at] = 0
        if count_zeros and self._is_zero.any():
            zeros = np.add.reduceat(self._is_zero.view(np.uint8), starts, dtype=np.uint32)
            result.n_zero[at] = zeros[present]
        nonfinite = np.zeros(len(starts))
        # Their squares cannot overflow in double: where the sum is not finite, an element is not.
        for i in np.flatnonzero(~np.isfinite(squares)).tolist():
            nonfinite[i] = np.count_nonzero(~np.isfinite(self._part(i)))
        result.n_nonfinite[at] = nonfinite[present]


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


def _put_statistics(result: Statistics, at: int, values: Reals) -> None:
    for field, value in zip(fields(Statistics), values, strict=True):
        getattr(result, field.name)[at] = value


def _is_small(tensor: torch.Tensor) -> bool:
    return (
        not isinstance(tensor, UninitializedParameter)
        and tensor.device.type == "cpu"
        and tensor.dtype in _FLOATS
        and tensor.layout is torch.strided
        and 0 < tensor.numel() <= _SMALL
        and not hasattr(tensor, "to_local")
    )


def _plain(tensor: torch.Tensor) -> torch.Tensor | None:
    """The numbers of a tensor as a dense one without graph; None if they cannot be read."""
    if isinstance(tensor, UninitializedParameter):
        return None
    tensor = tensor.detach()
    if hasattr(tensor, "to_local"):  # a DTensor: this rank's part
        tensor = tensor.to_local()
    if tensor.layout is torch.sparse_coo:
        # A row may be stored several times; its parts add up.
        tensor = tensor.coalesce().values()
    if tensor.is_meta or tensor.layout is not torch.strided:
        return None
    return tensor


def _sum_of_squares(tensor: torch.Tensor) -> Late[Reals]:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.device.type != "cpu":
        # Without a look at the value, the safe way is to accumulate in double at once.
        return Numbers(torch.linalg.vector_norm(tensor, dtype=_widest(tensor)) ** 2)
    if tensor.numel() == 0:
        return Known(np.zeros(1))
    return Known(np.array([_squares_on_host(tensor, _elements(tensor))]))


def _elements(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """The elements of a dense tensor on the host in any order, in float32 or float64."""
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.to(torch.float32)
    # In the order in which they lie in memory, whatever was transposed, so without a copy.
    return tensor.numpy().ravel(order="K")


def _squares_on_host(tensor: torch.Tensor, elements: npt.NDArray[Any]) -> float:
    total = 0.0
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for start in range(0, len(elements), _BLOCK):
            block = elements[start : start + _BLOCK]
            total += float(np.dot(block, block))
    if not _TINY < total < _HUGE and (total != 0.0 or elements.any()):
        total = float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
    return total


def _all_statistics(tensor: torch.Tensor, count_zeros: bool) -> Late[Reals]:
    """float64[7] in the order of the fields of Statistics."""
    numel = tensor.numel()
    if numel == 0:
        return Known(np.array([0.0, 0.0, 0.0, math.nan, math.nan, 0.0, 0.0]))
    if tensor.device.type != "cpu":
        return Numbers(_statistics_on_device(tensor))
    if tensor.is_complex():
        squares = float(_sum_of_squares(tensor).value()[0])
        zeros = numel - int(torch.count_nonzero(tensor))
        nonfinite = 0 if math.isfinite(squares) else int((~torch.isfinite(tensor)).sum())
        return Known(np.array([numel, math.nan, squares, math.nan, math.nan, zeros, nonfinite]))
    elements = _elements(tensor)
    with np.errstate(all="ignore"):
        squares = _squares_on_host(tensor, elements)
        unfit = 0 if math.isfinite(squares) else np.count_nonzero(~np.isfinite(elements))
        total = 0.0
        for start in range(0, numel, _BLOCK):
            total += float(elements[start : start + _BLOCK].sum())
        if math.isinf(total):
            total = float(elements.sum(dtype=np.float64))
        none = np.count_nonzero(elements == 0) if count_zeros else math.nan
        least, greatest = elements.min(), elements.max()
    return Known(np.array([numel, total, squares, least, greatest, none, unfit]))


def _statistics_on_device(tensor: torch.Tensor) -> torch.Tensor:
    wide = _widest(tensor)
    nonzero = torch.count_nonzero(tensor).to(wide)
    nonfinite = (tensor.numel() - torch.isfinite(tensor).sum()).to(wide)
    numel = torch.full_like(nonzero, tensor.numel())
    nan = torch.full_like(nonzero, math.nan)
    if tensor.is_complex():
        squares = (
            torch.linalg.vector_norm(torch.view_as_real(tensor.resolve_conj()), dtype=wide) ** 2
        )
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
