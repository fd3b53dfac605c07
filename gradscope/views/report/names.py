"""Names of the user's program as a page can show them."""

from __future__ import annotations

import re

MOST_CHARACTERS = 120

_UNSEEN = re.compile("[\0-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def shown(name: object, most: int = MOST_CHARACTERS) -> str:
    """Return a name without what cannot be seen, its middle left out if it is very long.

    Nothing is escaped here: the template does that.
    """
    text = _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", str(name))
    if len(text) <= most:
        return text
    start = most // 2
    return f"{text[:start]}…{text[len(text) - (most - start - 1) :]}"


def tail(name: object, most: int) -> str:
    """Return the end of a name, which tells parameters apart better than its beginning."""
    text = shown(name)
    return text if len(text) <= most else f"…{text[len(text) - most + 1 :]}"
