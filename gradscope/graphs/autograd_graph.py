"""The autograd graph of one backward: as tables, as a picture, as text, as a page to explore."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gradscope.errors import RenderError, UsageError
from gradscope.garbage import no_collection
from gradscope.graphs.detail import MAX_NODES, Views, checked_depth, checked_max_nodes
from gradscope.graphs.draw import draw, title
from gradscope.graphs.layout import TIME_LIMIT, LayoutTooSlowError, lay_out
from gradscope.graphs.likeness import checked_likeness
from gradscope.graphs.overlay import StepFacts, overlay_named, saved_bytes_of_nodes
from gradscope.graphs.tables import edges_frame, modules_frame, nodes_frame, unreached_frame
from gradscope.graphs.theme import theme_named
from gradscope.run.directory.layout import write_bytes

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

    import graphviz
    import networkx  # type: ignore[import-untyped]
    import pandas as pd

    from gradscope.graphs.detail import Depth
    from gradscope.graphs.difference import GraphDifference
    from gradscope.graphs.fold import Folded
    from gradscope.graphs.likeness import Likeness
    from gradscope.graphs.overlay import Overlay, OverlayName
    from gradscope.graphs.theme import Theme, ThemeName
    from gradscope.run.captured_graph import CapturedGraph, LongIntegers

_LAID_OUT: Final = (".svg", ".png", ".pdf")
_AS_DOT: Final = (".dot", ".gv")
_AS_PAGE: Final = ".html"
_OF_FIRST_COPY: Final = "shapes are those of the first repetition; those of others may differ"
_NOT_IN_TIME: Final = "coarser than asked for, because laying it out took too long"


class AutogradGraph:
    """What one backward walked through: operations, parameters and how data flowed between them.

    A notebook shows it as a picture, or as a tree where Graphviz is missing. ``len()`` is the
    number of nodes.

    Args:
        captured: the graph as plain arrays.
        step: the training step it belongs to, if known.
        facts: tells what is known of the parameters at that step, for overlays; called once, when
            it is needed.

    Attributes:
        captured: the graph as plain arrays.
        step: the training step it belongs to, or None.
    """

    def __init__(
        self,
        captured: CapturedGraph,
        *,
        step: int | None = None,
        facts: Callable[[], StepFacts] = StepFacts,
    ) -> None:
        self.captured = captured
        self.step = step
        self._facts = functools.cache(facts)
        self._views: dict[Likeness | None, Views] = {}

    def __len__(self) -> int:
        return len(self.captured)

    def __repr__(self) -> str:
        return f"<{title(self.captured, self.step)}, {self.captured.n_edges:,} edges>"

    # -- as tables --------------------------------------------------------------------------

    @property
    def nodes(self) -> pd.DataFrame:
        """One row per node, indexed by ``node``, the number by which ``edges`` refers to it.

        Columns: ``op`` (the autograd node as torch spells it), ``sequence_nr`` (grows with time in
        the forward; -1 for a leaf), ``module`` and ``module_type`` (of the innermost module that
        made it; ``""`` is the model itself, missing what no module made), ``call`` (the row of
        ``modules``, -1 for none), ``param`` (the first name of the parameter; missing for an
        operation and for a leaf that is no known parameter), ``aliases`` (tuple of all its names),
        ``output_shape`` and ``output_dtype`` (an element for each output of the operation),
        ``saved_bytes`` (what it keeps for the backward: parameters left out, memory that several
        nodes keep counted at the first), ``is_root`` (the backward starts here), ``is_crossing``
        (it belongs to an earlier step), ``file`` and ``line`` (of the program, where known).
        """
        return nodes_frame(self._folded, self._saved_bytes)

    @property
    def edges(self) -> pd.DataFrame:
        """One row per use of an output, in the direction in which the data flowed.

        Columns: ``source`` and ``target`` (nodes), ``source_output`` (which output of the source,
        from 0), ``shape`` (of that output). An operation that uses a tensor twice has two rows.
        """
        return edges_frame(self.captured)

    @property
    def modules(self) -> pd.DataFrame:
        """One row per call of a module in the forward, indexed by ``call``, in order.

        Columns: ``module`` (path) and ``module_type``, ``parent`` (the call around it, -1 for
        none), ``nodes_made`` and ``nodes_reached`` (operations, those of inner calls included; what
        was made and is not reached does not lead to the loss), ``saved_bytes`` (likewise),
        ``without_grad`` (gradients were switched off). Empty where calls were not followed.
        """
        return modules_frame(self._folded, self._saved_bytes)

    @property
    def unreached(self) -> pd.DataFrame:
        """One row per module or parameter that does not lead to the loss, and why.

        Columns: ``path``, ``type`` (class of the module, or ``parameter``), ``why`` (``cut off``:
        it made operations, none of which leads to the loss; ``no grad``: it ran while gradients
        were switched off; ``not called``; ``frozen``; ``unused``: its module leads to the loss, but
        not by way of this parameter), ``nodes_made`` (operations), ``params`` (names of the
        parameters concerned), ``taken_by`` (paths of the modules that were given its result after
        it had been cut from its graph). Of modules inside one another only the outermost is told.
        """
        return unreached_frame(self.captured)

    @property
    def crossing(self) -> pd.DataFrame:
        """The rows of ``nodes`` that belong to earlier steps: the graph grows from step to step."""
        nodes = self.nodes
        return nodes[nodes["is_crossing"]]

    # -- as a picture -----------------------------------------------------------------------

    @no_collection()
    def to_graphviz(
        self,
        *,
        fold: Likeness | None = "shape",
        depth: Depth = None,
        max_nodes: int = MAX_NODES,
        overlay: OverlayName | None = None,
        theme: ThemeName = "light",
    ) -> graphviz.Digraph:
        """The picture as a :class:`graphviz.Digraph`, to be changed or rendered by hand.

        Args:
            fold: what must agree for a repetition to be drawn once: ``"op"`` operations and wiring,
                ``"shape"`` shapes and the names of modules too, ``"exact"`` dtypes too; None draws
                every copy.
            depth: how many levels of modules are opened, 0 for none; ``"all"`` gives every
                operation and parameter a box of its own; by default the size of the graph decides.
            max_nodes: how many boxes there may be; what is asked for with ``depth`` is made
                coarser until it fits, and the picture says so.
            overlay: facts of the step to colour the boxes by: ``"grad_norm"``, ``"grad_status"``,
                ``"nonfinite"``, ``"update_ratio"``, ``"saved_bytes"`` or ``"findings"``.
            theme: ``"light"`` or ``"dark"``.

        Raises:
            UsageError: if an argument is none of these.
            ScopeStateError: if nothing is known of what the overlay shows.
        """
        return next(self._pictures(fold, depth, max_nodes, overlay, theme))

    @no_collection()
    def render(
        self,
        path: str | os.PathLike[str],
        *,
        fold: Likeness | None = "shape",
        depth: Depth = None,
        max_nodes: int = MAX_NODES,
        overlay: OverlayName | None = None,
        theme: ThemeName = "light",
        time_limit: float = TIME_LIMIT,
    ) -> Path:
        """Draw the graph into a file; an existing file is overwritten.

        Args:
            path: where to; its suffix says what: ``.svg``, ``.png``, ``.pdf``, ``.html`` for a page
                to explore (see :meth:`to_html`), or ``.dot`` (also ``.gv``) for the DOT text, which
                needs no Graphviz.
            fold: see :meth:`to_graphviz`.
            depth: see :meth:`to_graphviz`.
            max_nodes: see :meth:`to_graphviz`.
            overlay: see :meth:`to_graphviz`.
            theme: see :meth:`to_graphviz`.
            time_limit: seconds after which a layout is given up for a coarser picture.

        Returns:
            The path of the file.

        Raises:
            UsageError: if the suffix is none of these, or as for :meth:`to_graphviz`.
            ScopeStateError: if nothing is known of what the overlay shows.
            RenderError: if Graphviz is missing, or refuses even the coarsest picture.
            OSError: if it cannot be written. Whatever is raised, a file that was there stays.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        options = (fold, depth, max_nodes, overlay, theme)
        if suffix == _AS_PAGE:
            self._overlay(overlay, theme_named(theme))  # chosen on the page, but checked here
            content = self.to_html(fold=fold).encode("utf-8", "replace")
        elif suffix in _AS_DOT:
            content = next(self._pictures(*options)).source.encode()
        elif suffix in _LAID_OUT:
            content = self._lay_out(suffix[1:], self._pictures(*options), time_limit)
        else:
            supported = ", ".join((*_LAID_OUT, _AS_PAGE, *_AS_DOT))
            what = f"the suffix {path.suffix!r}" if suffix else "no suffix"
            raise UsageError(f"cannot render {str(path)!r}: it has {what}; use one of {supported}")
        write_bytes(path.resolve(), content)  # what a link leads to is written, and the link stays
        return path

    @no_collection()
    def to_html(self, *, fold: Likeness | None = "shape", theme: ThemeName | None = None) -> str:
        """The graph as one page to explore, which needs no network.

        Modules and repetitions open and close by click; there is a search, and a card for each
        node with its shapes, what it keeps for the backward and what is known of its gradient.

        Args:
            fold: see :meth:`to_graphviz`.
            theme: ``"light"`` or ``"dark"``; by default as the reader's system is set.

        Raises:
            UsageError: if an argument is none of these.
            RenderError: if Graphviz is missing.
        """
        likeness = checked_likeness(fold)
        if theme is not None:
            theme_named(theme)
        from gradscope.graphs.explorer import explorer_page

        return explorer_page(
            self.captured, step=self.step, facts=self._facts(), likeness=likeness, theme=theme
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What IPython shows where it cannot show the picture."""
        printer.text(repr(self) if cycle else self.to_text())

    def _repr_svg_(self) -> str | None:
        try:
            pictures = self._pictures("shape", None, MAX_NODES, None, "light")
            return self._lay_out("svg", pictures, TIME_LIMIT).decode()
        except RenderError:  # a notebook then shows the tree
            return None

    def _pictures(
        self,
        fold: object,
        depth: object,
        max_nodes: object,
        overlay: object,
        theme: object,
    ) -> Iterator[graphviz.Digraph]:
        """Yield pictures, each coarser than the one before, which took too long to lay out."""
        likeness, asked = checked_likeness(fold), checked_depth(depth)
        at_most, colours = checked_max_nodes(max_nodes), theme_named(theme)
        laid_over = self._overlay(overlay, colours)
        n_boxes = None
        for shown in self._views_of(likeness).shown(asked, at_most):
            if n_boxes is not None and len(shown.diagram.boxes) >= n_boxes:
                continue
            notes = [shown.detail.note] if shown.detail.note else []
            if likeness == "op" and shown.diagram.has_repetitions:
                notes.append(_OF_FIRST_COPY)
            if n_boxes is not None:
                notes.append(_NOT_IN_TIME)
            n_boxes = len(shown.diagram.boxes)
            yield draw(shown.diagram, colours, step=self.step, overlay=laid_over, notes=notes)

    def _views_of(self, likeness: Likeness | None) -> Views:
        if likeness not in self._views:
            self._views[likeness] = Views(self.captured, likeness)
        return self._views[likeness]

    # -- compared, and for other tools ------------------------------------------------------

    def fingerprint(self) -> str:
        """16 hexadecimal digits that are equal for equal graphs, in whichever step or process.

        They change with every operation, its wiring, shape, dtype and module, with names of
        parameters and with the roots; not with what is kept for the backward, nor with lines.
        """
        from gradscope.graphs.fingerprint import fingerprint

        return fingerprint(self.captured)

    def diff(self, other: AutogradGraph) -> GraphDifference:
        """What appeared, vanished or changed from this graph to another one.

        Args:
            other: a graph of another step or another run.

        Returns:
            An object that prints as text, is false if the graphs are equal, and has the DataFrames
            ``appeared``, ``vanished`` and ``changed``.

        Raises:
            UsageError: if ``other`` is no graph.
        """
        if not isinstance(other, AutogradGraph):
            raise UsageError(f"other is {type(other).__name__}: pass another graph to compare with")
        from gradscope.graphs.comparison import difference

        return difference(self.captured, other.captured)

    def to_text(self, *, depth: int | None = None, max_lines: int = 60, width: int = 100) -> str:
        """The graph as a tree for terminals: modules, repetitions, and what they consist of.

        Args:
            depth: how many levels are shown; by default as many as there is room for.
            max_lines: how many lines there may be.
            width: how many characters a line may have.

        Raises:
            UsageError: if an argument is no such number.
        """
        from gradscope.graphs.text_tree import text_tree

        folded = self._views_of("shape").chained
        return text_tree(folded, depth=depth, max_lines=max_lines, width=width)

    def to_networkx(self) -> networkx.MultiDiGraph[int]:
        """The graph as a :class:`networkx.MultiDiGraph`, in the direction of the data.

        Nodes and edges have the columns of ``nodes`` and ``edges`` as attributes.
        """
        from gradscope.run.interchange import to_networkx

        return to_networkx(self.captured)

    def to_json(self) -> str:
        """The graph as JSON, complete; :meth:`from_json` reads it back."""
        from gradscope.run.interchange import to_json

        return to_json(self.captured, self.step)

    @classmethod
    def from_json(cls, text: str) -> AutogradGraph:
        """Read a graph that :meth:`to_json` has written; facts for overlays are not in it.

        Raises:
            UsageError: if the text is cut off, is something else, or comes from a newer gradscope.
        """
        from gradscope.run.interchange import from_json

        captured, step = from_json(text)
        return cls(captured, step=step)

    @property
    def _folded(self) -> Folded:
        return self._views_of("shape").folded

    @property
    def _saved_bytes(self) -> LongIntegers:
        return saved_bytes_of_nodes(self._folded)

    def _overlay(self, name: object, theme: Theme) -> Overlay | None:
        if name is None:
            return None
        return overlay_named(name, self._facts(), theme, has_saved=len(self.captured.saved) > 0)

    def _lay_out(self, file_format: str, pictures: Iterator[Any], time_limit: float) -> bytes:
        for picture in pictures:
            try:
                return lay_out(picture.source, file_format, time_limit)
            except LayoutTooSlowError:
                continue
        raise RenderError(
            f"Graphviz did not lay out even the coarsest picture of this graph in {time_limit:g} "
            "seconds; render it to a .dot file for a tool of your own, or look at .nodes and .edges"
        )
