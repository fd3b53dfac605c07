"""How much of a graph a picture shows, so that it stays readable whatever the size of the graph."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from gradscope.errors import UsageError
from gradscope.graphs.arrange import diagram_of
from gradscope.graphs.diagram import Diagram
from gradscope.graphs.fold import Block, Folded

if TYPE_CHECKING:
    from gradscope.graphs.likeness import Likeness
    from gradscope.run.captured_graph import CapturedGraph

Depth: TypeAlias = int | Literal["all"] | None
"""How many levels of modules are opened; ``"all"`` is every operation; None decides by itself."""

MAX_NODES: Final = 100
"""Boxes in a picture at the most, unless asked for otherwise."""

_SMALL: Final = 40
"""A graph of so few boxes is shown in full: every operation and every parameter by itself."""

_MOST_LINKS_PER_BOX: Final = 5


@dataclass(frozen=True, slots=True)
class Detail:
    """One way to show a graph.

    Attributes:
        depth: how many levels of modules are opened.
        every_operation: whether modules that call no others, and chains, are opened too.
        each_kind_once: whether, of modules that do the same inside, only the first is opened.
        most_parts: how many parts of one block are shown at the most.
        note: what is left out, in words; empty for nothing.
    """

    depth: int
    every_operation: bool = False
    each_kind_once: bool = False
    most_parts: int = 10**9
    note: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """A diagram, and how it came to show what it shows.

    Attributes:
        diagram: the boxes.
        detail: how detailed it is.
    """

    diagram: Diagram
    detail: Detail


def checked_depth(depth: object) -> Depth:
    """Return ``depth`` if it is one of the allowed values.

    Raises:
        UsageError: if it is not.
    """
    if depth is None or depth == "all" or (type(depth) is int and depth >= 0):
        return depth
    raise UsageError(
        f"depth={depth!r}: pass how many levels of modules to open (0, 1, 2 …), 'all' to show "
        "every operation, or None to let the size of the graph decide"
    )


def checked_max_nodes(max_nodes: object) -> int:
    """Return ``max_nodes`` if it is a sensible number of boxes.

    Raises:
        UsageError: if it is not.
    """
    if type(max_nodes) is int and max_nodes >= 5:
        return max_nodes
    raise UsageError(
        f"max_nodes={max_nodes!r}: pass how many boxes a picture may have, a whole number from 5 on"
    )


class Views:
    """A graph from the most detailed picture that is allowed to the coarsest.

    Args:
        captured: the graph.
        likeness: what counts as a repetition; None to fold none.
    """

    def __init__(self, captured: CapturedGraph, likeness: Likeness | None) -> None:
        self._captured = captured
        self._likeness = likeness

    @functools.cached_property
    def folded(self) -> Folded:
        """The tree of blocks."""
        return Folded(self._captured, self._likeness)

    @functools.cached_property
    def chained(self) -> Folded:
        """The same, operations in a row put together."""
        return self.folded.with_chains()

    def shown(self, depth: Depth, max_nodes: int) -> Iterator[Shown]:
        """Yield the diagrams that have few enough boxes, the most detailed first.

        The last one is always small enough, though it may show next to nothing.
        """
        for detail in self._details(depth, max_nodes):
            folded = self.folded if detail.every_operation else self.chained
            most_parts = detail.most_parts
            if _count(folded, folded.root, _Opener(detail), 0, most_parts, max_nodes) > max_nodes:
                continue
            diagram = diagram_of(
                folded, _Opener(detail), most_parts=most_parts, most_missing=max_nodes // 2
            )
            if _is_small_enough(diagram, max_nodes):
                yield Shown(diagram, detail)
        # What is left has few blocks and many leaves, or edges everywhere.
        folded = self.chained
        few = max(1, max_nodes // 4)
        for most_parts in (max_nodes // 2, max_nodes // 4, max_nodes // 8, 2):
            detail = Detail(0, most_parts=max(2, most_parts), note=_CLOSED)
            diagram = diagram_of(
                folded,
                _Opener(detail),
                most_parts=detail.most_parts,
                most_leaves=1,
                most_missing=few,
            )
            if len(diagram.boxes) <= max_nodes:
                yield Shown(diagram, detail)
        # Even repetitions may be too many where they lie inside of one another.
        for most_parts in (max_nodes // 2, 2):
            detail = Detail(0, most_parts=most_parts, note=_CLOSED)
            diagram = diagram_of(
                folded, _opens_nothing, most_parts=most_parts, most_leaves=1, most_missing=few
            )
            yield Shown(diagram, detail)

    def _details(self, depth: Depth, max_nodes: int) -> Iterator[Detail]:
        deepest = _depth_of(self._captured)
        all_levels = deepest + 1
        if isinstance(depth, int):
            yield Detail(depth)
            deepest = depth - 1
        elif depth == "all":
            yield Detail(all_levels, every_operation=True)
            yield Detail(all_levels, note=_EVERY_OPERATION)
        else:
            every = Detail(all_levels, every_operation=True)
            if self._has_at_most(every, min(_SMALL, max_nodes)):
                yield every
        once = depth is None and self._likeness is not None
        levels = [*range(deepest, -1, -1)]
        if depth is None:
            levels.insert(0, all_levels)
        for level in levels:
            yield Detail(level, each_kind_once=once, note="" if level == all_levels else _CLOSED)
            few = max(4, max_nodes // 2)
            yield Detail(level, each_kind_once=once, most_parts=few, note=_CLOSED)

    def _has_at_most(self, detail: Detail, n_boxes: int) -> bool:
        """Whether a graph is small, its leaves included, without looking at all of a large one."""
        room, folded = n_boxes - len(self._captured.params), self.folded
        return room >= 0 and _count(folded, folded.root, _Opener(detail), 0, 10**9, room) <= room


_EVERY_OPERATION: Final = "not every operation has a box of its own: there would be too many"
_CLOSED: Final = (
    "inner modules are closed, and operations in a row put together, to keep it readable"
)


class _Opener:
    """Opens blocks as a detail says, in the order in which they come; good for one diagram."""

    def __init__(self, detail: Detail) -> None:
        self._detail = detail
        self._seen: set[object] = set()

    def __call__(self, block: Block, depth: int) -> bool:
        detail = self._detail
        if block.kind == "sequence":
            return True
        if block.kind != "module":
            return block.kind == "chain" and detail.every_operation
        if depth >= detail.depth or not (detail.every_operation or block.has_modules):
            return False
        if detail.each_kind_once:
            if block.kin in self._seen:
                return False
            self._seen.add(block.kin)
        return True


def _opens_nothing(block: Block, depth: int) -> bool:
    return False


def _count(
    folded: Folded, block: Block, opens: _Opener, depth: int, most_parts: int, at_most: int
) -> int:
    """Count the boxes that blocks get, up to one more than ``at_most``."""
    n_boxes = 0
    for part in folded.stretched(folded.parts(block), most_parts):
        if part.can_open and opens(part, depth):
            inner = depth + (part.kind == "module")
            n_boxes += _count(folded, part, opens, inner, most_parts, at_most - n_boxes)
        else:
            n_boxes += 1
        if n_boxes > at_most:
            break
    return n_boxes


def _depth_of(captured: CapturedGraph) -> int:
    depth = [0] * len(captured.calls)
    for call, parent in enumerate(captured.calls.parent.tolist()):
        depth[call] = depth[parent] + 1 if parent >= 0 else 1
    return max(depth, default=0)


def _is_small_enough(diagram: Diagram, max_nodes: int) -> bool:
    return len(diagram.boxes) <= max_nodes and len(diagram.links) <= _MOST_LINKS_PER_BOX * max_nodes
