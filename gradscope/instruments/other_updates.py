"""Norms of weights and updates where a model is too large to be taken apart all at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gradscope.instruments.flat_copies import FlatCopies, Integers, real_view
from gradscope.instruments.late import Late
from gradscope.instruments.statistics import Reals, StatisticsReader


class OtherUpdates:
    """Reads of the parameters whose turn it is not what can be told from a copy of the weights.

    Args:
        copies: where the weights are copied before each update.

    Attributes:
        tracked: of the last update, weights by their places in a buffer of all, int64[k]: which
            members they belong to, int64[k], and their values by name.
    """

    def __init__(self, copies: FlatCopies) -> None:
        self._copies = copies
        self._reader = StatisticsReader(copies.weights())
        nothing = np.zeros(0, np.int64)
        self.tracked: tuple[Integers, Integers, dict[str, Late[Any]]] = (nothing, nothing, {})

    def read(self, parameters: Sequence[torch.Tensor | None]) -> tuple[Integers, Late[Reals]]:
        """Read what an update has done; it needs the memory of their copies for that.

        Args:
            parameters: as the update left them, one for each member of the copies.

        Returns:
            Which members these are, int64[k]; and float64[3, k], sums of squares of the weights
            before, the weights after, and the update.
        """
        first, last = self._copies.turn
        others = [i for i, p in enumerate(parameters) if p is not None and not first <= i < last]
        weights = self._copies.weights()
        own: list[torch.Tensor | None] = [None] * len(weights)
        for i in others:
            own[i] = weights[i]
        now = [real_view(p) for i in others if (p := parameters[i]) is not None]
        copied = [weights[i] for i in others]
        at = np.array(others, np.int64)
        places, member = self._copies.tracked
        is_other = np.isin(member, at)
        places, member = places[is_other], member[is_other]
        values = {"weight_before": self._copies.gather("weight_before", places)}
        # The program's weights are not shown to NumPy: torch could resize them no more.
        before = self._reader.sums_of_squares(own)
        torch._foreach_sub_(copied, now)
        update = self._reader.sums_of_squares(own)
        torch._foreach_copy_(copied, now)
        after = self._reader.sums_of_squares(own)
        values["weight_after"] = self._copies.gather("weight_before", places)
        self.tracked = (places, member, values)
        return at, _Chosen((before, after, update), at)


class _Chosen(Late[Reals]):
    """Some entries of several arrays, as rows."""

    def __init__(self, arrays: Sequence[Late[Reals]], at: Integers) -> None:
        self._arrays, self._at = arrays, at

    def ready(self) -> bool:
        return all(array.ready() for array in self._arrays)

    def value(self) -> Reals:
        return np.array([array.value()[self._at] for array in self._arrays])
