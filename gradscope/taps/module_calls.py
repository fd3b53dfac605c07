"""Every call of every ``nn.Module``, through torch's global module hooks, for armed steps.

A hook on a module itself would turn off torch's fast paths (a ``TransformerEncoderLayer`` in eval
mode then computes other bits) and would travel with pickles and deep copies; the global ones do
neither (torch 2.13).
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

from torch import nn
from torch.compiler import is_dynamo_compiling
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from gradscope.taps.tap import Tap


class ModuleCallTap(Tap):
    """Emits ``module_started(module, args)`` and ``module_ended(module, result)``.

    The latter also comes after a call that raised, with None for a result.

    Attributes:
        seconds: what telling of calls has taken so far.
    """

    events = ("module_started", "module_ended")

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def install(self, undo: ExitStack) -> None:
        """Register the two global hooks."""
        undo.callback(register_module_forward_pre_hook(self._before).remove)
        undo.callback(register_module_forward_hook(self._after, always_call=True).remove)

    def _before(self, module: nn.Module, args: Any) -> None:
        if not is_dynamo_compiling():  # a constant to the compiler, which so sees nothing of us
            began = time.perf_counter()
            self.emit("module_started", module, args)
            self.seconds += time.perf_counter() - began

    def _after(self, module: nn.Module, args: Any, result: Any) -> None:
        if not is_dynamo_compiling():
            began = time.perf_counter()
            self.emit("module_ended", module, result)
            self.seconds += time.perf_counter() - began


module_calls = ModuleCallTap()
