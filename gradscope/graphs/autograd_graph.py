"""The autograd graph of one backward as tables and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from gradscope.errors import RenderError, UsageError
from gradscope.graphs.draw import draw, title
from gradscope.graphs.layout import MAX_BOXES, MAX_CROSSED_ROWS, lay_out
from gradscope.graphs.ranks import crossed_rows

if TYPE_CHECKING:
    import os

    import graphviz
    import pandas as pd

    from gradscope.run.captured_graph import CapturedGraph

_LAID_OUT: Final = (".svg", ".png", ".pdf")
_AS_DOT: Final = (".dot", ".gv")


class AutogradGraph:
    """What one backward walked through: operations, parameters and how data flowed between them.

    A notebook shows it as a picture. ``len()`` is the number of nodes.

    Args:
        captured: the graph as plain arrays.
        step: the training step it belongs to, if known.

    Attributes:
        captured: the graph as plain arrays.
        step: the training step it belongs to, or None.
    """

    def __init__(self, captured: CapturedGraph, *, step: int | None = None) -> None:
        self.captured = captured
        self.step = step

    def __len__(self) -> int:
        return len(self.captured)

    def __repr__(self) -> str:
        return f"<{title(self.captured, self.step)}, {self.captured.n_edges:,} edges>"

    @property
    def nodes(self) -> pd.DataFrame:
        """One row per node, indexed by ``node``, the number by which ``edges`` refers to it.

        Columns: ``op`` (the autograd node as torch spells it), ``sequence_nr`` (grows with time in
        the forward; -1 for a leaf), ``param`` (the first name of the parameter, None for an
        operation and for a leaf that is no known parameter), ``aliases`` (tuple of all its names),
        ``output_shape`` and ``output_dtype`` (one element per output of the operation), ``is_root``
        (the backward starts here).
        """
        import pandas as pd

        captured = self.captured
        aliases = [captured.params[leaf] if leaf >= 0 else () for leaf in captured.param.tolist()]
        roots = set(captured.roots.tolist())
        return pd.DataFrame(
            {
                "op": pd.Series([captured.ops[op] for op in captured.op.tolist()], dtype=object),
                "sequence_nr": captured.sequence_nr,
                "param": pd.Series(
                    [names[0] if names else None for names in aliases], dtype=object
                ),
                "aliases": pd.Series(aliases, dtype=object),
                "output_shape": pd.Series(captured.output_shape, dtype=object),
                "output_dtype": pd.Series(captured.output_dtype, dtype=object),
                "is_root": pd.Series([node in roots for node in range(len(captured))], dtype=bool),
            },
            index=pd.RangeIndex(len(captured), name="node"),
        )

    @property
    def edges(self) -> pd.DataFrame:
        """One row per use of an output, in the direction in which the data flowed.

        Columns: ``source`` and ``target`` (nodes), ``source_output`` (which output of the source,
        from 0). An operation that uses a tensor twice has two rows.
        """
        import pandas as pd

        captured = self.captured
        return pd.DataFrame(
            {
                "source": captured.source,
                "target": captured.target,
                "source_output": captured.source_output,
            }
        )

    def to_graphviz(self) -> graphviz.Digraph:
        """The picture as a :class:`graphviz.Digraph`, to be changed or rendered by hand.

        Node ``n7`` of it is row 7 of ``nodes``. This works for a graph of any size.
        """
        return draw(self.captured, step=self.step)

    def render(self, path: str | os.PathLike[str]) -> Path:
        """Draw the graph into a file; an existing file is overwritten.

        Args:
            path: where to; its suffix says what: ``.svg``, ``.png``, ``.pdf``, or ``.dot`` (also
                ``.gv``) for the DOT text, which needs no Graphviz and has no limit of size.

        Returns:
            The path of the file.

        Raises:
            UsageError: if the suffix is none of these.
            RenderError: if Graphviz is missing, or the graph is too large to be laid out in a few
                seconds (:data:`~gradscope.graphs.layout.MAX_BOXES`,
                :data:`~gradscope.graphs.layout.MAX_CROSSED_ROWS`). No file is written then.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix in _AS_DOT:
            path.write_text(self.to_graphviz().source, encoding="utf-8")
        elif suffix in _LAID_OUT:
            path.write_bytes(self._lay_out(suffix[1:]))
        else:
            supported = ", ".join(_LAID_OUT + _AS_DOT)
            what = f"the suffix {path.suffix!r}" if suffix else "no suffix"
            raise UsageError(f"cannot render {str(path)!r}: it has {what}; use one of {supported}")
        return path

    def _repr_svg_(self) -> str | None:
        try:
            return self._lay_out("svg").decode()
        except RenderError:  # a notebook then shows the repr
            return None

    def _lay_out(self, file_format: str) -> bytes:
        n_boxes = len(self)
        too_large = n_boxes > MAX_BOXES
        if too_large or crossed_rows(self.captured) > MAX_CROSSED_ROWS:
            why = f"more than {MAX_BOXES:,}" if too_large else "with edges that reach too far"
            raise RenderError(
                f"the graph has {n_boxes:,} nodes, {why} to be laid out in reasonable time; "
                "render it to a .dot file for a tool of your own, or look at .nodes and .edges"
            )
        return lay_out(self.to_graphviz().source, file_format)
