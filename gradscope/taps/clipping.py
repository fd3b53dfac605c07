"""``clip_grad_norm_`` and ``clip_grad_value_``, also where a program imported them by name.

What is replaced are functions that both look up inside ``torch.nn.utils.clip_grad``: a name that a
program has imported keeps pointing at the outer function, which still finds the inner one there.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling
from torch.nn.utils import clip_grad

from gradscope.taps.patch import replace
from gradscope.taps.tap import Tap
from gradscope.taps.uncompiled import uncompiled
from gradscope.taps.undo import Undo
from gradscope.taps.user_frame import user_location


class ClippingTap(Tap):
    """Emits ``gradients_clipped(function, gradients, limit, location)`` just before the clipping.

    ``function`` is ``clip_grad_norm_`` or ``clip_grad_value_``, ``gradients`` the list of tensors
    about to be changed (empty when there are none), ``limit`` the largest norm or value allowed.
    """

    events = ("gradients_clipped",)

    def install(self, undo: Undo) -> None:
        """Replace the inner functions."""
        replace(undo, clip_grad, "_clip_grads_with_norm_", self._wrap_norm)
        replace(undo, clip_grad, "_group_tensors_by_device_and_dtype", self._wrap_grouping)

    def _wrap_norm(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def _clip_grads_with_norm_(
            parameters: Any, max_norm: float, *args: Any, **kwargs: Any
        ) -> Any:
            if is_dynamo_compiling():  # a constant to the compiler, which so sees nothing of us
                return original(parameters, max_norm, *args, **kwargs)
            # Listed once: an iterator can be read only once, and torch has to read it too.
            parameters = [parameters] if isinstance(parameters, torch.Tensor) else [*parameters]
            if self.listeners:
                try:
                    gradients, location = _gradients(parameters), user_location()
                except Exception as error:
                    self.failed("gradients_clipped", error)
                else:
                    self.emit("gradients_clipped", "clip_grad_norm_", gradients, max_norm, location)
            return original(parameters, max_norm, *args, **kwargs)

        return _clip_grads_with_norm_

    def _wrap_grouping(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def _group_tensors_by_device_and_dtype(tensorlists: Any, *args: Any, **kwargs: Any) -> Any:
            if is_dynamo_compiling():
                return original(tensorlists, *args, **kwargs)
            caller = sys._getframe(1)
            # clip_grad_norm_ groups its tensors too, and is told of elsewhere.
            if self.listeners and caller.f_code.co_name == "clip_grad_value_":
                try:
                    limit = caller.f_locals.get("clip_value")
                    gradients, location = list(tensorlists[0]), user_location()
                except Exception as error:
                    self.failed("gradients_clipped", error)
                else:
                    self.emit("gradients_clipped", "clip_grad_value_", gradients, limit, location)
            return original(tensorlists, *args, **kwargs)

        return _group_tensors_by_device_and_dtype


@uncompiled
def _gradients(parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


clipping = ClippingTap()
