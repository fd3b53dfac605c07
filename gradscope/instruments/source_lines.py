"""Which line of the program made which nodes of the autograd graph; for armed steps only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from gradscope.run.captured_graph import CapturedGraph
from gradscope.taps.user_frame import user_location

_sequence_nr: Callable[[], int] = torch._C._autograd._get_sequence_nr

_MOST_CALLS = 100_000
"""How many calls are noted at most: a loop may go on without ever ending its first step."""


class SourceLines:
    """Notes the line behind every call that makes nodes."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, int], int] = {}
        # Of each call the numbers of its nodes, from and up to, and the line.
        self._calls: list[tuple[int, int, int]] = []

    def __len__(self) -> int:
        return len(self._calls)

    def forget(self) -> None:
        """Drop everything noted so far."""
        self._calls.clear()
        self._lines.clear()

    def failed(self, where: str, error: Exception) -> None:
        """Drop everything after an error: no line is better than a wrong one."""
        self.forget()

    def torch_function_called(
        self, function: Callable[..., Any], args: Any, kwargs: Any, result: Any, first_node: int
    ) -> None:
        """Note one call."""
        now = _sequence_nr()
        if now == first_node or len(self._calls) >= _MOST_CALLS:
            return
        location = user_location()
        if location is not None:
            line = self._lines.setdefault((location.file, location.line), len(self._lines))
            self._calls.append((first_node, now, line))

    def attribute(self, captured: CapturedGraph) -> CapturedGraph:
        """Return a graph in which every node knows the line that made it, as far as was seen."""
        if not self._calls:
            return captured
        # Calls inside of others are not seen, so these do not overlap.
        first, last, line = np.array(sorted(self._calls), np.int64).T
        at = np.searchsorted(first, captured.sequence_nr, side="right") - 1
        is_known = (at >= 0) & (captured.sequence_nr < last[at])
        return replace(
            captured,
            line=np.where(is_known, line[at], -1).astype(np.int32),
            lines=tuple(self._lines),
        )
