"""The nodes behind a root themselves, for who has to ask them while they are there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gradscope.run.captured_graph import operation

RESHAPES = frozenset(
    {"View", "UnsafeView", "ReshapeAlias", "T", "Transpose", "Permute", "Squeeze", "Unsqueeze"}
    | {"Clone", "Alias"}
)
"""Operations that give every value on as it is, and none twice."""

_MOST_NODES = 50_000


def node_of(tensor: torch.Tensor) -> Any:
    """Return the ``grad_fn`` of a tensor; None as well where torch will not say which it is.

    That is a view made under ``no_grad``, or one of several made at once, once something was
    written in place into what it is a view of: reading its ``grad_fn`` or ``is_leaf`` raises.
    """
    try:
        return tensor.grad_fn
    except RuntimeError:
        return None


def is_leaf_tensor(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a leaf; one of which torch will not say so is none."""
    try:
        return tensor.is_leaf
    except RuntimeError:
        return False


def operations_behind(roots: Sequence[torch.Tensor]) -> list[Any]:
    """Return the nodes that lead to some roots, in no order; the leaves' own are left out."""
    pending = [first for root in roots if (first := node_of(root)) is not None]
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


def numbers_behind(tensor: torch.Tensor, most: int) -> frozenset[int]:
    """Return autograd's sequence numbers of some nodes behind a tensor, the nearest first.

    Args:
        tensor: what was computed.
        most: how many at most.
    """
    nearest = [node] if (node := node_of(tensor)) is not None else []
    for node in nearest:  # grows while it is gone through
        used = (each for each, _ in node.next_functions if each is not None)
        nearest += [each for each in used if not is_leaf(each) and each not in nearest]
        if len(nearest) >= most:
            break
    return frozenset(node._sequence_nr() for node in nearest[:most])


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
    n_dims = len(shape_of(node))
    return name, dimension(node._saved_dim, n_dims) if n_dims else None


def shape_of(node: Any) -> tuple[int, ...]:
    """Return the shape of what an operation gave."""
    return tuple(node._input_metadata[0].shape)


def dimension(saved: int, n_dims: int) -> int:
    """Return a dimension that a node has saved, counted from 0."""
    # torch gives negative dimensions as unsigned numbers.
    return (saved - (1 << 64) if saved >= 1 << 63 else saved) % n_dims
