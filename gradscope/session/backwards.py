"""What a backward finds and leaves, and whose step it belongs to."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from gradscope.errors import text_of
from gradscope.instruments.graph_nodes import node_of
from gradscope.instruments.late import Known, Late, scalar_of
from gradscope.instruments.precomputed import precomputed_weights
from gradscope.instruments.roots import Roots
from gradscope.run.captured_graph import CapturedGraph
from gradscope.run.recording import Recording
from gradscope.session.all_gradients import AllGradients
from gradscope.session.attempts import Attempts
from gradscope.session.census import Census
from gradscope.session.cut_search import CutSearch
from gradscope.session.failures import Failures
from gradscope.session.gradients import NO_GRADIENT, GradientLook, Integers
from gradscope.session.graph_capture import GraphCapture
from gradscope.session.in_order import InOrder
from gradscope.session.ledger import Ledger
from gradscope.session.looks import Looks
from gradscope.session.nonfinite_search import NonfiniteSearch
from gradscope.taps.engine import BackwardCall
from gradscope.taps.user_frame import columns_of

_MOST_GRAPHS_WAITING = 8
"""How many captured graphs wait for the step they belong to; a loop may never step."""

_sequence_nr: Callable[[], int] = torch._C._autograd._get_sequence_nr


@dataclass(slots=True)
class _Backward:
    """A backward that is running.

    Attributes:
        call: as the engine was called; kept until it returns.
        began: when, in seconds of the process clock.
        last_node: autograd's sequence number at that moment.
        captured: its graph, until a step takes it.
        root_facts: for its row in ``backwards``.
        used_inside: numbers of the parameters whose gradients a step inside of it has used.
    """

    call: BackwardCall
    began: float
    last_node: int
    captured: CapturedGraph | None
    root_facts: dict[str, Any]
    used_inside: list[Integers] = field(default_factory=list)


class Backwards:
    """Looks at the gradients around each backward, and accounts for what it wrote.

    Args:
        recording: where rows go.
        census: who is who.
        ledger: what happened.
        in_order: where what is to be accounted for waits.
        attempts: the optimizers' steps, whose gradients these are.
        failures: runs instruments.
        gradients: those of all parameters.
        graphs: captures them.
        cuts: finds where one was cut.
        nonfinite: finds where the first value came from that is not finite.
        looks: follow every call of some steps.
        event: adds a row to ``events``.

    Attributes:
        roots: the tensors from which backwards began.
    """

    def __init__(
        self,
        recording: Recording,
        census: Census,
        ledger: Ledger,
        in_order: InOrder,
        attempts: Attempts,
        failures: Failures,
        gradients: AllGradients,
        graphs: GraphCapture,
        cuts: CutSearch,
        nonfinite: NonfiniteSearch,
        looks: Looks,
        event: Callable[..., None],
    ) -> None:
        self._recording = recording
        self._census = census
        self._ledger = ledger
        self._in_order = in_order
        self._attempts = attempts
        self._failures = failures
        self._all = gradients
        self._graphs = graphs
        self._cuts = cuts
        self._nonfinite = nonfinite
        self._looks = looks
        self._event = event
        self.roots = Roots()
        self._running: _Backward | None = None
        self._first: int | None = None  # where it came; -1 after the second

    def forget(self) -> None:
        """Forget the backward that is running."""
        self._running = None

    def started(self, call: BackwardCall, *, first_node: int) -> None:
        """Look at the gradients as a backward finds them, and at the graph it walks.

        Args:
            call: as the engine was called.
            first_node: autograd's sequence number when the model was last called.
        """
        captured = None
        if call.accumulates:
            look = self._all.look()
            self._in_order.do(functools.partial(self._account_start, look), look)
            if len(self._attempts.graphs) < _MOST_GRAPHS_WAITING and self._graphs.wanted(
                self._attempts.n_ended,
                call.location,
                _sequence_nr() - first_node,
                someone_is_new=self._attempts.someone_is_new,
            ):
                captured = self._graphs.capture(call.roots)
                if captured is not None:
                    self._cuts.graph_captured(captured)
        # Before the backward: a graph that it will free is still to be met, or not, at the next.
        root_facts = self._failures.run("roots", self.roots.met, call.roots) or {}
        self._nonfinite.backward_started(call.roots, captured)
        if call.accumulates:
            self._look_for_results(call)
        root_facts |= self._looks.backward_started(call.roots, len(self._attempts.optimizers))
        self._running = _Backward(call, time.perf_counter(), _sequence_nr(), captured, root_facts)

    def ended(self, call: BackwardCall, error: BaseException | None) -> None:
        """Look at what a backward wrote.

        Args:
            call: as the engine was called.
            error: what it raised.
        """
        began = time.perf_counter()
        backward, self._running = self._running, None
        if backward is None:
            return
        # What is done later holds none of the roots, and so keeps no graph alive.
        started, last_node, captured = backward.began, backward.last_node, backward.captured
        value = _root_value(call)
        row = _row(call, error) | backward.root_facts
        if not call.accumulates:
            self._in_order.do(
                lambda: self._record(self._ledger.other_backward(), value, row), value
            )
            return
        look = self._attempts.last_look = self._all.look_at_identities()
        is_foreign = False
        used_inside = backward.used_inside
        if not self._all.changed and not used_inside:
            leaves: list[torch.Tensor] = []
            captured = self._graphs.capture(call.roots, leaves, whole=captured is not None)
            if all(node_of(root) is None for root in call.roots):
                leaves.clear()  # a root that is a leaf itself has no graph behind it
            row["ends_in_cut"] = self._cuts.backward_reached_nothing(call.roots, leaves)
            # Another model's graph, or an input's: its leaves are all strangers, and none was cut.
            known = [leaf for leaf in leaves if self._census.knows(leaf)]
            is_foreign = bool(leaves) and not known and not row["ends_in_cut"]
            del leaves, known
        if self._looks.now is None:
            self._cuts.backward_ended()
        if captured is not None:
            row["n_in_graph"] = sum(bool(names) for names in captured.params)

        account = functools.partial(
            self._account_end,
            look,
            value,
            row,
            captured,
            self._all.params,
            used_inside,
            last_node=last_node,
            seconds=began - started,
            is_foreign=is_foreign,
        )
        self._in_order.do(account, value)
        if captured is not None:  # large, and counted only once it is accounted for
            self._in_order.settle()
        self._attempts.backward_ended()
        if error is not None:
            self._event("exception", f"backward: {text_of(error)}", call.location)

    def _account_start(self, look: Late[GradientLook]) -> None:
        """Account for the gradients as a backward found them."""
        self._ledger.backward_started(look.value())

    def _account_end(
        self,
        look: GradientLook,
        value: Late[Any],
        row: dict[str, Any],
        captured: CapturedGraph | None,
        params: Integers,
        used_inside: list[Integers],
        **facts: Any,
    ) -> None:
        """Account for what a backward wrote, and add its row.

        Args:
            look: the gradients as it left them.
            value: its root's.
            row: of ``backwards``, as far as it was known when it ended.
            captured: its graph.
            params: int64[n], numbers of the parameters looked at.
            used_inside: numbers of the parameters whose gradients a step inside of it has used.
            facts: passed on to the ledger.
        """
        number, wrote = self._ledger.backward_ended(
            look, root=float(value.value()), used_inside=bool(used_inside), **facts
        )
        if captured is not None:
            self._attempts.graphs[number] = captured
        reached = params[wrote]
        if used_inside:
            reached = np.unique(np.concatenate([reached, *used_inside]))
        row["n_reached"] = len(reached)
        self._record(number, value, row)
        self._recording.reached(reached)

    def used_inside(self, number: int) -> None:
        """Let an optimizer that steps before a backward is over have its share of it.

        What was written is cleared again by the time the backward ends.

        Args:
            number: of the optimizer that is about to step, inside of a backward or not.
        """
        backward = self._running
        if backward is None or not backward.call.accumulates:
            return
        look = self._attempts.look_at_gradients(number)
        params = self._census.params_of(number)[look.token != NO_GRADIENT]
        backward.used_inside.append(params)
        captured, backward.captured = backward.captured, None
        value, last_node = _root_value(backward.call), backward.last_node
        seconds = time.perf_counter() - backward.began

        def account() -> None:
            running = self._ledger.backward_used_inside(
                number,
                look,
                root=float(value.value()),
                last_node=last_node,
                seconds=seconds,
            )
            if captured is not None:
                self._attempts.graphs[running] = captured

        self._in_order.do(account, value)

    def _look_for_results(self, call: BackwardCall) -> None:
        """See at the second backward whether weights were computed once, before the loop."""
        if self._first is None:
            self._first = _sequence_nr()
        elif self._first >= 0:
            before, self._first = self._first, -1
            names = self._failures.run(
                "precomputed", precomputed_weights, call.roots, before, self._census.knows
            )
            if names:
                self._event("non_leaf", ", ".join(name for name in names if name))

    def _record(self, number: int, value: Late[Any], row: dict[str, Any]) -> None:
        self._recording.add_backward({"backward": number, "root": float(value.value()), **row})


def _root_value(call: BackwardCall) -> Late[Any]:
    return scalar_of(call.roots[0]) if len(call.roots) == 1 else Known(float("nan"))


def _row(call: BackwardCall, error: BaseException | None) -> dict[str, Any]:
    return {
        "function": "backward" if call.accumulates else "grad",
        "root_shape": ", ".join(str(tuple(root.shape)) for root in call.roots),
        "root_grad_fn": ", ".join(
            node.name() for r in call.roots if (node := node_of(r)) is not None
        ),
        "root_requires_grad": any(root.requires_grad for root in call.roots),
        "retain_graph": call.retain_graph,
        "create_graph": call.create_graph,
        "error": "" if error is None else type(error).__name__,
        **columns_of(call.location),
    }
