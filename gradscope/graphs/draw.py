"""Draws a diagram as a Graphviz digraph.

The forward runs down the page: parameters stand above the operations that use them and the loss is
at the bottom. An ``AccumulateGrad`` node is drawn as the leaf into which it accumulates.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from gradscope.graphs.diagram import NO_FRAME
from gradscope.graphs.labels import as_text, as_tooltip, frame_label, label
from gradscope.graphs.overlay import NO_MARK
from gradscope.graphs.wording import (
    block_kind,
    block_title,
    box_caption,
    counted,
    shapes_text,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import graphviz

    from gradscope.graphs.diagram import Box, Diagram
    from gradscope.graphs.overlay import Mark, Overlay
    from gradscope.graphs.theme import Look, Theme
    from gradscope.graphs.wording import Caption
    from gradscope.run.captured_graph import CapturedGraph

_FONT: Final = "Helvetica,Arial,sans-serif"


def draw(
    diagram: Diagram,
    theme: Theme,
    *,
    step: int | None = None,
    overlay: Overlay | None = None,
    notes: Sequence[str] = (),
) -> graphviz.Digraph:
    """Build the picture of a diagram; nothing is laid out and no Graphviz is needed for it.

    Args:
        diagram: what to draw.
        theme: its colours.
        step: the training step it belongs to, for the title.
        overlay: facts to colour the boxes by.
        notes: what to say below the legend.

    Returns:
        A digraph whose nodes are called ``b0``, ``b1`` … after the boxes of the diagram.
    """
    import graphviz

    marks = [NO_MARK] * len(diagram.boxes) if overlay is None else overlay.marks(diagram)
    picture = graphviz.Digraph(
        "autograd graph",
        graph_attr={
            "rankdir": "TB",
            "bgcolor": theme.paper,
            "pad": "0.3",
            "nodesep": "0.25",
            "ranksep": "0.16",
            "fontname": _FONT,
            "fontsize": "11",
            "fontcolor": theme.ink,
            "labelloc": "t",
            "label": _heading(diagram, theme, step, overlay, notes),
            "tooltip": "autograd graph",
        },
        node_attr={
            "shape": "box",
            "fontname": _FONT,
            "fontsize": "11",
            "fontcolor": theme.ink,
            "margin": "0.12,0.06",
            "height": "0.3",
        },
        edge_attr={
            "color": theme.edge,
            "arrowsize": "0.6",
            "fontname": _FONT,
            "fontsize": "8",
            "fontcolor": theme.faint,
        },
    )
    _fill_frame(picture, diagram, NO_FRAME, 0, theme, marks)
    for link in diagram.links:
        text = shapes_text(link.shapes, link.n_tensors)
        is_leaf = diagram.boxes[link.source].block is None  # its shape is in its own box
        more = {"label": f" {as_text(text)} "} if text and not (is_leaf or link.carried) else {}
        if link.carried:
            # It points upwards; the order of the ranks is not its business.
            more |= {"style": "dashed", "constraint": "false", "label": f" ×{link.turns:,} "}
        if diagram.boxes[link.source].missing is not None:
            more |= {"style": "dashed"}
        if link.is_cut:
            more |= {"style": "dashed", "color": theme.cut, "fontcolor": theme.cut, "label": " ✂ "}
        if link.carried:
            text += f" to the next of {link.turns:,} repetitions"
        tooltip = as_tooltip(text or " ")
        picture.edge(f"b{link.source}", f"b{link.target}", tooltip=tooltip, **more)
    return picture


def title(captured: CapturedGraph, step: int | None) -> str:
    """One line: the step, and how much there is in the graph."""
    n_operations = len(captured) - len(captured.params)
    counts = [counted(n_operations, "operation"), counted(captured.n_params, "parameter")]
    if other := len(captured.params) - captured.n_params:
        counts.append(counted(other, "other leaf", "other leaves"))
    when = "" if step is None else f" of step {step}"
    return f"autograd graph{when}: {', '.join(counts)}"


def _fill_frame(
    picture: graphviz.Digraph,
    diagram: Diagram,
    frame: int,
    depth: int,
    theme: Theme,
    marks: Sequence[Mark],
) -> None:
    around = _path(diagram, frame)
    shown_inside = {
        each.block.kin: diagram.folded.captured.calls.path(each.block.call)
        for each in reversed(diagram.frames)
        if each.block.kin
    }
    for number, box in enumerate(diagram.boxes):
        if box.frame == frame:
            like = shown_inside.get(box.block.kin, "") if box.block is not None else ""
            caption = box_caption(diagram.folded, box, around, like)
            _add_box(picture, diagram, number, caption, theme, marks[number])
    for number, inner in enumerate(diagram.frames):
        if inner.parent != frame:
            continue
        title = block_title(diagram.folded, inner.block, around)
        kind = block_kind(diagram.folded, inner.block) if inner.block.kind == "module" else ""
        with picture.subgraph(name=f"cluster_{number}") as cluster:
            cluster.attr(
                label=frame_label(title, kind, theme.faint),
                tooltip=as_tooltip(title),
                labeljust="l",
                style="rounded,filled",
                fillcolor=theme.frames[depth % len(theme.frames)],
                color=theme.frame_line,
                penwidth="2" if inner.block.count > 1 else "1",
                margin="10",
            )
            _fill_frame(cluster, diagram, number, depth + 1, theme, marks)


def _path(diagram: Diagram, frame: int) -> str:
    """The path of the innermost module around."""
    while frame != NO_FRAME:
        block = diagram.frames[frame].block
        if block.kind == "module":
            return diagram.folded.captured.calls.path(block.call)
        frame = diagram.frames[frame].parent
    return ""


def _add_box(
    picture: graphviz.Digraph,
    diagram: Diagram,
    number: int,
    caption: Caption,
    theme: Theme,
    mark: Mark,
) -> None:
    box = diagram.boxes[number]
    look = _look(diagram, box, theme)
    if mark.text:
        caption = replace(caption, small=(*caption.small, mark.text))
    outline = {"penwidth": "2"} if box.is_root else {}
    if box.block is not None and box.block.count > 1:
        outline["peripheries"] = "2"
    picture.node(
        f"b{number}",
        label=label(
            caption,
            theme.faint,
            bold=box.block is None or box.block.kind == "module" or box.is_root,
            is_root=box.is_root,
        ),
        tooltip=as_tooltip(_tooltip(diagram, box)),
        fillcolor=mark.fill or look.fill,
        color=look.line,
        style=look.style,
        **outline,
    )


def _look(diagram: Diagram, box: Box, theme: Theme) -> Look:
    if box.is_root:
        return theme.root
    if box.missing is not None:
        return theme.frozen if box.missing.why == "frozen" else theme.missing
    if box.block is None:
        is_named = all(diagram.parameter_names(box))
        return theme.parameter if is_named else theme.leaf
    return theme.module if box.block.kind in ("module", "sequence") else theme.operation


def _tooltip(diagram: Diagram, box: Box) -> str:
    captured = diagram.folded.captured
    if box.missing is not None:
        return f"{box.missing.path}: {box.missing.why}"
    if box.block is None:
        names = diagram.parameter_names(box)
        return ", ".join(", ".join(n) for n in names) or "a leaf tensor that is no known parameter"
    if box.block.can_open:
        return f"{box.block.kind}, {counted(box.block.n_operations, 'operation')}"
    node = int(diagram.folded.execution.node[box.block.start])
    dtypes = ", ".join(dict.fromkeys(captured.outputs_of(node).dtypes))
    return f"{captured.op_of(node)} {dtypes}".strip()


def _heading(
    diagram: Diagram,
    theme: Theme,
    step: int | None,
    overlay: Overlay | None,
    notes: Sequence[str],
) -> str:
    captured = diagram.folded.captured
    swatches = "".join(
        f'<TD BORDER="1" COLOR="{look.line}" BGCOLOR="{look.fill}">  </TD>'
        f'<TD><FONT POINT-SIZE="10">{text}  </FONT></TD>'
        for look, text in _legend(diagram, theme)
    )
    legend = (
        f'<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="4"><TR>{swatches}</TR></TABLE>'
        if swatches
        else "Nothing that requires grad leads to the root: it has no graph."
    )
    texts = ["Arrows follow the data through the forward; gradients flow back against them."]
    if any(link.carried for link in diagram.links):
        texts.append("×N: drawn once, done N times; dashed arrows lead to the next repetition.")
    elif diagram.has_repetitions:
        texts.append("×N: drawn once, done N times.")
    if overlay is not None:
        texts.append(overlay.legend)
    texts += notes
    small = "".join(
        f'<TR><TD><FONT POINT-SIZE="10" COLOR="{theme.faint}">{as_text(text)}</FONT></TD></TR>'
        for text in texts
    )
    return (
        '<<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="4">'
        f'<TR><TD><FONT POINT-SIZE="14"><B>{title(captured, step)}</B></FONT></TD></TR>'
        f"<TR><TD>{legend}</TD></TR>{small}</TABLE>>"
    )


def _legend(diagram: Diagram, theme: Theme) -> list[tuple[Look, str]]:
    looks = {id(_look(diagram, box, theme)) for box in diagram.boxes}
    texts = (
        (theme.parameter, "parameter"),
        (theme.leaf, "other leaf that requires grad"),
        (theme.operation, "operation"),
        (theme.module, "module"),
        (theme.root, "loss (root)"),
        (theme.frozen, "frozen"),
        (theme.missing, "does not lead to the loss"),
    )
    return [(look, text) for look, text in texts if id(look) in looks]
