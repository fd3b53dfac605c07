"""``Module.train``, and with it ``Module.eval``: who switched a model to which mode, and where."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.compiler import is_dynamo_compiling

from gradscope.taps.patch import replace
from gradscope.taps.tap import Tap
from gradscope.taps.undo import Undo


class ModeTap(Tap):
    """Emits ``mode_set(module, location)`` after the outermost call.

    The calls of a module's children, of which a model has hundreds, emit nothing.
    """

    events = ("mode_set",)

    def install(self, undo: Undo) -> None:
        """Replace ``nn.Module.train``."""
        self._setting = threading.local()
        replace(undo, nn.Module, "train", self._wrap)

    def _wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def train(module: Any, *args: Any, **kwargs: Any) -> Any:
            # Dynamo takes the first for a constant, and so sees nothing of us.
            if is_dynamo_compiling() or getattr(self._setting, "now", False):
                return original(module, *args, **kwargs)
            self._setting.now = True
            try:
                result = original(module, *args, **kwargs)
            finally:
                self._setting.now = False
            if self.listeners:
                self.emit_with_line("mode_set", module)
            return result

        return train


modes = ModeTap()
