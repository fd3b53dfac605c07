"""Everything that the page to explore a graph shows, as plain data."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from gradscope.graphs.cards import OVERLAYS, Cards, listed, shown_text
from gradscope.graphs.detail import MAX_NODES, Views
from gradscope.graphs.inside_layout import Arrow, Size, Sketch, laid_out, text_width
from gradscope.graphs.insides import MOST_BOXES, NO_BOX, insides_of, key_of
from gradscope.graphs.wording import Caption, box_caption, counted, shapes_text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gradscope.graphs.diagram import Box
    from gradscope.graphs.inside_layout import Layout
    from gradscope.graphs.insides import Inside, Insides, Port
    from gradscope.graphs.likeness import Likeness
    from gradscope.graphs.overlay import StepFacts
    from gradscope.run.captured_graph import CapturedGraph

LAYOUT_TIME_LIMIT: Final = 15.0
"""Seconds for the layout of all insides; those that are not done by then become columns."""

# Sizes of text and boxes in pixels; assets/explorer.css sets the same.
_TITLE: Final = 12.0
_SMALL: Final = 10.0
_TITLE_LINE: Final = 16.0
_SMALL_LINE: Final = 13.0
_BOX_MARGIN: Final = Size(22.0, 10.0)
_OPENS_MARK: Final = 16.0
_PORT_HEIGHT: Final = 18.0
_HEAD_MARGIN: Final = 40.0

_FIRST_IS_SHOWN: Final = " the first is shown"
_LONGEST_LINE: Final = 26
_MOST_TITLE_LINES: Final = 3
_LONGEST_SMALL: Final = 40
_LONGEST_PORT: Final = 24
_MOST_LABELS: Final = 12
_MOST_LABELS_PER_BOX: Final = 1.3
_MOST_NAMES_SEARCHED: Final = 300

_CARRIED: Final = 1
_CUT: Final = 2
_DASHED: Final = 4


def explorer_data(
    captured: CapturedGraph,
    heading: str,
    facts: StepFacts,
    likeness: Likeness | None,
    *,
    most_boxes: int = MOST_BOXES,
    time_limit: float = LAYOUT_TIME_LIMIT,
) -> dict[str, Any]:
    """Gather everything that the page shows; its form is told at the head of ``explorer.js``.

    Args:
        captured: the graph.
        heading: what it is called.
        facts: what is known of the parameters at its step.
        likeness: what must agree for a repetition to be drawn once.
        most_boxes: how many boxes there may be, about, before the rest stays closed.
        time_limit: seconds for the layout.
    """
    views = Views(captured, likeness)
    folded = views.folded
    picture = next(views.shown(None, MAX_NODES)).diagram
    opened = {key_of(frame.block) for frame in picture.frames}
    outermost = folded.parts(folded.root)
    if len(outermost) == 1:
        opened.add(key_of(outermost[0]))
    insides = insides_of(folded, opened, most_boxes)
    return _Page(insides, facts).data(heading, opened, time_limit)


class _Page:
    """Puts together what is shown of insides."""

    def __init__(self, insides: Insides, facts: StepFacts) -> None:
        self._insides = insides
        self._cards = Cards(insides, facts)
        self._boxes = [(inside, box) for inside in insides.each for box in inside.boxes]
        self._captions = [
            box_caption(insides.folded, box, _path_around(insides, inside))
            for inside, box in self._boxes
        ]
        self._leaves = [self._cards.leaves(inside, box) for inside, box in self._boxes]

    def data(self, heading: str, opened: Iterable[object], time_limit: float) -> dict[str, Any]:
        number_of_inside = {inside.box: at for at, inside in enumerate(self._insides.each)}
        sizes = [
            _box_size(_drawn(caption), box)
            for caption, (_, box) in zip(self._captions, self._boxes, strict=True)
        ]
        layouts = laid_out(
            [self._sketch(inside, sizes) for inside in self._insides.each], time_limit
        )
        boxes = self._described(sizes)
        keys = set(opened)
        for number, at in number_of_inside.items():
            if number != NO_BOX:
                boxes[number]["inside"] = at
        for told, (_, box) in zip(boxes, self._boxes, strict=True):
            if box.block is not None and box.block.can_open and "inside" not in told:
                told["full"] = 1
        return {
            "title": heading,
            "note": self._note(),
            "insides": [
                self._placed(inside, layout)
                for inside, layout in zip(self._insides.each, layouts, strict=True)
            ],
            "boxes": boxes,
            "open": [
                inside.box
                for inside in self._insides.each
                if inside.box != NO_BOX and key_of(inside.block) in keys
            ],
            **self._parameters(boxes),
            **self._marked(boxes),
        }

    def _note(self) -> str:
        n_left = self._insides.n_left_out
        if not n_left:
            return ""
        left = counted(n_left, "box stays", "boxes stay")
        return f"{left} closed: this page has no room for what is inside."

    # -- boxes ------------------------------------------------------------------------------

    def _described(self, sizes: list[Size]) -> list[dict[str, Any]]:
        boxes = []
        for (inside, box), caption, size in zip(self._boxes, self._captions, sizes, strict=True):
            drawn = _drawn(caption)
            full = shown_text(" ".join(caption.title))
            told: dict[str, Any] = {
                "look": _look(self._insides, box),
                "title": list(drawn.title),
                "size": [round(size.width), round(size.height)],
                "rows": [list(row) for row in self._cards.rows(inside, box)],
            }
            if drawn.kind:
                told["kind"] = drawn.kind
            if drawn.small:
                told["small"] = list(drawn.small)
            if full != " ".join(drawn.title):
                told["name"] = full
            if box.is_root:
                told["root"] = 1
            if box.block is not None and box.block.count > 1:
                told["count"] = box.block.count
            if box.block is not None and box.block.can_open:
                head = f"{' '.join(drawn.title)} {shown_text(caption.kind, _LONGEST_SMALL)}"
                if box.block.count > 1:
                    head += _FIRST_IS_SHOWN
                told["head"] = round(text_width(head, _TITLE, bold=True) + _HEAD_MARGIN)
            path = self._cards.path(inside, box)
            if any(path):
                told["path"] = " · ".join(part for part in path if part)
            boxes.append(told)
        return boxes

    def _parameters(self, boxes: list[dict[str, Any]]) -> dict[str, Any]:
        """Give boxes the leaves that they list, and return the table of all that are listed."""
        number: dict[int, int] = {}
        for told, leaves, (_, box) in zip(boxes, self._leaves, self._boxes, strict=True):
            shown, n_more = listed(leaves)
            if shown:
                told["params"] = [number.setdefault(leaf, len(number)) for leaf in shown]
            if n_more:
                told["more"] = n_more
            if box.block is None and n_more:
                names = [self._insides.folded.captured.params[leaf] for leaf in leaves]
                told["find"] = " ".join(
                    shown_text(name) for each in names[:_MOST_NAMES_SEARCHED] for name in each
                )
        return {"params": [self._cards.parameter_row(leaf) for leaf in number]}

    def _marked(self, boxes: list[dict[str, Any]]) -> dict[str, Any]:
        names = self._cards.overlays()
        for name in names:
            for told, mark in zip(
                boxes, self._cards.marks(name, self._boxes, self._leaves), strict=True
            ):
                if mark is not None:
                    told.setdefault("marks", {})[name] = list(mark)
        return {"overlays": [[name, *OVERLAYS[name]] for name in names]}

    # -- where they stand -------------------------------------------------------------------

    def _sketch(self, inside: Inside, sizes: list[Size]) -> Sketch:
        n_boxes = len(inside.boxes)
        arrows = [
            Arrow(link.source, link.target, _label_size(_label(inside, at)), link.carried)
            for at, link in enumerate(inside.links)
        ]
        for at, port in enumerate(inside.ports, n_boxes):
            arrows += [
                Arrow(at, inner) if port.is_input else Arrow(inner, at) for inner in port.inner
            ]
        texts = [
            Size(text_width(self._port_text(port), _SMALL) + 16, _PORT_HEIGHT)
            for port in inside.ports
        ]
        own = sizes[inside.first : inside.first + n_boxes]
        tops = [at for at, port in enumerate(inside.ports, n_boxes) if port.is_input]
        bottoms = [at for at, port in enumerate(inside.ports, n_boxes) if not port.is_input]
        return Sketch((*own, *texts), tuple(arrows), tuple(tops), tuple(bottoms))

    def _placed(self, inside: Inside, layout: Layout) -> dict[str, Any]:
        n_boxes = len(inside.boxes)
        edges: list[list[Any]] = []
        for at, (link, route) in enumerate(zip(inside.links, layout.routes, strict=False)):
            giver = inside.boxes[link.source].missing
            flags = _CARRIED * link.carried + _CUT * link.is_cut + _DASHED * (giver is not None)
            points = [round(part) for part in route.points]
            edge = [link.source, link.target, flags, points]
            if text := _label(inside, at):
                edge += [text, *(round(part) for part in route.label)]
            edges.append(edge)
        routes = iter(layout.routes[len(inside.links) :])
        for at, port in enumerate(inside.ports, n_boxes):
            for inner in port.inner:
                ends = [at, inner] if port.is_input else [inner, at]
                points = [round(part) for part in next(routes).points]
                edges.append([*ends, _CARRIED * port.carried, points])
        corners = [[round(x), round(y)] for x, y in layout.corners]
        return {
            "of": inside.box,
            "first": inside.first,
            "size": [round(layout.size.width), round(layout.size.height)],
            "at": [part for corner in corners[:n_boxes] for part in corner],
            "ports": [
                [
                    self._port_text(port),
                    *corner,
                    round(text_width(self._port_text(port), _SMALL) + 16),
                    port.box,
                ]
                for port, corner in zip(inside.ports, corners[n_boxes:], strict=True)
            ],
            "edges": edges,
        }

    def _port_text(self, port: Port) -> str:
        way = "from" if port.is_input else "to"
        if port.box == NO_BOX:
            return f"{way} {counted(port.n_others, 'other')}"
        caption, block = self._captions[port.box], self._boxes[port.box][1].block
        name = caption.title[0]
        if block is not None and block.kind == "sequence":
            name += f" {caption.kind}"  # that it is repeated says little by itself
        text = f"{way} {shown_text(name, _LONGEST_PORT)}"
        if port.carried:
            text += " (copy before)" if port.is_input else " (next copy)"
        return text


def _path_around(insides: Insides, inside: Inside) -> str:
    """The path of the innermost module around what is inside."""
    call = inside.call()
    return "" if call < 0 else insides.folded.captured.calls.path(call)


def _look(insides: Insides, box: Box) -> str:
    if box.is_root:
        return "root"
    if box.missing is not None:
        return "frozen" if box.missing.why == "frozen" else "missing"
    if box.block is None:
        params = insides.folded.captured.params
        leaves = [box.leaf] if box.leaf >= 0 else box.leaves
        return "parameter" if all(params[leaf] for leaf in leaves) else "leaf"
    return box.block.kind if box.block.kind in ("module", "sequence", "stretch") else "operation"


def _drawn(caption: Caption) -> Caption:
    """Cut a caption down to what fits into a box.

    A kind for which the title leaves no room comes to stand below it.
    """
    lines = [
        line for text in caption.title for line in _broken(shown_text(text, 200), caption.breaks_at)
    ]
    if len(lines) > _MOST_TITLE_LINES:
        lines = [*lines[: _MOST_TITLE_LINES - 1], lines[_MOST_TITLE_LINES - 1] + "…"]
    small = [shown_text(text, _LONGEST_SMALL) for text in caption.small]
    kind = shown_text(caption.kind, _LONGEST_SMALL)
    if kind and len(lines[-1]) + len(kind) > _LONGEST_LINE:
        small.insert(0, kind)
        kind = ""
    return Caption(tuple(lines), tuple(small), kind)


def _broken(text: str, separator: str) -> list[str]:
    """Break a text after separators, and wherever there are none in time."""
    lines = [""]
    at_most = f".{{1,{_LONGEST_LINE}}}"
    for part in re.findall(f"{at_most}?[{re.escape(separator)} ]|{at_most}", text):
        if lines[-1] and len(lines[-1]) + len(part) > _LONGEST_LINE:
            lines.append("")
        lines[-1] += part
    return [line.strip() for line in lines if line.strip()] or ["?"]


def _box_size(caption: Caption, box: Box) -> Size:
    opens = box.block is not None and box.block.can_open
    small = list(caption.small)
    if box.is_root:
        small.append("▲ backward starts here")
    widths = [text_width(line, _TITLE, bold=True) for line in caption.title]
    widths[0] += _OPENS_MARK if opens else 0.0
    widths[-1] += text_width(f"  {caption.kind}", _SMALL) if caption.kind else 0.0
    widths += [text_width(line, _SMALL) for line in small]
    height = len(caption.title) * _TITLE_LINE + len(small) * _SMALL_LINE
    return Size(max(46.0, max(widths) + _BOX_MARGIN.width), height + _BOX_MARGIN.height)


def _label(inside: Inside, at: int) -> str:
    link = inside.links[at]
    if link.is_cut:
        return "✂"
    if inside.boxes[link.source].block is None or link.carried:
        return ""  # a leaf's shape is in its own box
    if len(inside.links) > _MOST_LABELS_PER_BOX * len(inside.boxes) + _MOST_LABELS:
        return ""  # they would lie on top of one another
    return shapes_text(link.shapes, link.n_tensors)


def _label_size(text: str) -> Size | None:
    return Size(text_width(text, _SMALL) + 8, _SMALL_LINE) if text else None
