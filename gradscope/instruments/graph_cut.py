"""Where the graph behind a loss was cut: the call after which nothing requires grad any more.

While armed, every torch function is seen with what went in and what came out. A call that takes a
tensor requiring grad and gives back a value that does not is a cut; what is computed from a cut
value descends from it. When backward then starts from a root without a path to any parameter, the
latest cut among the root's ancestors is the one that severed it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from gradscope.instruments.graph_nodes import node_of, numbers_behind
from gradscope.instruments.nested_tensors import nested_tensors
from gradscope.taps.module_calls import module_calls
from gradscope.taps.tap import Listener
from gradscope.taps.torch_functions import TorchFunctionTap
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
        cut_off: autograd's sequence numbers of the last operations before it.
    """

    function: str
    location: Location | None
    order: int
    cut_off: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where a tensor without graph comes from.

    Attributes:
        tensor: the tensor, held weakly: an id recurs once its owner is gone.
        memory: what it lies in, held weakly, which a tensor made behind our back may share.
        address: where in it.
        cuts: the calls that ended a graph among its ancestors.
        made: the calls among its ancestors that made tensors of plain numbers.
        is_made: whether it came directly out of such a call.
    """

    tensor: weakref.ref[torch.Tensor]
    memory: StorageWeakRef | None
    address: int
    cuts: frozenset[Cut]
    made: frozenset[Cut]
    is_made: bool


_NOTHING: frozenset[Cut] = frozenset()

# Calls that give a tensor's values away as numbers, which torch cannot follow.
_EXITS = frozenset({"item", "tolist", "numpy", "__array__", "__float__", "__int__", "__bool__"})


# Calls that make a tensor of numbers a program already has, and not of chance or of ones.
_REBUILD = frozenset({"tensor", "as_tensor", "asarray", "full", "scalar_tensor", "from_numpy"})

_MOST_CALLS = 100_000
"""How many calls are followed at most: a loop may go on without ever ending its first step."""


_MOST_CUT_OFF = 16
"""How many operations before a cut are noted: a few of the program's own may follow a module's."""

_MOST_JOINS = 1000

_MOST_CUTS = 16
"""How many cuts a tensor is remembered to descend from; the latest is what matters."""


class GraphCutFinder:
    """Follows cuts through the calls of an armed step, up to the root of a backward.

    Args:
        on_failure: told when following a call raises; after that no more calls are followed.
    """

    def __init__(self, on_failure: Callable[[Exception], None]) -> None:
        self._on_failure = on_failure
        self._blind = False
        self._origins: dict[int, _Origin] = {}
        self._last_exit: frozenset[Cut] = _NOTHING
        # Where values that were cut off have come into a graph: its node there, and the cuts.
        self._joins: list[tuple[int, frozenset[Cut]]] = []
        self._n_calls = 0
        self._without_grad: nn.Module | None = None
        self._without_grad_at: Location | None = None
        self._suspended_by: nn.Module | None = None
        self._thread = threading.get_ident()
        self._torch_functions = TorchFunctionTap()
        self._also: list[Listener] = []
        try:
            self._torch_functions.add(self)
            module_calls.add(self)
        except BaseException:
            self.disarm()
            raise

    def failed(self, where: str, error: Exception) -> None:
        """Follow nothing more; the mode itself cannot be removed while it handles a call."""
        if not self._blind:
            self._blind = True
            self._on_failure(error)

    @property
    def can_be_disarmed(self) -> bool:
        """Whether :meth:`disarm` would leave nothing behind: not in the middle of a call."""
        return self._torch_functions.can_be_removed

    @property
    def seconds(self) -> float:
        """What following calls of torch functions has taken so far."""
        return self._torch_functions.seconds

    def tell(self, listener: Listener) -> None:
        """Let somebody else listen to the calls, as long as they are followed."""
        self._also.append(listener)
        self._torch_functions.add(listener)

    def suspend(self) -> None:
        """See no calls until :meth:`resume`."""
        self._torch_functions.suspend()

    def resume(self) -> None:
        """See calls again."""
        self._torch_functions.resume()

    def disarm(self) -> None:
        """See no more calls, and drop what was seen."""
        self._suspended_by = None
        try:
            for listener in (self, *self._also):
                self._torch_functions.remove(listener)
        finally:
            module_calls.remove(self)
        self._origins.clear()
        self._joins.clear()

    def module_started(self, module: nn.Module, args: Any) -> None:
        """Note a module call, and look away during one without gradients or with other bits."""
        if self._suspended_by is not None or threading.get_ident() != self._thread:
            return
        if not torch.is_grad_enabled():
            self._without_grad = module
            self._without_grad_at = user_location()
        elif module.training or not isinstance(module, _HAVE_FAST_PATHS):
            return
        self._suspended_by = module
        self._torch_functions.suspend()

    def module_ended(self, module: nn.Module, result: Any) -> None:
        """Note the end of a module call."""
        if module is not self._suspended_by:
            return
        self._suspended_by = None
        self._torch_functions.resume()
        if module is self._without_grad:
            self._without_grad = None
            if any(parameter.requires_grad for parameter in module.parameters()):
                cut = Cut("no_grad", self._without_grad_at, self._n_calls)
                for output in nested_tensors(result):
                    if node_of(output) is None:
                        self._remember(output, frozenset({cut}), _NOTHING)

    def torch_function_called(
        self, function: Callable[..., Any], args: Any, kwargs: Any, result: Any, first_node: int
    ) -> None:
        """Take one call into account."""
        if self._blind:
            return
        self._n_calls += 1
        if self._n_calls > _MOST_CALLS:
            self._blind = True
            self._origins.clear()
            return
        name = _spelled(function)
        outputs = [tensor for tensor in nested_tensors(result) if node_of(tensor) is None]
        if not outputs and name not in _EXITS:
            self._join(args, kwargs, result)
            return
        if name.startswith("new_") or name.endswith("_like"):
            return  # takes a tensor's shape alone: what comes out was never in its graph
        inputs = list(nested_tensors((args, kwargs)))
        origins = [self._origin_of(tensor) for tensor in inputs]
        cuts = _NOTHING.union(*(origin.cuts for origin in origins if origin))
        made = _NOTHING.union(*(origin.made for origin in origins if origin))
        if any(tensor.requires_grad for tensor in inputs):
            cuts |= {self._cut(name, inputs)}
        elif not inputs:
            made |= {self._cut(name)}
        if name in _EXITS:
            self._last_exit = cuts or self._last_exit
        known = {id(tensor) for tensor in inputs}
        for output in outputs:
            if id(output) not in known:
                self._remember(output, cuts, made, is_made=not inputs)

    def cut_of(self, ends: Iterable[torch.Tensor]) -> Cut | None:
        """Return the cut that severed the ends of a graph, or None if it was not seen.

        That is the latest cut among the ancestors of an end.

        Args:
            ends: the leaves of the graph that backward walked that are no parameters; of a root
                without a graph, the root itself.
        """
        origins = [origin for end in ends if (origin := self._origin_of(end, by_memory=True))]
        cuts = _NOTHING.union(*(origin.cuts for origin in origins))
        return max(cuts, key=lambda cut: cut.order, default=None)

    def cuts_within(self, numbers: Set[int]) -> list[Cut]:
        """Return the cuts whose values have come into a graph, in order.

        Args:
            numbers: the sequence numbers of its nodes.
        """
        cuts = _NOTHING.union(*(cuts for number, cuts in self._joins if number in numbers))
        return sorted(cuts, key=lambda cut: cut.order)

    def _join(self, args: Any, kwargs: Any, result: Any) -> None:
        """Note where cut values are used together with some that have a graph."""
        if len(self._joins) >= _MOST_JOINS:
            return
        cuts = _NOTHING
        for tensor in nested_tensors((args, kwargs)):
            origin = None if tensor.requires_grad else self._origin_of(tensor)
            if origin is None:
                continue
            cuts |= origin.cuts
            if any(made.function in _REBUILD for made in origin.made):
                cuts |= self._last_exit  # its numbers, as far as can be told
        if cuts:
            nodes = (node_of(output) for output in nested_tensors(result))
            self._joins += [(node._sequence_nr(), cuts) for node in nodes if node is not None]

    def rebuilding_of(self, ends: Iterable[torch.Tensor]) -> Cut | None:
        """Return where an end was made of plain numbers that came out of a graph, if seen.

        For an end whose values went through numbers further up, that is the last call that gave
        values of a graph away.
        """
        if not self._last_exit:
            return None
        origins = [origin for end in ends if (origin := self._origin_of(end))]
        made = _NOTHING.union(*(origin.made for origin in origins if origin.is_made))
        rebuilt = [cut for cut in made if cut.function in _REBUILD]
        return max(rebuilt or self._last_exit, key=lambda cut: cut.order)

    def _cut(self, name: str, inputs: Sequence[torch.Tensor] = ()) -> Cut:
        behind = (numbers_behind(each, _MOST_CUT_OFF) for each in inputs if each.requires_grad)
        return Cut(
            name if torch.is_grad_enabled() else "no_grad",
            user_location(),
            self._n_calls,
            frozenset[int]().union(*behind),
        )

    def _remember(
        self,
        tensor: torch.Tensor,
        cuts: frozenset[Cut],
        made: frozenset[Cut],
        *,
        is_made: bool = False,
    ) -> None:
        if len(cuts) > _MOST_CUTS:  # a running mean descends from those of all steps
            cuts = frozenset(sorted(cuts, key=lambda cut: cut.order)[-_MOST_CUTS:])
        self._origins[id(tensor)] = _Origin(
            weakref.ref(tensor), *_memory_of(tensor), cuts, made, is_made
        )

    def _origin_of(self, tensor: torch.Tensor, *, by_memory: bool = False) -> _Origin | None:
        known = self._origins.get(id(tensor))
        if known is not None and known.tensor() is tensor:
            return known
        if by_memory:
            # Variable(loss.data) wraps the memory of a tensor without a call that can be seen.
            memory, address = _memory_of(tensor)
            for origin in reversed(self._origins.values()):
                if origin.memory is None or origin.memory.expired():
                    continue  # what lies there now may be anybody's
                if origin.memory == memory and origin.address == address:
                    return origin
        return None


def _memory_of(tensor: torch.Tensor) -> tuple[StorageWeakRef | None, int]:
    """What a tensor's values lie in, and where; nothing for one without memory of its own."""
    try:
        return StorageWeakRef(tensor.untyped_storage()), tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, fake, or inside a functional transform
        return None, 0


def _spelled(function: Callable[..., Any]) -> str:
    owner = getattr(function, "__self__", None)
    name = getattr(function, "__name__", "")
    if name == "__get__" and owner is not None:
        return getattr(owner, "__name__", name)  # an attribute such as .data
    return name
