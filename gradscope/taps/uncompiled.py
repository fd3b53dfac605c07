"""Functions of ours that the compiler passes over, as it does over those of torch itself.

Between two graphs compiled code runs as usual, but every frame that it comes to is compiled: a hook
or a replaced function of ours would be, too, and all that it calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(function: F) -> F:
    """Keep a function and everything that it calls from being compiled."""
    return _passed_over(function, "SKIP")


def passed_over(function: F) -> F:
    """Keep a function from being compiled, but not what it calls: that is the program's."""
    return _passed_over(function, "DEFAULT")


def _passed_over(function: F, inner: str) -> F:
    # Private to torch; without it nothing but a few more compiled frames is lost (torch 2.13).
    with contextlib.suppress(ImportError, AttributeError, TypeError):
        from torch._C._dynamo import eval_frame

        action = eval_frame._FrameAction
        strategy = eval_frame._FrameExecStrategy(action.SKIP, getattr(action, inner))
        eval_frame.set_code_exec_strategy(function.__code__, strategy)
    return function
