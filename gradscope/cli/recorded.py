"""What the verbs about a recorded run share: the argument that names it, and opening it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from gradscope.cli.output import tell

if TYPE_CHECKING:
    from gradscope.opening import Run


def add_run(parser: argparse.ArgumentParser) -> None:
    """Declare the argument."""
    parser.add_argument(
        "run",
        metavar="DIR",
        help="a run directory, written by watch(save=DIR), scope.save(DIR) or gradscope run -o DIR",
    )


def add_output(parser: argparse.ArgumentParser, what: str) -> None:
    """Declare ``-o`` and ``--force``.

    Args:
        parser: of the verb.
        what: the help of ``-o``.
    """
    parser.add_argument("-o", "--output", metavar="FILE", help=what)
    parser.add_argument("--force", action="store_true", help="overwrite what is there already")


def opened(arguments: argparse.Namespace) -> Run:
    """Open the run.

    Raises:
        RunDirectoryError: if there is none, or none that can be read.
    """
    from gradscope.opening import Run

    return Run(arguments.run)


def tell_notes(run: Run, since: int = 0) -> None:
    """Tell what of the run could not be read.

    Args:
        run: which one.
        since: how many of its notes were there before, and say how the run itself went.
    """
    for note in run.notes[since:]:
        tell(f"gradscope: {note}")
