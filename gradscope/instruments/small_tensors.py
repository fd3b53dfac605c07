"""Many small tensors, read in a few calls.

One call of torch on a small tensor costs more than reading it, and a buffer for all of them would
be out of the processor's cache again before it is read. So tensors of one shape are stacked, some
at a time, into one small buffer, and reduced there along its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.parameter import UninitializedParameter

from gradscope.instruments.local import is_spread

Places = npt.NDArray[np.int64]
Singles = npt.NDArray[np.float32]
Reals = npt.NDArray[np.float64]

LARGEST = 16_384
"""Elements of a tensor above which it is read by itself."""

TINY, HUGE = 1e-30, 1e37
"""Outside of these a float32 sum of squares has lost digits to underflow or overflow."""

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class _Stack:
    """Tensors of one shape and dtype that fit into the buffer together.

    Attributes:
        members, places: the places of k tensors in the list of all, as int64[k] too.
        target: float32[k, *shape], the buffer as torch is to fill it.
        rows, row_vectors, column_vectors: float32[k, n], [k, 1, n] and [k, n, 1], the same memory.
        squares: float32[k, 1, 1], where their sums of squares go.
    """

    members: list[int]
    places: Places
    target: torch.Tensor
    rows: Singles
    row_vectors: Singles
    column_vectors: Singles
    squares: Singles


class SmallTensors:
    """Reads the small ones of lists of tensors that are shaped like a fixed list.

    Args:
        like: the tensors, or None for one that is gone; of each only shape, dtype and device are
            remembered.

    Attributes:
        others: places of the tensors that are not small, or that do not lie in the host's memory.
    """

    def __init__(self, like: Sequence[torch.Tensor | None]) -> None:
        alike: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
        self.others: list[int] = []
        for place, tensor in enumerate(like):
            if tensor is not None and _is_small(tensor):
                alike.setdefault((tensor.shape, tensor.dtype), []).append(place)
            else:
                self.others.append(place)
        # Where the program has set a default device, it is not meant for us.
        buffer = torch.zeros(LARGEST if alike else 0, dtype=torch.float32, device="cpu")
        self._places = np.array([i for members in alike.values() for i in members], np.int64)
        self._squares = np.zeros(len(self._places), np.float32)
        self._stacks: list[_Stack] = []
        start = 0
        for (shape, _), members in alike.items():
            n = shape.numel()
            most = LARGEST // n
            for first in range(0, len(members), most):
                some = members[first : first + most]
                k = len(some)
                part = buffer[: k * n]
                rows = part.view(k, n).numpy()
                squares = self._squares[start : start + k]
                self._stacks.append(
                    _Stack(
                        some,
                        np.array(some, np.int64),
                        part.view(k, *shape),
                        rows,
                        rows.reshape(k, 1, n),
                        rows.reshape(k, n, 1),
                        squares.reshape(k, 1, 1),
                    )
                )
                start += k

    def sums_of_squares(
        self, tensors: Sequence[torch.Tensor | None], result: Reals, irregular: list[int]
    ) -> None:
        """Fill in the sum of squares of each, whatever its scale.

        Args:
            tensors: like those that the reader was made for; None for an absent one.
            result: float64[n], one place for each of ``tensors``.
            irregular: to this are added the places of those that cannot be stacked.
        """
        if not self._stacks:
            return
        squares = self._squares
        with np.errstate(over="ignore", under="ignore", invalid="ignore"), torch.no_grad():
            for stack in self._stacks:
                try:
                    torch.stack([tensors[i] for i in stack.members], out=stack.target)  # type: ignore[misc]
                except (TypeError, RuntimeError):  # one is absent, or sparse
                    stack.squares.fill(np.nan)
                else:
                    np.matmul(stack.row_vectors, stack.column_vectors, out=stack.squares)
        result[self._places] = squares
        if _is_usual(squares):
            return
        for stack in self._stacks:
            if not _is_usual(stack.squares):
                for places, rows in _fill(stack, tensors, irregular):
                    result[places] = sums_of_squares(rows)

    def rows(
        self, tensors: Sequence[torch.Tensor | None], irregular: list[int]
    ) -> Iterator[tuple[Places, Singles]]:
        """Give the tensors of each stack as rows, which the next stack overwrites.

        Args:
            tensors: like those that the reader was made for; None for an absent one.
            irregular: to this are added the places of those that cannot be stacked.

        Yields:
            Their places, int64[k], and their elements, float32[k, n].
        """
        for stack in self._stacks:
            yield from _fill(stack, tensors, irregular)


def sums_of_squares(rows: Singles) -> Reals:
    """Return float64[k], the sum of squares of each row.

    A product of a row and a column is a call of BLAS, which adds in several lanes: float32 loses no
    more than its last digit. Where squares leave its range, double precision takes its place.
    """
    k, n = rows.shape
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        products: Singles = np.matmul(rows.reshape(k, 1, n), rows.reshape(k, n, 1)).reshape(k)
    if _is_usual(products):
        return products.astype(np.float64)
    wide = rows.astype(np.float64)
    return np.asarray(np.einsum("ij,ij->i", wide, wide))


def _is_usual(squares: Singles) -> bool:
    return bool(squares.min() > TINY and squares.max() < HUGE)


def _fill(
    stack: _Stack, tensors: Sequence[torch.Tensor | None], irregular: list[int]
) -> Iterator[tuple[Places, Singles]]:
    everything = [tensors[i] for i in stack.members]
    try:
        # The usual case: none is absent, or sparse.
        with torch.no_grad():
            torch.stack(everything, out=stack.target)  # type: ignore[arg-type]
    except (TypeError, RuntimeError):
        pass
    else:
        yield stack.places, stack.rows
        return
    there = [(i, t) for i in stack.members if (t := tensors[i]) is not None]
    regular = [(i, t) for i, t in there if t.layout is torch.strided]
    irregular += [i for i, t in there if t.layout is not torch.strided]
    if regular:
        k = len(regular)
        with torch.no_grad():
            torch.stack([t for _, t in regular], out=stack.target[:k])
        yield np.array([i for i, _ in regular], np.int64), stack.rows[:k]


def _is_small(tensor: torch.Tensor) -> bool:
    return (
        not isinstance(tensor, UninitializedParameter)
        and tensor.device.type == "cpu"
        and tensor.dtype in _FLOATS
        and tensor.layout is torch.strided
        and 0 < tensor.numel() <= LARGEST
        and not is_spread(tensor)
    )
