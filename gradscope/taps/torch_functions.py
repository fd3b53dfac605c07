"""Every torch function as the program calls it, through a ``TorchFunctionMode``.

It makes each call several times dearer, and while it is active torch leaves some fast paths: it is
for single, armed steps, and whoever arms it suspends it where bits could change.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)

from gradscope.taps.compiled_code import compiled_code
from gradscope.taps.tap import Tap
from gradscope.taps.undo import Undo

_sequence_nr: Callable[[], int] = torch._C._autograd._get_sequence_nr


class _CallMode(TorchFunctionMode):
    def __init__(self, tap: TorchFunctionTap) -> None:
        super().__init__()
        self.tap = tap

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        try:
            first_node = _sequence_nr()
        except Exception as error:
            self.tap.failed("torch_function_called", error)
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        began = time.perf_counter()
        self.tap.emit("torch_function_called", func, args, kwargs, result, first_node)
        self.tap.seconds += time.perf_counter() - began
        return result


class TorchFunctionTap(Tap):
    """Emits ``torch_function_called(function, args, kwargs, result, first_node)`` in one thread.

    ``first_node`` is autograd's sequence number before the call; its nodes have that or later ones.

    Function modes belong to a thread, and so does a tap of this kind: it is made for the thread
    that adds its listener, and has to be left there.

    The mode is slipped in *below* the modes a program has entered itself. Those are left in the
    order in which they were entered, each by taking whatever is on top: a mode on top of the
    program's would be removed in its place, at a ``with torch.device(...)`` for instance.

    Inside of compiled code there is no mode: see :mod:`gradscope.taps.compiled_code`.

    Attributes:
        seconds: what telling of calls has taken so far.
    """

    events = ("torch_function_called",)

    def __init__(self) -> None:
        super().__init__()
        self._mode = _CallMode(self)
        self.suspended = 0
        self.seconds = 0.0

    def install(self, undo: Undo) -> None:
        """Slip the mode in below the others."""
        self.suspended = 0
        self._thread = threading.get_ident()
        self._is_inside_compiled_code = False
        undo.callback(self._end)
        self._insert()
        undo.callback(compiled_code.remove, self)
        compiled_code.add(self)

    def _end(self) -> None:
        self._is_inside_compiled_code = False  # its end may still be told, and puts nothing back
        self._take_out()

    def compiled_code_entered(self, function: Any, args: Any, kwargs: Any) -> None:
        """See no calls, unless the compiled code runs inside of a call, where none are seen."""
        if threading.get_ident() == self._thread and self.can_be_removed:
            self._is_inside_compiled_code = True
            self.suspend()

    def compiled_code_left(self, succeeded: bool, result: Any) -> None:
        """See calls again."""
        if threading.get_ident() == self._thread and self._is_inside_compiled_code:
            self._is_inside_compiled_code = False
            self.resume()

    def suspend(self) -> None:
        """Take the mode out for a while; calls nest."""
        self.suspended += 1
        if self.suspended == 1:
            self._take_out()

    def resume(self) -> None:
        """Undo one :meth:`suspend`."""
        self.suspended -= 1
        if self.suspended == 0:
            self._insert()

    @property
    def can_be_removed(self) -> bool:
        """Whether the mode can be taken out now.

        While the mode handles a call, and ``Tensor.backward`` is one, torch has taken it from the
        stack and will put it back, whatever happens in between.
        """
        return bool(self.suspended) or self._mode in _get_current_function_mode_stack()

    def _insert(self) -> None:
        modes = _get_current_function_mode_stack()
        # The context of torch.set_default_device, entered in Python, insists on lying at the very
        # bottom (torch/utils/_device.py). That of "with torch.device(...)", entered in C++, is
        # left by taking whatever lies on top, and has to stay above us (torch 2.13).
        bottom = int(bool(modes) and hasattr(modes[0], "old_device"))
        _rebuild([*modes[:bottom], self._mode, *modes[bottom:]])

    def _take_out(self) -> None:
        modes = _get_current_function_mode_stack()
        if self._mode in modes:
            _rebuild([mode for mode in modes if mode is not self._mode])


def _rebuild(modes: list[Any]) -> None:
    """Put other modes in the place of those that are active; these stay if that fails."""
    before = _get_current_function_mode_stack()
    try:
        _replace_all(modes)
    except BaseException:
        _replace_all(before)
        raise


def _replace_all(modes: list[Any]) -> None:
    for _ in _get_current_function_mode_stack():
        _pop_mode()
    for mode in modes:
        _push_mode(mode)
