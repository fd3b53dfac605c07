"""``gradscope summary DIR``: the screen of a recorded run."""

from __future__ import annotations

import argparse
import sys

from gradscope.cli.output import READABLE_WIDTH, command, show, width_of
from gradscope.cli.recorded import add_run, opened
from gradscope.config import SEVERITIES


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "summary",
        help="print what is wrong with a recorded run, and the loop as it really ran",
        description="Print the screen of a recorded run, as it was printed when it ended: what is "
        "wrong, where and how to mend it, and the loop as it really ran.",
    )
    add_run(parser)
    parser.add_argument(
        "--show",
        choices=SEVERITIES,
        default="warning",
        help="the least severe findings to show (default: warning)",
    )
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Print the screen, and what else there is to see of this run."""
    from rich.text import Text

    from gradscope.rules.finding import Severity
    from gradscope.views.terminal import screen

    run = opened(arguments)
    least = Severity[arguments.show.upper()]
    findings = run.findings
    show(screen(run._recording, findings, least))
    suggested = []
    told = findings.at_least(least)
    if told:
        suggested.append((command("rule", told[0].code), f"what {told[0].name} means"))
    suggested.append(
        (command("report", arguments.run, "-o", "run.html"), "all of it as a page, with charts")
    )
    suggested.append((command("table", arguments.run, "steps"), "one row a step"))
    if len(run.params) and len(run.updates):
        param = str(run.updates["param"].iloc[-1])
        suggested.append((command("explain", arguments.run, param), "the last update of it"))
    if run.captured_steps:
        suggested.append(
            (command("graph", arguments.run, "-o", "graph.svg"), "what backward walked through")
        )
    show(Text("\nnext:", style="bold"))
    sys.stdout.flush()
    room = width_of(sys.stdout) or READABLE_WIDTH
    width = max(len(line) for line, _ in suggested)
    # A command is never broken, so that it can be copied.
    beside = width + max(len(what) for _, what in suggested) + 4 <= room
    for line, what in suggested:
        print(f"  {line:<{width}}  {what}" if beside else f"  {line}")
    return 0
