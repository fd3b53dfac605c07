"""The autograd engine: every backward, whoever calls it and however it ends.

``Tensor.backward``, ``torch.autograd.backward`` and ``torch.autograd.grad`` all pass through
``_engine_run_backward``, which ``torch.autograd`` imports by name from ``torch.autograd.graph``:
both names are replaced (torch 2.13).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.graph
from torch._guards import TracingContext

from gradscope.taps.patch import replace
from gradscope.taps.tap import Tap
from gradscope.taps.uncompiled import uncompiled
from gradscope.taps.undo import Undo
from gradscope.taps.user_frame import Location, user_location


@uncompiled
def inside_backward() -> bool:
    """Tell whether the calling thread is executing a node of a backward right now."""
    # Set per thread by the engine itself, so that it is also right on the engine's device
    # threads, where a recomputed checkpoint runs its forward.
    return torch._C._current_graph_task_id() != -1


@uncompiled
def inside_transform() -> bool:
    """Tell whether a transform of ``torch.func`` or a compiler is at work.

    Their tensors hold no values.
    """
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or TracingContext.try_get() is not None
    )


@dataclass(slots=True)
class BackwardCall:
    """One call into the engine. Holds the roots, so no listener may keep it.

    Attributes:
        roots: the tensors that backward starts from.
        accumulates: True for ``backward``, False for ``autograd.grad``, which writes no ``.grad``.
        restricted: whether ``inputs=`` names the leaves that are to receive gradients.
        retain_graph: whether the graph is kept for another backward.
        create_graph: whether the gradients get a graph of their own.
        location: the line of the program that called.
    """

    roots: tuple[torch.Tensor, ...]
    accumulates: bool
    restricted: bool
    retain_graph: bool
    create_graph: bool
    location: Location | None


class EngineTap(Tap):
    """Emits ``backward_started(call)`` and ``backward_ended(call, error)``.

    A backward that runs inside another one (a reentrant checkpoint) is part of it and emits
    nothing.
    """

    events = ("backward_started", "backward_ended")

    def install(self, undo: Undo) -> None:
        """Replace the engine's entry in both modules that hold it."""
        replace(undo, torch.autograd.graph, "_engine_run_backward", self._wrap)
        replace(undo, torch.autograd, "_engine_run_backward", self._wrap)

    def _wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def _engine_run_backward(t_outputs: Any, *args: Any, **kwargs: Any) -> Any:
            call = None
            if self.listeners:
                try:
                    if not (inside_backward() or inside_transform()):
                        call = _describe(t_outputs, args, kwargs)
                except Exception as error:
                    self.failed("backward_started", error)
            if call is None:
                return original(t_outputs, *args, **kwargs)
            self.emit("backward_started", call)
            try:
                result = original(t_outputs, *args, **kwargs)
            except BaseException as error:
                self.emit("backward_ended", call, error)
                raise
            self.emit("backward_ended", call, None)
            return result

        return _engine_run_backward


@uncompiled
def _describe(outputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BackwardCall:
    # Positions as in the two calls in torch/autograd/__init__.py:
    # (grad_tensors, retain_graph, create_graph, inputs, allow_unreachable, accumulate_grad=...).
    given = dict(
        zip(("grad_tensors", "retain_graph", "create_graph", "inputs"), args, strict=False)
    )
    given.update(kwargs)
    roots = (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
    return BackwardCall(
        roots=tuple(root for root in roots if isinstance(root, torch.Tensor)),
        accumulates=bool(given.get("accumulate_grad", False)),
        restricted=bool(given.get("inputs")),
        retain_graph=bool(given.get("retain_graph")),
        create_graph=bool(given.get("create_graph")),
        location=user_location(),
    )


engine = EngineTap()
