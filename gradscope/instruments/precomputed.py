"""Weights that are results: computed once, before the loop, from leaves that have no name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gradscope.instruments.graph_nodes import is_leaf, node_of, operation_of, operations_behind

# What only looks at the memory of a leaf gives no values of its own: img = pixels.view(3, 64, 64).
_VIEWS = frozenset(
    {
        *("View", "Alias", "T", "Transpose", "Permute", "Squeeze", "Unsqueeze", "Expand", "Select"),
        *("Slice", "AsStrided", "ReshapeAlias", "Narrow", "Unbind", "Split", "ViewAsComplex"),
    }
)


def precomputed_weights(
    roots: Sequence[torch.Tensor], before: int, is_trained: Callable[[torch.Tensor], bool]
) -> list[str]:
    """Return the names of weights that are results of an operation on a leaf.

    They show in the second graph of a run: as the only operations that it shares with the first,
    each of them, or a chain of them, with a single leaf at its end that nothing else uses. A state
    that is carried over from the first iteration has weights behind it that the second uses too.

    Args:
        roots: where the second backward starts.
        before: what the first graph's operations have a smaller sequence number than.
        is_trained: whether a leaf is known to be trained itself.

    Returns:
        One name for each, ``""`` where it lies in no global variable of the program; nothing where
        the graphs share anything else.
    """
    nodes = operations_behind(roots)
    old = [node for node in nodes if node._sequence_nr() < before]
    used_by_new = {
        used for node in nodes if node._sequence_nr() >= before for used, _ in node.next_functions
    }
    used_by_old = set()
    for node in old:
        inputs = [used for used, _ in node.next_functions if used is not None]
        if len(inputs) != 1:
            return []
        (used,) = inputs
        if is_leaf(used) and (used in used_by_new or is_trained(used.variable)):
            return []
        used_by_old.add(used)
    last = [node for node in old if node not in used_by_old and not _is_view(node)]
    program = vars(sys.modules["__main__"]) if "__main__" in sys.modules else {}
    names = {
        node: name
        for name, value in list(program.items())
        if isinstance(value, torch.Tensor) and (node := node_of(value)) is not None
    }
    return [names.get(node, "") for node in last]


def _is_view(node: Any) -> bool:
    return operation_of(node) in _VIEWS
