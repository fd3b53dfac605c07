"""Replacing a function of torch, and putting it back exactly as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradscope.taps.uncompiled import passed_over


class Patch:
    """One replaced attribute of a module or class.

    Restoring checks that the attribute still is ours: if someone else has replaced it since, their
    replacement stays (it may call ours, which then only passes the call on).
    """

    def __init__(self, owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Any]) -> None:
        self.owner = owner
        self.name = name
        # Taken from __dict__, so that restoring puts back the very object a class held,
        # and not a function bound or inherited on the way.
        self.original = vars(owner)[name]
        self.replacement = passed_over(wrap(self.original))
        setattr(owner, name, self.replacement)

    @property
    def in_place(self) -> bool:
        """Whether the attribute is still the one this patch has put there."""
        return vars(self.owner).get(self.name) is self.replacement

    def restore(self) -> None:
        """Put the original back, unless someone else has taken the place since."""
        if self.in_place:
            setattr(self.owner, self.name, self.original)
