"""What a picture shows: boxes inside of frames, and the edges between them.

Of a repetition only the first copy is shown. An edge that leads from one copy to the next is marked
as carried over; it is the only kind that may point backwards, all others follow the data downwards.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from gradscope.graphs.fold import Block, Folded
    from gradscope.graphs.unreached import Unreached
    from gradscope.run.captured_graph import LongIntegers, Shape

NO_FRAME: Final = -1


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
        turns: how many copies that repetition has; 1 if it leads nowhere like that.
        is_cut: whether it is what is left of an edge after a ``detach()`` or the like.
    """

    source: int
    target: int
    shapes: tuple[Shape, ...] = ()
    n_tensors: int = 1
    carried: bool = False
    turns: int = 1
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

    @property
    def has_repetitions(self) -> bool:
        """Whether something is drawn once that was done several times."""
        blocks = [frame.block for frame in self.frames]
        blocks += [box.block for box in self.boxes if box.block is not None]
        return any(block.count > 1 for block in blocks)

    def parameter_names(self, box: Box) -> list[tuple[str, ...]]:
        """Return the names of the parameters in a box, an entry for each."""
        captured = self.folded.captured
        leaves = [box.leaf] if box.leaf >= 0 else box.leaves
        return [captured.params[leaf] for leaf in leaves]
