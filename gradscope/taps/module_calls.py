"""Every call of every ``nn.Module``, through torch's global module hooks.

A hook on a module itself would turn off torch's fast paths (a ``TransformerEncoderLayer`` in eval
mode then computes other bits) and would travel with pickles and deep copies; the global ones do
neither (torch 2.13).
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from gradscope.taps.tap import Tap


class ModuleCallTap(Tap):
    """Emits ``call_started(module)`` and ``call_ended(module, result)``.

    The latter also comes after a call that raised, with None for a result.
    """

    events = ("call_started", "call_ended")

    def install(self) -> None:
        """Register the two global hooks."""
        self._handles = [
            register_module_forward_pre_hook(self._before),
            register_module_forward_hook(self._after, always_call=True),
        ]

    def uninstall(self) -> None:
        """Remove the two global hooks."""
        for handle in self._handles:
            handle.remove()

    # These two run around every module call of the process: the loops of Tap.emit, unrolled.

    def _before(self, module: nn.Module, args: Any) -> None:
        for listener in self.listeners:
            try:
                listener.call_started(module)
            except Exception as error:
                listener.failed("call_started", error)

    def _after(self, module: nn.Module, args: Any, result: Any) -> None:
        for listener in self.listeners:
            try:
                listener.call_ended(module, result)
            except Exception as error:
                listener.failed("call_ended", error)


module_calls = ModuleCallTap()
