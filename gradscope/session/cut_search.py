"""When to look for the place where a graph was cut, and for how long."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from gradscope.instruments.graph_cut import Cut, GraphCutFinder
from gradscope.instruments.source_lines import SourceLines
from gradscope.run.captured_graph import CapturedGraph
from gradscope.session.failures import Failures
from gradscope.taps.tap import Listener

_MOST_TOLD = 16
"""How many cuts are told of one graph."""

_MOST_SEARCHES = 8
"""How many steps are armed at most, in a loop that is suspicious at every step."""


class CutSearch:
    """Arms the cut finder for each optimizer's first step, and after a backward without effect.

    Args:
        failures: runs the finder.
        event: adds a row to ``events``.
        lines: notes the lines of the program while calls are followed.
    """

    def __init__(self, failures: Failures, event: Callable[..., None], lines: SourceLines) -> None:
        self._failures = failures
        self._lines = lines
        self._event = event
        self._finder: GraphCutFinder | None = None
        self._n_searches = 0
        self._suspicious = False
        self._is_over = False
        self._looks_away = False
        self._seconds = 0.0

    @property
    def seconds(self) -> float:
        """What following calls of torch functions has taken so far."""
        return self._seconds + (0.0 if self._finder is None else self._finder.seconds)

    @property
    def is_armed(self) -> bool:
        """Whether a finder is at work."""
        return self._finder is not None

    def wants_to_search(self, *, someone_is_new: bool) -> bool:
        """Whether there is a reason to search in the step that begins."""
        self.look_back()  # a step that raised has not told of its end
        if self._is_over:
            self.step_ended()
        has_reason = someone_is_new or self._suspicious
        return self._finder is None and has_reason and self._n_searches < _MOST_SEARCHES

    def arm(self) -> None:
        """Follow every call from here on."""
        self._n_searches += 1
        self._suspicious = False
        self._finder = self._failures.run("graph_cut", GraphCutFinder, self._failed)
        if self._finder is not None:
            self._finder.tell(self._lines)
            self._event("armed", "graph_cut")

    def tell(self, listener: Listener | None) -> None:
        """Let somebody else listen to the calls that are followed, as long as they are."""
        if self._finder is not None and listener is not None:
            self._finder.tell(listener)
            self._event("armed", "closer_look")

    def backward_reached_nothing(
        self, roots: Sequence[torch.Tensor], leaves: Sequence[torch.Tensor]
    ) -> bool:
        """Find where the graph of a backward that wrote no gradient was cut.

        If nobody looked, look next time.

        Args:
            roots: where the backward started.
            leaves: where its graph ends; nothing for roots without a graph.

        Returns:
            Whether a leaf was seen to be cut from another graph.
        """
        if self._finder is None:
            self._suspicious = True
            return False
        cut: Cut | None = self._failures.run("graph_cut", self._finder.cut_of, leaves or roots)
        ends_in_cut = bool(leaves) and cut is not None
        if cut is None:
            cut = self._failures.run("graph_cut", self._finder.rebuilding_of, leaves or roots)
        if cut is not None:
            self._n_searches = _MOST_SEARCHES
            self._event("cut", cut.function, cut.location)
        return ends_in_cut

    def graph_captured(self, captured: CapturedGraph) -> None:
        """Tell which modules' results were cut off, and are part of a loss all the same.

        Args:
            captured: the graph of the loss, with the calls of modules.
        """
        if self._finder is None or not len(captured.calls):
            return
        numbers = set(captured.sequence_nr.tolist())
        cuts: list[Cut] = self._failures.run("graph_cut", self._finder.cuts_within, numbers) or []
        first, last = captured.calls.first, captured.calls.last
        for cut in cuts[:_MOST_TOLD]:
            around = [np.flatnonzero((first <= n) & (n < last)) for n in sorted(cut.cut_off)]
            innermost = {captured.calls.path(int(calls[-1])) for calls in around if len(calls)}
            for path in sorted(innermost):
                self._event("cut_in_loss", f"{path}, {cut.function}", cut.location)

    def backward_ended(self) -> None:
        """Let the search end: what it was for is known now, one way or the other."""
        self._is_over = self._finder is not None

    def look_away(self) -> None:
        """Follow no calls for a while: an optimizer's own are none of a graph."""
        # In a step inside of a backward the mode is at work itself, and cannot be taken out.
        if self._finder is not None and not self._looks_away and self.can_give_up:
            self._looks_away = True
            self._finder.suspend()

    def look_back(self) -> None:
        """Follow calls again."""
        if self._finder is not None and self._looks_away:
            self._finder.resume()
        self._looks_away = False

    def step_ended(self) -> None:
        """Disarm at the end of a step, or later if that is in the middle of a backward."""
        self._is_over = not self.can_give_up
        if not self._is_over:
            self.give_up()

    def give_up(self) -> None:
        """Disarm now."""
        if self._finder is not None:
            self._seconds += self._finder.seconds
            self._finder.disarm()
            self._finder = None

    @property
    def can_give_up(self) -> bool:
        """Whether :meth:`give_up` would leave nothing behind right now."""
        return self._finder is None or self._finder.can_be_disarmed

    def _failed(self, error: Exception) -> None:
        self._failures.silence("graph_cut", "instrument-failed", error)
