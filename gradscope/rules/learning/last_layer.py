"""How many outputs the last layer before a loss function has, as its parameters tell."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gradscope.run.captured_graph import operation

if TYPE_CHECKING:
    from gradscope.run.captured_graph import CapturedGraph

_LOSSES = frozenset({"NllLoss", "NllLoss2D"})

_PRODUCTS = frozenset({"Addmm", "Mm"})
"""A matrix that goes into one as it is has its outputs last; a ``Linear`` gives its transpose."""


def outputs_of_last_layer(graph: CapturedGraph) -> set[int]:
    """Return the sizes of the parameters that are nearest to a classification loss.

    Of several such losses all are taken. Parameters of one element, such as temperatures, are
    passed by. The set is empty where the graph has no such loss.
    """
    level = [n for n in range(len(graph)) if operation(graph.op_of(n)) in _LOSSES]
    seen, sizes = set(level), set[int]()
    while level and not sizes:
        givers = [(node, g) for node in level for g in graph.givers_of(node)]
        sizes = {_outputs(graph, node, giver) for node, giver in givers} - {0}
        level = list({giver for _, giver in givers} - seen)
        seen.update(level)
    return sizes


def _outputs(graph: CapturedGraph, node: int, leaf: int) -> int:
    """How many outputs a parameter gives a layer; 0 if it is none, or has one element."""
    number = int(graph.param[leaf])
    shape = graph.param_shape[number] if number >= 0 and graph.params[number] else ()
    if math.prod(shape) == 1:
        return 0
    is_last = len(shape) == 2 and operation(graph.op_of(node)) in _PRODUCTS
    return shape[-1] if is_last else shape[0]
