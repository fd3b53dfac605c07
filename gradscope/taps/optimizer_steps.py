"""``Optimizer.step`` of every optimizer in the process, through torch's global step hooks.

Hooks of an instance would travel with its pickles and deep copies; the global ones do not.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable
from types import CodeType, FrameType, FunctionType, MethodType
from typing import Any

from torch.compiler import is_dynamo_compiling
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from gradscope.taps.compiled_code import compiled_code
from gradscope.taps.tap import Tap
from gradscope.taps.uncompiled import passed_over, uncompiled
from gradscope.taps.undo import Undo

# The function that runs the hooks around every optimizer's step (torch 2.13). Its code object is
# one and the same for all optimizers, so that it can be counted on the stack.
_STEP_WRAPPER: CodeType = next(
    constant
    for constant in Optimizer.profile_hook_step.__code__.co_consts
    if isinstance(constant, CodeType) and constant.co_name == "wrapper"
)


# What can be wrapped without a difference. An optimizer may be passed something else that can be
# called: an object whose other methods it uses, or the model itself.
_FUNCTIONS = (FunctionType, MethodType, functools.partial)


class OptimizerStepTap(Tap):
    """Emits what happens around an optimizer's update.

    ``step_started(optimizer, has_closure)``, ``closure_ended(optimizer)`` and
    ``step_ended(optimizer)``.

    A closure runs forward and backward inside ``step``, after ``step_started``: whoever wants the
    gradients that the update reads looks at ``closure_ended``, which comes once per evaluation.
    A step that raises has no ``step_ended``. ``torch.compile(optimizer.step)`` is seen at the edges
    of the compiled code: the hooks would break its graph. A step inside of a compiled function is
    not seen. A step inside the same optimizer's step (a subclass
    that calls ``super().step()``) is part of it and emits nothing.
    """

    events = ("step_started", "closure_ended", "step_ended")

    def __init__(self) -> None:
        super().__init__()
        self._here = threading.local()

    @property
    def inside_hook(self) -> bool:
        """Whether this thread is inside one of the two hooks, which then must not be removed.

        torch is iterating over the hooks of everybody at that moment (torch 2.13).
        """
        return bool(getattr(self._here, "inside_hook", False))

    def install(self, undo: Undo) -> None:
        """Register the two global hooks."""
        self._here = threading.local()
        undo.callback(register_optimizer_step_pre_hook(self._before).remove)
        undo.callback(register_optimizer_step_post_hook(self._after).remove)
        undo.callback(compiled_code.remove, self)
        compiled_code.add(self)

    def compiled_code_entered(self, function: Any, args: Any, kwargs: Any) -> None:
        """See a compiled step begin; one with a closure cannot be seen from outside."""
        optimizer = getattr(function, "__self__", None)
        if (
            isinstance(optimizer, Optimizer)
            and function.__name__ == "step"
            and not (args or kwargs)
        ):
            nested = self._enter(optimizer, n_frames=0)
            self._here.compiled = None if nested else optimizer
            if not nested:
                self.emit("step_started", optimizer, False)

    def compiled_code_left(self, succeeded: bool, result: Any) -> None:
        """See a compiled step end."""
        optimizer = getattr(self._here, "compiled", None)
        if optimizer is None:
            return
        self._here.compiled = None
        del self._here.steps[-1:]
        if succeeded:
            self.emit("step_ended", optimizer)

    @uncompiled
    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if is_dynamo_compiling():
            return None
        watched = None
        self._here.inside_hook = True
        try:
            try:
                if self._enter(optimizer):
                    return None
                # In the hook's args the optimizer itself stands first (torch 2.13).
                closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
                if isinstance(closure, _FUNCTIONS):
                    watched = self._watch_closure(optimizer, closure)
            except Exception as error:
                self.failed("step_started", error)
                return None
            self.emit("step_started", optimizer, watched is not None)
        finally:
            self._here.inside_hook = False
        if watched is None:
            return None
        if "closure" in kwargs:
            return args, {**kwargs, "closure": watched}
        return (args[0], watched, *args[2:]), kwargs

    @uncompiled
    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_dynamo_compiling():
            return
        steps = getattr(self._here, "steps", None)
        if not steps or steps[-1]() is not optimizer:
            return
        steps.pop()
        if not any(step() is optimizer for step in steps):
            self._here.inside_hook = True
            try:
                self.emit("step_ended", optimizer)
            finally:
                self._here.inside_hook = False

    def _enter(self, optimizer: Optimizer, n_frames: int = 1) -> bool:
        """Note that a step begins; returns whether it runs inside a step of the same optimizer.

        Args:
            optimizer: the optimizer.
            n_frames: how many frames the step itself has on the stack by now.
        """
        steps = getattr(self._here, "steps", None)
        if steps is None:
            steps = self._here.steps = []
        if steps:
            # A step that raised has left its entry behind; the true depth is on the stack.
            n_compiled = getattr(self._here, "compiled", None) is not None  # has no frame there
            del steps[max(0, _steps_on_stack() + n_compiled - n_frames) :]
        nested = any(step() is optimizer for step in steps)
        steps.append(weakref.ref(optimizer))
        return nested

    def _watch_closure(
        self, optimizer: Optimizer, closure: Callable[..., Any]
    ) -> Callable[..., Any]:
        @functools.wraps(closure)
        def watched(*args: Any, **kwargs: Any) -> Any:
            result = closure(*args, **kwargs)
            self.emit("closure_ended", optimizer)
            return result

        return passed_over(watched)


def _steps_on_stack() -> int:
    frame: FrameType | None = sys._getframe(1)
    count = 0
    while frame is not None:
        count += frame.f_code is _STEP_WRAPPER
        frame = frame.f_back
    return count


optimizer_steps = OptimizerStepTap()
