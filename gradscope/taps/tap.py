"""What every tap has in common: its listeners, and the edge at which their errors stop."""

from __future__ import annotations

import threading
from typing import Any, ClassVar, Protocol


class Listener(Protocol):
    """Whoever listens to taps: a method for each event it wants, and a place for its errors."""

    def failed(self, where: str, error: Exception) -> None:
        """Take note that handling the event ``where`` raised ``error``; must not raise."""


class Tap:
    """One seam of torch, process-wide.

    Subclasses implement :meth:`install` and :meth:`uninstall` and call :meth:`emit` with the name
    of a listener's method; a listener that lacks the method is passed over.
    """

    events: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self.listeners: tuple[Any, ...] = ()
        self._lock = threading.Lock()

    def install(self) -> None:
        """Hook into torch. Called with the first listener."""
        raise NotImplementedError

    def uninstall(self) -> None:
        """Leave torch as it was found. Called with the last listener."""
        raise NotImplementedError

    def add(self, listener: Listener) -> None:
        """Begin to tell ``listener``; a second call for the same listener changes nothing."""
        with self._lock:
            if any(known is listener for known in self.listeners):
                return
            if not self.listeners:
                self.install()
            self.listeners = (*self.listeners, listener)

    def remove(self, listener: Listener) -> None:
        """Stop telling ``listener``; an unknown listener is ignored."""
        with self._lock:
            rest = tuple(known for known in self.listeners if known is not listener)
            if len(rest) == len(self.listeners):
                return
            self.listeners = rest
            if not rest:
                self.uninstall()

    def emit(self, event: str, *arguments: Any) -> None:
        """Tell every listener; what one raises is its own affair and goes to its ``failed``."""
        for listener in self.listeners:
            handle = getattr(listener, event, None)
            if handle is None:
                continue
            try:
                handle(*arguments)
            except Exception as error:
                listener.failed(event, error)
