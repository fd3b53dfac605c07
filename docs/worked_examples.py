"""Runs the programs on a page, and writes under each what it printed."""

from __future__ import annotations

import contextlib
import io
import math
import re

_EXAMPLE = re.compile(r"(```python\n(.*?)```\n\n```text\n)(.*?)(```\n)", re.DOTALL)

_NUMBER = re.compile(r"([−-]?\d[\d.]*(?:e[-+]?\d+)?)")

# Processors add sums up in orders of their own, so a number may differ by so much, relatively;
_LARGEST_DIFFERENCE = 1e-3
# what is smaller than this is rounding itself, on these pages; and so is what a line is about that
# says one of these.
_NOTHING = 1e-5
_ABOUT_ROUNDING = ("rounding", "units in the", "last place")


def filled(page: str) -> str:
    """Return the page with the output of its programs, which run in order in one namespace."""
    namespace: dict[str, object] = {"__name__": "__main__"}

    def run(example: re.Match[str]) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(example[2], "<page>", "exec"), namespace)
        return f"{example[1]}{printed.getvalue()}{example[4]}"

    return _EXAMPLE.sub(run, page)


def agree(one: str, other: str) -> bool:
    """Whether two pages say the same, numbers up to rounding."""
    lines, others = one.splitlines(), other.splitlines()
    return len(lines) == len(others) and all(map(_is_same, lines, others))


def _is_same(one: str, other: str) -> bool:
    parts, others = _NUMBER.split(one), _NUMBER.split(other)
    # Every second part is a number.
    if [part.split() for part in parts[::2]] != [part.split() for part in others[::2]]:
        return False
    is_about_rounding = any(phrase in one for phrase in _ABOUT_ROUNDING)
    return is_about_rounding or all(map(_is_close, parts[1::2], others[1::2]))


def _is_close(one: str, other: str) -> bool:
    x, y = (float(each.rstrip(".").replace("−", "-")) for each in (one, other))
    both_nothing = abs(x) < _NOTHING and abs(y) < _NOTHING
    return both_nothing or math.isclose(x, y, rel_tol=_LARGEST_DIFFERENCE)
