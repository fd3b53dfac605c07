"""Which files are gradscope's own, to be left out of tracebacks and places."""

from __future__ import annotations

import os

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
# The demo is a user's program that happens to ship with the package.
_PROGRAMS = os.path.join(_PACKAGE, "demo") + os.sep


def is_ours(filename: str) -> bool:
    """Whether a file belongs to gradscope, the demo's programs excepted."""
    return filename.startswith(_PACKAGE) and not filename.startswith(_PROGRAMS)
