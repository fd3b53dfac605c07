"""What is inside of each block of a graph, one level at a time, for a page in which they open.

Of a repetition the first copy is shown, and stands for all of them: of every operation it is known
in which places of the order of execution its copies lie.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from gradscope.graphs.arrange import diagram_of
from gradscope.graphs.diagram import Diagram
from gradscope.graphs.fold import NO_CALL
from gradscope.graphs.ranges import concatenated

if TYPE_CHECKING:
    from collections.abc import Collection

    from gradscope.graphs.diagram import Box, Link
    from gradscope.graphs.execution import Execution
    from gradscope.graphs.fold import Block, Folded, Kind
    from gradscope.run.captured_graph import LongIntegers

BlockKey: TypeAlias = "tuple[Kind, int, int]"
"""What tells a block from others, in whichever :class:`Folded` of the same graph it is."""

MOST_BOXES: Final = 2500
"""Boxes in all insides together, about."""

NO_BOX: Final = -1

_MOST_PARTS: Final = (60, 24, 12)
_MOST_LEAVES: Final = 12
_MOST_LINKS_PER_BOX: Final = 2.5
_MOST_PORTS: Final = 8


@dataclass(frozen=True, slots=True)
class Port:
    """Where data comes in from outside of a block, or goes out to.

    Attributes:
        is_input: whether it comes in.
        box: number of the box outside; -1 for the rest of many.
        n_others: how many boxes the rest consists of; 0 for a port of one box.
        carried: whether the box outside belongs to another copy of a repetition around.
        inner: the boxes inside that it is connected to, counted within the inside.
    """

    is_input: bool
    box: int
    n_others: int
    carried: bool
    inner: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Inside:
    """What is shown when a block is opened.

    Attributes:
        block: the block.
        box: number of the box that opens; -1 for the whole graph.
        parent: the inside in which that box lies.
        first: the number of its first box; boxes are numbered over all insides.
        boxes: its boxes, in the order of execution, then leaves, then what is not reached.
        links: the edges between them, which count boxes from 0 on.
        alike: of leaves in it, those of the other copies for which they stand.
        copies: int64[c], how far each copy of what is inside lies behind the first.
        ports: where data comes in and goes out.
        starts: int64, where each of the boxes that stand for operations begins.
    """

    block: Block
    box: int
    parent: Inside | None
    first: int
    boxes: list[Box]
    links: list[Link]
    alike: dict[int, list[int]]
    copies: LongIntegers
    starts: LongIntegers
    ports: list[Port] = field(default_factory=list)

    def around(self) -> list[Inside]:
        """Return the insides from the whole graph down to this one."""
        found = [self]
        while found[-1].parent is not None:
            found.append(found[-1].parent)
        return found[::-1]

    def call(self) -> int:
        """Return the call of the innermost module that all of this is inside of; -1 for none."""
        for each in reversed(self.around()):
            if each.block.kind == "module":
                return each.block.call
        return NO_CALL


@dataclass(slots=True, eq=False)
class Insides:
    """The insides of a graph, an outer one before those in it.

    Attributes:
        folded: the tree of blocks.
        each: the insides.
        n_left_out: how many blocks could be opened if there were room.
        uses: int64[e], the edges in the order of their sources.
        first_use: int64[m + 1], the uses of what was made at place i are the edges
            ``uses[first_use[i]:first_use[i + 1]]``.
    """

    folded: Folded
    each: list[Inside]
    n_left_out: int
    uses: LongIntegers
    first_use: LongIntegers


def key_of(block: Block) -> BlockKey:
    """Return what tells a block from others."""
    return block.kind, block.start, block.stop


def insides_of(
    folded: Folded, opened: Collection[BlockKey] = (), most_boxes: int = MOST_BOXES
) -> Insides:
    """Look into blocks, the outer ones first, until there are enough boxes.

    Args:
        folded: the tree of blocks, without chains.
        opened: the blocks that come before all others, as far as those around them do.
        most_boxes: no further block is looked into once there are so many boxes.
    """
    edges = folded.execution
    uses = np.argsort(edges.source, kind="stable")
    uses = uses[np.searchsorted(edges.source[uses], 0) :]
    first_use = np.searchsorted(edges.source[uses], np.arange(len(edges) + 1))
    found = Insides(folded, [], 0, uses, first_use)
    n_boxes, n_waiting = 0, 0
    waiting: list[tuple[bool, int, int, Block, int, Inside | None]] = []
    heapq.heappush(waiting, (False, 0, 0, folded.root, NO_BOX, None))
    while waiting and n_boxes < most_boxes:
        _, depth, _, block, box, parent = heapq.heappop(waiting)
        inside = _looked_into(folded, block, box, parent, n_boxes)
        inside.ports = _ports(found, inside)
        found.each.append(inside)
        for number, inner in enumerate(inside.boxes, inside.first):
            if inner.block is not None and inner.block.can_open:
                n_waiting += 1
                is_late = key_of(inner.block) not in opened
                heapq.heappush(
                    waiting, (is_late, depth + 1, n_waiting, inner.block, number, inside)
                )
        n_boxes += len(inside.boxes)
    found.n_left_out = len(waiting)
    return found


def edges_of(edges: Execution, start: int, stop: int, copies: LongIntegers) -> LongIntegers:
    """Return the inputs of a stretch of operations, in all its copies."""
    found, _ = concatenated(edges.first_input[start + copies], edges.first_input[stop + copies])
    return found


def _looked_into(
    folded: Folded, block: Block, box: int, parent: Inside | None, first: int
) -> Inside:
    diagram = _diagram(folded, block)
    copies = np.zeros(1, np.int64) if parent is None else parent.copies
    copies = (copies[:, None] + np.arange(block.count) * block.period).ravel()
    starts = [each.block.start for each in diagram.boxes if each.block is not None]
    return Inside(
        block,
        box,
        parent,
        first,
        diagram.boxes,
        diagram.links,
        diagram.alike,
        copies,
        np.array(starts, np.int64),
    )


def _diagram(folded: Folded, block: Block) -> Diagram:
    for most_parts in _MOST_PARTS:
        diagram = diagram_of(
            folded,
            lambda *_: False,
            top=block,
            most_parts=most_parts,
            most_leaves=_MOST_LEAVES,
        )
        if len(diagram.links) <= _MOST_LINKS_PER_BOX * len(diagram.boxes):
            break
    return diagram


# -- what comes in and goes out -----------------------------------------------------------------


def _ports(insides: Insides, inside: Inside) -> list[Port]:
    if inside.parent is None:
        return []
    edges, block = insides.folded.execution, inside.block
    stop = block.start + block.period
    incoming = edges_of(edges, block.start, stop, inside.copies)
    incoming = incoming[edges.source[incoming] >= 0]
    used, _ = concatenated(
        insides.first_use[block.start + inside.copies], insides.first_use[stop + inside.copies]
    )
    outgoing = insides.uses[used]
    return [
        *_ports_of(inside, edges.target[incoming], edges.source[incoming], is_input=True),
        *_ports_of(inside, edges.source[outgoing], edges.target[outgoing], is_input=False),
    ]


def _ports_of(
    inside: Inside, inner: LongIntegers, outer: LongIntegers, *, is_input: bool
) -> list[Port]:
    """Make the ports of edges with one end inside, in whichever copy, and the other anywhere."""
    box, carried = np.full(len(inner), NO_BOX), np.zeros(len(inner), np.bool_)
    inner, outer = inner.copy(), outer.copy()
    left = np.ones(len(inner), np.bool_)  # those of which both ends lie in the same block so far
    around = inside.around()
    for each, within in zip(around, [*around[1:], None], strict=True):
        block = each.block
        if within is None:
            # Both ends are inside; only if an outer repetition lies between, it comes from outside.
            box[left & carried] = inside.box
        copy_of_inner, first_inner = divmod(inner - block.start, block.period)
        copy_of_outer, first_outer = divmod(outer - block.start, block.period)
        inner = block.start + first_inner
        outer = np.where(left, block.start + first_outer, outer)
        if within is not None:
            carried |= left & (copy_of_inner != copy_of_outer)
            leaves = (outer < within.block.start) | (outer >= within.block.stop)
            at = np.flatnonzero(left & leaves)
            box[at] = each.first + np.searchsorted(each.starts, outer[at], side="right") - 1
            left &= ~leaves
    at = np.flatnonzero(box != NO_BOX)
    inner_box = np.searchsorted(inside.starts, inner[at], side="right") - 1
    ends: dict[tuple[int, bool], list[int]] = {}
    for outside, is_carried, end in np.unique(
        np.stack([box[at], carried[at], inner_box], axis=1), axis=0
    ).tolist():
        ends.setdefault((outside, bool(is_carried)), []).append(end)
    ports = [
        Port(is_input, outside, 0, is_carried, tuple(to))
        for (outside, is_carried), to in ends.items()
    ]
    if len(ports) <= _MOST_PORTS:
        return ports
    kept, rest = ports[: _MOST_PORTS - 1], ports[_MOST_PORTS - 1 :]
    together = sorted({end for port in rest for end in port.inner})
    carried_all = all(port.carried for port in rest)
    return [*kept, Port(is_input, NO_BOX, len(rest), carried_all, tuple(together))]
