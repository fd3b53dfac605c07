"""Every call of every ``nn.Module``, through torch's global module hooks, for armed steps.

A hook on a module itself would turn off torch's fast paths (a ``TransformerEncoderLayer`` in eval
mode then computes other bits) and would travel with pickles and deep copies; the global ones do
neither (torch 2.13).
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.compiler import is_dynamo_compiling
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from gradscope.taps.compiled_code import EVAL_FRAME, compiled_code
from gradscope.taps.patch import replace
from gradscope.taps.tap import Tap
from gradscope.taps.uncompiled import uncompiled
from gradscope.taps.undo import Undo


class ModuleCallTap(Tap):
    """Emits ``module_started(module, args)`` and ``module_ended(module, result)``.

    The latter also comes after a call that raised, with None for a result. Inside of compiled code
    there are no calls: of a compiled module there is its own, and nothing in it.

    Attributes:
        seconds: what telling of calls has taken so far.
    """

    events = ("module_started", "module_ended")

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self._looking = Undo()

    def install(self, undo: Undo) -> None:
        """Register the two global hooks."""
        self._n_looking_away = 0
        self._here = threading.local()
        undo.callback(self._end)
        self._look()
        undo.callback(compiled_code.remove, self)
        compiled_code.add(self)

    def _end(self) -> None:
        self._n_looking_away = 0
        self._looking.close()

    def compiled_code_entered(self, function: Any, args: Any, kwargs: Any) -> None:
        """See no calls; a module that was compiled in place begins its own."""
        module = getattr(function, "__self__", None)
        is_in_place = isinstance(module, nn.Module) and function.__name__ == "_call_impl"
        self._here.compiled_in_place = module if is_in_place else None
        if is_in_place:
            self.emit("module_started", module, args)
        self._look_away()

    def compiled_code_left(self, succeeded: bool, result: Any) -> None:
        """See calls again."""
        self._look_back()
        module = getattr(self._here, "compiled_in_place", None)
        if module is not None:
            self._here.compiled_in_place = None
            self.emit("module_ended", module, result)

    def compiler_loaded(self) -> None:
        """Take care of the calls of compiled modules from here on."""
        self._look_away()
        self._look_back()

    def _look(self) -> None:
        with Undo() as undo:
            undo.callback(register_module_forward_pre_hook(self._before).remove)
            undo.callback(register_module_forward_hook(self._after, always_call=True).remove)
            wrapper = getattr(sys.modules.get(EVAL_FRAME), "OptimizedModule", None)
            if wrapper is not None and "__call__" in vars(wrapper):
                replace(undo, wrapper, "__call__", self._wrap_compiled_call)
        self._looking = undo

    def _look_away(self) -> None:
        """Take the hooks out, which are those of all threads: they would be compiled in."""
        with self._lock:
            self._n_looking_away += 1
            if self._n_looking_away == 1:
                self._looking.close()

    def _look_back(self) -> None:
        with self._lock:
            if self._n_looking_away:  # else nobody listens any more
                self._n_looking_away -= 1
                if not self._n_looking_away:
                    self._look()

    def _wrap_compiled_call(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def __call__(module: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
            # The original would warn of our hooks.
            if is_dynamo_compiling():
                return original(module, *args, **kwargs)
            result = None
            self.emit("module_started", module._orig_mod, args)
            self._look_away()
            try:
                result = original(module, *args, **kwargs)
            finally:
                self._look_back()
                self.emit("module_ended", module._orig_mod, result)
            return result

        return __call__

    @uncompiled
    def _before(self, module: nn.Module, args: Any) -> None:
        if not is_dynamo_compiling():  # a constant to the compiler, which so sees nothing of us
            began = time.perf_counter()
            self.emit("module_started", module, args)
            self.seconds += time.perf_counter() - began

    @uncompiled
    def _after(self, module: nn.Module, args: Any, result: Any) -> None:
        if not is_dynamo_compiling():
            began = time.perf_counter()
            self.emit("module_ended", module, result)
            self.seconds += time.perf_counter() - began


module_calls = ModuleCallTap()
