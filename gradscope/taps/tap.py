"""What every tap has in common: its listeners, and the edge at which their errors stop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar, Protocol

from torch._C import DisableTorchFunction as _DisableTorchFunction
from torch._C import _len_torch_dispatch_stack
from torch.utils._python_dispatch import _disable_current_modes

from gradscope.taps.uncompiled import uncompiled
from gradscope.taps.undo import Undo
from gradscope.taps.user_frame import user_location


class Listener(Protocol):
    """Whoever listens to taps: a method for each event it wants, and a place for its errors."""

    def failed(self, where: str, error: Exception) -> None:
        """Take note that handling the event ``where`` raised ``error``; must not raise."""


@uncompiled
def out_of_sight(handle: Callable[..., Any], *arguments: Any) -> Any:
    """Call a listener such that what it does with tensors is not seen by the program's own modes.

    A mode of the program's that counts operations, forbids them or draws random numbers for each
    would behave differently otherwise.
    """
    hidden = _disable_current_modes() if _len_torch_dispatch_stack() else nullcontext()
    with _DisableTorchFunction(), hidden:
        return handle(*arguments)


class Tap:
    """One seam of torch, process-wide.

    Subclasses implement :meth:`install` and call :meth:`emit` with the name of a listener's method;
    a listener that lacks the method is passed over. What a tap does besides, around a call of the
    program's, it tries, and tells an error with :meth:`failed`.
    """

    events: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self.listeners: tuple[Any, ...] = ()
        self._lock = threading.Lock()
        self._undo = Undo()

    def install(self, undo: Undo) -> None:
        """Hook into torch. Called with the first listener.

        Args:
            undo: is given what leaves torch as it was found, piece by piece; called with the last
                listener, or at once if a later piece cannot be put in place.
        """
        raise NotImplementedError

    def add(self, listener: Listener) -> None:
        """Begin to tell ``listener``; a second call for the same listener changes nothing."""
        with self._lock:
            if any(known is listener for known in self.listeners):
                return
            if not self.listeners:
                with Undo() as undo:
                    self.install(undo)
                self._undo = undo
            self.listeners = (*self.listeners, listener)

    def remove(self, listener: Listener) -> None:
        """Stop telling ``listener``; an unknown listener is ignored."""
        with self._lock:
            rest = tuple(known for known in self.listeners if known is not listener)
            if len(rest) == len(self.listeners):
                return
            if not rest:
                self._undo.close()
            self.listeners = rest  # now: if something stays in place, it can be tried again

    @uncompiled
    def emit(self, event: str, *arguments: Any) -> None:
        """Tell every listener; what one raises is its own affair and goes to its ``failed``."""
        for listener in self.listeners:
            handle = getattr(listener, event, None)
            if handle is None:
                continue
            try:
                if _len_torch_dispatch_stack():
                    out_of_sight(handle, *arguments)
                else:  # as good as always, and this runs around every call of every module
                    with _DisableTorchFunction():
                        handle(*arguments)
            except Exception as error:
                listener.failed(event, error)

    @uncompiled
    def emit_with_line(self, event: str, *arguments: Any) -> None:
        """Tell every listener, the line of the program being the last argument."""
        try:
            location = user_location()
        except Exception as error:
            self.failed(event, error)
        else:
            self.emit(event, *arguments, location)

    @uncompiled
    def failed(self, event: str, error: Exception) -> None:
        """Tell every listener of an error of the tap's own; ``event`` is what will not come."""
        for listener in self.listeners:
            listener.failed(event, error)
