"""What a watch may be told, and the switch in the environment that turns everything off."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from gradscope.errors import UsageError

OnError = Literal["record", "raise"]


@dataclass(frozen=True, slots=True)
class WatchOptions:
    """The options of one watch, checked once at its beginning.

    Attributes:
        budget: the share of the step time that observing may take, 0.03 for three percent.
            It spaces the recorded steps; what is seen at every step is not subject to it.
        every: record every n-th step in full, whatever it costs; None lets the budget decide.
        include: patterns (as in ``fnmatch``) of parameter names to watch; empty for all.
        exclude: patterns of parameter names to leave out.
        on_error: ``record`` keeps an error of gradscope's own away from the training;
            ``raise`` lets it out, for gradscope's own tests.
    """

    budget: float = 0.03
    every: int | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    on_error: OnError = "record"

    def __post_init__(self) -> None:
        if type(self.budget) not in (int, float) or not 0 < self.budget <= 1:
            raise UsageError(
                f"budget={self.budget!r}: pass the share of the step time that observing may "
                "take, greater than 0 and at most 1 (0.03 is three percent)"
            )
        if self.every is not None and not (type(self.every) is int and self.every >= 1):
            raise UsageError(f"every={self.every!r}: pass a whole number of steps, 1 or more")
        for name, patterns in (("params", self.include), ("exclude", self.exclude)):
            if not all(isinstance(pattern, str) for pattern in patterns):
                raise UsageError(
                    f"{name}={patterns!r}: pass a pattern of parameter names such as 'head.*', or "
                    "a list of patterns"
                )
        if self.on_error not in ("record", "raise"):
            raise UsageError(f"on_error={self.on_error!r}: pass 'record' or 'raise'")


def as_patterns(name: str, patterns: object) -> tuple[str, ...]:
    """Return one pattern or several as a tuple.

    Raises:
        UsageError: if ``patterns`` is neither a text nor something to iterate over.
    """
    if isinstance(patterns, str):
        return (patterns,)
    if not isinstance(patterns, Iterable):
        raise UsageError(
            f"{name}={patterns!r}: pass a pattern of parameter names such as 'head.*', or a list "
            "of patterns"
        )
    return tuple(patterns)


def switched_off() -> bool:
    """Tell whether ``GRADSCOPE=0`` in the environment asks for watching nothing at all."""
    return os.environ.get("GRADSCOPE", "").strip().lower() in ("0", "off", "false", "no")
