"""The comparison of two runs as plain data for JSON."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from gradscope._version import __version__
from gradscope.comparison.difference import Comparison, Difference, Fact

VERSION = 1
"""Of the document's layout; raised when a key changes its meaning."""


def document(names: tuple[str, str], comparison: Comparison) -> dict[str, Any]:
    """Return the document, as ``docs/diff.md`` describes it.

    Args:
        names: what the two runs are called.
        comparison: what was found.
    """
    first, beyond = comparison.first, comparison.beyond_rounding
    return {
        "version": VERSION,
        "gradscope": __version__,
        "a": {"run": names[0], "steps": comparison.n_steps[0]},
        "b": {"run": names[1], "steps": comparison.n_steps[1]},
        "equal": first is None,
        "first": None if first is None else _difference(first),
        "beyond_rounding": None if beyond is None else _difference(beyond),
        "differences": [_difference(each) for each in comparison.differences],
        "growth": [
            {field.name: _json(getattr(each, field.name)) for field in fields(each)}
            for each in comparison.growth
        ],
        "rtol": comparison.rtol,
        "rounding": comparison.rounding,
        "compared": {"steps": comparison.n_common, "values": dict(comparison.compared)},
        "not_compared": list(comparison.not_compared),
        "surroundings": [_fact(each) for each in comparison.surroundings],
    }


def _difference(difference: Difference) -> dict[str, Any]:
    plain = {field.name: _json(getattr(difference, field.name)) for field in fields(difference)}
    for name in ("hint", "param", "module", "optimizer"):
        plain[name] = plain[name] or None
    plain["facts"] = [_fact(each) for each in difference.facts]
    return plain


def _fact(fact: Fact) -> dict[str, Any]:
    return {field.name: _json(getattr(fact, field.name)) for field in fields(fact)}


def _json(value: Any) -> Any:
    """Numbers that are not finite, which JSON has no word for, become texts."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
