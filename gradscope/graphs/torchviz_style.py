"""Turns the statements of a picture into a Graphviz digraph that looks like one of torchviz's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    import graphviz

    from gradscope.instruments.dot_statements import DotStatement

_BOX: Final = {
    "style": "filled",
    "shape": "box",
    "align": "left",
    "fontsize": "10",
    "ranksep": "0.1",
    "height": "0.2",
    "fontname": "monospace",
}
_SMALLEST: Final = 12
_INCHES_PER_STATEMENT: Final = 0.15


def draw_statements(statements: Iterable[DotStatement]) -> graphviz.Digraph:
    """Build the digraph; nothing is laid out and no Graphviz is needed for it.

    Args:
        statements: boxes, lines and comments, as ``instruments.dot_statements`` writes them. The
            digraph keeps the order of boxes and lines, on which the layout depends.

    Returns:
        A digraph with torchviz's attributes. The more statements, the larger the page is, in
        inches. Comments make its first line, which is not drawn.
    """
    import graphviz

    picture = graphviz.Digraph(node_attr=_BOX)
    comments = []
    for statement in statements:
        if statement.kind == "comment":
            comments.append(statement.text)
        elif statement.kind == "edge":
            picture.edge(statement.tail, statement.head, **dict(statement.attributes))
        else:
            # Graphviz reads more into a backslash and <…> than the names of a program mean by them.
            fill = {} if statement.fill is None else {"fillcolor": statement.fill}
            picture.node(statement.name, graphviz.escape(statement.label), **fill)
    picture.comment = "; ".join(comments) or None
    side = max(_SMALLEST, _INCHES_PER_STATEMENT * len(picture.body))
    picture.graph_attr["size"] = f"{side},{side}"
    return picture
