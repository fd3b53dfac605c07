"""Of which steps the autograd graph is captured, and the module calls that belong to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from gradscope.config import GraphSteps
from gradscope.instruments.autograd_graph import capture_graph
from gradscope.instruments.call_log import CallLog
from gradscope.instruments.source_lines import SourceLines
from gradscope.run.captured_graph import CapturedGraph
from gradscope.session.census import Census, is_compiled
from gradscope.session.failures import Failures

_MOST_FIRST = 64
"""How many graphs are captured at first steps; some optimizer may never make its own."""


class GraphCapture:
    """Captures the graphs that were asked for, and follows module calls at the steps they are of.

    Args:
        steps: of which steps the graph is wanted.
        census: names parameters and modules.
        failures: runs the instruments.
        lines: knows the lines of the program, while they are followed.
    """

    def __init__(
        self, steps: GraphSteps, census: Census, failures: Failures, lines: SourceLines
    ) -> None:
        self._steps = steps
        self._census = census
        self._failures = failures
        self._lines = lines
        self._log: CallLog | None = None
        self._stepped: set[int] = set()
        self._paths: dict[int, str] = {}
        self._paths_of = -1
        self._n_first = 0
        # How many nodes the forward had made when the last graph of each backward was captured.
        self._n_made: dict[object, int] = {}

    def call_started(self, module: nn.Module, step: int, *, someone_is_new: bool) -> None:
        """Begin to follow module calls, if the graph of this step will be captured."""
        if self._log is not None or not self._may_be_wanted(step, someone_is_new):
            return
        if is_compiled(module):
            return  # there is nothing inside to be seen
        self._failures.run("module_calls", self._follow)

    def wanted(self, step: int, place: object, n_made: int, *, someone_is_new: bool) -> bool:
        """Whether the graph of a backward is to be captured.

        Args:
            step: the number that the next attempt will have.
            place: the line that calls the backward.
            n_made: how many nodes the forward has made.
            someone_is_new: whether an optimizer has made no attempt yet.
        """
        has_changed = self._steps == "changed" and self._n_made.get(place) != n_made
        is_first = someone_is_new and self._steps in ("first", "changed")
        if is_first and self._n_first >= _MOST_FIRST:
            return False
        if not (has_changed or is_first or self._is_asked_for(step)):
            return False
        self._n_first += is_first
        if self._steps == "changed":
            self._n_made[place] = n_made
        return True

    def capture(
        self,
        roots: Sequence[torch.Tensor],
        leaves: list[torch.Tensor] | None = None,
        *,
        whole: bool = True,
    ) -> CapturedGraph | None:
        """Capture the graph behind the roots of a backward.

        Args:
            roots: where it starts.
            leaves: the leaves of the graph are added to this list.
            whole: whether to read what nodes keep and to tell modules and lines, too.
        """

        def names_of(leaf: torch.Tensor) -> tuple[str, ...]:
            if leaves is not None:
                leaves.append(leaf)
            return self._census.names_of(leaf)

        def captured() -> CapturedGraph:
            graph = capture_graph(roots, names_of, saved=whole)
            if not whole:
                return graph
            graph = replace(graph, registered=self._census.registered())
            if self._log is not None:
                graph = self._log.attribute(graph, self._paths_now())
            return self._lines.attribute(graph)

        graph: CapturedGraph | None = self._failures.run("autograd_graph", captured)
        return graph

    @property
    def has_notes(self) -> bool:
        """Whether calls or lines were noted, which is so at few steps."""
        return self._log is not None or len(self._lines) > 0

    def step_ended(self, optimizer: int, optimizers: Sequence[int]) -> None:
        """Forget the notes once every optimizer has stepped: a graph may belong to a later one."""
        self._stepped.add(optimizer)
        if self._stepped.issuperset(optimizers) or self._n_first >= _MOST_FIRST:
            self._stepped.clear()
            self.give_up()

    def give_up(self) -> None:
        """Follow module calls no more, and forget what was noted."""
        self._lines.forget()
        if self._log is not None:
            self._log.stop()
            self._log = None

    def _paths_now(self) -> dict[int, str]:
        """The path of each module, worked out anew only if models have come or changed.

        Naming every module takes as long as following their calls.
        """
        if self._paths_of != self._census.generation:
            self._paths, self._paths_of = (
                self._census.paths_of_modules(),
                self._census.generation,
            )
        return self._paths

    def _follow(self) -> None:
        log = CallLog(self._paths_now(), self._failed)
        log.start()
        self._log = log

    def _failed(self, error: Exception) -> None:
        self._failures.silence("module_calls", "instrument-failed", error)

    def _may_be_wanted(self, step: int, someone_is_new: bool) -> bool:
        if self._steps == "changed":
            return True
        is_first = someone_is_new and self._steps == "first" and self._n_first < _MOST_FIRST
        return is_first or self._is_asked_for(step)

    def _is_asked_for(self, step: int) -> bool:
        return self._steps == "every" or (
            isinstance(self._steps, frozenset) and step in self._steps
        )
