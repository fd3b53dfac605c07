"""Doing things in the order in which they happened, several steps of them together."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

_MOST_STEPS = 16
"""Steps that are accounted for together. Between two of them training has filled the processor's
caches with its own; the same arithmetic for several steps in a row takes a fraction of the time."""

_MOST_LOOKED_AT = 8192
"""Parameters, over all steps, whose looks wait at most. For many parameters the arithmetic itself
is what takes time, and nothing is gained by waiting."""

_LONGEST_WAIT = 1.0
"""Seconds after which what waits is accounted for: a killed run should have lost little, and what
is written to a directory is written every few seconds."""

_MOST_ACTIONS = 1024
"""A program may go on calling its model and never step."""


class Awaited(Protocol):
    """Something that may not be there yet."""

    def ready(self) -> bool:
        """Whether it is there."""


class InOrder:
    """A queue of actions, each waiting for its values and for the actions before it.

    On the CPU every value is there at once, and what waits only waits for company. On an
    accelerator values arrive some steps later, and with them what depends on them.

    Args:
        failed: told when an action raises.

    Attributes:
        most_steps: steps that are accounted for together.
        settled: called whenever everything was done that could be.
    """

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self._queue: deque[tuple[Callable[[], None], tuple[Awaited, ...]]] = deque()
        self._failed = failed
        self._n_steps = 0
        self._since = 0.0
        self._has_failed = False
        # Whoever reads the tables in another thread settles what waits.
        self._lock = threading.RLock()
        self.most_steps = 1
        self.settled: Callable[[], None] = lambda: None

    def expect(self, n_params: int) -> None:
        """Take note of how many parameters each step looks at."""
        self.most_steps = max(1, min(_MOST_STEPS, _MOST_LOOKED_AT // max(1, n_params)))

    def do(self, action: Callable[[], None], *awaited: Awaited) -> None:
        """Do ``action`` once all is there, after everything that came before it.

        After one that has failed nothing is done any more: what builds on it would be wrong.
        """
        if self._has_failed:
            return
        self._queue.append((action, awaited))
        if len(self._queue) >= _MOST_ACTIONS:
            self.settle()

    def step_ended(self, *, is_urgent: bool) -> None:
        """Do what can be done, if enough has come together.

        Args:
            is_urgent: whether something in this step must not wait.
        """
        self._n_steps += 1
        now = time.perf_counter()
        if self._n_steps == 1:
            self._since = now
        if is_urgent or self._n_steps >= self.most_steps or now - self._since > _LONGEST_WAIT:
            self.settle()

    def settle(self, *, wait: bool = False) -> None:
        """Do what can be done; with ``wait``, wait for values and do everything."""
        with self._lock:
            self._n_steps = 0
            while self._queue:
                action, awaited = self._queue[0]
                if not wait and not all(value.ready() for value in awaited):
                    break
                self._queue.popleft()
                self._try(action)
            self._try(self.settled)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._has_failed = True
            self._queue.clear()
            self._failed(error)
