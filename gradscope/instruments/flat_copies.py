"""Copies of several quantities of many parameters, each quantity in one flat buffer.

One call copies all parameters, and arithmetic on them is a few long loops instead of many short
ones. The buffers are allocated once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.parameter import UninitializedParameter

from gradscope.instruments.late import Known, Late, Numbers
from gradscope.instruments.local import is_spread

Integers = npt.NDArray[np.int64]

MOST_BYTES = 64 * 2**20
"""What all copies but that of the weights may take, or :data:`_SHARE` of that if it is more."""

_SHARE = 0.25

TRACKED = 16
"""How many weights of each parameter are kept of every recorded step."""

_STACKED = 4
"""From how many neighbours of one shape on one call for all is quicker than one for each."""


class FlatCopies:
    """Buffers for copies of the parameters of one device and working precision.

    Complex parameters are copied as pairs of real numbers. The copy of the weights has room for all
    parameters. The other quantities have room for :attr:`turn`, a range of them, because a large
    model leaves no memory for copies of everything: then the ranges take turns.

    Args:
        device: where the buffers lie.
        dtype: float32, or float64 for double precision parameters.
        places: where in the list of all parameters these are.
        parameters: the parameters themselves; of each only the shape is remembered.
        n_quantities: how many quantities besides the weight will be copied.

    Attributes:
        places: int64[n].
        names_of_dtypes: the dtype of each parameter, without ``torch.``.
        starts: int64[n + 1], where each parameter begins in a buffer of all, and where the last
            ends.
        turn: first and last + 1 of the parameters whose other quantities there is room for now.
        cuts: room for how those who read the copies cut ranges of them.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        places: Sequence[int],
        parameters: Sequence[torch.Tensor],
        n_quantities: int,
    ) -> None:
        self.device, self.dtype = device, dtype
        self.places = np.array(places, np.int64)
        self.names_of_dtypes = [str(p.dtype).removeprefix("torch.") for p in parameters]
        self._shapes = [real_view(parameter).shape for parameter in parameters]
        sizes = np.array([shape.numel() for shape in self._shapes], np.int64)
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        total = int(self.starts[-1])
        most = max(MOST_BYTES // dtype.itemsize, int(_SHARE * total))
        self._turns = _turns(self.starts, most // max(1, n_quantities))
        self._turn = 0
        self._room = max(int(self.starts[b] - self.starts[a]) for a, b in self._turns)
        self._has_complex = any(parameter.is_complex() for parameter in parameters)
        self.cuts: dict[tuple[int, int], list[Any]] = {}
        self._buffers: dict[str, torch.Tensor] = {}
        self._views: dict[tuple[str, int], list[torch.Tensor]] = {}
        self._stacks: dict[
            tuple[str, int], tuple[list[int], list[tuple[int, int, torch.Tensor]]]
        ] = {}

    @property
    def turn(self) -> tuple[int, int]:
        """Which parameters there is room for now."""
        return self._turns[self._turn]

    @property
    def _all_present(self) -> npt.NDArray[np.bool_]:
        return np.ones(self.turn[1] - self.turn[0], np.bool_)

    @property
    def has_turns(self) -> bool:
        """Whether there is no room for all parameters at once."""
        return len(self._turns) > 1

    def next_turn(self) -> None:
        """Make room for the next parameters; what was copied of the present ones is lost."""
        self._turn = (self._turn + 1) % len(self._turns)

    def copy_weights(self, parameters: Sequence[Any]) -> None:
        """Copy all weights, as they are now."""
        sources = [real_view(p) for p in parameters] if self._has_complex else parameters
        self._copy_all("weight_before", sources)

    @cached_property
    def tracked(self) -> tuple[Integers, Integers]:
        """Of each parameter some elements, spread evenly, its first and its last among them.

        Their places in a buffer of all parameters, int64[k], and whose they are, int64[k].
        """
        places = [
            np.unique(np.linspace(start, stop - 1, TRACKED).astype(np.int64))
            for start, stop in pairwise(self.starts.tolist())
        ]
        member = np.repeat(np.arange(len(places)), [len(each) for each in places])
        return np.concatenate([[], *places]).astype(np.int64), member

    def weights(self) -> list[torch.Tensor]:
        """Return the copies of all weights, each in its shape."""
        return self._views_of("weight_before")

    def copy(self, quantity: str, tensors: Sequence[torch.Tensor | None]) -> npt.NDArray[np.bool_]:
        """Copy a quantity of the parameters whose turn it is.

        Args:
            quantity: its name.
            tensors: one for each of these parameters, shaped like it, or None.

        Returns:
            Which of them there were; where there was none, the buffer holds what it held before.
        """
        views = self._views_of(quantity)
        if not self._has_complex:
            try:
                self._copy_all(quantity, tensors)
                return self._all_present
            except (AttributeError, TypeError, RuntimeError):  # one is absent, or sparse
                pass
        plain = [_plain(tensor, view) for tensor, view in zip(tensors, views, strict=True)]
        present = np.array([tensor is not None for tensor in plain], np.bool_)
        if present.any():
            there = [(view, tensor) for view, tensor in zip(views, plain, strict=True)]
            torch._foreach_copy_(
                [view for view, tensor in there if tensor is not None],
                [tensor for _, tensor in there if tensor is not None],
            )
        return present

    def _copy_all(self, quantity: str, tensors: Sequence[Any]) -> None:
        """Copy tensors of which none is absent; those of one shape are stacked by one call."""
        single, stacks = self._stacks_of(quantity)
        for first, last, stack in stacks:
            # Torch would give another shape to where the result goes.
            if tensors[first].shape != stack.shape[1:]:
                raise TypeError
            torch.stack(tensors[first:last], out=stack)  # type: ignore[arg-type]
        if single:
            views = self._views_of(quantity)
            torch._foreach_copy_([views[i] for i in single], [tensors[i] for i in single])

    def _stacks_of(self, quantity: str) -> tuple[list[int], list[tuple[int, int, torch.Tensor]]]:
        """Which members are copied by themselves, and which neighbours of one shape together."""
        key = (quantity, 0 if quantity == "weight_before" else self._turn)
        found = self._stacks.get(key)
        if found is None:
            views = self._views_of(quantity)
            single: list[int] = []
            stacks = []
            first = 0
            for shape, alike in groupby(views, lambda view: view.shape):
                last = first + len(list(alike))
                if last - first < _STACKED or self.device.type != "cpu":
                    single += range(first, last)
                else:
                    flat = self._buffer(quantity)[views[first].storage_offset() :]
                    stack = flat[: (last - first) * shape.numel()].view(last - first, *shape)
                    stacks.append((first, last, stack))
                first = last
            found = self._stacks[key] = (single, stacks)
        return found

    def spread(self, quantity: str, numbers: Sequence[Any]) -> None:
        """Give every element of each parameter the same number.

        Args:
            quantity: its name.
            numbers: one for each parameter whose turn it is: a tensor of one element, a number, or
                None for 0.
        """
        own = [self._on_device(number) for number in numbers]
        torch._foreach_copy_(
            self._views_of(quantity),
            [number.expand_as(v) for number, v in zip(own, self._views_of(quantity), strict=True)],
        )

    def shaped(self, quantity: str, member: int) -> torch.Tensor:
        """Return the copy of one parameter's quantity, in its shape."""
        first = 0 if quantity == "weight_before" else self.turn[0]
        return self._views_of(quantity)[member - first]

    def flat(self, quantity: str, start: int, stop: int) -> torch.Tensor:
        """Return part of a buffer, by places in the buffer of all parameters."""
        buffer = self._buffer(quantity)
        base = 0 if quantity == "weight_before" else int(self.starts[self.turn[0]])
        return buffer[start - base : stop - base]

    def gather(self, quantity: str, positions: Integers) -> Late[Any]:
        """Return single elements, by their places in the buffer of all parameters."""
        buffer = self._buffer(quantity)
        base = 0 if quantity == "weight_before" else int(self.starts[self.turn[0]])
        if self.device.type == "cpu":
            return Known(buffer.numpy()[positions - base])
        at = torch.from_numpy(positions - base)
        if self.device.type == "cuda":  # a copy from unpinned memory makes the host wait
            at = at.pin_memory()
        return Numbers(buffer[at.to(self.device, non_blocking=True)])

    def _on_device(self, number: Any) -> torch.Tensor:
        if is_elsewhere(number):
            own: torch.Tensor = number.detach().reshape(())
            return own.to(self.device, self.dtype)
        # Filled in there: copied from the host, the host would wait.
        value = 0.0 if number is None else float(number)
        return torch.full((), value, device=self.device, dtype=self.dtype)

    def _buffer(self, quantity: str) -> torch.Tensor:
        buffer = self._buffers.get(quantity)
        if buffer is None:
            room = int(self.starts[-1]) if quantity == "weight_before" else self._room
            buffer = torch.zeros(room, dtype=self.dtype, device=self.device)
            self._buffers[quantity] = buffer
        return buffer

    def _views_of(self, quantity: str) -> list[torch.Tensor]:
        everything = quantity == "weight_before"
        first, last = (0, len(self.places)) if everything else self.turn
        key = (quantity, 0 if everything else self._turn)
        views = self._views.get(key)
        if views is None:
            shapes = self._shapes[first:last]
            sizes = [shape.numel() for shape in shapes]
            parts = self._buffer(quantity)[: sum(sizes)].split(sizes) if sizes else ()
            views = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
            self._views[key] = views
        return views


def is_elsewhere(value: Any) -> bool:
    """Whether a value is a tensor on a device, which the host would have to wait for."""
    return isinstance(value, torch.Tensor) and value.device.type != "cpu"


def can_be_copied(parameter: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    """Whether a parameter's numbers can be read as they lie in memory."""
    return (
        parameter is not None
        and not isinstance(parameter, UninitializedParameter)
        and not parameter.is_meta
        and parameter.layout is torch.strided
        and (parameter.dtype.is_floating_point or parameter.dtype.is_complex)
        and not is_spread(parameter)
    )


def working_dtype(parameter: torch.Tensor) -> torch.dtype:
    """The precision of a parameter's copies: every value of its dtype is one of theirs."""
    is_double = parameter.dtype in (torch.float64, torch.complex128)
    return torch.float64 if is_double else torch.float32


def real_view(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without graph, a complex one as pairs of real numbers."""
    tensor = tensor.detach()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _plain(tensor: torch.Tensor | None, view: torch.Tensor) -> Any:
    if tensor is None:
        return None
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = real_view(tensor)
    return tensor if tensor.shape == view.shape and not tensor.is_meta else None


def _turns(starts: Integers, most: int) -> list[tuple[int, int]]:
    """Split parameters into ranges of at most ``most`` numbers, or of a single parameter."""
    turns, first = [], 0
    for member in range(1, len(starts)):
        is_last = member == len(starts) - 1
        if is_last or starts[member + 1] - starts[first] > most:
            turns.append((first, member))
            first = member
    return turns or [(0, 0)]
