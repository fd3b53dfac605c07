"""Doing things in the order in which they happened, once the values they need have arrived."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol


class Awaited(Protocol):
    """Something that may not be there yet."""

    def ready(self) -> bool:
        """Whether it is there."""


class InOrder:
    """A queue of actions, each waiting for its values and for the actions before it.

    On the CPU every value is there at once and nothing ever queues. On an accelerator values
    arrive some steps later, and with them what depends on them.

    Args:
        failed: told when an action raises.
    """

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self._queue: deque[tuple[Callable[[], None], tuple[Awaited, ...]]] = deque()
        self._failed = failed

    def do(self, action: Callable[[], None], *awaited: Awaited) -> None:
        """Do ``action`` now if all is there, else when it is; it may raise only if done now."""
        self.settle()
        if not self._queue and all(value.ready() for value in awaited):
            action()
        else:
            self._queue.append((action, awaited))

    def settle(self, *, wait: bool = False) -> None:
        """Do what can be done; with ``wait``, wait for values and do everything."""
        while self._queue:
            action, awaited = self._queue[0]
            if not wait and not all(value.ready() for value in awaited):
                return
            self._queue.popleft()
            try:
                action()
            except Exception as error:
                self._failed(error)
