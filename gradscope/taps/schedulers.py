"""``step`` of every learning rate scheduler in torch."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from torch.compiler import is_dynamo_compiling
from torch.optim import lr_scheduler

from gradscope.taps.patch import replace
from gradscope.taps.tap import Tap
from gradscope.taps.undo import Undo


class SchedulerTap(Tap):
    """Emits ``scheduler_stepped(scheduler, location)`` after the outermost call.

    The step that a scheduler takes while it is being made, and the steps of the schedulers inside
    a ``SequentialLR`` or ``ChainedScheduler``, are not the program's and emit nothing.
    """

    events = ("scheduler_stepped",)

    def install(self, undo: Undo) -> None:
        """Replace ``step`` in each class of the module that defines one."""
        self._stepping = threading.local()
        for kind in vars(lr_scheduler).values():
            is_scheduler = isinstance(kind, type) and issubclass(kind, lr_scheduler.LRScheduler)
            if is_scheduler and "step" in vars(kind):
                replace(undo, kind, "step", self._wrap)

    def _wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            if is_dynamo_compiling():  # a constant to the compiler, which so sees nothing of us
                return original(scheduler, *args, **kwargs)
            nested = getattr(self._stepping, "now", False)
            self._stepping.now = True
            try:
                result = original(scheduler, *args, **kwargs)
            finally:
                self._stepping.now = nested
            if self.listeners and not nested and not getattr(scheduler, "_is_initial", False):
                self.emit_with_line("scheduler_stepped", scheduler)
            return result

        return step


schedulers = SchedulerTap()
