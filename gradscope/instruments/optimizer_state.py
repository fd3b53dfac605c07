"""What an optimizer keeps for each parameter: moments, buffers, counters, of any class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gradscope.instruments.late import Known, Late, scalar_of
from gradscope.instruments.statistics import Statistics, StatisticsReader


@dataclass(slots=True)
class StateReading:
    """The state of an optimizer at one moment, one entry per parameter and key.

    Attributes:
        places: place of the parameter in the list that was passed, per entry.
        keys: name of the entry in ``optimizer.state[p]``.
        values: for each entry that is a single number, its value; None for a tensor.
        tensors: places of the entries that are tensors, in the order of ``statistics``.
        statistics: of those tensors.
    """

    places: list[int]
    keys: list[str]
    values: list[Late[Any] | None]
    tensors: list[int]
    statistics: Late[Statistics]

    def ready(self) -> bool:
        """Whether every value has arrived."""
        return self.statistics.ready() and all(v is None or v.ready() for v in self.values)


class StateReader:
    """Reads the state that an optimizer holds for a list of parameters."""

    def __init__(self) -> None:
        self._layout: list[tuple[int, str, torch.Size]] = []
        self._reader: StatisticsReader | None = None

    def read(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor | None]
    ) -> StateReading:
        """Read the state as it is now; a parameter that has none yet has no entry."""
        places: list[int] = []
        keys: list[str] = []
        values: list[Late[Any] | None] = []
        tensors: list[torch.Tensor] = []
        layout: list[tuple[int, str, torch.Size]] = []
        for place, parameter in enumerate(parameters):
            # The state is a defaultdict: asking for what is not there would create it.
            held = None if parameter is None else optimizer.state.get(parameter)
            if not held:
                continue
            for key, value in held.items():
                if isinstance(value, torch.Tensor) and value.dim() > 0:
                    layout.append((len(keys), str(key), value.shape))
                    tensors.append(value)
                    values.append(None)
                elif isinstance(value, torch.Tensor):
                    values.append(scalar_of(value))
                elif isinstance(value, int | float):
                    values.append(Known(float(value)))
                else:
                    continue
                places.append(place)
                keys.append(str(key))
        if self._reader is None or layout != self._layout:
            self._layout = layout
            self._reader = StatisticsReader(tensors)
        return StateReading(
            places=places,
            keys=keys,
            values=values,
            tensors=[entry for entry, _, _ in layout],
            statistics=self._reader.statistics(tensors),
        )
