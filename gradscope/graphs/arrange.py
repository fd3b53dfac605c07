"""Arranges the operations and leaves of a graph in the boxes and frames of a diagram."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from gradscope.graphs.diagram import NO_FRAME, Box, Diagram, Frame, Link
from gradscope.graphs.missing_boxes import MissingBoxes

if TYPE_CHECKING:
    import numpy.typing as npt

    from gradscope.graphs.fold import Block, Folded
    from gradscope.run.captured_graph import LongIntegers, Shape

IsOpen: TypeAlias = "Callable[[Block, int], bool]"
"""Whether to show the inside of a block, which lies in so many frames of modules."""


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
        # Of each edge the repetition between whose copies it leads: its frame, counted from 2; 1 is
        # the block whose inside is shown, 0 none.
        self.carried = np.zeros(len(folded.execution.source), np.int32)

    def diagram(self) -> Diagram:
        self._place_parts(self.top, NO_FRAME, 0)
        self._repeat(self.top, NO_FRAME)
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
                number = len(self.frames)
                self.frames.append(Frame(part, frame))
                self._place_parts(part, number, depth + (part.kind == "module"))
                self._repeat(part, number)
            else:
                self.box_of_place[part.start : part.stop] = len(self.boxes)
                self.boxes.append(Box(frame, part))
                self._show_first_copy(part)

    def _repeat(self, block: Block, frame: int) -> None:
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
        leads_on = (edges.source[of] >= block.start) & (copy_of_source < copy_of_target)
        carried[leads_on] = frame + 2
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
        inner &= (source >= 0) & ((source != target) | (self.carried > 0))
        links = self._drawn_together(inner, source, target)
        for leaves, users in self._leaf_boxes(target):
            shapes = {self.folded.captured.param_shape[leaf]: None for leaf in leaves}
            links += [Link(n_boxes, user, tuple(shapes), len(leaves)) for user in users]
            n_boxes += 1
        boxes, taken = MissingBoxes(
            self.folded, self.top, self.frames, self.boxes, self.box_of_place, self.shown_place
        ).placed(self.most_missing)
        self.boxes += boxes
        return links + taken

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
        links: dict[tuple[int, int, int], Link] = {}
        shapes: dict[tuple[int, int, int], dict[Shape, None]] = {}
        for a, b, carried, place, output in np.unique(key, axis=0).tolist():
            of = captured.outputs_of(edges.node[place]).shapes
            link = links.get((a, b, carried))
            if link is None:
                turns = self._n_copies(carried)
                link = links[a, b, carried] = Link(
                    a, b, n_tensors=0, carried=carried > 0, turns=turns
                )
                shapes[a, b, carried] = {}
            link.n_tensors += 1
            if output < len(of):
                shapes[a, b, carried][of[output]] = None
        for which, link in links.items():
            link.shapes = tuple(shapes[which])
        return list(links.values())

    def _n_copies(self, carried: int) -> int:
        if carried == 0:
            return 1
        return self.top.count if carried == 1 else self.frames[carried - 2].block.count

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
        if is_own.any():
            is_own &= ~self._has_several_places(first)[edges.leaf]
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

    def _has_several_places(self, first: LongIntegers) -> npt.NDArray[np.bool_]:
        """Return bool[p], which leaves are not the counterpart of one leaf in the first copy alone.

        Such a one is shared with what lies elsewhere, and shown by itself.

        Args:
            first: int64[e], the edge in the first copy that corresponds to each edge.
        """
        edges = self.folded.execution
        n_leaves = len(self.folded.captured.params)
        uses = np.flatnonzero(edges.leaf >= 0)
        lowest, highest = np.full(n_leaves, n_leaves), np.full(n_leaves, -1)
        np.minimum.at(lowest, edges.leaf[uses], edges.leaf[first[uses]])
        np.maximum.at(highest, edges.leaf[uses], edges.leaf[first[uses]])
        return highest > lowest

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
