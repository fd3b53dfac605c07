"""The operations of a graph as a tree of blocks: modules inside modules, repetitions drawn once.

Every block is a stretch of the order of execution, and its parts cover it without a gap. So the
tree can be cut off anywhere, and what is drawn as one box then never closes a circle of arrows
(:mod:`gradscope.graphs.execution`). Nothing is lost: the copies of a repetition lie one after the
other behind the first, place by place.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import numpy as np

from gradscope.graphs.execution import execution_of
from gradscope.graphs.likeness import (
    likeness_of_leaves,
    likeness_of_module,
    likeness_of_operations,
)
from gradscope.graphs.repeats import Wiring, find_runs
from gradscope.graphs.unreached import Unreached, unreached

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gradscope.graphs.likeness import Likeness
    from gradscope.run.captured_graph import CapturedGraph, Integers, LongIntegers

Kind: TypeAlias = Literal["graph", "module", "sequence", "operation", "chain", "stretch"]
"""What a block is: the whole graph, a call of a module, several things that were done in a row
again and again, a single operation, operations each of which only hands on to the next, or any
operations in a row that there is no room to show."""

_STRETCHES: Final = 40
"""Into how many stretches a block is divided that has too many parts."""

NO_CALL: Final = -1


@dataclass(slots=True, eq=False)
class Block:
    """A stretch of the order of execution that can be drawn as one box.

    Attributes:
        kind: what it is.
        start, stop: the places that it covers, all copies of a repetition together.
        count: how many copies there are, one directly after the other; mostly 1.
        call: the call of a module, for ``module`` blocks.
        items: the items inside of it (of the first copy), as numbers in its region.
        region: the region whose items these are.
    """

    kind: Kind
    start: int
    stop: int
    count: int = 1
    call: int = NO_CALL
    region: _Region | None = field(default=None, repr=False)
    items: tuple[int, int] = (0, 0)

    @property
    def period(self) -> int:
        """How many places a copy has."""
        return (self.stop - self.start) // self.count

    @property
    def n_operations(self) -> int:
        """How many operations there are in all copies together."""
        return self.stop - self.start

    @property
    def kin(self) -> object:
        """Equal for modules that do the same inside, whatever the shapes; None for other blocks."""
        return self.region.kin if self.kind == "module" and self.region is not None else None

    @property
    def has_modules(self) -> bool:
        """Whether a module calls others, or the program does."""
        return self.region is not None and bool(self.region.inner)

    @property
    def can_open(self) -> bool:
        """Whether there is something inside that could be shown."""
        return self.kind != "operation"


@dataclass(slots=True, eq=False)
class _Region:
    """One call of a module, or the program around all calls, in places and items.

    An item is an operation that the module has carried out itself, or a call inside of it.
    """

    call: int
    start: int
    stop: int = 0
    inner: list[_Region] = field(default_factory=list)
    likeness: int = 0
    kin: int = 0
    _items: tuple[LongIntegers, dict[int, _Region]] | None = None

    def items(self) -> tuple[LongIntegers, dict[int, _Region]]:
        """Return int64[k + 1], where each item begins and the last one ends, and inner regions."""
        if self._items is None:
            inside = np.zeros(self.stop - self.start + 1, np.bool_)
            for region in self.inner:
                inside[region.start - self.start + 1 : region.stop - self.start] = True
            places = np.flatnonzero(~inside) + self.start
            first = np.searchsorted(places, [region.start for region in self.inner]).tolist()
            self._items = (places, dict(zip(first, self.inner, strict=True)))
        return self._items


class Folded:
    """The tree of blocks of one graph; a block's parts are worked out when they are asked for.

    Args:
        captured: the graph.
        likeness: when two pieces count as the same; None folds no repetition.

    Attributes:
        captured: the graph.
        execution: its operations in order.
        root: the whole graph.
    """

    def __init__(self, captured: CapturedGraph, likeness: Likeness | None = "shape") -> None:
        self.captured = captured
        self.execution = execution_of(captured)
        self._chains = False
        self._parts: dict[Block, list[Block]] = {}
        self._inside: dict[Block, list[Block]] = {}
        self._uses: LongIntegers | None = None
        self._unreached: list[Unreached] | None = None
        self._folds = likeness is not None
        compared: Likeness = likeness or "shape"
        likeness_of = likeness_of_operations(captured, self.execution, compared)
        program = _regions(captured, self.execution.node)
        self._likeness = likeness_of
        if self._folds:
            for region, number in _numbered_alike(program, captured, likeness_of, compared):
                region.likeness = number
            by_operation = captured.op[self.execution.node].astype(np.int64)
            for region, number in _numbered_alike(program, captured, by_operation, "op"):
                region.kin = number
            self._wiring = Wiring(self.execution, likeness_of_leaves(captured, compared))
        self.root = self._block("graph", program)

    def with_chains(self) -> Folded:
        """Return the same tree, but operations that only hand on to each other are one block."""
        chained = copy.copy(self)
        chained._chains = True
        chained._parts, chained._inside = {}, {}
        return chained

    @property
    def n_operations(self) -> int:
        """How many operations there are."""
        return len(self.execution)

    @property
    def unreached(self) -> list[Unreached]:
        """What does not lead to the loss."""
        if self._unreached is None:
            self._unreached = unreached(self.captured)
        return self._unreached

    def parts(self, block: Block) -> list[Block]:
        """Return what a block consists of (a repetition: its first copy), in order."""
        known = self._parts.get(block)
        if known is None:
            known = self._parts[block] = list(self._divided(block))
        return known

    def stretched(self, parts: Sequence[Block], at_most: int) -> list[Block]:
        """Return fewer parts, neighbours being put together, in equal shares."""
        if len(parts) <= at_most:
            return list(parts)
        share = -(-len(parts) // at_most)
        return [
            group[0] if len(group) == 1 else self._stretch(group)
            for group in (parts[i : i + share] for i in range(0, len(parts), share))
        ]

    def nodes(self, block: Block) -> LongIntegers:
        """Return int64[n], the nodes in a block, all copies, in the order of execution."""
        return self.execution.node[block.start : block.stop].astype(np.int64)

    def _divided(self, block: Block) -> Iterator[Block]:
        if block.kind == "operation":
            return
        if block.kind == "stretch":
            yield from self.stretched(self._inside[block], _STRETCHES)
            return
        if block.kind == "chain":
            for place in range(block.start, block.start + block.period):
                yield Block("operation", place, place + 1)
            return
        region = block.region
        assert region is not None
        found = self._folded_items(region, *block.items)
        yield from self._with_chains(found) if self._chains else found

    def _folded_items(self, region: _Region, first: int, stop: int) -> list[Block]:
        places, inner = region.items()
        runs = []
        if self._folds and stop - first > 1:
            likeness = self._likeness[places[first:stop]].copy()
            for item, part in inner.items():
                if first <= item < stop:
                    likeness[item - first] = part.likeness
            runs = find_runs(likeness, places[first : stop + 1], self._wiring)
        blocks = []
        at = first
        for run in runs:
            begin, end = first + run.first, first + run.stop
            blocks += [self._item(region, item) for item in range(at, begin)]
            blocks.append(self._repetition(region, begin, run.period, run.count))
            at = end
        blocks += [self._item(region, item) for item in range(at, stop)]
        return blocks

    def _item(self, region: _Region, item: int) -> Block:
        places, inner = region.items()
        if item in inner:
            return self._block("module", inner[item])
        return Block("operation", int(places[item]), int(places[item]) + 1)

    def _repetition(self, region: _Region, first: int, period: int, count: int) -> Block:
        places, _ = region.items()
        if period == 1:
            block = self._item(region, first)
        else:
            block = Block("sequence", 0, 0, region=region, items=(first, first + period))
        block.start, block.stop = int(places[first]), int(places[first + period * count])
        block.count = count
        return block

    def _block(self, kind: Kind, region: _Region) -> Block:
        places, _ = region.items()
        return Block(
            kind,
            region.start,
            region.stop,
            call=region.call,
            region=region,
            items=(0, len(places) - 1),
        )

    def _stretch(self, parts: Sequence[Block]) -> Block:
        block = Block("stretch", parts[0].start, parts[-1].stop)
        self._inside[block] = list(parts)
        return block

    def _with_chains(self, parts: list[Block]) -> Iterator[Block]:
        chain: list[Block] = []
        for part in parts:
            if part.kind == "operation" and part.count == 1:
                if chain and not self._hands_on(part.start):
                    yield from _linked(chain)
                    chain = []
                chain.append(part)
            else:
                yield from _linked(chain)
                chain = []
                yield part
        yield from _linked(chain)

    def _hands_on(self, place: int) -> bool:
        """Whether an operation is the only user of the one before it and uses nothing else."""
        edges = self.execution
        inputs = edges.source[edges.first_input[place] : edges.first_input[place + 1]]
        return len(inputs) == 1 and inputs[0] == place - 1 and bool(self._n_uses[place - 1] == 1)

    @property
    def _n_uses(self) -> LongIntegers:
        if self._uses is None:
            inner = self.execution.source[self.execution.source >= 0]
            self._uses = np.bincount(inner, minlength=len(self.execution))
        return self._uses


def _linked(chain: list[Block]) -> Iterator[Block]:
    if len(chain) > 1:
        yield Block("chain", chain[0].start, chain[-1].stop)
    else:
        yield from chain


def _regions(captured: CapturedGraph, node: Integers) -> _Region:
    """Build the tree of calls; one that is left and entered again has a region for each time."""
    parents = captured.calls.parent.tolist()
    call = captured.call[node]
    changes = np.flatnonzero(np.diff(call, prepend=-2))
    program = _Region(NO_CALL, 0)
    opened = [program]
    for place, current in zip(changes.tolist(), call[changes].tolist(), strict=True):
        wanted = []
        around = current
        while around != NO_CALL:
            wanted.append(around)
            around = parents[around]
        wanted.reverse()
        n_kept = 0
        while (
            n_kept < min(len(wanted), len(opened) - 1) and opened[n_kept + 1].call == wanted[n_kept]
        ):
            n_kept += 1
        while len(opened) - 1 > n_kept:
            opened.pop().stop = place
        for entered in wanted[n_kept:]:
            region = _Region(entered, place)
            opened[-1].inner.append(region)
            opened.append(region)
    for region in opened:
        region.stop = len(node)
    return program


def _numbered_alike(
    program: _Region, captured: CapturedGraph, likeness: LongIntegers, compared: Likeness
) -> Iterator[tuple[_Region, int]]:
    """Give regions with the same contents the same number, from the innermost outwards."""
    numbers: dict[object, int] = {}
    number_of: dict[int, int] = {}
    offset = int(likeness.max(initial=0)) + 1
    operations = likeness.tolist()
    calls = captured.calls
    of_module = [likeness_of_module(path, kind, compared) for path, kind in calls.modules]
    module = calls.module.tolist()
    order = [program]
    for region in order:  # grows while it is walked
        order.extend(region.inner)
    for region in reversed(order):
        contents: list[int] = []
        at = region.start
        for part in region.inner:
            contents += operations[at : part.start]
            contents.append(number_of[id(part)])
            at = part.stop
        contents += operations[at : region.stop]
        what = None if region.call == NO_CALL else of_module[module[region.call]]
        key = (what, tuple(contents))
        number_of[id(region)] = numbers.setdefault(key, len(numbers)) + offset
        yield region, number_of[id(region)]
