"""``gradscope rule GS201``: what a rule finds, why it matters, how to mend it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from gradscope.cli.output import show

if TYPE_CHECKING:
    from gradscope.rules import Rule

_FAMILIES = {
    "1": "parameters and optimizer",
    "2": "zero_grad and accumulation",
    "3": "forward, loss and graph",
    "4": "backward and gradients",
    "5": "step",
    "6": "learning",
    "8": "distributed training",
    "9": "gradscope itself",
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser("rule", help="explain a rule, or list them all")
    parser.add_argument("rule", nargs="?", help="a code (GS201) or a name (missing-zero-grad)")
    parser.add_argument("--all", action="store_true", help="list every rule")
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Print the rule's documentation, or the list of rules."""
    from gradscope.rules import find_rule

    if arguments.rule is None or arguments.all:
        _print_list()
        return 0
    from rich.markdown import Markdown

    rule = find_rule(arguments.rule)
    show(Markdown(rule.documentation() + _thresholds(rule)))
    return 0


def _print_list() -> None:
    from gradscope.rules import RULES

    family = ""
    for rule in RULES:
        if rule.code[2] != family:
            family = rule.code[2]
            print(f"\nGS{family}  {_FAMILIES.get(family, '')}\n")
        summary = rule.documentation().partition("\n")[0].partition(": ")[2].rstrip(".")
        print(f"  {rule.code}  {rule.name}  ({rule.severity})\n         {summary}")
    print("\nNext: gradscope rule CODE explains one of them.")


def _thresholds(rule: type[Rule]) -> str:
    from gradscope.rules.thresholds import thresholds_of

    thresholds = thresholds_of(rule)
    if not thresholds:
        return ""
    rows = "\n".join(f"- `{name} = {value:g}`" for name, value in thresholds.items())
    return f"\n\n## Thresholds, for `[tool.gradscope.thresholds.{rule.code}]`\n\n{rows}\n"
