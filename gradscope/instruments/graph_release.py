"""Keeps the freeing of a deep graph from overflowing the C stack, once Python has walked it.

torch frees a graph in a loop as long as Python never saw its nodes. A node that was seen keeps its
Python object for as long as it lives, and such nodes are freed one inside the other: 180 to 400
bytes of stack for each node on the longest path. A walked chain of 60,000 operations then ends the
program with a segmentation fault where the loss goes out of scope, and in a thread with a stack of
1 MiB one of 4,000 does (torch 2.13).

The remedy: some nodes, never more than :data:`MAX_NESTED` below one another, hold a list of the
nodes below them. When such a node is freed its list is freed element by element, consumers before
producers, so that nothing nests. A node is listed only by a node from which it can be reached and
which therefore keeps it alive anyway; so nothing lives longer than it would have.
"""

from __future__ import annotations

from typing import Any

import numpy as np

MAX_NESTED = 1000
_KEY = "gradscope.release_order"


def bound_release_depth(
    nodes: list[Any],
    first_edge: list[int],
    source: list[int],
    sequence_nr: list[int] | None = None,
) -> None:
    """Make the graph of ``nodes`` safe to free; costs nothing for up to ``MAX_NESTED`` nodes.

    Args:
        nodes: all nodes of the graph, each once.
        first_edge: n + 1 offsets; the inputs of node i are ``source[first_edge[i]:first_edge[i +
            1]]``.
        source: for each edge the number of the node that is used.
        sequence_nr: autograd's number of each node, if known; less than 0 for a leaf. Where they
            agree with the edges, which they do in a graph that one thread has made, the order of
            nodes need not be worked out.
    """
    if len(nodes) <= MAX_NESTED:
        return
    order = None if sequence_nr is None else _by_number(first_edge, source, sequence_nr)
    if order is None:
        order = _consumers_first(len(nodes), first_edge, source)
    nested = [0] * len(nodes)  # how many nodes are freed inside each other, from this one down
    holders = []
    for node in reversed(order):
        depth = 0
        for used in source[first_edge[node] : first_edge[node + 1]]:
            if nested[used] > depth:
                depth = nested[used]
        if depth >= MAX_NESTED:
            holders.append(node)
            depth = -1
        nested[node] = depth + 1
    if not holders:
        return
    rank = {node: at for at, node in enumerate(reversed(order))}
    ends = set(holders)
    for holder in holders:
        below = {holder}
        pending = [holder]
        while pending:
            node = pending.pop()
            for used in source[first_edge[node] : first_edge[node + 1]]:
                if used not in below and first_edge[used] != first_edge[used + 1]:
                    below.add(used)
                    if used not in ends:
                        pending.append(used)
        below.remove(holder)
        # A list is freed from its end.
        nodes[holder].metadata[_KEY] = [nodes[node] for node in sorted(below, key=rank.__getitem__)]


def _by_number(
    first_edge: list[int], source: list[int], sequence_nr: list[int]
) -> list[int] | None:
    """Return the nodes by descending number, if that puts every consumer first."""
    number = np.array(sequence_nr, np.int64)
    if (np.repeat(number, np.diff(first_edge)) <= number[source]).any():
        return None
    order: list[int] = np.argsort(-number, kind="stable").tolist()
    return order


def _consumers_first(n: int, first_edge: list[int], source: list[int]) -> list[int]:
    unmet = [0] * n
    for used in source:
        unmet[used] += 1
    order = [node for node in range(n) if not unmet[node]]
    for node in order:  # grows while it is walked
        for used in source[first_edge[node] : first_edge[node + 1]]:
            unmet[used] -= 1
            if not unmet[used]:
                order.append(used)
    return order
