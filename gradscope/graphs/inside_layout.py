"""Where the boxes and arrows of each inside stand, as Graphviz lays them out beforehand.

Lengths are in pixels, from the upper left corner. Boxes are told to Graphviz by their size alone; a
page sets the text, so how wide it is is estimated here.
"""

from __future__ import annotations

import time
import unicodedata
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from gradscope.errors import RenderError
from gradscope.graphs.layout import lay_out_all
from gradscope.graphs.topological import topological_order

if TYPE_CHECKING:
    from collections.abc import Sequence

_PER_INCH: Final = 72
_ARROWS_AT_ONCE: Final = 500
_LONGEST: Final = 5.0
"""Seconds for graphs with so many arrows together, before they are tried in halves."""

_WORKERS: Final = 2
"""How many processes lay out at the same time."""

_COLUMN_GAP: Final = 24.0
_NARROW: Final = frozenset("iIjlt.,:;'|!()[]/-f ")
_WIDE: Final = frozenset("mwMW@%&…→×")


@dataclass(frozen=True, slots=True)
class Size:
    """How large something is, in pixels."""

    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Arrow:
    """An arrow to be laid out.

    Attributes:
        source, target: numbers of the boxes.
        label: how large its label is, or None.
        carried: whether it may point upwards.
    """

    source: int
    target: int
    label: Size | None = None
    carried: bool = False


