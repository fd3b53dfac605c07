"""Words that several rules share."""

from __future__ import annotations

import os


def some_of(some: int, all_of_them: int) -> str:
    """``all 4`` or ``3 of 4``."""
    return f"all {all_of_them}" if some == all_of_them else f"{some} of {all_of_them}"


def shortened(path: str) -> str:
    """A path as one would type it here: relative to the working directory if it lies in there."""
    try:
        relative = os.path.relpath(path)
    except (ValueError, OSError):  # another drive, or a working directory that is gone
        return path
    return path if relative.startswith(os.pardir) else relative


def place(file: str, line: int) -> str:
    """A line within a sentence; the whole path stands in the finding's own ``file``."""
    return f"{os.path.basename(file)}:{line}"
