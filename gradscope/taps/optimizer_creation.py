"""Optimizers as they are made, for a watch that has to find them by itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from gradscope.taps.patch import replace
from gradscope.taps.tap import Tap
from gradscope.taps.undo import Undo


class OptimizerCreationTap(Tap):
    """Emits ``optimizer_created(optimizer)`` when the base class has taken its parameter groups."""

    events = ("optimizer_created",)

    def install(self, undo: Undo) -> None:
        """Replace the base class's ``__init__``, which every optimizer calls."""
        replace(undo, torch.optim.Optimizer, "__init__", self._wrap)

    def _wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def __init__(optimizer: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            original(optimizer, *args, **kwargs)
            self.emit("optimizer_created", optimizer)

        return __init__


optimizer_creation = OptimizerCreationTap()
