"""``GradScaler``: a step that it skips calls no optimizer, and so no step hook."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from torch.amp.grad_scaler import GradScaler
from torch.compiler import is_dynamo_compiling

from gradscope.taps.patch import Patch
from gradscope.taps.tap import Tap
from gradscope.taps.user_frame import user_location


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

    def install(self) -> None:
        """Replace the methods on the class; ``torch.cuda.amp.GradScaler`` inherits them."""
        self._stepping = threading.local()
        self._patches = [
            Patch(GradScaler, "scale", self._wrap_scale),
            Patch(GradScaler, "step", self._wrap_step),
            Patch(GradScaler, "unscale_", self._wrap_unscale),
            Patch(GradScaler, "update", self._wrap_update),
        ]

    def uninstall(self) -> None:
        """Restore the methods."""
        for patch in self._patches:
            patch.restore()

    def _wrap_scale(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def scale(scaler: Any, outputs: Any) -> Any:
            result = original(scaler, outputs)
            if self.listeners and not is_dynamo_compiling() and scaler.is_enabled():
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
                self.emit("gradients_unscaled", scaler, optimizer, user_location())
            return result

        return unscale_

    def _wrap_update(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def update(scaler: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(scaler, *args, **kwargs)
            if self.listeners and not is_dynamo_compiling():
                self.emit("scale_updated", scaler, user_location())
            return result

        return update


grad_scaler = GradScalerTap()
