"""The operations of a graph in the order in which the forward carried them out.

In this order data only flows forwards. So whatever lies between two places of it can be drawn as
one box without making a circle of arrows: anything on a path that leaves a stretch of the order and
comes back would have to lie inside the stretch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradscope.graphs.topological import topological_order

if TYPE_CHECKING:
    from gradscope.run.captured_graph import CapturedGraph, Integers, LongIntegers


@dataclass(frozen=True, slots=True, eq=False)
class Execution:
    """The operations in order, and their inputs.

    Below, *m* is the number of operations and *e* of edges; a *place* is a position in the order.

    Attributes:
        node: int32[m], the node at each place.
        place: int32[n], the place of each node; -1 for a leaf.
        first_input: int64[m + 1], the inputs of the operation at place i are the edges from
            ``first_input[i]`` up to ``first_input[i + 1]``, in the order of its arguments.
        source: int64[e], the place of the operation that made the input; -1 if it is a leaf.
        leaf: int32[e], the leaf that is the input, as an index into ``params``; -1 if it is none.
        source_output: int32[e], which output of the source it is.
        target: int64[e], the place of the operation that takes it; in ascending order.
    """

    node: Integers
    place: Integers
    first_input: LongIntegers
    source: LongIntegers
    leaf: Integers
    source_output: Integers
    target: LongIntegers

    def __len__(self) -> int:
        return len(self.node)


def execution_of(captured: CapturedGraph) -> Execution:
    """Put the operations of a graph into order.

    The sequence numbers of autograd are that order, as long as one thread made all nodes.
    """
    is_leaf = captured.param >= 0
    operations = np.flatnonzero(~is_leaf)
    # Breadth first from the roots, so a higher number is earlier where sequence numbers agree.
    by_number = np.lexsort((-operations, captured.sequence_nr[operations]))
    order = operations[by_number].astype(np.int32)
    place = np.full(len(captured), -1, np.int32)
    place[order] = np.arange(len(order))
    inner = ~is_leaf[captured.source]
    if (place[captured.source[inner]] >= place[captured.target[inner]]).any():
        order = _topological(captured, place)
        place[order] = np.arange(len(order))
    by_target = np.argsort(place[captured.target], kind="stable")
    source, target = captured.source[by_target], place[captured.target[by_target]]
    first_input = np.zeros(len(order) + 1, np.int64)
    np.cumsum(np.bincount(target, minlength=len(order)), out=first_input[1:])
    return Execution(
        node=order,
        place=place,
        first_input=first_input,
        source=place[source].astype(np.int64),
        leaf=captured.param[source],
        source_output=captured.source_output[by_target],
        target=target.astype(np.int64),
    )


def _topological(captured: CapturedGraph, wanted: Integers) -> Integers:
    """Return the operations in an order in which data flows forwards, as near as can be to one."""
    inner = captured.param[captured.source] < 0
    arrows = zip(captured.source[inner].tolist(), captured.target[inner].tolist(), strict=True)
    order = np.array(topological_order(len(captured), arrows, wanted.tolist()), np.int32)
    return order[captured.param[order] < 0]
