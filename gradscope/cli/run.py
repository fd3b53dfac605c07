"""``gradscope run script.py [args]``: watch a program that nobody edited."""

from __future__ import annotations

import argparse
import sys

from gradscope.cli.output import command, show, tell
from gradscope.cli.watched import Watched, add_options, guarded, leave, run_watched


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "run",
        help="run a training script under watch",
        description="Run a script as Python would, watch the models and optimizers that it makes, "
        "and print the loop as it really ran to standard error at its end.",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        help="record to the run directory DIR while the program trains, for gradscope.open(DIR)",
    )
    add_options(parser)
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Run the program; its exit status is ours, its exceptions look as Python prints them."""
    watched = run_watched(arguments)
    guarded(lambda: _print_screen(watched, arguments.show))
    if watched.saved_to is not None:
        tell(f"recorded to {watched.saved_to}: gradscope.open({str(watched.saved_to)!r})")
        tell(f"next: {command('summary', watched.saved_to)}")
    return leave(watched, watched.ended.status)


def _print_screen(watched: Watched, shows: str) -> None:
    if watched.recording is None or watched.findings is None:
        return
    from gradscope.rules import Severity
    from gradscope.views.terminal import screen

    sys.stdout.flush()
    shown = screen(watched.recording, watched.findings, Severity[shows.upper()])
    show(shown, sys.stderr)
