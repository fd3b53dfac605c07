"""Which line of the user's program is behind a call that reached torch."""

from __future__ import annotations

import os
import sys
from types import CodeType, FrameType
from typing import NamedTuple

import torch

from gradscope.own_code import is_ours
from gradscope.taps.uncompiled import uncompiled

_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_STANDARD = (os.path.dirname(os.path.abspath(os.__file__)) + os.sep, "<frozen ")
_SITE_PACKAGES = f"{os.sep}site-packages{os.sep}"

# By id, for a code object is hashed by all that is in it; held, so that the id is nobody else's.
_is_user_code: dict[int, tuple[CodeType, bool]] = {}


class Location(NamedTuple):
    """A line of the user's program.

    Attributes:
        file: the path as Python compiled it.
        line: counted from 1.
        function: the name of the function the line is in, ``<module>`` at top level.
    """

    file: str
    line: int
    function: str


def user_frame(start: FrameType | None = None) -> FrameType | None:
    """Return the innermost frame that is neither torch's, gradscope's nor the standard library's.

    Args:
        start: where to begin; the caller's frame by default.
    """
    frame: FrameType | None = start if start is not None else sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        known = _is_user_code.get(id(code))
        if known is None:
            known = _is_user_code[id(code)] = (code, _belongs_to_user(code.co_filename))
        if known[1]:
            return frame
        frame = frame.f_back
    return None


def making_frame(thing: object) -> FrameType | None:
    """Return the frame of the program that makes an object whose ``__init__`` is running.

    The object's own ``__init__``, where the program has written it, is passed over.
    """
    frame = user_frame(sys._getframe(1))
    while frame is not None and frame.f_code.co_name == "__init__":
        first = frame.f_code.co_varnames[0] if frame.f_code.co_argcount else ""
        if frame.f_locals.get(first) is not thing:
            break
        frame = user_frame(frame.f_back) if frame.f_back is not None else None
    return frame


def inside_method_of(kind: type, package: str, other_than: object) -> bool:
    """Whether a method of another object of a kind is running, whose class is in a package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        # Before the locals are asked for, which takes long: only of methods of that package.
        if code.co_argcount and frame.f_globals.get("__name__", "").startswith(package):
            first = frame.f_locals.get(code.co_varnames[0])
            if issubclass(type(first), kind) and first is not other_than:
                return type(first).__module__.startswith(package)
        frame = frame.f_back
    return False


@uncompiled
def user_location(start: FrameType | None = None) -> Location | None:
    """Return the line of the user's program that is being executed, or None if there is none."""
    frame = user_frame(start if start is not None else sys._getframe(1))
    if frame is None:
        return None
    return Location(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)


def columns_of(location: Location | None, prefix: str = "") -> dict[str, str | int]:
    """Return ``file`` and ``line`` for the row of a table; nothing for an unknown place.

    Args:
        location: the place.
        prefix: what stands in front of the columns' names.
    """
    if location is None:
        return {}
    return {f"{prefix}file": location.file, f"{prefix}line": location.line}


def _belongs_to_user(filename: str) -> bool:
    if is_ours(filename) or filename.startswith(_TORCH):
        return False
    # Packages installed for the user live below the standard library's folder, and are the
    # user's program here: what they do to the loop has to be told like what the script does.
    return not filename.startswith(_STANDARD) or _SITE_PACKAGES in filename
