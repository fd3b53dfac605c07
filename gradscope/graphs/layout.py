"""Turns DOT into a picture file with whichever Graphviz is at hand.

The library that the wheels of pygraphviz carry comes first: it needs nothing but pip. The program
``dot`` on the PATH is the alternative.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from gradscope.errors import RenderError

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_BOXES = 2_000
"""Boxes in a picture that Graphviz is asked to lay out.

Measured with Graphviz 14.1 on one core: a GPT of 12 layers (759 boxes) takes 0.2 s, one of 30
layers (1,875 boxes) 1.3 s, one of 48 layers (2,991 boxes) 3 s.
"""

MAX_CROSSED_ROWS = 30_000
"""Rows crossed by edges, summed, in a picture that Graphviz is asked to lay out.

An LSTM cell run for 60 time steps has 57,000 and takes 2 s, a densely connected net of 40 layers
33,000 and as long; 230,000 were not done after 12 s. They are counted by
:func:`gradscope.graphs.ranks.crossed_rows`.
"""

MAX_CURVED_ROWS = 4_000
"""Rows crossed, summed, up to which edges are curves led around the boxes; then they are straight.

Leading them around is what costs: 0.7 to 3 s at 4,000, 15 s at four times as many.
"""


def lay_out(dot: str, file_format: str) -> bytes:
    """Lay out a graph and draw it.

    Args:
        dot: the graph in the DOT language.
        file_format: ``"svg"``, ``"png"`` or ``"pdf"``.

    Returns:
        The contents of the picture file.

    Raises:
        RenderError: if neither pygraphviz nor ``dot`` is there, or they refuse the graph.
    """
    refusals = []
    for engine in _ENGINES:
        try:
            return engine(dot, file_format)
        except _NotInstalledError:
            continue
        except Exception as error:
            refusals.append((engine, error))
    if refusals:
        said = "; ".join(f"{_ENGINES[engine]}: {error}" for engine, error in refusals)
        raise RenderError(f"Graphviz could not draw the picture ({said})") from refusals[0][1]
    raise RenderError(
        "drawing a picture needs Graphviz, and none was found: `pip install pygraphviz` brings it "
        "along (or install Graphviz itself, so that `dot` is on the PATH). A .dot file can be "
        "written without it."
    )


class _NotInstalledError(Exception):
    """This engine is not there."""


def _by_library(dot: str, file_format: str) -> bytes:
    try:
        with warnings.catch_warnings():
            # Extension modules made with SWIG warn about themselves on newer Pythons.
            warnings.simplefilter("ignore")
            pygraphviz: Any = importlib.import_module("pygraphviz")
    except (ImportError, OSError) as error:  # OSError: its libraries do not load
        raise _NotInstalledError from error
    graph = pygraphviz.AGraph(string=dot)
    try:
        # draw() asks for this number only to write to stderr that 1,000 nodes may take long.
        graph.number_of_nodes = lambda: 0
        picture: bytes = graph.draw(format=file_format, prog="dot")
    finally:
        graph.close()
    return picture


def _by_program(dot: str, file_format: str) -> bytes:
    import graphviz

    try:
        return graphviz.pipe("dot", file_format, dot.encode(), quiet=True)  # type: ignore[no-any-return]
    except graphviz.ExecutableNotFound as error:
        raise _NotInstalledError from error


_ENGINES: dict[Callable[[str, str], bytes], str] = {
    _by_library: "pygraphviz",
    _by_program: "dot",
}
