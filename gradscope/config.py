"""What a watch may be told, and the switch in the environment that turns everything off."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from gradscope.errors import UsageError

OnError = Literal["record", "raise"]

GraphSteps = Literal["first", "changed", "every"] | frozenset[int] | None
"""Of which steps the autograd graph is captured: each optimizer's first one; besides, those whose
forward makes another number of nodes than before; every one; those of these numbers; or none."""

KEEP_STEPS = 16
"""Of how many of the latest recorded steps tensors are kept where nothing else is asked for."""


@dataclass(frozen=True, slots=True)
class WatchOptions:
    """The options of one watch, checked once at its beginning.

    Attributes:
        budget: the share of the step time that observing may take, 0.03 for three percent.
            It spaces the recorded steps; what is seen at every step is not subject to it.
        every: record every n-th step in full, whatever it costs; None lets the budget decide.
        include: patterns (as in ``fnmatch``) of parameter names to watch; empty for all.
        exclude: patterns of parameter names to leave out.
        keep: patterns of the parameters of which gradient, weight and state are kept whole, as they
            were before and after recorded steps.
        keep_steps: the steps of which they are kept, which are then recorded in any case; or how
            many of the latest recorded steps.
        graph: of which steps the autograd graph is captured.
        on_error: ``record`` keeps an error of gradscope's own away from the training;
            ``raise`` lets it out, for gradscope's own tests.
    """

    budget: float = 0.03
    every: int | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    keep_steps: int | frozenset[int] = KEEP_STEPS
    graph: GraphSteps = "first"
    on_error: OnError = "record"

    def __post_init__(self) -> None:
        if type(self.budget) not in (int, float) or not 0 < self.budget <= 1:
            raise UsageError(
                f"budget={self.budget!r}: pass the share of the step time that observing may "
                "take, greater than 0 and at most 1 (0.03 is three percent)"
            )
        if self.every is not None and not (type(self.every) is int and self.every >= 1):
            raise UsageError(f"every={self.every!r}: pass a whole number of steps, 1 or more")
        for name, patterns in (
            ("params", self.include),
            ("exclude", self.exclude),
            ("keep", self.keep),
        ):
            if not all(isinstance(pattern, str) for pattern in patterns):
                raise UsageError(
                    f"{name}={patterns!r}: pass a pattern of parameter names such as 'head.*', or "
                    "a list of patterns"
                )
        if isinstance(self.keep_steps, int) and self.keep_steps < 1:
            raise UsageError(
                f"keep_steps={self.keep_steps}: pass how many of the latest recorded steps to "
                "keep, 1 or more, or the numbers of the steps, such as range(100, 110)"
            )
        if self.on_error not in ("record", "raise"):
            raise UsageError(f"on_error={self.on_error!r}: pass 'record' or 'raise'")

    def keeps_step(self, step: int) -> bool:
        """Whether a step was asked for by its number."""
        return bool(self.keep) and not isinstance(self.keep_steps, int) and step in self.keep_steps


def as_steps(name: str, steps: object) -> int | frozenset[int]:
    """Return a number of steps as it is, and several step numbers as a set.

    Raises:
        UsageError: if ``steps`` is neither a whole number nor an iterable of them.
    """
    if isinstance(steps, int) and not isinstance(steps, bool):
        return steps
    numbers = list(steps) if isinstance(steps, Iterable) else []
    if not numbers or not all(type(number) is int and number >= 0 for number in numbers):
        raise UsageError(
            f"{name}={steps!r}: pass how many of the latest recorded steps to keep, or the numbers "
            "of the steps, such as range(100, 110)"
        )
    return frozenset(numbers)


def as_graph_steps(steps: object) -> GraphSteps:
    """Return what ``watch(graph=)`` was told, several step numbers as a set.

    Raises:
        UsageError: if it is none of the words, no step number and no iterable of them.
    """
    if steps is None or steps in ("first", "changed", "every"):
        return steps
    if type(steps) is int:
        steps = [steps]
    is_listing = isinstance(steps, Iterable) and not isinstance(steps, str)
    numbers = list(steps) if is_listing else [-1]  # type: ignore[call-overload]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise UsageError(
            f"graph={steps!r}: pass 'first', 'changed' or 'every', the numbers of the steps whose "
            "autograd graph to capture, such as [0, 100], or None to capture none"
        )
    return frozenset(numbers)


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
