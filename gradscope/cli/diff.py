"""``gradscope diff A B``: where two runs of the same training part."""

from __future__ import annotations

import argparse
import json
import math
import sys

from gradscope.cli.output import show


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "diff",
        help="say where two runs of the same training part, and in what first",
        description="Compare two run directories of what should be the same training. Exit with 0 "
        "if they are equal, with 1 if they part, with 2 if they cannot be compared.",
    )
    parser.add_argument("a", metavar="A", help="a run directory")
    parser.add_argument("b", metavar="B", help="another one")
    parser.add_argument(
        "--format",
        choices=("text", "json"),
        default="text",
        help="text: one screen. json: everything, as one document",
    )
    parser.add_argument(
        "--rtol",
        type=_tolerance,
        default=0.0,
        metavar="R",
        help="pass over relative differences of numbers up to R, such as 1e-6 (default: 0, only "
        "numbers that are the same to the last bit are equal)",
    )
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Print where the runs part; the exit status is 1 if they do."""
    from gradscope.comparing import diff

    found = diff(arguments.a, arguments.b, rtol=arguments.rtol)
    if arguments.format == "json":
        json.dump(found.to_dict(), sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        show(found)
    return int(bool(found))


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no relative difference, such as 1e-6")
    return value
