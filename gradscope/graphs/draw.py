"""Draws a captured autograd graph as a Graphviz digraph, one box for each parameter and operation.

The forward runs down the page: parameters stand above the operations that use them and the loss is
at the bottom. An ``AccumulateGrad`` node is drawn as the leaf into which it accumulates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gradscope.graphs.labels import (
    FAINT,
    INK,
    as_tooltip,
    leaf_label,
    operation_label,
    shape_text,
)
from gradscope.graphs.layout import MAX_CURVED_ROWS
from gradscope.graphs.ranks import crossed_rows

if TYPE_CHECKING:
    import graphviz

    from gradscope.run.captured_graph import CapturedGraph

# Every colour is set, the background too, so that a dark page does not show through.
_LINE: Final = "#7b8794"
_FONT: Final = "Helvetica,Arial,sans-serif"
_PARAMETER: Final = {"fillcolor": "#cfe3fb", "color": "#2f6db5", "style": "rounded,filled"}
_LEAF: Final = {"fillcolor": "#fde8c4", "color": "#b7791f", "style": "rounded,filled"}
_OPERATION: Final = {"fillcolor": "#f5f7fa", "color": "#9aa5b1", "style": "filled"}
_ROOT: Final = {"fillcolor": "#c6efcd", "color": "#2f855a", "style": "filled", "penwidth": "2"}


def draw(captured: CapturedGraph, *, step: int | None = None) -> graphviz.Digraph:
    """Build the picture of ``captured``; nothing is laid out and no Graphviz is needed for it.

    Args:
        captured: the graph to draw.
        step: the training step it belongs to, for the title.

    Returns:
        A digraph whose nodes are called ``n0``, ``n1`` … after the nodes of ``captured``.
    """
    import graphviz

    roots = set(captured.roots.tolist())
    picture = graphviz.Digraph(
        "autograd graph",
        graph_attr={
            "rankdir": "TB",
            "bgcolor": "#ffffff",
            "pad": "0.3",
            "nodesep": "0.25",
            "ranksep": "0.35",
            "fontname": _FONT,
            "fontcolor": INK,
            "labelloc": "t",
            "label": _heading(captured, step),
            "tooltip": "autograd graph",
        },
        node_attr={
            "shape": "box",
            "fontname": _FONT,
            "fontsize": "11",
            "fontcolor": INK,
            "margin": "0.12,0.06",
            "height": "0.3",
        },
        edge_attr={"color": _LINE, "arrowsize": "0.6", "fontname": _FONT},
    )
    if crossed_rows(captured) > MAX_CURVED_ROWS:
        picture.attr("graph", splines="line", nslimit="1", nslimit1="1", mclimit="0.1")
    op = captured.op.tolist()
    param = captured.param.tolist()
    made = captured.sequence_nr.tolist()
    # dot keeps boxes of a rank roughly in the order they are declared: the forward's own order.
    for node in sorted(range(len(captured)), key=lambda node: (made[node], -node)):
        is_root = node in roots
        name = captured.ops[op[node]]
        if param[node] >= 0:
            names = captured.params[param[node]]
            look = _PARAMETER if names else _LEAF
            label = leaf_label(names, captured.param_shape[param[node]], is_root=is_root)
            tooltip = ", ".join(names) or "a leaf tensor that is no known parameter"
        else:
            look = _OPERATION
            label = operation_label(name, captured.output_shape[node], is_root=is_root)
            tooltip = name
        dtypes = ", ".join(dict.fromkeys(captured.output_dtype[node]))
        picture.node(
            f"n{node}",
            label=label,
            tooltip=as_tooltip(f"{tooltip} {dtypes}".strip()),
            **(look | _ROOT if is_root else look),
        )
    edges = zip(
        captured.source.tolist(),
        captured.target.tolist(),
        captured.source_output.tolist(),
        strict=True,
    )
    for source, target, output in edges:
        shapes = captured.output_shape[source]
        what = shape_text(shapes[output]) if output < len(shapes) else " "
        picture.edge(f"n{source}", f"n{target}", tooltip=what)
    return picture


def _heading(captured: CapturedGraph, step: int | None) -> str:
    looks = []
    if captured.n_params:
        looks.append((_PARAMETER, "parameter and its shape"))
    if captured.n_params < len(captured.params):
        looks.append((_LEAF, "other leaf that requires grad"))
    if len(captured) > len(captured.params):
        looks.append((_OPERATION, "operation and the shape of its output"))
    if len(captured.roots):
        looks.append((_ROOT, "loss (root)"))
    swatches = "".join(
        f'<TD BORDER="1" COLOR="{look["color"]}" BGCOLOR="{look["fillcolor"]}">  </TD>'
        f'<TD><FONT POINT-SIZE="10">{text}  </FONT></TD>'
        for look, text in looks
    )
    legend = (
        f'<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="4"><TR>{swatches}</TR></TABLE>'
        if looks
        else "Nothing that requires grad leads to the root: it has no graph."
    )
    return (
        '<<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="4">'
        f'<TR><TD><FONT POINT-SIZE="14"><B>{title(captured, step)}</B></FONT></TD></TR>'
        f"<TR><TD>{legend}</TD></TR>"
        f'<TR><TD><FONT POINT-SIZE="10" COLOR="{FAINT}">Arrows follow the data through the '
        "forward; gradients flow back against them.</FONT></TD></TR></TABLE>>"
    )


def title(captured: CapturedGraph, step: int | None) -> str:
    """One line: the step, and how much there is in the graph."""
    n_operations = len(captured) - len(captured.params)
    counts = [_count(n_operations, "operation"), _count(captured.n_params, "parameter")]
    if other := len(captured.params) - captured.n_params:
        counts.append(_count(other, "other leaf", "other leaves"))
    when = "" if step is None else f" of step {step}"
    return f"autograd graph{when}: {', '.join(counts)}"


def _count(n: int, one: str, many: str | None = None) -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"
