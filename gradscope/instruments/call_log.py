"""Which module call made which nodes of the autograd graph.

autograd numbers the nodes of a thread in the order in which they are made. So the number at the
beginning of a call and the one at its end say which nodes it made, and nothing has to be attached
to them. What a call gave is remembered by the memory it lies in, held weakly, to see who took it
after it had been cut from its graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from gradscope.run.captured_graph import CapturedGraph, ModuleCalls
from gradscope.taps.engine import BackwardCall, engine
from gradscope.taps.module_calls import module_calls

# Looked up once: these run twice in every module call.
_thread = threading.get_ident
_sequence_nr: Callable[[], int] = torch._C._autograd._get_sequence_nr
_is_grad_enabled: Callable[[], bool] = torch.is_grad_enabled
_graph_task: Callable[[], int] = torch._C._current_graph_task_id

BACKWARD = ("<autograd.grad>", "backward")
"""Stands for a module whose call is a backward that makes nodes itself (``create_graph``)."""

_MOST_CALLS = 200_000
"""After how many calls those that are over are forgotten: a loop may never end its first step."""


class CallLog:
    """Follows the calls of all modules in the thread that made it, from :meth:`start` on.

    Args:
        paths: path of each module of the models by its id.
        failed: told when following a call raises; after that no more calls are followed.
    """

    def __init__(
        self, paths: Mapping[int, str], failed: Callable[[Exception], None] | None = None
    ) -> None:
        self._paths = paths
        self._on_failure = failed
        self._thread = threading.get_ident()
        self._given: dict[int, int] = {}
        self.forget()

    def __del__(self) -> None:
        with suppress(Exception):
            self._release()

    def start(self) -> None:
        """Begin to listen."""
        try:
            module_calls.add(self)
            engine.add(self)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Listen no more; what was noted stays."""
        try:
            module_calls.remove(self)
        finally:
            engine.remove(self)

    def forget(self) -> None:
        """Drop everything noted so far."""
        self._release()
        # By the id of the module; a backward that makes nodes has a key of its own.
        self._modules: dict[Any, int] = {}
        self._strangers: dict[int, str] = {}
        # Only while a module is alive does its id stand for it.
        self._alive: dict[int, nn.Module] = {}
        # Of each call its module, the call around it, its first sequence number, gradients off.
        self._began: list[tuple[int, int, int, bool]] = []
        self._last: list[int] = []
        self._open: list[int] = []
        self._feeds: dict[tuple[int, int], None] = {}
        self._is_blind = False
        # Of each other thread that called modules, the sequence number when it first did.
        self._elsewhere: dict[int, int] = {}
        self._made_elsewhere = False

    def __len__(self) -> int:
        return len(self._began)

    def failed(self, where: str, error: Exception) -> None:
        """Note no more calls after an error."""
        if not self._is_blind:
            self._is_blind = True
            if self._on_failure is not None:
                self._on_failure(error)

    # -- what the taps tell -----------------------------------------------------------------

    def module_started(self, module: nn.Module, args: Any) -> None:
        """Note the beginning of a call."""
        # A checkpoint computes its forward again inside the backward: other nodes, soon gone.
        if self._is_blind or _graph_task() != -1:
            return
        if _thread() != self._thread:
            self._elsewhere.setdefault(_thread(), _sequence_nr())
            return
        if not self._open and len(self._began) > _MOST_CALLS:
            self.forget()
        number = self._modules.get(id(module))
        if number is None:
            number = self._meet(module)
        call = self._begin(number)
        for value in args:
            if type(value) in _TENSORS and not value.requires_grad:
                storage = _storage(value)
                giver = None if storage is None else self._given.get(storage._cdata)
                if giver is not None:
                    self._feeds[giver, call] = None

    def module_ended(self, module: nn.Module, result: Any) -> None:
        """Note the end of a call."""
        if _thread() != self._thread:
            began = self._elsewhere.get(_thread())
            self._made_elsewhere |= began is not None and began != _sequence_nr()
            return
        if not self._open:
            return
        call = self._open[-1]
        # A call that was begun while nobody looked is none of ours.
        if self._modules.get(id(module)) != self._began[call][0]:
            return
        self._open.pop()
        self._last[call] = _sequence_nr()
        for value in result if type(result) in (tuple, list) else (result,):
            if type(value) in _TENSORS and (storage := _storage(value)) is not None:
                address = storage._cdata
                if address not in self._given:
                    storage._weak_ref()
                self._given[address] = call

    def backward_started(self, call: BackwardCall) -> None:
        """Note the beginning of a backward whose own nodes may become part of a graph."""
        if call.create_graph and _thread() == self._thread and not self._is_blind:
            self._begin(self._modules.setdefault(BACKWARD, len(self._modules)))

    def backward_ended(self, call: BackwardCall, error: BaseException | None) -> None:
        """Note its end."""
        if not call.create_graph or not self._open or _thread() != self._thread:
            return
        if self._began[self._open[-1]][0] == self._modules.get(BACKWARD):
            self._last[self._open.pop()] = _sequence_nr()

    # -- what came of it --------------------------------------------------------------------

    def attribute(
        self, captured: CapturedGraph, paths: Mapping[int, str] | None = None
    ) -> CapturedGraph:
        """Return a graph in which every node knows the module call that made it.

        Where several threads have made nodes that cannot be told, for each has numbers of its own:
        the graph is returned as it is.

        Args:
            captured: the graph.
            paths: path of each module by today's names, if these may have changed: a model that
                was met after the beginning gives all others their names in front.
        """
        if self._made_elsewhere:
            return captured
        began = np.array(self._began, np.int64).reshape(-1, 4)
        first = began[:, 2]
        last = np.array(self._last, np.int64)
        last[self._open] = np.iinfo(np.int64).max  # a loss computed and walked inside of a forward
        call = _innermost(captured.sequence_nr, first, last)
        began, last, call, feeds = _of_this_graph(began, last, call, self._feeds)
        first = began[:, 2]
        number_of = {number: key for key, number in self._modules.items()}
        today = self._paths if paths is None else {**self._paths, **paths}
        modules = tuple(
            BACKWARD if (key := number_of[number]) == BACKWARD else self._described(key, today)
            for number in range(len(number_of))
        )
        return replace(
            captured,
            call=call,
            calls=ModuleCalls(
                modules=modules,
                module=began[:, 0].astype(np.int32),
                parent=began[:, 1].astype(np.int32),
                first=first,
                last=last,
                without_grad=began[:, 3].astype(np.bool_),
                feeds=feeds,
            ),
        )

    # -- inside -----------------------------------------------------------------------------

    def _release(self) -> None:
        """Let go of the weak references; until then no other memory can take their addresses."""
        for storage in self._given:
            torch.UntypedStorage._free_weak_ref(storage)
        self._given = {}

    def _begin(self, number: int) -> int:
        call = len(self._began)
        around = self._open[-1] if self._open else -1
        self._began.append((number, around, _sequence_nr(), not _is_grad_enabled()))
        self._last.append(-1)
        self._open.append(call)
        return call

    def _meet(self, module: nn.Module) -> int:
        number = self._modules[id(module)] = len(self._modules)
        self._alive[id(module)] = module
        if id(module) not in self._paths and id(module) not in self._strangers:
            # Its parts are met when they are called; here they get their names.
            outermost = f"<{type(module).__name__}>"
            for path, part in module.named_modules():
                self._strangers.setdefault(id(part), f"{outermost}.{path}".rstrip("."))
        return number

    def _described(self, key: int, paths: Mapping[int, str]) -> tuple[str, str]:
        path = paths.get(key)
        if path is None:
            path = self._strangers[key]
        return path, type(self._alive[key]).__name__


