"""The ``gradscope`` command: one verb is one file."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from gradscope._version import __version__
from gradscope.cli import (
    check,
    demo,
    diff,
    doctor,
    explain,
    export,
    graph,
    report,
    rule,
    run,
    summary,
    table,
)
from gradscope.cli.output import tell
from gradscope.errors import GradscopeError, text_of

VERBS = (run, check, summary, table, graph, explain, report, diff, export, rule, demo, doctor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 2 for what cannot be done as asked."""
    parser = argparse.ArgumentParser(
        prog="gradscope", description="Watches a PyTorch training loop and says what is wrong."
    )
    parser.add_argument("--version", action="version", version=f"gradscope {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for verb in VERBS:
        verb.add_parser(subparsers)
    parsed = parser.parse_args(arguments)
    try:
        status: int = parsed.execute(parsed)
        sys.stdout.flush()
    except GradscopeError as error:
        tell(f"gradscope: {error}")
        return 2
    except BrokenPipeError:  # whoever read our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what Python flushes at its end
        return 0
    except OSError as error:  # of the disk; of no program's, whose errors come as how it ended
        tell(f"gradscope: {text_of(error)}")
        return 2
    return status
