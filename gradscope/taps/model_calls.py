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

from gradscope.taps.patch import replace
from gradscope.taps.tap import Tap, out_of_sight
from gradscope.taps.uncompiled import uncompiled
from gradscope.taps.undo import Undo

_CHOICE = ("_compiled_call_impl", "_call_impl")
"""The names in torch's own ``nn.Module.__call__`` (2.13), which does nothing but call one of the
two. Where that is so, we do it in its place, and a module further in has no call more to pay."""


class _Here(threading.local):
    """What is running in a thread.

    Attributes:
        inside: the listeners that have taken a call that is running.
        taken_by: the tap's listeners when all of them had taken one.
    """

    inside: tuple[Any, ...] = ()
    taken_by: tuple[Any, ...] | None = None


class ModelCallTap(Tap):
    """Asks ``takes_call(module)``, and of what was taken emits ``call_ended(module)``.

    A listener that takes a call is not asked about the calls inside of it. ``call_ended`` also
    comes when the call raises.
    """

    events = ("takes_call", "call_ended")

    def install(self, undo: Undo) -> None:
        """Replace ``nn.Module.__call__``."""
        self._here = _Here()
        replace(undo, nn.Module, "__call__", self._wrap)

    def _wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        here = self._here
        only_chooses = getattr(original, "__code__", None) is not None and (
            original.__code__.co_names == _CHOICE
        )

        @functools.wraps(original)
        def __call__(module: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
            if is_dynamo_compiling():  # a constant to the compiler, which so sees nothing of us
                return original(module, *args, **kwargs)
            if here.taken_by is self.listeners:  # as for all modules further in
                if only_chooses and module._compiled_call_impl is None:
                    return module._call_impl(*args, **kwargs)
                return original(module, *args, **kwargs)
            inside = here.inside
            takers = self._takers(module, inside)
            if not takers:
                return original(module, *args, **kwargs)
            before = here.taken_by
            here.inside = (*inside, *takers)
            if len(here.inside) == len(self.listeners):
                here.taken_by = self.listeners
            try:
                return original(module, *args, **kwargs)
            finally:
                here.inside, here.taken_by = inside, before
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
