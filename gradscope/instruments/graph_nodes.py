"""The nodes behind a root themselves, for who has to ask them while they are there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gradscope.run.captured_graph import operation

_MOST_NODES = 50_000


def operations_behind(roots: Sequence[torch.Tensor]) -> list[Any]:
    """Return the nodes that lead to some roots, in no order; the leaves' own are left out."""
    pending = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen: set[Any] = set(pending)
    nodes: list[Any] = []
    while pending and len(nodes) < _MOST_NODES:
        node: Any = pending.pop()
        nodes.append(node)
        for used, _ in node.next_functions:
            if used is not None and used not in seen and not is_leaf(used):
                seen.add(used)
                pending.append(used)
    return nodes


def is_leaf(node: Any) -> bool:
    """Whether a node stands for a leaf, whose gradient it accumulates."""
    return type(node).__name__ == "AccumulateGrad"


def operation_of(node: Any) -> str:
    """Return the operation that a node is the backward of, as in ``Log``."""
    return operation(type(node).__name__)


def described(node: Any) -> tuple[str, int | None]:
    """Return the name of an operation, and the dimension of a softmax or log-softmax.

    Args:
        node: nothing is said of None.
    """
    if node is None:
        return "", None
    name = operation_of(node)
    if name not in ("Softmax", "LogSoftmax"):
        return name, None
    dim = int(node._saved_dim)
    if dim >= 1 << 63:  # torch gives negative dimensions as unsigned numbers
        dim -= 1 << 64
    n_dims = len(node._input_metadata[0].shape)
    return name, dim % n_dims if n_dims else None
