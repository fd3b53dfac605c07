"""``gradscope explain DIR "head.weight[3,7]" --step 10``: one weight's update, line by line."""

from __future__ import annotations

import argparse
import json
import re
import sys

from gradscope.cli.output import READABLE_WIDTH, command, tell, width_of
from gradscope.cli.recorded import add_run, opened, tell_notes
from gradscope.errors import UsageError

_INDEXED = re.compile(r"(?P<param>.+)\[(?P<index>[^\[\]]*)\]", re.DOTALL)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "explain",
        help="explain the update of one weight with every number in the optimizer's formula",
        description="Explain the update of one weight with every number in the optimizer's "
        "formula, or sum up that of a whole parameter.",
    )
    add_run(parser)
    parser.add_argument(
        "weight",
        metavar="WEIGHT",
        help='a weight, as in "head.weight[3,7]" (with quotes, for the shell), or a parameter',
    )
    parser.add_argument(
        "--step",
        type=int,
        default=-1,
        metavar="N",
        help="of which step; -1, the default, is the last one recorded, -2 that before it",
    )
    parser.add_argument(
        "--format", choices=("text", "json"), default="text", help="json: every number, as data"
    )
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Print the explanation.

    Raises:
        UsageError: if there is no such parameter or weight.
        ScopeStateError: if nothing is known of it at that step.
    """
    run = opened(arguments)
    known = set(run.params["param"])
    param, index = split(arguments.weight, known)
    explanation = run.explain(param, index, arguments.step)
    tell_notes(run, len(run.about.get("notes") or ()))
    if arguments.format == "json":
        print(json.dumps(explanation.to_dict(), indent=1))
        return 0
    print(explanation.to_text(width_of(sys.stdout) or READABLE_WIDTH))
    if index is None:
        params = run.params.set_index("param")
        first = ",".join(
            "0" for _ in re.findall(r"\d+", str(params.at[explanation.param, "shape"]))
        )
        tell(f"next: {command('explain', arguments.run, f'{param}[{first}]')} explains one weight")
    else:
        tell(f"next: {command('explain', arguments.run, param)} sums up the whole parameter")
    return 0


def split(weight: str, known: set[str]) -> tuple[str, tuple[int, ...] | None]:
    """Return the parameter and the index that are meant; no index for a whole parameter.

    Args:
        weight: as in ``head.weight[3,7]``.
        known: names of parameters, which may have brackets of their own.

    Raises:
        UsageError: if what is in the brackets is no index.
    """
    match = _INDEXED.fullmatch(weight)
    if match is None or weight in known:
        return weight, None
    try:
        return match["param"], tuple(
            int(each) for each in match["index"].split(",") if each.strip()
        )
    except ValueError:
        raise UsageError(
            f"{weight}: write whole numbers in the brackets, as in {match['param']}[3,7]"
        ) from None