@dataclass(frozen=True, slots=True)
class Route:
    """Where an arrow runs.

    Attributes:
        points: x and y of the start, then of two control points and an end for each curve.
        label: x and y of the middle of its label.
    """

    points: tuple[float, ...]
    label: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything stands.

    Attributes:
        size: of the whole.
        corners: the upper left corner of each box.
        routes: the route of each arrow.
    """

    size: Size
    corners: tuple[tuple[float, float], ...]
    routes: tuple[Route, ...]


@dataclass(frozen=True, slots=True)
class Sketch:
    """Boxes and arrows that have no places yet.

    Attributes:
        sizes: of the boxes.
        arrows: between them.
        top, bottom: the boxes that stand above and below all others.
    """

    sizes: tuple[Size, ...]
    arrows: tuple[Arrow, ...]
    top: tuple[int, ...] = ()
    bottom: tuple[int, ...] = ()


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """How wide a text is at the most, in pixels, in a sans-serif face of the given size."""
    width = 0.0
    for char in text:
        if char in _NARROW:
            width += 0.36
        elif char in _WIDE or unicodedata.east_asian_width(char) in "WF":
            width += 1.0
        elif char.isupper():
            width += 0.72
        else:
            width += 0.58
    return width * size * (1.06 if bold else 1.0)


def laid_out(sketches: Sequence[Sketch], time_limit: float) -> list[Layout]:
    """Lay out sketches; those for which there is no time or no Graphviz become columns."""
    ends = time.monotonic() + time_limit
    batches: list[list[str]] = []
    n_arrows = _ARROWS_AT_ONCE
    for sketch in sketches:
        if n_arrows >= _ARROWS_AT_ONCE:
            batches.append([])
            n_arrows = 0
        batches[-1].append(dot_of(sketch))
        n_arrows += len(sketch.arrows)
    with ThreadPoolExecutor(_WORKERS) as workers:
        done = workers.map(partial(_plain, ends=ends), batches)
        plains = [plain for batch in done for plain in batch]
    return [
        in_column(sketch) if plain is None else read_plain(plain, sketch)
        for sketch, plain in zip(sketches, plains, strict=True)
    ]


def _plain(dots: list[str], ends: float) -> list[str | None]:
    """Ask Graphviz for layouts; what fails together is tried again in halves."""
    left = ends - time.monotonic()
    if left > 0:
        try:
            return [each.decode() for each in lay_out_all(dots, "plain", min(left, _LONGEST))]
        except RenderError:
            if len(dots) > 1:
                half = len(dots) // 2
                return _plain(dots[:half], ends) + _plain(dots[half:], ends)
    return [None] * len(dots)


def dot_of(sketch: Sketch) -> str:
    """Write a sketch down for Graphviz."""
    lines = [
        "digraph {",
        # Without the limit the last pixels of a tall graph can take it longer than all the rest.
        'nodesep="0.22" ranksep="0.2" nslimit="1"',
        'node [shape="box" fixedsize="true" label=""]',
        'edge [dir="none"]',
    ]
    lines += [
        f'b{number} [width="{size.width / _PER_INCH:.3f}" height="{size.height / _PER_INCH:.3f}"]'
        for number, size in enumerate(sketch.sizes)
    ]
    for rank, boxes in (("source", sketch.top), ("sink", sketch.bottom)):
        if boxes:
            names = " ".join(f"b{number}" for number in boxes)
            lines.append(f'{{ rank="{rank}" {names} }}')
    for arrow in sketch.arrows:
        more = []
        if arrow.carried:
            more.append('constraint="false"')
        if arrow.label is not None:
            width, height = round(arrow.label.width), round(arrow.label.height)
            more.append(
                'label=<<TABLE BORDER="0" CELLBORDER="0" CELLPADDING="0" FIXEDSIZE="TRUE" '
                f'WIDTH="{width}" HEIGHT="{height}"><TR><TD></TD></TR></TABLE>>'
            )
        lines.append(f"b{arrow.source} -> b{arrow.target} [{' '.join(more)}]")
    return "\n".join([*lines, "}"])


def read_plain(plain: str, sketch: Sketch) -> Layout:
    """Read what Graphviz wrote in its ``plain`` format.

    https://graphviz.org/docs/outputs/plain/
    """
    height = 0.0
    size = Size(0.0, 0.0)
    corners = [(0.0, 0.0)] * len(sketch.sizes)
    routes: dict[tuple[int, int], list[Route]] = defaultdict(list)

    def at(x: str, y: str) -> tuple[float, float]:
        return float(x) * _PER_INCH, (height - float(y)) * _PER_INCH

    for line in plain.splitlines():
        what, *words = line.split(" ")
        if what == "graph":
            height = float(words[2])
            size = Size(float(words[1]) * _PER_INCH, height * _PER_INCH)
        elif what == "node":
            number = int(words[0][1:])
            x, y = at(words[1], words[2])
            own = sketch.sizes[number]
            corners[number] = (x - own.width / 2, y - own.height / 2)
        elif what == "edge":
            n_points = int(words[2])
            ends = 3 + 2 * n_points
            points = [at(*words[i : i + 2]) for i in range(3, ends, 2)]
            # A label, if there is one, stands before its place; style and colour come last.
            label = at(words[-4], words[-3]) if len(words) > ends + 2 else (0.0, 0.0)
            route = Route(tuple(part for point in points for part in point), label)
            routes[int(words[0][1:]), int(words[1][1:])].append(route)
    # Of several arrows between two boxes the one that was written first comes first.
    in_order = tuple(routes[arrow.source, arrow.target].pop(0) for arrow in sketch.arrows)
    return Layout(size, tuple(corners), in_order)


def in_column(sketch: Sketch) -> Layout:
    """Put the boxes below one another, with arrows that bend around those in between."""
    order = _downwards(sketch)
    width = max((size.width for size in sketch.sizes), default=0.0)
    corners = [(0.0, 0.0)] * len(sketch.sizes)
    row = {}
    y = 0.0
    for at, number in enumerate(order):
        row[number] = at
        corners[number] = ((width - sketch.sizes[number].width) / 2, y)
        y += sketch.sizes[number].height + _COLUMN_GAP
    bend = 0.0
    routes = []
    for arrow in sketch.arrows:
        (ax, ay), (bx, by) = corners[arrow.source], corners[arrow.target]
        a, b = sketch.sizes[arrow.source], sketch.sizes[arrow.target]
        n_between = row[arrow.target] - row[arrow.source]
        if n_between == 1:
            x, low = ax + a.width / 2, ay + a.height
            points = [x, low, x, low + 8, x, by - 8, x, by]
        else:
            reach = min(30.0 + 6.0 * abs(n_between), 160.0)
            bend = max(bend, reach)
            ax, bx = ax + a.width, bx + b.width
            ay, by = ay + a.height / 2, by + b.height / 2
            points = [ax, ay, width + reach, ay, width + reach, by, bx, by]
        routes.append(Route(tuple(points), ((points[2] + points[4]) / 2, (ay + by) / 2)))
    size = Size(width + bend, max(0.0, y - _COLUMN_GAP))
    return Layout(size, tuple(corners), tuple(routes))


def _downwards(sketch: Sketch) -> list[int]:
    """Return the boxes in an order in which arrows lead down, but for those that may point up."""
    place = dict.fromkeys(sketch.top, -1) | dict.fromkeys(sketch.bottom, 1)
    n_boxes = len(sketch.sizes)
    arrows = ((each.source, each.target) for each in sketch.arrows if not each.carried)
    return topological_order(n_boxes, arrows, [place.get(number, 0) for number in range(n_boxes)])
