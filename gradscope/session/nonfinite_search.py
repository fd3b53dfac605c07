"""When to search for the origin of NaN and infinity, and how it is told."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from gradscope.instruments.nonfinite import Origin, first_nonfinite, first_singular, has_singular
from gradscope.run.captured_graph import CapturedGraph, operation
from gradscope.run.recording import Recording
from gradscope.session.failures import Failures
from gradscope.session.schedule import at_doublings
from gradscope.taps.user_frame import Location

_MOST_TOLD = 4
_SHARE = 0.1
"""The share of the time that looking at singular points may take, after the first backwards."""

_MOST_SUSPECTS = 64

_ALWAYS = 32
"""So many first backwards are looked at whatever it costs."""


class NonfiniteSearch:
    """Traces the first losses and gradients that are not finite.

    A loss that is not finite is traced before its backward. Whether a gradient will be finite is
    not known then, so in graphs with operations whose derivative can be infinite these are looked
    at before every backward, as far as time allows, and told if the step then reads such gradients.

    Args:
        recording: holds the graphs of first steps, which know module and line of every node.
        failures: runs the instruments.
        event: adds a row to ``events``.
    """

    def __init__(
        self, recording: Recording, failures: Failures, event: Callable[..., None]
    ) -> None:
        self._recording = recording
        self._failures = failures
        self._event = event
        self._n_told = 0
        self._is_suspicious = False
        # By the number of the backward that came past it.
        self._suspects: dict[int, Origin] = {}
        self._next_look = 0.0
        self._has_singular = False
        self._captured: CapturedGraph | None = None
        self._n_backwards = 0

    def backward_started(
        self, roots: Sequence[torch.Tensor], captured: CapturedGraph | None
    ) -> None:
        """Look at a loss, and at the points where its graph is singular.

        Args:
            roots: where the backward starts.
            captured: its graph, if that was captured.
        """
        if captured is not None:
            self._captured = captured
        if self._n_told >= _MOST_TOLD or not roots:
            return
        if self._is_suspicious or _is_nonfinite_here(roots[0]):
            self._is_suspicious = False
            origin: Origin | None = self._failures.run("nonfinite", first_nonfinite, roots)
            if origin is not None:
                self._tell(origin)
            return
        now = time.perf_counter()
        self._n_backwards += 1
        if at_doublings(self._n_backwards):  # now and then: graphs change
            self._has_singular = bool(self._failures.run("nonfinite", has_singular, roots))
        is_early = self._n_backwards <= _ALWAYS
        if not self._has_singular or (now < self._next_look and not is_early):
            return
        found: Origin | None = self._failures.run("nonfinite", first_singular, roots)
        if found is not None and len(self._suspects) < _MOST_SUSPECTS:
            self._suspects[self._n_backwards] = found
        spent = time.perf_counter() - now
        self._next_look = now + spent / _SHARE if found is None else 0.0

    def step_ended(self) -> Callable[[float, float], None]:
        """Return whom to tell what a step that has ended read, once it is known."""
        return functools.partial(self._step_read, self._n_backwards)

    def _step_read(self, n_backwards: int, grad_norm: float, loss: float) -> None:
        earlier = [number for number in self._suspects if number <= n_backwards]
        suspects = [self._suspects.pop(number) for number in earlier]
        if math.isfinite(grad_norm) and not math.isnan(loss):
            return
        if suspects and self._n_told < _MOST_TOLD:
            self._tell(suspects[0])
        elif self._n_told == 0:
            self._is_suspicious = True

    def _tell(self, origin: Origin) -> None:
        if not origin.operation:
            self._n_told = _MOST_TOLD  # from here on everything is
            self._event("nonfinite", origin.what)
            return
        self._n_told += 1
        graphs = list(self._recording.graphs.values())
        if self._captured is not None:
            graphs.append(self._captured)
        module, location = _place_of(origin, graphs)
        within = f" in {module}" if module else ""
        values = "value" if origin.count == 1 else "values"
        detail = f"{origin.operation}{within}: {origin.what} ({origin.count} {values})"
        self._event("nonfinite", detail, location)


def _is_nonfinite_here(root: torch.Tensor) -> bool:
    # On another device asking would wait for it; there the step tells later.
    if root.device.type != "cpu" or root.numel() != 1 or not root.is_floating_point():
        return False
    return not math.isfinite(root.detach().item())


def _place_of(origin: Origin, graphs: Any) -> tuple[str, Location | None]:
    """Module and line of an operation, from a graph that was captured with both.

    The nodes of one operation are told apart by the order in which they were made.
    """
    for graph in graphs:
        numbers = [n for n, name in enumerate(graph.ops) if operation(name) == origin.operation]
        nodes = np.flatnonzero(np.isin(graph.op, numbers))
        if len(nodes) != origin.of:
            continue
        nodes = nodes[np.argsort(graph.sequence_nr[nodes])]
        return _described(graph, int(nodes[origin.rank]))
    return "", None


def _described(graph: CapturedGraph, node: int) -> tuple[str, Location | None]:
    module = ""
    if len(graph.call) and graph.call[node] >= 0:
        module = graph.calls.path(int(graph.call[node]))
    location = None
    if len(graph.line) and graph.line[node] >= 0:
        file, line = graph.lines[int(graph.line[node])]
        location = Location(file, line, "")
    return module, location
