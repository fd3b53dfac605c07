"""One closer look: everything between a model's call and the step after it, in detail."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from gradscope.instruments.autograd_graph import capture_graph
from gradscope.instruments.graph_nodes import is_leaf_tensor
from gradscope.instruments.late import Late
from gradscope.instruments.loss_calls import LossCalls
from gradscope.instruments.module_survey import MadeAt, ModuleSurvey
from gradscope.instruments.nested_tensors import nested_tensors
from gradscope.instruments.tensor_summary import TensorSummary, is_readable
from gradscope.session.census import Census
from gradscope.taps.engine import inside_backward
from gradscope.taps.module_calls import module_calls
from gradscope.taps.user_frame import Location, columns_of, user_location

_MOST_INPUTS = 8


class CloserLook:
    """What is noted during one look, and the rows that are made of it at its end.

    Args:
        step: the number that the next attempt will have.
        census: names parameters and modules.
        made_at: where a module was made, as far as that was seen.
        known_before: the strangers that the look before met.
        failed: told when noting something raises; after that nothing is noted.
    """

    def __init__(
        self,
        step: int,
        census: Census,
        made_at: MadeAt,
        known_before: Sequence[weakref.ref[torch.Tensor]],
        failed: Callable[[Exception], None],
    ) -> None:
        self.step = step
        self._census = census
        self._known_before = known_before
        self._on_failure = failed
        self._is_blind = False
        self._thread = threading.get_ident()
        self._survey = ModuleSurvey(census.paths_of_modules, made_at)
        self._losses = LossCalls(census.names_of, self._survey)
        self._inputs: list[TensorSummary] = []
        self._reached: set[int] = set()
        self._reached_params: set[str] = set()
        self._strangers: list[dict[str, Any]] = []
        self._uses: dict[int, tuple[weakref.ref[torch.Tensor], str, Location | None]] = {}
        self.strangers: list[weakref.ref[torch.Tensor]] = []
        module_calls.add(self)

    def failed(self, where: str, error: Exception) -> None:
        """Note nothing more after an error."""
        if not self._is_blind:
            self._is_blind = True
            self._on_failure(error)

    @property
    def is_whole(self) -> bool:
        """Whether nothing has failed: of half a look nobody could tell what it did not see."""
        return not self._is_blind

    def end(self) -> None:
        """Listen no more."""
        module_calls.remove(self)

    # -- what the taps tell -----------------------------------------------------------------

    def module_started(self, module: nn.Module, args: Any) -> None:
        """Note the beginning of a call, and what an outermost one is given."""
        if self._is_elsewhere():
            return
        if not self._survey.is_inside and torch.is_grad_enabled():
            owner = type(module).__name__
            for value in nested_tensors(args):
                if len(self._inputs) < _MOST_INPUTS and is_readable(value):
                    self._inputs.append(TensorSummary("input", owner, value))
        self._survey.module_started(module, args)

    def module_ended(self, module: nn.Module, result: Any) -> None:
        """Note the end of a call."""
        if not self._is_elsewhere():
            self._survey.module_ended(module, result)

    def torch_function_called(
        self, function: Callable[..., Any], args: Any, kwargs: Any, result: Any, first_node: int
    ) -> None:
        """Note the call of a loss or activation function, and who uses a stranger first."""
        if not self._is_elsewhere():
            for value in nested_tensors((args, kwargs)):
                if value.requires_grad and is_leaf_tensor(value) and not self._census.knows(value):
                    use = (weakref.ref(value), self._survey.here, user_location())
                    self._uses.setdefault(id(value), use)
            self._losses.torch_function_called(function, args, kwargs, result, first_node)

    def backward_started(self, roots: Sequence[torch.Tensor], oldest: int) -> dict[str, Any]:
        """Walk the graph of a backward.

        Args:
            roots: where it starts.
            oldest: nodes with a smaller sequence number are old.

        Returns:
            ``n_nodes`` and ``n_old_nodes`` for its row.
        """
        self._losses.backward_started(roots)
        strangers: list[torch.Tensor] = []

        def names_of(leaf: torch.Tensor) -> tuple[str, ...]:
            names = self._census.names_of(leaf)
            if not names:
                strangers.append(leaf)
            return names

        graph = capture_graph(roots, names_of)
        is_node = graph.sequence_nr >= 0
        self._reached.update(graph.sequence_nr[is_node].tolist())
        self._reached_params.update(names[0] for names in graph.params if names)
        if strangers:
            self._census.adopt_unregistered(strangers)
            self._meet([leaf for leaf in strangers if not self._census.knows(leaf)])
        return {
            "n_nodes": int(is_node.sum()),
            "n_old_nodes": int((is_node & (graph.sequence_nr < oldest)).sum()),
        }

    # -- what came of it --------------------------------------------------------------------

    @property
    def awaited(self) -> list[Late[Any]]:
        """What may still be on its way."""
        inputs = [summary.numbers for summary in self._inputs]
        return [*self._survey.awaited, *self._losses.awaited, *inputs]

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """Return the rows of each table, once everything awaited has come."""
        rows = {
            "calls": list(self._survey.calls()),
            "activations": list(self._survey.activations()),
            "batches": [summary.row() for summary in (*self._inputs, *self._losses.targets)],
            "losses": list(self._losses.rows(self._reached, self._reached_params)),
            "strangers": [
                {**row, "module": self._survey.path_of(row["module"])} if "module" in row else row
                for row in self._strangers
            ],
        }
        for each in rows.values():
            for row in each:
                row["step"] = self.step
        return rows

    # -- inside -----------------------------------------------------------------------------

    def _is_elsewhere(self) -> bool:
        # A checkpoint computes its forward again inside the backward.
        return self._is_blind or threading.get_ident() != self._thread or inside_backward()

    def _meet(self, strangers: list[torch.Tensor]) -> None:
        before = [known() for known in self._known_before]
        for leaf in strangers:
            self.strangers.append(weakref.ref(leaf))
            if not leaf.requires_grad:
                continue
            row: dict[str, Any] = {
                "shape": str(tuple(leaf.shape)),
                "is_parameter": isinstance(leaf, nn.Parameter),
                "recurs": any(known is leaf for known in before),
            }
            use = self._uses.get(id(leaf))
            if use is not None and use[0]() is leaf:
                _, row["module"], location = use
                row |= columns_of(location)
            self._strangers.append(row)
