"""How far a step moves the weights, from a copy of them taken before it.

A weight before that is computed back from the result would prove nothing about the step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.parameter import UninitializedParameter

from gradscope.instruments.late import Known, Late
from gradscope.instruments.statistics import Reals, StatisticsReader


class WeightChange:
    """Holds one float32 copy of a fixed list of parameters, allocated once.

    Args:
        parameters: the parameters, None for one that is gone.
    """

    def __init__(self, parameters: Sequence[torch.Tensor | None]) -> None:
        self._reader = StatisticsReader(parameters)
        self._copies = [_room_for(parameter) for parameter in parameters]
        self._copied: list[int] = []

    def before(self, parameters: Sequence[torch.Tensor | None]) -> Late[Reals]:
        """Copy the weights; returns float64[n], their sums of squares, NaN for one not copied."""
        self._copied = [
            i
            for i, parameter in enumerate(parameters)
            if parameter is not None and self._copies[i] is not None
        ]
        with torch.no_grad():
            copies, current = self._pairs(parameters)
            if copies:
                torch._foreach_copy_(copies, current)
        return self._reader.sums_of_squares(self._held())

    def after(self, parameters: Sequence[torch.Tensor | None]) -> tuple[Late[Reals], Late[Reals]]:
        """Return float64[n] each: sums of squares of the weights now, and of their change.

        Uses the copies up: the difference is taken in their place.
        """
        if not self._copied:
            nothing = np.full(len(parameters), np.nan)
            return Known(nothing), Known(nothing)
        with torch.no_grad():
            copies, current = self._pairs(parameters)
            torch._foreach_sub_(copies, current)
        change = self._reader.sums_of_squares(self._held())
        now = self._reader.sums_of_squares(parameters)
        self._copied = []
        return now, change

    def _pairs(
        self, parameters: Sequence[torch.Tensor | None]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        pairs = [
            (copy, parameter.detach())
            for i in self._copied
            if (parameter := parameters[i]) is not None and (copy := self._copies[i]) is not None
        ]
        return [copy for copy, _ in pairs], [parameter for _, parameter in pairs]

    def _held(self) -> list[torch.Tensor | None]:
        held = set(self._copied)
        return [copy if i in held else None for i, copy in enumerate(self._copies)]


def _room_for(parameter: torch.Tensor | None) -> torch.Tensor | None:
    if (
        parameter is None
        or isinstance(parameter, UninitializedParameter)
        or parameter.is_meta
        or parameter.layout is not torch.strided
        or hasattr(parameter, "to_local")
    ):
        return None
    dtype = parameter.dtype
    if dtype.is_floating_point and dtype.itemsize < 8:
        dtype = torch.float32
    return torch.empty(parameter.shape, dtype=dtype, device=parameter.device)
