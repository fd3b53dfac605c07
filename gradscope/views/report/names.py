"""Names of the user's program as a page can show them."""

from __future__ import annotations

import re

MOST_CHARACTERS = 120

_UNSEEN = re.compile("[\0-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def shown(name: object, most: int = MOST_CHARACTERS) -> str:
    """Return a name without what cannot be seen, its middle left out if it is very long.

    Nothing is escaped here: the template does that.
    """
    text = _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", str(name))
    if len(text) <= most:
        return text
    start = most // 2
    return f"{text[:start]}…{text[len(text) - (most - start - 1) :]}"


def scientific(value: float) -> str:
    """Return a positive number with two digits, small and large ones as in ``2.4·10⁻⁴``."""
    if 0.01 <= value < 1e4:
        return f"{float(f'{value:.2g}'):g}"
    mantissa, power = f"{value:.1e}".split("e")
    return f"{mantissa}·10{str(int(power)).translate(_RAISED)}"
