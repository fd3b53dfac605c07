"""What a picture shows: boxes inside of frames, and the edges between them.

Of a repetition only the first copy is shown. An edge that leads from one copy to the next is marked
as carried over; it is the only kind that may point backwards, all others follow the data downwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from gradscope.graphs.likeness import without_numbers
from gradscope.graphs.unreached import Unreached

if TYPE_CHECKING:
    from gradscope.graphs.fold import Block, Folded
    from gradscope.graphs.unreached import Why
    from gradscope.run.captured_graph import LongIntegers, Shape

IsOpen: TypeAlias = "Callable[[Block, int], bool]"
"""Whether to show the inside of a block, which lies in so many frames."""

NO_FRAME: Final = -1

_MOST_SINGLE_PARAMETERS: Final = 4


@dataclass(slots=True, eq=False)
class Frame:
    """A block whose inside is shown.

    Attributes:
        block: the block.
        parent: number of the frame around it; -1 for none.
    """

    block: Block
    parent: int = NO_FRAME


@dataclass(slots=True, eq=False)
class Box:
    """Something drawn as one box.

    Attributes:
        frame: number of the frame that it stands in; -1 for none.
        block: the block that it stands for, if it does.
        leaf: the leaf that it stands for, an index into ``params``; -1 if it does not.
        leaves: the leaves that only this block uses and that have no box of their own.
        missing: what does not lead to the loss, if the box stands for such a thing.
        is_root: whether a backward starts in here.
    """

    frame: int
    block: Block | None = None
    leaf: int = -1
    leaves: list[int] = field(default_factory=list)
    missing: Unreached | None = None
    is_root: bool = False


@dataclass(slots=True)
class Link:
    """All edges from one box to another.

    Attributes:
        source, target: numbers of the boxes.
        shapes: the shapes of the tensors, once each.
        n_tensors: how many tensors there are.
        carried: whether it leads from a copy of a repetition to the next.
        is_cut: whether it is what is left of an edge after a ``detach()`` or the like.
    """

    source: int
    target: int
    shapes: tuple[Shape, ...] = ()
    n_tensors: int = 1
    carried: bool = False
    is_cut: bool = False


@dataclass(slots=True, eq=False)
class Diagram:
    """Everything in a picture.

    Attributes:
        folded: the tree of blocks that is shown.
        frames: opened blocks, outer ones first.
        boxes: in the order of execution, then leaves, then what is not reached.
        links: the edges between boxes; none from a box to itself, unless it is carried over.
        box_of_place: int64[m], the box that shows each operation, in whichever copy it is.
        shown_place: int64[m], the place in the first copy that stands for each place.
        alike: of leaves that are shown, those of the other copies for which they stand.
    """

    folded: Folded
    frames: list[Frame]
    boxes: list[Box]
    links: list[Link]
    box_of_place: LongIntegers
    shown_place: LongIntegers
    alike: dict[int, list[int]]

    def parameter_names(self, box: Box) -> list[tuple[str, ...]]:
        """Return the names of the parameters in a box, an entry for each."""
        captured = self.folded.captured
        leaves = [box.leaf] if box.leaf >= 0 else box.leaves
        return [captured.params[leaf] for leaf in leaves]


def diagram_of(
    folded: Folded,
    is_open: IsOpen,
    *,
    top: Block | None = None,
    most_parts: int = 10**9,
    most_leaves: int = 10**9,
    most_missing: int = 10**9,
) -> Diagram:
    """Decide what is one box and what is a frame around others, and draw the edges together.

    Args:
        folded: the tree of blocks.
        is_open: whether to show the inside of a block.
        top: the block whose inside is shown; the whole graph by default.
        most_parts: a block with more parts than these has neighbours put together.
        most_leaves: if there are more boxes of leaves than these, those in a frame become one.
        most_missing: if there are more boxes than these of what does not lead to the loss, those in
            a frame become one for each reason; if these still are too many, the least are left out.
    """
    builder = _Builder(folded, is_open, top or folded.root, most_parts, most_leaves, most_missing)
    return builder.diagram()


class _Builder:
    def __init__(
        self,
        folded: Folded,
        is_open: IsOpen,
        top: Block,
        most_parts: int,
        most_leaves: int,
        most_missing: int,
    ) -> None:
        self.folded = folded
        self.is_open = is_open
        self.top = top
        self.most_parts = most_parts
        self.most_leaves = most_leaves
        self.most_missing = most_missing
        self.alike: dict[int, list[int]] = {}
        self.frames: list[Frame] = []
        self.boxes: list[Box] = []
        n_places = len(folded.execution)
        self.box_of_place = np.full(n_places, -1, np.int64)
        self.shown_place = np.arange(n_places)
        self.carried = np.zeros(len(folded.execution.source), np.bool_)

    def diagram(self) -> Diagram:
        self._place_parts(self.top, NO_FRAME, 0)
        self._repeat(self.top)
        links = self._links()
        self._mark_roots()
        return Diagram(
            self.folded,
            self.frames,
            self.boxes,
            links,
            self.box_of_place,
            self.shown_place,
            self.alike,
        )

    # -- boxes and frames -------------------------------------------------------------------

    def _place_parts(self, block: Block, frame: int, depth: int) -> None:
        for part in self.folded.stretched(self.folded.parts(block), self.most_parts):
            if part.can_open and self.is_open(part, depth):
                self.frames.append(Frame(part, frame))
                self._place_parts(part, len(self.frames) - 1, depth + (part.kind == "module"))
                self._repeat(part)
            else:
                self.box_of_place[part.start : part.stop] = len(self.boxes)
                self.boxes.append(Box(frame, part))
                self._show_first_copy(part)

    def _repeat(self, block: Block) -> None:
        """Let the first copy of an opened repetition stand for the others."""
        if block.count == 1:
            return
        first = slice(block.start, block.start + block.period)
        self.box_of_place[block.start : block.stop] = np.tile(self.box_of_place[first], block.count)
        self._show_first_copy(block)
        edges = self.folded.execution
        of = slice(*edges.first_input[[block.start, block.stop]].tolist())
        copy_of_target = (edges.target[of] - block.start) // block.period
        copy_of_source = (edges.source[of] - block.start) // block.period
        # What is carried over inside of the first copy is so inside of the others, too.
        carried = np.tile(self.carried[of].reshape(block.count, -1)[0], block.count)
        carried |= (edges.source[of] >= block.start) & (copy_of_source < copy_of_target)
        self.carried[of] = carried

    def _show_first_copy(self, block: Block) -> None:
        if block.count > 1:
            first = self.shown_place[block.start : block.start + block.period]
            self.shown_place[block.start : block.stop] = np.tile(first, block.count)

    def _mark_roots(self) -> None:
        captured, place = self.folded.captured, self.folded.execution.place
        box_of_leaf = {leaf: box for box in self.boxes for leaf in box.leaves}
        box_of_leaf |= {box.leaf: box for box in self.boxes if box.leaf >= 0}
        for root in captured.roots.tolist():
            if place[root] >= 0:
                at = int(self.box_of_place[place[root]])
                if at >= 0:
                    self.boxes[at].is_root = True
            elif captured.param[root] in box_of_leaf:
                box_of_leaf[captured.param[root]].is_root = True

    # -- edges ------------------------------------------------------------------------------

    def _links(self) -> list[Link]:
        edges, n_boxes = self.folded.execution, len(self.boxes)
        target = self.box_of_place[edges.target]
        inner = (edges.source >= 0) & (target >= 0)
        source = np.where(inner, self.box_of_place[edges.source], -1)
        inner &= (source >= 0) & ((source != target) | self.carried)
        links = self._drawn_together(inner, source, target)
        for leaves, users in self._leaf_boxes(target):
            shapes = {self.folded.captured.param_shape[leaf]: None for leaf in leaves}
            links += [Link(n_boxes, user, tuple(shapes), len(leaves)) for user in users]
            n_boxes += 1
        return links + self._missing()

    def _drawn_together(
        self,
        inner: np.ndarray[tuple[int], np.dtype[np.bool_]],
        source: LongIntegers,
        target: LongIntegers,
    ) -> list[Link]:
        edges, captured = self.folded.execution, self.folded.captured
        at = np.flatnonzero(inner)
        # One tensor is one output of one operation, in whichever copy of a repetition.
        shown = self.shown_place[edges.source[at]]
        key = np.stack(
            [source[at], target[at], self.carried[at], shown, edges.source_output[at]], axis=1
        )
        links: dict[tuple[int, int, bool], Link] = {}
        shapes: dict[tuple[int, int, bool], dict[Shape, None]] = {}
        for a, b, carried, place, output in np.unique(key, axis=0).tolist():
            of = captured.outputs_of(edges.node[place]).shapes
            link = links.get((a, b, bool(carried)))
            if link is None:
                link = links[a, b, bool(carried)] = Link(a, b, n_tensors=0, carried=bool(carried))
                shapes[a, b, bool(carried)] = {}
            link.n_tensors += 1
            if output < len(of):
                shapes[a, b, bool(carried)][of[output]] = None
        for which, link in links.items():
            link.shapes = tuple(shapes[which])
        return list(links.values())

    def _leaf_boxes(self, target: LongIntegers) -> list[tuple[list[int], list[int]]]:
        """Make the boxes of leaves; return the leaves in each, and which boxes use them.

        A leaf that one module alone uses, and whose inside is not shown, is told of in the
        module's own box.
        """
        edges = self.folded.execution
        shown = self.shown_place[edges.target]
        # The edge in the first copy that corresponds to each edge.
        first = edges.first_input[shown] + (
            np.arange(len(edges.target)) - edges.first_input[edges.target]
        )
        is_leaf = (edges.leaf >= 0) & (target >= 0)
        # What copies have of their own is shown with the first one.
        is_own = (shown != edges.target) & (edges.leaf != edges.leaf[np.where(is_leaf, first, 0)])
        for at in np.flatnonzero(is_leaf & is_own).tolist():
            others = self.alike.setdefault(int(edges.leaf[first[at]]), [])
            others.append(int(edges.leaf[at]))
        # One that a copy uses several times still is one.
        self.alike = {leaf: list(dict.fromkeys(others)) for leaf, others in self.alike.items()}
        drawn = is_leaf & ~is_own
        pairs = np.unique(np.stack([edges.leaf[drawn], target[drawn]], axis=1), axis=0)
        users: dict[int, list[int]] = {}
        for leaf, box in pairs.tolist():
            users.setdefault(leaf, []).append(box)
        for leaf in self.folded.captured.param[self.folded.captured.roots].tolist():
            if leaf >= 0 and self.top is self.folded.root:
                users.setdefault(leaf, [])
        for leaf, boxes in list(users.items()):
            only = self.boxes[boxes[0]] if len(boxes) == 1 else None
            if only is not None and only.block is not None and only.block.can_open:
                only.leaves.append(leaf)
                del users[leaf]
        if len(users) > self.most_leaves:
            return self._leaves_together(users)
        for leaf, boxes in users.items():
            self.boxes.append(Box(self._common_frame(boxes), leaf=leaf))
        return [([leaf], boxes) for leaf, boxes in users.items()]

    def _leaves_together(self, users: dict[int, list[int]]) -> list[tuple[list[int], list[int]]]:
        by_frame: dict[int, dict[int, list[int]]] = {}
        for leaf, boxes in users.items():
            by_frame.setdefault(self._common_frame(boxes), {})[leaf] = boxes
        self.boxes += [Box(frame, leaves=list(of)) for frame, of in by_frame.items()]
        return [
            (list(of), sorted({box for boxes in of.values() for box in boxes}))
            for of in by_frame.values()
        ]

    def _common_frame(self, boxes: list[int]) -> int:
        chains = [self._frames_around(self.boxes[box].frame) for box in boxes]
        common = NO_FRAME
        for frames in zip(*chains, strict=False):
            if len(set(frames)) > 1:
                break
            common = frames[0]
        return common

    def _frames_around(self, frame: int) -> list[int]:
        frames = []
        while frame != NO_FRAME:
            frames.append(frame)
            frame = self.frames[frame].parent
        return frames[::-1]

    # -- what is not reached ----------------------------------------------------------------

    def _missing(self) -> list[Link]:
        calls = self.folded.captured.calls
        of_call = {
            frame.block.call: number
            for number, frame in enumerate(self.frames)
            if frame.block.kind == "module"
        }
        of_call.setdefault(self.top.call, NO_FRAME)
        of_path = {calls.path(call): of_call[call] for call in reversed(of_call) if call >= 0}
        called = {calls.path(call) for call in range(len(calls))}
        by_frame: dict[int, list[Unreached]] = {}
        elsewhere = []
        for each in self.folded.unreached:
            frame = self._frame_of_missing(each, of_call, of_path, called)
            if frame is None:
                elsewhere.append(each)
            else:
                by_frame.setdefault(frame, []).append(each)
        # The first copy tells of what is missing in the others, too.
        for call, shown in self._calls_in_other_copies().items():
            if shown in of_call:
                of_call.setdefault(call, of_call[shown])
                of_path.setdefault(calls.path(call), of_call[shown])
        known = {_likeness(frame, each) for frame, found in by_frame.items() for each in found}
        for each in elsewhere:
            frame = self._frame_of_missing(each, of_call, of_path, called)
            if frame is not None and _likeness(frame, each) not in known:
                known.add(_likeness(frame, each))
                by_frame.setdefault(frame, []).append(each)
        first = len(self.boxes)
        for at_most in (_MOST_SINGLE_PARAMETERS, 1):
            boxes = [
                Box(frame, missing=each)
                for frame, found in by_frame.items()
                for each in _told_together(found, at_most, modules_too=at_most == 1)
            ]
            if len(boxes) <= self.most_missing:
                break
        else:
            boxes = sorted(boxes, key=_extent, reverse=True)[: self.most_missing]
        self.boxes += boxes
        return [link for number in range(first, len(self.boxes)) for link in self._taken(number)]

    def _calls_in_other_copies(self) -> dict[int, int]:
        """Return, for calls in the other copies of repetitions, those shown in their place."""
        call = self.folded.captured.call[self.folded.execution.node]
        parent = self.folded.captured.calls.parent
        is_other = self.shown_place != np.arange(len(call))
        pairs = np.stack([call[is_other], call[self.shown_place[is_other]]], axis=1)
        shown_for: dict[int, int] = {}
        for other, shown in np.unique(pairs, axis=0).tolist():
            while other != shown and other not in shown_for and min(other, shown) >= 0:
                shown_for[other] = shown
                other, shown = int(parent[other]), int(parent[shown])
        return shown_for

    def _frame_of_missing(
        self,
        missing: Unreached,
        of_call: dict[int, int],
        of_path: dict[str, int],
        called: set[str],
    ) -> int | None:
        """Return the frame in which something missing belongs; None if that is not shown."""
        if missing.call >= 0:
            return of_call.get(int(self.folded.captured.calls.parent[missing.call]))
        return self._frame_of_path(missing.path, of_path, called)

    def _frame_of_path(self, path: str, of_path: dict[str, int], called: set[str]) -> int | None:
        """Return the frame in which something that was not called belongs; None if not shown."""
        while path:
            path = path.rpartition(".")[0]
            if path in of_path:
                return of_path[path]
            if path in called:
                return None
        return NO_FRAME if self.top is self.folded.root else None

    def _taken(self, number: int) -> list[Link]:
        """Return links from something missing to whoever was given its result."""
        missing = self.boxes[number].missing
        if missing is None or missing.call < 0:
            return []
        takers = {
            self._box_of_call(taker)
            for giver, taker in self.folded.captured.calls.feeds
            if self._is_inside(giver, missing.call)
        }
        is_cut = missing.why != "frozen"
        return [Link(number, box, is_cut=is_cut) for box in sorted(takers - {-1, number})]

    def _box_of_call(self, call: int) -> int:
        """Return the box that shows the beginning of a call; -1 if none does."""
        captured, execution = self.folded.captured, self.folded.execution
        first = captured.calls.first[call]
        inside = captured.sequence_nr[execution.node] >= first
        inside &= captured.sequence_nr[execution.node] < captured.calls.last[call]
        places = np.flatnonzero(inside)
        if len(places):
            return int(self.box_of_place[places[0]])
        for number, box in enumerate(self.boxes):
            around = -1 if box.missing is None else box.missing.call
            if around >= 0 and self._is_inside(call, around):
                return number
        return -1

    def _is_inside(self, call: int, around: int) -> bool:
        parent = self.folded.captured.calls.parent
        while call > around:
            call = int(parent[call])
        return call == around


def _likeness(frame: int, missing: Unreached) -> tuple[int, str, str, Why]:
    return frame, without_numbers(missing.path), missing.what, missing.why


def _extent(box: Box) -> int:
    return len(box.missing.params) + box.missing.n_operations if box.missing is not None else 0


def _told_together(found: list[Unreached], at_most: int, *, modules_too: bool) -> list[Unreached]:
    """Tell in one box of what is missing for the same reason, if it is more than ``at_most``."""
    alike: dict[tuple[str, Why], list[Unreached]] = {}
    together: list[Unreached] = []
    for each in found:
        what = "parameter" if each.what == "parameter" else "module"
        if what == "parameter" or modules_too:
            alike.setdefault((what, each.why), []).append(each)
        else:
            together.append(each)
    for (what, why), those in alike.items():
        if len(those) <= at_most:
            together += those
            continue
        params = tuple(param for each in those for param in each.params)
        n_operations = sum(each.n_operations for each in those)
        name = f"{len(those)} {what}s"
        together.append(Unreached(name, "", why, n_operations=n_operations, params=params))
    return together
