"""``gradscope graph DIR -o graph.svg``: the autograd graph of a recorded step."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gradscope.cli.output import (
    READABLE_WIDTH,
    checked_output,
    command,
    say,
    tell,
    width_of,
    written_to,
)
from gradscope.cli.recorded import add_output, add_run, opened, tell_notes
from gradscope.errors import UsageError

if TYPE_CHECKING:
    from gradscope.graphs.autograd_graph import AutogradGraph

_PICTURES = (".svg", ".png", ".pdf", ".html", ".dot", ".gv")
_TEXTS = (".txt", ".json")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "graph",
        help="draw the autograd graph of a recorded step",
        description="Draw the autograd graph behind the loss of a recorded step into FILE, or "
        "print it as a tree.",
    )
    add_run(parser)
    add_output(
        parser,
        "its ending says what is written: .svg, .png, .pdf, .html (a page to explore), .dot, "
        ".txt (a tree) or .json (everything, for other tools); without it the tree is printed",
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="of which step (default: the last one captured)"
    )
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Print the graph, or draw it into a file.

    Raises:
        UsageError: if the file's ending says nothing.
        OutputExistsError: if the file is there already.
        ScopeStateError: if the graph of that step was not captured.
        RenderError: if Graphviz is missing.
    """
    output = arguments.output
    path = None if output is None else checked_output(output, force=arguments.force)
    if path is not None and path.suffix.lower() not in (*_PICTURES, *_TEXTS):
        raise UsageError(
            f"--output {output}: its ending says what is written; use one of "
            f"{', '.join((*_PICTURES, *_TEXTS))}"
        )
    run = opened(arguments)
    graph = run.graph(arguments.step)
    tell_notes(run, len(run.about.get("notes") or ()))
    if path is None:
        say(graph.to_text(width=width_of(sys.stdout) or READABLE_WIDTH))
        tell(f"next: {command('graph', arguments.run, '-o', 'graph.html')} draws it to explore")
        return 0
    with written_to(path):
        _write(graph, path)
    others = [step for step in run.captured_steps if step != graph.step]
    tell(f"wrote {path}: the graph of step {graph.step}, {len(graph):,} nodes")
    if others:
        tell(f"next: --step {others[0]} draws another one; captured: {_listed(others)}")
    elif path.suffix.lower() != ".html":
        tell(f"next: {command('graph', arguments.run, '-o', 'graph.html')} draws it to explore")
    else:
        tell("next: open it in a browser")
    return 0


def _write(graph: AutogradGraph, path: Path) -> None:
    from gradscope.run.directory.layout import write_bytes

    if path.suffix.lower() == ".json":
        write_bytes(path.resolve(), graph.to_json().encode())
    elif path.suffix.lower() == ".txt":
        text = graph.to_text(width=READABLE_WIDTH)
        write_bytes(path.resolve(), f"{text}\n".encode("utf-8", "replace"))
    else:
        graph.render(path)


def _listed(steps: list[int], most: int = 8) -> str:
    rest = len(steps) - most
    return ", ".join(map(str, steps[:most])) + (f" and {rest} more" if rest > 0 else "")
