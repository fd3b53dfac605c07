"""Replacing a function of torch, and putting it back exactly as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradscope.taps.uncompiled import passed_over
from gradscope.taps.undo import Undo


def replace(
    undo: Undo, owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Any]
) -> Callable[[], bool]:
    """Replace one attribute of a module or class.

    What puts it back checks that the attribute still is ours: if someone else has replaced it
    since, their replacement stays (it may call ours, which then only passes the call on).

    Args:
        undo: is given what puts the original back.
        owner: the module or class.
        name: of the attribute.
        wrap: given the original, returns what takes its place.

    Returns:
        What tells whether it still is in its place.
    """
    # Taken from __dict__, so that the very object is put back that a class held, and not a
    # function bound or inherited on the way.
    original = vars(owner)[name]
    replacement = passed_over(wrap(original))

    def is_in_place() -> bool:
        return vars(owner).get(name) is replacement

    def restore() -> None:
        # Without a call of ours: what has to come out again depends on as little as can be.
        if vars(owner).get(name) is replacement:
            setattr(owner, name, original)

    undo.callback(restore)
    setattr(owner, name, replacement)
    return is_in_place
