"""Words that several rules share."""

from __future__ import annotations

import os


def some_of(some: int, all_of_them: int) -> str:
    """``all 4`` or ``3 of 4``."""
    return f"all {all_of_them}" if some == all_of_them else f"{some} of {all_of_them}"


def shortened(path: str) -> str:
    """A path as one would type it here: relative to the working directory if that is shorter."""
    try:
        relative = os.path.relpath(path)
    except (ValueError, OSError):
        return path
    return relative if len(relative) < len(path) else path
