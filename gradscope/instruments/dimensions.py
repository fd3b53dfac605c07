"""Where a dimension of a tensor has gone, after views of it."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

from gradscope.instruments.graph_nodes import dimension, operation_of, shape_of

_REGROUPS = frozenset({"View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze"})
"""They keep the order of elements: what is found by how many elements lie before and in it."""


def dimension_after(views: Iterable[Any], dim: int | None) -> int | None:
    """Follow a dimension through operations; None where it has become a part of another.

    Args:
        views: the nodes of the operations, the first one first.
        dim: the dimension, from 0, of what the first one is given.
    """
    for node in views:
        if dim is None:
            return None
        dim = _after(node, dim)
    return dim


def _after(node: Any, dim: int) -> int | None:
    name = operation_of(node)
    given, taken = shape_of(node.next_functions[0][0]), shape_of(node)
    if name == "T":
        return 1 - dim
    if name == "Transpose":
        one, other = (dimension(of, len(given)) for of in (node._saved_dim0, node._saved_dim1))
        return {one: other, other: one}.get(dim, dim)
    if name == "Permute":
        return [dimension(of, len(given)) for of in node._saved_dims].index(dim)
    if name not in _REGROUPS:
        return dim + len(taken) - len(given)  # what is broadcast gets its dimensions in front
    before = prod(given[:dim])
    found = (d for d, n in enumerate(taken) if n == given[dim] and prod(taken[:d]) == before)
    return next(found, None)
