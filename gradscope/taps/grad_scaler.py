"""``GradScaler``: a step that it skips calls no optimizer, and so no step hook."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from torch.amp.grad_scaler import GradScaler
from torch.compiler import is_dynamo_compiling

from gradscope.taps.patch import replace
from gradscope.taps.tap import Tap
from gradscope.taps.undo import Undo


class GradScalerTap(Tap):
    """Emits what happens at a gradient scaler.

    ``loss_scaled(scaler, outputs)`` with what ``scale`` gave, a tensor or several,
    ``scaler_step_started(scaler, optimizer)``, ``scaler_step_ended(scaler, optimizer)``,
    ``gradients_unscaled(scaler, optimizer, location)``, ``scale_updated(scaler, location)``. The
    scaler's own call of ``unscale_`` inside its ``step`` is part of that step and emits nothing.
    """

    events = (
        "loss_scaled",
        "scaler_step_started",
        "scaler_step_ended",
        "gradients_unscaled",
        "scale_updated",
    )

    def install(self, undo: Undo) -> None:
        """Replace the methods on the class; ``torch.cuda.amp.GradScaler`` inherits them."""
        self._stepping = threading.local()
        replace(undo, GradScaler, "scale", self._wrap_scale)
        replace(undo, GradScaler, "step", self._wrap_step)
        replace(undo, GradScaler, "unscale_", self._wrap_unscale)
        replace(undo, GradScaler, "update", self._wrap_update)

    def _wrap_scale(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def scale(scaler: Any, outputs: Any) -> Any:
            result = original(scaler, outputs)
            if self.listeners and not is_dynamo_compiling():
                try:
                    is_enabled = scaler.is_enabled()
                except Exception as error:
                    self.failed("loss_scaled", error)
                else:
                    if is_enabled:
                        self.emit("loss_scaled", scaler, result)
            return result

        return scale

    def _wrap_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def step(scaler: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            if is_dynamo_compiling():  # a constant to the compiler, which so sees nothing of us
                return original(scaler, optimizer, *args, **kwargs)
            self.emit("scaler_step_started", scaler, optimizer)
            self._stepping.now = True
            try:
                result = original(scaler, optimizer, *args, **kwargs)
            finally:
                self._stepping.now = False
            self.emit("scaler_step_ended", scaler, optimizer)
            return result

        return step

    def _wrap_unscale(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def unscale_(scaler: Any, optimizer: Any) -> Any:
            result = original(scaler, optimizer)
            if (
                self.listeners
                and not is_dynamo_compiling()
                and not getattr(self._stepping, "now", False)
            ):
                self.emit_with_line("gradients_unscaled", scaler, optimizer)
            return result

        return unscale_

    def _wrap_update(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def update(scaler: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(scaler, *args, **kwargs)
            if self.listeners and not is_dynamo_compiling():
                self.emit_with_line("scale_updated", scaler)
            return result

        return update


grad_scaler = GradScalerTap()