_TENSORS = (torch.Tensor, nn.Parameter)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """What a tensor's values lie in; None for one without memory of its own."""
    try:
        return tensor.untyped_storage()
    except (RuntimeError, NotImplementedError):  # sparse, fake, or inside a functional transform
        return None


def _innermost(sequence_nr: Any, first: Any, last: Any) -> Any:
    """Return int32[n], for each node the last call to begin of those that had not ended by then."""
    n_calls = len(first)
    if not n_calls:
        return np.full(len(sequence_nr), -1, np.int32)
    # Calls nest, so one pass over their ends in order tells which is innermost between any two.
    moments = np.concatenate([first, last])
    calls = np.arange(n_calls)
    # Where a call made nothing its end comes with its beginning; ends of inner calls come first.
    order = np.lexsort(
        (np.concatenate([calls, -calls]), np.repeat([1, 0], n_calls), moments)
    ).tolist()
    made_something = (last > first).tolist()
    open_calls = [-1]
    innermost, since = [-1], [np.iinfo(np.int64).min]
    for at in order:
        call = at if at < n_calls else at - n_calls
        if not made_something[call]:
            continue
        if at < n_calls:
            open_calls.append(call)
        elif open_calls[-1] == call:
            open_calls.pop()
        else:
            open_calls.remove(call)
        since.append(int(moments[at]))
        innermost.append(open_calls[-1])
    place = np.searchsorted(np.array(since), sequence_nr, side="right") - 1
    call = np.array(innermost, np.int32)[place]
    call[sequence_nr < 0] = -1
    return call


def _of_this_graph(
    began: Any, last: Any, call: Any, feeds: Iterable[tuple[int, int]]
) -> tuple[Any, Any, Any, tuple[tuple[int, int], ...]]:
    """Leave out outermost calls that belong to the graph of another loss.

    They made nodes, none of which is in this graph, while another call of the same module has some
    in it: the earlier micro-batches of an accumulation, a discriminator's turn before the
    generator's.
    """
    n_calls = len(began)
    outermost = np.arange(n_calls)
    for each, parent in enumerate(began[:, 1].tolist()):
        if parent >= 0:
            outermost[each] = outermost[parent]
    has_nodes = np.zeros(n_calls, np.bool_)
    has_nodes[outermost[call[call >= 0]]] = True
    module, made = began[:, 0], last > began[:, 2]
    reached = np.unique(module[has_nodes])
    is_other = made & ~has_nodes & np.isin(module, reached) & (began[:, 1] < 0)
    keep = np.flatnonzero(~is_other[outermost])
    if len(keep) == n_calls:
        return began, last, call, tuple(feeds)
    number = np.full(n_calls + 1, -1, np.int64)  # the last stands for "none"
    number[keep] = np.arange(len(keep))
    kept = began[keep].copy()
    kept[:, 1] = number[kept[:, 1]]
    pairs = [(int(number[giver]), int(number[taker])) for giver, taker in feeds]
    feeds_kept = tuple(pair for pair in pairs if min(pair) >= 0)
    return kept, last[keep], number[call].astype(np.int32), feeds_kept


def paths_of(models: Iterable[tuple[str, nn.Module]]) -> dict[int, str]:
    """Return the path of every module by its id.

    Args:
        models: of each model what comes in front of its paths, ``""`` or its name with a dot, and
            the model.
    """
    paths: dict[int, str] = {}
    for prefix, model in models:
        for path, module in model.named_modules():
            path = (prefix + path).replace("_orig_mod.", "").removesuffix("_orig_mod")
            paths.setdefault(id(module), path.rstrip("."))
    return paths
