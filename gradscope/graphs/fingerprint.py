"""A graph in sixteen characters, to see at once whether two steps or two runs have the same one."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gradscope.run.captured_graph import CapturedGraph, Integers, LongIntegers


def fingerprint(captured: CapturedGraph) -> str:
    """Return 16 hexadecimal digits that are equal for equal graphs.

    Told apart is everything that the backward walks through: the operation of each node, its
    inputs in their order and which output of the source each is, shapes and dtypes, the names of
    parameters, the path and class of the module that made a node and which of its nodes came from
    the same call, and the roots. The numbers of nodes and autograd's sequence numbers do not
    matter, so two steps of a loop have the same fingerprint, and so have two processes.

    Nor does anything matter that is not part of the graph itself: what is kept for the backward,
    lines of the program, the step's beginning, parameters and calls that are not reached.

    Two graphs that differ share a fingerprint with a probability of 2⁻⁶⁴.
    """
    order = _order(captured)
    place = np.empty(len(captured), np.int64)
    place[order] = np.arange(len(captured))
    by_target = np.argsort(place[captured.target], kind="stable")
    calls = captured.calls
    parts: list[Any] = [
        len(captured),
        _told_apart(captured.op[order], captured.ops),
        _told_apart(
            captured.output[order], [(each.shapes, each.dtypes) for each in captured.outputs]
        ),
        _told_apart(
            captured.param[order],
            [
                (sorted(names), shape)
                for names, shape in zip(captured.params, captured.param_shape, strict=True)
            ],
            is_own=True,
        ),
        _told_apart(
            captured.call[order],
            [calls.modules[module] for module in calls.module.tolist()],
            is_own=True,
        ),
        place[captured.target[by_target]],
        place[captured.source[by_target]],
        captured.source_output[by_target],
        np.sort(place[captured.roots]),
    ]
    digest = hashlib.sha256()
    for part in parts:
        for piece in part if isinstance(part, tuple) else (part,):
            if isinstance(piece, np.ndarray):
                piece = piece.astype("<i8").tobytes()
            else:
                piece = ascii(piece).encode()  # a name may hold what UTF-8 cannot
            digest.update(b"%d:" % len(piece) + piece)
    return digest.hexdigest()[:16]


def _told_apart(
    number: Integers, values: Iterable[Any], *, is_own: bool = False
) -> tuple[LongIntegers, list[Any]]:
    """Return int64[n], numbers by first occurrence, and the value that each of them stands for.

    ``values`` is what the numbers in ``number`` stand for; -1 stands for nothing and stays. Equal
    values get the same number, unless each is a thing of its own (``is_own``).
    """
    values = list(values)
    if not is_own:
        seen: dict[Any, int] = {}
        same = [seen.setdefault(value, len(seen)) for value in values]
        number, values = np.array([*same, -1], np.int32)[number], list(seen)
    occurring, first, inverse = np.unique(number, return_index=True, return_inverse=True)
    is_some = occurring >= 0
    by_first = np.argsort(np.where(is_some, first, -1), kind="stable")
    new = np.empty(len(occurring), np.int64)
    new[by_first] = np.arange(len(occurring)) - int((~is_some).sum())
    return new[inverse], [values[i] for i in occurring[by_first].tolist() if i >= 0]


def _order(captured: CapturedGraph) -> LongIntegers:
    """Return int64[n], the nodes in an order that only what the graph is decides.

    It is breadth first from the roots, the last one first, each node's inputs in their order.
    """
    starts = _by_time(captured, captured.roots)
    seen = np.concatenate([starts, captured.source])
    nodes, first = np.unique(seen, return_index=True)
    # A graph mostly comes in this very order, and then nothing has to be walked.
    if len(nodes) == len(captured) and (np.diff(first) > 0).all():
        return np.arange(len(captured))
    # As lists, these would be a million objects all over the memory.
    first_input = np.searchsorted(captured.target, np.arange(len(captured) + 1)).data
    sources = captured.source.data
    # Only in a graph made by hand there are nodes that no root depends on.
    is_used = np.zeros(len(captured), np.bool_)
    is_used[captured.source] = True
    is_used[starts] = True
    others = _by_time(captured, np.flatnonzero(~is_used))
    order: list[int] = []
    is_known = bytearray(len(captured))
    for node in [*starts.tolist(), *others.tolist()]:
        is_known[node] = True
    walked = 0
    for more in (starts, others):
        order += more.tolist()
        while walked < len(order):
            node = order[walked]
            walked += 1
            for edge in range(first_input[node], first_input[node + 1]):
                source = sources[edge]
                if not is_known[source]:
                    is_known[source] = True
                    order.append(source)
    return np.array(order, np.int64)


def _by_time(captured: CapturedGraph, nodes: Integers | LongIntegers) -> LongIntegers:
    """Return nodes, each once, the latest first; those of the same time stay in their order."""
    _, first = np.unique(nodes, return_index=True)
    each = nodes[np.sort(first)].astype(np.int64)
    return each[np.argsort(-captured.sequence_nr[each], kind="stable")]
