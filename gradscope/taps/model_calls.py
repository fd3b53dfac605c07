"""The outermost calls of models: one replaced method, and nothing in the calls further in.

Hooks would have to be paid at every module inside the model (about 3 µs each, torch 2.13), or be
put on the model itself, where they travel with its pickles and copies and can turn fast paths off.
``nn.Module.__call__`` does neither: it lies on the class, and further in it only passes on.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.compiler import is_dynamo_compiling

from gradscope.taps.patch import Patch
from gradscope.taps.tap import Tap, out_of_sight
from gradscope.taps.uncompiled import uncompiled


class ModelCallTap(Tap):
    """Asks ``takes_call(module)``, and of what was taken emits ``call_ended(module)``.

    A listener that takes a call is not asked about the calls inside of it. ``call_ended`` also
    comes when the call raises.
    """

    events = ("takes_call", "call_ended")

    def install(self) -> None:
        """Replace ``nn.Module.__call__``."""
        self._here = threading.local()
        self._patch = Patch(nn.Module, "__call__", self._wrap)

    def uninstall(self) -> None:
        """Restore it."""
        self._patch.restore()

    def _wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def __call__(module: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
            if is_dynamo_compiling():  # a constant to the compiler, which so sees nothing of us
                return original(module, *args, **kwargs)
            inside = getattr(self._here, "inside", ())
            if len(inside) == len(self.listeners):
                return original(module, *args, **kwargs)
            takers = self._takers(module, inside)
            if not takers:
                return original(module, *args, **kwargs)
            self._here.inside = (*inside, *takers)
            try:
                return original(module, *args, **kwargs)
            finally:
                self._here.inside = inside
                for listener in takers:
                    try:
                        out_of_sight(listener.call_ended, module)
                    except Exception as error:
                        listener.failed("call_ended", error)

        return __call__

    @uncompiled
    def _takers(self, module: nn.Module, inside: tuple[Any, ...]) -> tuple[Any, ...]:
        takers = []
        for listener in self.listeners:
            if listener in inside:
                continue
            try:
                if out_of_sight(listener.takes_call, module):
                    takers.append(listener)
            except Exception as error:
                listener.failed("takes_call", error)
        return tuple(takers)


model_calls = ModelCallTap()
