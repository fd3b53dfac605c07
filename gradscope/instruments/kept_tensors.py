"""Whole tensors around an update, of the few parameters that the program asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gradscope.instruments.late import Late, Numbers
from gradscope.instruments.local import local

Array = npt.NDArray[Any]


class TensorKeeper:
    """Copies gradient, weight and state tensors around the updates of some parameters.

    In the order of a step: :meth:`before`, :meth:`gradients` (once more for each evaluation of a
    closure), :meth:`after`.

    Args:
        places: of these parameters in the list of all that the optimizer holds.
    """

    def __init__(self, places: Sequence[int]) -> None:
        self._places = places
        self._copies: dict[int, dict[str, Late[Array]]] = {}

    def before(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Any]) -> bool:
        """Copy weights and state as an update finds them."""
        self._copies = {place: {} for place in self._places if parameters[place] is not None}
        self._copy_all(optimizer, parameters, "before")
        return True

    def gradients(self, gradients: Sequence[Any]) -> bool:
        """Copy the gradients that an update is about to read."""
        for place, copies in self._copies.items():
            for name in ("gradient", "touched"):
                copies.pop(name, None)
            gradient = gradients[place]
            _copy(copies, "gradient", gradient)
            if gradient is not None and gradient.layout is torch.sparse_coo:
                touched = torch.zeros(gradient.shape, dtype=torch.bool, device=gradient.device)
                touched[tuple(gradient._indices())] = True
                _copy(copies, "touched", touched)
        return True

    def after(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[Any]
    ) -> dict[int, Late[dict[str, Array]]]:
        """Copy weights and state as an update left them.

        Returns:
            By place the copies by name: ``weight_before``, ``gradient``, ``exp_avg_before`` …; of a
            sparse gradient also ``touched``, where it has elements.
        """
        self._copy_all(optimizer, parameters, "after")
        kept, self._copies = self._copies, {}
        return {place: _Together(copies) for place, copies in kept.items()}

    def _copy_all(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[Any], when: str
    ) -> None:
        for place, copies in self._copies.items():
            parameter = parameters[place]
            if parameter is None:
                continue
            _copy(copies, f"weight_{when}", parameter)
            # The state is a defaultdict: asking for what is not there would create it.
            for key, value in (optimizer.state.get(parameter) or {}).items():
                _copy(copies, f"{key}_{when}", value)


def _copy(copies: dict[str, Late[Array]], name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor) or value.is_meta:
        return
    value = local(value.detach())
    if value.layout is not torch.strided:
        value = value.to_dense()
    # NumPy has no bfloat16; of a half every value is a float32.
    is_half = value.dtype.is_floating_point and value.dtype.itemsize < 4
    copies[name] = Numbers(value, torch.float32 if is_half else value.dtype)


class _Together(Late[dict[str, Array]]):
    """Several late tensors as one value."""

    def __init__(self, copies: dict[str, Late[Array]]) -> None:
        self._copies = copies

    def ready(self) -> bool:
        return all(copy.ready() for copy in self._copies.values())

    def value(self) -> dict[str, Array]:
        return {name: np.asarray(copy.value()) for name, copy in self._copies.items()}
