"""``gradscope report DIR -o run.html``: a recorded run as one page to open and to send."""

from __future__ import annotations

import argparse
from pathlib import Path

from gradscope.cli.output import checked_output, tell, written_to
from gradscope.cli.recorded import add_output, add_run, opened, tell_notes


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "report",
        help="write a recorded run as one page of HTML, to open and to send",
        description="Write a recorded run as one page of HTML that needs no network: findings, "
        "the loop as it really ran, charts, the flow of gradients and the graph.",
    )
    add_run(parser)
    add_output(parser, "where to (default: report.html)")
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Write the page.

    Raises:
        OutputExistsError: if the file is there already.
        UsageError: if it cannot be written.
    """
    path = checked_output(arguments.output or "report.html", force=arguments.force)
    run = opened(arguments)
    with written_to(path):
        run.report(path, force=arguments.force)
    tell_notes(run, len(run.about.get("notes") or ()))
    tell(f"wrote {path}: {path.stat().st_size / 1e6:.1f} MB, complete in itself")
    tell(f"next: open {Path(path).absolute().as_uri()} in a browser, or send the file")
    return 0
