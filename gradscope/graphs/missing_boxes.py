"""The boxes of what does not lead to the loss, where it belongs among the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from gradscope.graphs.diagram import NO_FRAME, Box, Link
from gradscope.graphs.likeness import without_numbers
from gradscope.graphs.unreached import Unreached

if TYPE_CHECKING:
    from gradscope.graphs.diagram import Frame
    from gradscope.graphs.fold import Block, Folded
    from gradscope.graphs.unreached import Why
    from gradscope.run.captured_graph import LongIntegers

_MOST_SINGLE_PARAMETERS: Final = 4


class MissingBoxes:
    """Finds the frame in which each thing that is not reached would stand.

    Args:
        folded: the tree of blocks.
        top: the block whose inside is shown.
        frames: the opened blocks.
        boxes: the boxes of what leads to the loss.
        box_of_place: int64[m], the box that shows each operation.
        shown_place: int64[m], the place in the first copy that stands for each place.
    """

    def __init__(
        self,
        folded: Folded,
        top: Block,
        frames: list[Frame],
        boxes: list[Box],
        box_of_place: LongIntegers,
        shown_place: LongIntegers,
    ) -> None:
        self.folded = folded
        self.top = top
        self.frames = frames
        self.boxes = boxes
        self.box_of_place = box_of_place
        self.shown_place = shown_place

    def placed(self, at_most: int) -> tuple[list[Box], list[Link]]:
        """Return the boxes, and the links from them to whoever was given what they made.

        Args:
            at_most: if there are more boxes than these, those in a frame become one for each
                reason; if these still are too many, the least are left out.
        """
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
        for most_alike in (_MOST_SINGLE_PARAMETERS, 1):
            boxes = [
                Box(frame, missing=each)
                for frame, found in by_frame.items()
                for each in _told_together(found, most_alike, modules_too=most_alike == 1)
            ]
            if len(boxes) <= at_most:
                break
        else:
            boxes = sorted(boxes, key=_extent, reverse=True)[:at_most]
        everything = [*self.boxes, *boxes]
        numbers = range(len(self.boxes), len(everything))
        return boxes, [link for number in numbers for link in self._taken(number, everything)]

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

    def _taken(self, number: int, boxes: list[Box]) -> list[Link]:
        """Return links from something missing to whoever was given its result."""
        missing = boxes[number].missing
        if missing is None or missing.call < 0:
            return []
        takers = {
            self._box_of_call(taker, boxes)
            for giver, taker in self.folded.captured.calls.feeds
            if self.folded.captured.calls.is_inside(giver, missing.call)
        }
        is_cut = missing.why != "frozen"
        return [Link(number, box, is_cut=is_cut) for box in sorted(takers - {-1, number})]

    def _box_of_call(self, call: int, boxes: list[Box]) -> int:
        """Return the box that shows the beginning of a call; -1 if none does."""
        captured, execution = self.folded.captured, self.folded.execution
        first = captured.calls.first[call]
        inside = captured.sequence_nr[execution.node] >= first
        inside &= captured.sequence_nr[execution.node] < captured.calls.last[call]
        places = np.flatnonzero(inside)
        if len(places):
            return int(self.box_of_place[places[0]])
        for number, box in enumerate(boxes):
            around = -1 if box.missing is None else box.missing.call
            if around >= 0 and captured.calls.is_inside(call, around):
                return number
        return -1


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
