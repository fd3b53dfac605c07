"""``gradscope rule GS201``: what a rule finds, why it matters, how to mend it."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser("rule", help="explain a rule, or list them all")
    parser.add_argument("rule", nargs="?", help="a code (GS201) or a name (missing-zero-grad)")
    parser.add_argument("--all", action="store_true", help="list every rule")
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Print the rule's documentation, or the list of rules."""
    from rich.console import Console
    from rich.markdown import Markdown

    from gradscope.rules import RULES, find_rule

    if arguments.rule is None or arguments.all:
        for rule in RULES:
            print(f"{rule.code}  {rule.name}  ({rule.severity})")
        print("\nNext: gradscope rule CODE explains one of them.")
        return 0
    Console(soft_wrap=False).print(Markdown(find_rule(arguments.rule).documentation()))
    return 0
