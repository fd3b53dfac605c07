"""Modules as they are made, for a watch that has to find everything by itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from gradscope.taps.patch import replace
from gradscope.taps.tap import Tap
from gradscope.taps.undo import Undo


class ModuleCreationTap(Tap):
    """Emits ``module_created(module, location)`` for modules of classes that are torch's own.

    For one of the program's own classes the line would be that of its ``super().__init__()``.
    """

    events = ("module_created",)

    def install(self, undo: Undo) -> None:
        """Replace the base class's ``__init__``, which every module calls."""
        replace(undo, nn.Module, "__init__", self._wrap)

    def _wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def __init__(module: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            original(module, *args, **kwargs)
            if self.listeners and type(module).__module__.startswith("torch.nn"):
                self.emit_with_line("module_created", module)

        return __init__


module_creation = ModuleCreationTap()
