"""Values that may still be on their way from an accelerator.

Reading a value from a device waits for all work queued there; inside a training step that is
forbidden. So a value is copied to the host without waiting, and asked for when it has arrived.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import numpy.typing as npt
import torch

from gradscope.instruments.local import is_spread

T_co = TypeVar("T_co", covariant=True)


class Late(Protocol[T_co]):
    """A value that may not be there yet."""

    def ready(self) -> bool:
        """Whether :meth:`value` would return without waiting."""

    def value(self) -> T_co:
        """Return the value, waiting for it if need be."""


class Known(Late[T_co]):
    """A value that is there."""

    __slots__ = ("_value",)

    def __init__(self, value: T_co) -> None:
        self._value = value

    def ready(self) -> bool:
        """Return True."""
        return True

    def value(self) -> T_co:
        """Return the value."""
        return self._value


class Numbers(Late[npt.NDArray[Any]]):
    """Numbers in a tensor, of any dtype and on any device, as an array.

    The tensor is read as it is when this is made: what the program writes into it afterwards does
    not matter.

    Args:
        tensor: a dense tensor.
        dtype: of the array.
    """

    __slots__ = ("_arrived", "_dtype", "_host")

    def __init__(self, tensor: torch.Tensor, dtype: torch.dtype = torch.float64) -> None:
        tensor = tensor.detach()
        self._dtype = dtype
        if tensor.device.type == "cpu":
            self._host = tensor.to(dtype, copy=True)
            self._arrived = None
            return
        # Pinned memory comes from torch's caching allocator; only into it can a copy go without
        # the host waiting.
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._arrived = torch.Event(tensor.device.type)
        self._arrived.record()

    def ready(self) -> bool:
        """Whether the copy has arrived on the host."""
        return self._arrived is None or self._arrived.query()

    def value(self) -> npt.NDArray[Any]:
        """Return the numbers, shaped like the tensor."""
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers: npt.NDArray[Any] = self._host.to(self._dtype).resolve_conj().numpy()
        return numbers


def scalar_of(tensor: torch.Tensor) -> Late[Any]:
    """Return the value of a tensor of one real element; NaN for any other tensor."""
    if tensor.numel() != 1 or tensor.is_meta or tensor.is_complex() or not _is_plain(tensor):
        return Known(float("nan"))
    if tensor.device.type == "cpu":
        return Known(tensor.detach().item())
    return Numbers(tensor.detach().reshape(()))


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and not is_spread(tensor)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # many at once, under vmap
    )
