"""Where the graph behind a loss was cut: the call after which nothing requires grad any more.

While armed, every torch function is seen with what went in and what came out. A call that takes a
tensor requiring grad and gives back a value that does not is a cut; what is computed from a cut
value descends from it. When backward then starts from a root without a path to any parameter, the
latest cut among the root's ancestors is the one that severed it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradscope.taps.torch_functions import torch_functions
from gradscope.taps.user_frame import Location, user_location

# Modules that take other kernels, with other bits, while a function mode is active: in eval mode
# (torch 2.13, nn/modules/transformer.py and activation.py).
_HAVE_FAST_PATHS = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


@dataclass(frozen=True, slots=True)
class Cut:
    """One call that ended a graph.

    Attributes:
        function: the call as a person writes it: ``detach``, ``item``, ``torch.tensor``, or
            ``no_grad`` for an operation under disabled gradients.
        location: the line of the program.
        order: counts the calls seen; the later of two cuts has the greater.
    """

    function: str
    location: Location | None
    order: int


class GraphCutFinder:
    """Follows cuts through the calls of an armed step, up to the root of a backward."""

    def __init__(self) -> None:
        self._origins: dict[int, tuple[weakref.ref[torch.Tensor], frozenset[Cut]]] = {}
        self._n_calls = 0
        self._without_grad: nn.Module | None = None
        self._without_grad_at: Location | None = None
        self._suspended_by: nn.Module | None = None
        torch_functions.add(self)

    def failed(self, where: str, error: Exception) -> None:
        """See nothing more."""
        self.disarm()

    def disarm(self) -> None:
        """See no more calls, and drop what was seen."""
        if self._suspended_by is not None:
            self._suspended_by = None
            torch_functions.resume()
        torch_functions.remove(self)
        self._origins.clear()

    def call_started(self, module: nn.Module) -> None:
        """Note a module call, and look away during one whose bits would change."""
        if not torch.is_grad_enabled():
            if self._without_grad is not None:
                return
            self._without_grad = module
            self._without_grad_at = user_location()
            look_away = any(isinstance(part, _HAVE_FAST_PATHS) for part in module.modules())
        else:
            look_away = not module.training and isinstance(module, _HAVE_FAST_PATHS)
        if look_away and self._suspended_by is None:
            self._suspended_by = module
            torch_functions.suspend()

    def call_ended(self, module: nn.Module, result: Any) -> None:
        """Note the end of a module call."""
        if module is self._suspended_by:
            self._suspended_by = None
            torch_functions.resume()
        if module is self._without_grad:
            # What happened inside may not have been seen; what came out of it has no graph.
            cut = frozenset({Cut("no_grad", self._without_grad_at, self._n_calls)})
            if any(parameter.requires_grad for parameter in module.parameters()):
                for output in _tensors(result):
                    if not output.requires_grad:
                        self._remember(output, cut)
            self._without_grad = None

    def torch_function_called(
        self, function: Callable[..., Any], args: Any, kwargs: Any, result: Any
    ) -> None:
        """Take one call into account."""
        self._n_calls += 1
        outputs = [tensor for tensor in _tensors(result) if tensor.grad_fn is None]
        if not outputs:
            return
        inputs = list(_tensors((args, kwargs)))
        known = {id(tensor) for tensor in inputs}
        origins = frozenset[Cut]().union(*(self._origins_of(tensor) for tensor in inputs))
        # A leaf made of something with a graph, or of plain numbers: here the graph ends.
        if not inputs or any(tensor.requires_grad for tensor in inputs):
            origins |= {self._cut(_spelled(function))}
        for output in outputs:
            if id(output) not in known:
                self._remember(output, origins)

    def cut_of(self, roots: Iterable[torch.Tensor]) -> Cut | None:
        """Return the cut that severed the roots of a backward, or None if it was not seen."""
        cuts: set[Cut] = set()
        for root in roots:
            cuts |= self._origins_of(root) or self._sharing_memory_with(root)
        return max(cuts, key=lambda cut: cut.order, default=None)

    def _cut(self, name: str) -> Cut:
        if torch.is_grad_enabled():
            return Cut(name, user_location(), self._n_calls)
        where = self._without_grad_at if self._without_grad is not None else user_location()
        return Cut("no_grad", where, self._n_calls)

    def _remember(self, tensor: torch.Tensor, cuts: frozenset[Cut]) -> None:
        self._origins[id(tensor)] = (weakref.ref(tensor), cuts)

    def _origins_of(self, tensor: torch.Tensor) -> frozenset[Cut]:
        known = self._origins.get(id(tensor))
        # An id recurs once its owner is gone.
        return known[1] if known is not None and known[0]() is tensor else frozenset()

    def _sharing_memory_with(self, root: torch.Tensor) -> frozenset[Cut]:
        """Cuts whose value the root wraps anew, as ``Variable(loss.data)`` does unseen."""
        for reference, cuts in reversed(self._origins.values()):
            tensor = reference()
            if tensor is not None and tensor.data_ptr() == root.data_ptr() != 0:
                return cuts
        return frozenset()


def _spelled(function: Callable[..., Any]) -> str:
    owner = getattr(function, "__self__", None)
    name = getattr(function, "__name__", "")
    if name == "__get__" and owner is not None:
        return getattr(owner, "__name__", name)  # an attribute such as .data
    return name


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, list | tuple):
            stack.extend(item)
        elif isinstance(item, dict):
            stack.extend(item.values())
