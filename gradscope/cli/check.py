"""``gradscope check script.py [args]``: a training run as a test that fails for its findings."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from gradscope.cli.output import show, tell
from gradscope.cli.watched import Watched, add_options, document, guarded, leave, run_watched
from gradscope.config import SEVERITIES

if TYPE_CHECKING:
    from gradscope.rules.finding import Findings


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "check",
        help="run a training script under watch, and fail if something is wrong with it",
        description="Run a script as gradscope run does. Exit with 0 if nothing was found, with 1 "
        "if something was, with 2 if it could not be asked for like that, and with the script's "
        "own status if the script itself failed.",
    )
    parser.add_argument(
        "--fail-on",
        choices=SEVERITIES,
        help="the least severity that makes the check fail (default: error)",
    )
    parser.add_argument(
        "--format",
        choices=("text", "json", "github"),
        default="text",
        help="text: the verdict. json: the findings as one document, the only thing on standard "
        "output; the script's goes to standard error. github: annotations for GitHub Actions",
    )
    add_options(parser)
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Run the program, print what was found, and tell by the exit status whether that is bad."""
    with _standard_output(for_us_alone=arguments.format == "json") as out:
        watched = run_watched(arguments)
        if watched.findings is not None:
            guarded(lambda: _print(watched, arguments, out))
    status = _status(watched, arguments)
    if watched.findings is not None and watched.findings.warnings and status == 0:
        tell("warnings do not make this check fail; with --fail-on warning they do")
    return leave(watched, status)


def _status(watched: Watched, arguments: argparse.Namespace) -> int:
    from gradscope.rules.finding import Severity

    least = Severity[(arguments.fail_on or watched.fail_on).upper()]
    if any(finding.severity >= least for finding in watched.findings or ()):
        return 1
    judged = watched.recording is None or watched.findings is not None
    return watched.ended.status or (0 if judged else 2)


def _print(watched: Watched, arguments: argparse.Namespace, out: TextIO) -> None:
    from gradscope.rules.finding import Findings, Severity

    recording, findings = watched.recording, watched.findings
    if recording is None or findings is None:
        return
    # What makes the check fail is always shown.
    fail_on = arguments.fail_on or watched.fail_on
    shows = min(Severity[arguments.show.upper()], Severity[fail_on.upper()])
    sys.stdout.flush()
    if arguments.format == "json":
        json.dump(document(watched), out, indent=1, ensure_ascii=False)
        out.write("\n")
    elif arguments.format == "github":
        from gradscope.views.github import annotation_lines

        shown: Findings = Findings([f for f in findings if f.severity >= shows])
        # A command has to begin its line, and the program may have left one unfinished.
        out.write("\n" + annotation_lines(shown) if shown else "")
    else:
        from gradscope.views.terminal import screen

        show(screen(recording, findings, shows), out)
    out.flush()


@contextmanager
def _standard_output(*, for_us_alone: bool) -> Iterator[TextIO]:
    """Our standard output; if for us alone, what the program writes goes to standard error."""
    if not for_us_alone:
        yield sys.stdout
        return
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)  # below Python, so that processes that the program starts are covered too
    try:
        with open(ours, "w", encoding="utf-8", closefd=False) as out:
            yield out
    finally:
        sys.stdout.flush()
        os.dup2(ours, 1)
        os.close(ours)
