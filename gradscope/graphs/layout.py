"""Turns DOT into picture files with whichever Graphviz is at hand, in a process of its own.

The library that the wheels of pygraphviz carry comes first: it needs nothing but pip. The program
``dot`` on the PATH is the alternative. Either runs outside of this process, so that a layout that
takes too long can be ended, and whatever Graphviz does to its own memory is not done to ours.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from gradscope.errors import RenderError
from gradscope.graphs.layout_worker import packed, unpacked

TIME_LIMIT: Final = 20.0
"""Seconds that a layout may take before it is given up."""

_WORKER: Final = Path(__file__).with_name("layout_worker.py")


class LayoutTooSlowError(RenderError):
    """The layout was given up after the time it was allowed."""


def lay_out(dot: str, file_format: str, time_limit: float = TIME_LIMIT) -> bytes:
    """Lay out a graph and draw it; see :func:`lay_out_all`."""
    return lay_out_all([dot], file_format, time_limit)[0]


def lay_out_all(
    dots: Sequence[str], file_format: str, time_limit: float = TIME_LIMIT
) -> list[bytes]:
    """Lay out graphs one after the other and draw each.

    Args:
        dots: the graphs in the DOT language.
        file_format: any that Graphviz knows, such as ``"svg"``, ``"png"``, ``"pdf"``, ``"json"``.
        time_limit: seconds that all of them together may take.

    Returns:
        The contents of a picture file for each.

    Raises:
        LayoutTooSlowError: if they take longer.
        RenderError: if neither pygraphviz nor ``dot`` is there, or they refuse a graph.
    """
    ends = time.monotonic() + time_limit
    inputs = [dot.encode("utf-8", "backslashreplace") for dot in dots]
    refusals = []
    for name, engine in ENGINES.items():
        try:
            return engine(inputs, file_format, ends)
        except _NotThereError:
            continue
        except _RefusedError as refusal:
            refusals.append(f"{name}: {refusal}")
    if refusals:
        raise RenderError(f"Graphviz could not draw the picture ({'; '.join(refusals)})")
    raise RenderError(
        "drawing a picture needs Graphviz, and none was found: `pip install pygraphviz` brings it "
        "along (or install Graphviz itself, so that `dot` is on the PATH). A .dot file can be "
        "written without it."
    )


class _RefusedError(Exception):
    """This engine did not draw it, for the reason given."""


class _NotThereError(_RefusedError):
    """This engine is not installed."""


def _by_library(inputs: list[bytes], file_format: str, ends: float) -> list[bytes]:
    if not sys.executable or importlib.util.find_spec("pygraphviz") is None:
        raise _NotThereError("not installed")
    # -P: the folder of the worker has modules of its own, which are not for import by name.
    command = [sys.executable, "-P", str(_WORKER), file_format]
    pictures, said = unpacked(_run(command, packed(inputs), ends))
    if len(pictures) != len(inputs):
        raise _RefusedError(said)
    return pictures


def _by_program(inputs: list[bytes], file_format: str, ends: float) -> list[bytes]:
    if (program := shutil.which("dot")) is None:
        raise _NotThereError("not on the PATH")
    command = [program, "-Kdot", f"-T{file_format}"]
    return [_run(command, dot, ends) for dot in inputs]


ENGINES: Final[dict[str, Callable[[list[bytes], str, float], list[bytes]]]] = {
    "pygraphviz": _by_library,
    "dot": _by_program,
}
"""What can lay out graphs, by name, the first choice first."""


def failure_of(engine: str) -> str:
    """Let an engine lay out a small graph; what it says if it cannot, empty if it can."""
    try:
        (picture,) = ENGINES[engine]([b"digraph { a -> b }"], "svg", time.monotonic() + TIME_LIMIT)
    except RenderError as error:
        return str(error)
    except _RefusedError as refusal:
        return str(refusal)
    return "" if b"<svg" in picture else "it gave no picture"


def _run(command: list[str], given: bytes, ends: float) -> bytes:
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, timeout=max(0.1, ends - time.monotonic())
        )
    except subprocess.TimeoutExpired:
        raise LayoutTooSlowError("Graphviz took too long to lay out the picture") from None
    except OSError as error:
        raise _RefusedError(str(error)) from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise _RefusedError(said[-300:] or f"it ended with status {done.returncode}")
    return done.stdout
