"""Where compiled code begins and ends, so that whoever follows single calls can look away.

What ``torch.compile`` returns has its frames compiled under the function modes and global module
hooks that are there at its first call: they would become part of it, it would be compiled anew when
they are gone, and would compute other bits, or fail (torch 2.13).
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

import torch

from gradscope.taps.patch import replace
from gradscope.taps.tap import Tap
from gradscope.taps.uncompiled import uncompiled
from gradscope.taps.undo import Undo

EVAL_FRAME = "torch._dynamo.eval_frame"
_SWITCH = "_maybe_set_eval_frame"
"""Called by the wrapper around everything compiled, on the way in and on the way out."""

_COMPILER = str(Path(torch.__file__).parent / "_dynamo")

_WRAPPER = "compile_wrapper"
"""That wrapper."""


class CompiledCodeTap(Tap):
    """Emits what happens at the edges of compiled code, in the thread that runs it.

    ``compiled_code_entered(function, args, kwargs)`` with what was passed to ``torch.compile``, and
    ``compiled_code_left(succeeded, result)``. Compiled code inside of compiled code is part of it
    and emits nothing. ``compiler_loaded()`` comes once, if the compiler is imported while somebody
    listens. Private to torch; where it is not there nothing is emitted.
    """

    events = ("compiled_code_entered", "compiled_code_left", "compiler_loaded")

    def __init__(self) -> None:
        super().__init__()
        self._here = threading.local()
        self._sees_edges: Callable[[], bool] | None = None

    def install(self, undo: Undo) -> None:
        """Replace the switch; where nothing was compiled yet, as soon as something is."""
        self._here = threading.local()
        self._sees_edges = None
        self._undo_later = Undo()
        undo.callback(self._undo_later.close)
        if EVAL_FRAME in sys.modules:
            self._replace_switch()
        else:  # importing the compiler takes seconds
            replace(undo, torch, "compile", self._wrap_compile)

    @property
    def is_inside(self) -> bool:
        """Whether this thread is running compiled code, or what lies between its graphs."""
        return getattr(self._here, "outermost", None) is not None

    @property
    def sees_edges(self) -> bool:
        """Whether code that was compiled so far cannot be run without being noticed."""
        return self._sees_edges is not None and self._sees_edges()

    def _replace_switch(self) -> None:
        with contextlib.suppress(KeyError):
            self._sees_edges = replace(
                self._undo_later, sys.modules[EVAL_FRAME], _SWITCH, self._wrap_switch
            )

    def _wrap_compile(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def compile(*args: Any, **kwargs: Any) -> Any:  # noqa: A001
            compiled = original(*args, **kwargs)
            if self.listeners and self._sees_edges is None and EVAL_FRAME in sys.modules:
                self._replace_switch()
                self.emit("compiler_loaded")
            return compiled

        return compile

    def _wrap_switch(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def _maybe_set_eval_frame(callback: Any) -> Any:
            # While the switch is on, whatever runs in Python is compiled: nothing of ours may.
            wrapper = sys._getframe(1)
            if wrapper.f_code.co_name != _WRAPPER:
                return original(callback)
            outermost = getattr(self._here, "outermost", None)
            if outermost is None and callback is not None:
                self._here.outermost = id(wrapper)
                given = wrapper.f_locals
                self.emit(
                    "compiled_code_entered",
                    _inside(given.get("fn")),
                    given.get("args"),
                    given.get("kwargs"),
                )
                del given
                return original(callback)
            result = original(callback)
            if outermost == id(wrapper):
                self._here.outermost = None
                given = wrapper.f_locals
                self.emit("compiled_code_left", "result" in given, given.get("result"))
            return result

        return _maybe_set_eval_frame


@uncompiled
def _inside(function: Any) -> Any:
    """What the compiler has put a wrapper of its own around, if it has (torch 2.14)."""
    code = getattr(function, "__code__", None)
    if isinstance(code, CodeType) and code.co_filename.startswith(_COMPILER):
        return getattr(function, "__wrapped__", function)
    return function


compiled_code = CompiledCodeTap()
