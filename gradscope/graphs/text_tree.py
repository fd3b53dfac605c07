"""A graph as a tree of text, for a terminal: modules inside modules, and what each of them does."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from itertools import islice
from math import prod
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from gradscope.errors import UsageError
from gradscope.graphs.labels import with_glyphs
from gradscope.graphs.likeness import without_numbers
from gradscope.graphs.overlay import saved_bytes_of_nodes
from gradscope.graphs.unreached import unreached
from gradscope.graphs.wording import (
    block_kind,
    block_title,
    bytes_text,
    counted,
    missing_caption,
    operation_name,
    shape_text,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gradscope.graphs.fold import Block, Folded
    from gradscope.graphs.unreached import Unreached

_FEWEST_LINES: Final = 5
_SMALLEST_WIDTH: Final = 40
_INDENT: Final = 4
_ROOM_FOR_TEXT: Final = 30
_MOST_OPERATIONS: Final = 6
_BETWEEN: Final = " · "
_SCISSORS: Final = "\N{BLACK SCISSORS}"

_Part: TypeAlias = "list[Block]"
"""What has a line of its own: operations in a row, or a single other block."""


def text_tree(
    folded: Folded, *, depth: int | None = None, max_lines: int = 60, width: int = 100
) -> str:
    """Return a graph as a tree of text without colours.

    A line tells of a module its class, how often it repeats, what it does if it calls no other
    module, how many operations there are in it if there are several, the output of the last one
    (→), the parameters it uses and, in brackets, how many numbers they hold, and what is kept for
    the backward, shared memory counted where it is kept first. Of a repetition all this is told of
    all copies together, but for the output, and below it only what is in the first copy. Operations
    in a row share a line. What does not lead to the loss has scissors in front.

    Args:
        folded: the graph as a tree of blocks.
        depth: how many levels of modules are opened, 0 for none; None for as many as there is room
            for.
        max_lines: how many lines there may be. Where there would be more, the deepest levels are
            closed first, then long lists are cut in the middle; the last line says so.
        width: how many columns there may be; what goes beyond them is cut off.

    Raises:
        UsageError: if one of the numbers is no whole number, or too small.
    """
    _check(depth, max_lines, width)
    trees = _Trees(folded)
    wanted = trees.deepest if depth is None else min(depth, trees.deepest)
    room = max_lines - 1  # the last line may have to say what is left out
    deepest = min(wanted, (width - _ROOM_FOR_TEXT) // _INDENT)
    for most_items in (None, room // 2, room // 4):
        for level in range(deepest, -1, -1):
            tree = trees.built(level, most_items, room)
            if tree is not None:
                note = _note(level, wanted, most_items, max_lines, width)
                return _printed(tree, note, width)
    return _printed(trees.root(), _note(0, 1, 1, max_lines, width), width)


def _check(depth: object, max_lines: object, width: object) -> None:
    if depth is not None and (type(depth) is not int or depth < 0):
        raise UsageError(
            f"depth={depth!r}: pass how many levels of modules to open (0, 1, 2 …), or None to let "
            "the room decide"
        )
    for name, value, least, of in (
        ("max_lines", max_lines, _FEWEST_LINES, "lines"),
        ("width", width, _SMALLEST_WIDTH, "columns"),
    ):
        if type(value) is not int or value < least:
            raise UsageError(
                f"{name}={value!r}: pass how many {of} the text may have, a whole number from "
                f"{least} on"
            )


def _note(level: int, wanted: int, most_items: int | None, max_lines: int, width: int) -> str:
    notes = []
    if level < wanted:
        notes.append(f"modules below level {level} are closed" if level else "modules are closed")
    if most_items is not None:
        notes.append("long lists are cut")
    return f"({', '.join(notes)}: max_lines={max_lines}, width={width})" if notes else ""


def _printed(tree: _Item, note: str, width: int) -> str:
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    def line(text: str) -> Text:
        return Text(with_glyphs(text))

    root = Tree(line(tree.text))
    pending = [(tree, root)]
    while pending:
        item, branch = pending.pop()
        pending += [(each, branch.add(line(each.text))) for each in item.inner]
    out = io.StringIO()
    # Nothing of the terminal in which this happens to run may show in the text.
    console = Console(
        file=out,
        width=width,
        color_system=None,
        force_terminal=False,
        force_jupyter=False,
        legacy_windows=False,
    )
    for printed in (root, line(note)) if note else (root,):
        console.print(printed, no_wrap=True, overflow="ellipsis")
    return "\n".join(each.rstrip() for each in out.getvalue().splitlines())


@dataclass(slots=True, eq=False)
class _Item:
    """A line of the tree, and the lines below it.

    Attributes:
        text: what it says.
        around: path of the module in which the lines below it lie.
        call: the module's call; -1 if it is none.
        paths: paths of all modules for which it stands, the copies of a repetition included.
        inner: the lines below it.
    """

    text: str
    around: str = ""
    call: int = -1
    paths: list[str] = field(default_factory=list)
    inner: list[_Item] = field(default_factory=list)


class _Trees:
    """Makes trees of one graph, more and less detailed ones."""

    def __init__(self, folded: Folded) -> None:
        self._folded = folded
        captured = folded.captured
        kept = saved_bytes_of_nodes(folded)[folded.execution.node]
        self._kept_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept)])
        self._is_named = np.array([bool(names) for names in captured.params], np.bool_)
        self._size = np.array([prod(shape) for shape in captured.param_shape], np.int64)
        self._missing = unreached(captured)
        levels: list[int] = []
        for parent in captured.calls.parent.tolist():
            levels.append(levels[parent] + 1 if parent >= 0 else 1)
        self.deepest = max(levels, default=0)

    def root(self) -> _Item:
        """Make the first line alone."""
        facts = self._facts(0, self._folded.n_operations, self._folded.n_operations - 1)
        return _Item(_BETWEEN.join(["autograd graph", *facts]))

    def built(self, level: int, most_items: int | None, at_most: int) -> _Item | None:
        """Make a tree.

        Args:
            level: how many levels of modules are opened.
            most_items: how many lines there may be directly below a line; None for any number.
            at_most: how many lines there may be in all.

        Returns:
            The first line, with the others below it; None if there are too many.
        """
        root = self.root()
        item_of: dict[str, _Item] = {}
        opened = [(root, self._folded.root, 0)]
        n_lines = 1
        for item, block, depth in opened:  # grows while it is walked
            parts = self._parts(block)
            head, tail = _ends(len(parts), most_items)
            n_lines += head + tail + (head + tail < len(parts))
            if n_lines > at_most:
                return None
            for number, part in enumerate(parts):
                if number == head and head + tail < len(parts):
                    item.inner.append(_Item(self._left_out(parts[head : len(parts) - tail])))
                if head <= number < len(parts) - tail:
                    continue
                inner = self._item(part, item)
                item.inner.append(inner)
                for path in inner.paths:
                    item_of.setdefault(path, inner)
                if part[0].kind == "module" and depth < level and part[0].has_modules:
                    opened.append((inner, part[0], depth + 1))
                elif part[0].kind == "sequence" and not self._is_plain(part[0]):
                    opened.append((inner, part[0], depth))
        n_lines += self._add_missing(root, item_of, most_items)
        return root if n_lines <= at_most else None

    def _parts(self, block: Block) -> list[_Part]:
        parts: list[_Part] = []
        for part in self._folded.parts(block):
            is_plain = self._is_plain(part)
            if is_plain and parts and self._is_plain(parts[-1][0]):
                parts[-1].append(part)
            else:
                parts.append([part])
        return parts

    def _is_plain(self, block: Block) -> bool:
        """Whether there are only operations in a block, and no modules."""
        if block.kind == "sequence":
            return all(map(self._is_plain, self._folded.parts(block)))
        return block.kind in ("operation", "chain")

    # -- what a line says -------------------------------------------------------------------------

    def _item(self, part: _Part, above: _Item) -> _Item:
        block = part[0]
        start, stop, last = block.start, part[-1].stop, part[-1].start + part[-1].period - 1
        facts = [*self._facts(start, stop, last)]
        if stop - start == 1:
            del facts[0]  # it is named
        if block.kind != "module":
            text = f"×{block.count:,}"  # a sequence, opened below
            if self._is_plain(block):
                text = self._operations(part)
            return _Item(_BETWEEN.join([text, *facts]), above.around, above.call, above.paths)
        name = block_title(self._folded, block, above.around)
        if kind := block_kind(self._folded, block):
            name += f" {kind}"
        if not block.has_modules:
            name += f": {self._operations(self._folded.parts(block))}"
        path = self._folded.captured.calls.path(block.call)
        paths = self._paths_of_copies(block)
        if above.around and path.startswith(f"{above.around}."):
            # It also stands for what is in its place in the copies of a module around it.
            paths += [other + path[len(above.around) :] for other in above.paths]
        return _Item(_BETWEEN.join([name, *facts]), path, block.call, [*dict.fromkeys(paths)])

    def _paths_of_copies(self, block: Block) -> list[str]:
        captured, node = self._folded.captured, self._folded.execution.node
        parent = captured.calls.parent
        paths: dict[str, None] = {}
        for place in range(block.start, block.stop, block.period):
            call = int(captured.call[node[place]])
            while parent[call] != parent[block.call]:
                call = int(parent[call])
            paths[captured.calls.path(call)] = None
        return [*paths]

    def _operations(self, blocks: Sequence[Block]) -> str:
        """Name operations in a row: the first ones and the last one."""
        names = [*islice(self._names(blocks), _MOST_OPERATIONS + 1)]
        if len(names) > _MOST_OPERATIONS:
            *_, last = self._names(blocks[-1:])
            names = [*names[: _MOST_OPERATIONS - 2], "…", last]
        return " → ".join(names)

    def _names(self, blocks: Sequence[Block]) -> Iterator[str]:
        for block in blocks:
            times = f" ×{block.count:,}" if block.count > 1 else ""
            if block.kind == "sequence":
                yield f"({self._operations(self._folded.parts(block))}){times}"
                continue
            places = range(block.start, block.start + block.period)
            for node in self._folded.execution.node[places.start : places.stop].tolist():
                yield operation_name(self._folded.captured.op_of(node)) + times

    def _facts(self, start: int, stop: int, last: int) -> Iterator[str]:
        """Yield what is to be said of the operations at the places from ``start`` up to ``stop``.

        The one at ``last`` gives what all of them give together.
        """
        captured, edges = self._folded.captured, self._folded.execution
        yield counted(stop - start, "operation")
        if start == stop:
            return
        if shapes := captured.outputs_of(edges.node[last]).shapes:
            yield f"→ {shape_text(shapes[0])}" + (" …" if len(shapes) > 1 else "")
        used = edges.leaf[edges.first_input[start] : edges.first_input[stop]]
        leaves = np.unique(used[used >= 0])
        named = leaves[self._is_named[leaves]]
        if len(named):
            yield f"{counted(len(named), 'parameter')} ({self._size[named].sum():,})"
        if len(named) < len(leaves):
            yield counted(len(leaves) - len(named), "other leaf", "other leaves")
        if kept := self._kept_before[stop] - self._kept_before[start]:
            yield f"keeps {bytes_text(float(kept))}"

    def _left_out(self, parts: list[_Part]) -> str:
        n_operations = parts[-1][-1].stop - parts[0][0].start
        return f"… {len(parts):,} more{_BETWEEN}{counted(n_operations, 'operation')}"

    # -- what does not lead to the loss -----------------------------------------------------------

    def _add_missing(self, root: _Item, item_of: dict[str, _Item], most_items: int | None) -> int:
        """Put what is not reached below the modules it belongs to; return the number of lines."""
        where: dict[_Item, dict[object, list[Unreached]]] = {}
        for each in self._missing:
            parts = each.path.split(".")
            around = (".".join(parts[:n]) for n in range(len(parts) - 1, -1, -1))
            item = next((item_of[path] for path in around if path in item_of), root)
            like = (without_numbers(each.path), each.what, each.why, each.n_operations)
            alike = where.setdefault(item, {}).setdefault((like, len(each.params)), [])
            alike.append(each)
        n_lines = 0
        for item, groups in where.items():
            shown = [*islice(groups.values(), most_items)]
            for group in shown:
                call = group[0].call
                after = next((i for i, e in enumerate(item.inner) if e.call > call >= 0), None)
                at = len(item.inner) if after is None else after
                item.inner.insert(at, _Item(_missing_text(group, item), call=call))
            n_lines += len(shown)
            if len(shown) < len(groups):
                n_lines += 1
                left = sum(map(len, groups.values())) - sum(map(len, shown))
                item.inner.append(_Item(f"{_SCISSORS} … {left:,} more"))
        return n_lines


def _missing_text(alike: list[Unreached], below: _Item) -> str:
    first, last = alike[0], alike[-1]
    caption = missing_caption(first, below.around)
    name = caption.title[0]
    if len(alike) > 1:
        inside, others = _inside(first.path, below.paths), _inside(last.path, below.paths)
        # In each copy of a repetition the same, or several of them in one module.
        name = inside if inside == others else f"{inside} … {others}"
        name += f" ×{len(alike):,}"
    facts = [name, *caption.small]
    if first.taken_by:
        more = ", …" if len(first.taken_by) > 1 else ""
        facts.append(f"its result goes to {first.taken_by[0]}{more}")
    return f"{_SCISSORS} {_BETWEEN.join(facts)}"


def _inside(path: str, around: list[str]) -> str:
    """Return what is left of a path inside of the module of ``around`` in which it lies."""
    return next((path[len(each) + 1 :] for each in around if path.startswith(f"{each}.")), path)


def _ends(n_items: int, at_most: int | None) -> tuple[int, int]:
    """Return how many items of a list are shown at its beginning and at its end."""
    if at_most is None or n_items <= at_most:
        return n_items, 0
    tail = (at_most - 1) // 3
    return at_most - 1 - tail, tail
