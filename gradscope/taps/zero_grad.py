"""``Optimizer.zero_grad`` and ``Module.zero_grad``: the spelled-out ways to clear gradients.

Gradients cleared by hand are not seen here; the ledger infers them from the gradients themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from gradscope.taps.patch import replace
from gradscope.taps.tap import Tap
from gradscope.taps.undo import Undo


class ZeroGradTap(Tap):
    """Emits ``zero_grad_called(owner, location)`` after the call, owner an optimizer or module."""

    events = ("zero_grad_called",)

    def install(self, undo: Undo) -> None:
        """Replace both methods on their classes."""
        replace(undo, torch.optim.Optimizer, "zero_grad", self._wrap)
        replace(undo, torch.nn.Module, "zero_grad", self._wrap)

    def _wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def zero_grad(owner: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(owner, *args, **kwargs)
            if self.listeners and not is_dynamo_compiling():
                self.emit_with_line("zero_grad_called", owner)
            return result

        return zero_grad


zero_grad = ZeroGradTap()
