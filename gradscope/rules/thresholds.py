"""The numbers that rules judge by, and how a project replaces them with its own.

A threshold is a number in capitals in the module of a rule, such as ``_LEAST_SHARE``; a project
calls it ``least-share``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from gradscope.errors import UsageError
from gradscope.rules import find_rule
from gradscope.rules.rule import Rule


def thresholds_of(rule: type[Rule]) -> dict[str, float]:
    """Return the thresholds of a rule by their names."""
    module = sys.modules[rule.__module__]
    return {_spelled(name): value for name, value in _constants(module.__dict__).items()}


def check_thresholds(thresholds: Mapping[str, Mapping[str, float]]) -> None:
    """Make sure that there are such thresholds.

    Args:
        thresholds: values by the code or name of a rule, and the name of the threshold.

    Raises:
        UsageError: naming those of the rule.
        UnknownRuleError: if there is no such rule.
    """
    for code, values in thresholds.items():
        rule = find_rule(code)
        known = thresholds_of(rule)
        for name in values:
            if name not in known:
                there_are = ", ".join(f"{k} = {v:g}" for k, v in known.items()) or "none"
                raise UsageError(
                    f"{rule.code} {rule.name} has no threshold {name!r}; there are: {there_are}"
                )


@contextmanager
def replaced_thresholds(thresholds: Mapping[str, Mapping[str, float]]) -> Iterator[None]:
    """Let rules judge by other numbers than their own, for the length of a block."""
    replaced = []
    try:
        for code, values in thresholds.items():
            names = sys.modules[find_rule(code).__module__].__dict__
            for name, value in _constants(names).items():
                if _spelled(name) in values:
                    replaced.append((names, name, value))
                    names[name] = values[_spelled(name)]
        yield
    finally:
        for names, name, value in replaced:
            names[name] = value


def _constants(names: Mapping[str, object]) -> dict[str, float]:
    return {
        name: value
        for name, value in names.items()
        if name.isupper() and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _spelled(name: str) -> str:
    return name.strip("_").lower().replace("_", "-")
