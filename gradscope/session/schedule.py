"""Which steps are recorded in full."""

from __future__ import annotations

import math

DENSE = 3
"""How many first steps are recorded whatever they cost: most defects show in the first step."""

_SMOOTHING = 0.3
"""Weight of the newest measurement in the running means of costs and step times."""


class Schedule:
    """Spaces the recorded steps so that what recording them costs stays inside the budget.

    Args:
        budget: the share of the step time that recording may take.
        every: record every n-th step, whatever it costs; None for the budget.
        dense: how many first steps are recorded whatever they cost.
    """

    def __init__(self, budget: float, every: int | None, dense: int = DENSE) -> None:
        self._budget = budget
        self._every = every
        self._dense = dense
        self._next = dense
        self._cost: float | None = None
        self._step_time: float | None = None

    def is_recorded(self, step: int) -> bool:
        """Tell whether a step, counted from 0 for its optimizer, is to be recorded in full."""
        if self._every is not None:
            return step % self._every == 0
        return step < self._dense or step >= self._next

    def measured(self, step: int, *, recorded: bool, cost: float, step_time: float) -> None:
        """Take note of what a step cost.

        Args:
            step: as in :meth:`is_recorded`.
            recorded: whether it was recorded in full.
            cost: seconds that recording took, beyond what is seen at every step.
            step_time: seconds the whole step took without ``cost``.
        """
        # The first step is slow for reasons of its own, such as memory being allocated.
        if step > 0 or self._step_time is None:
            self._step_time = _smoothed(self._step_time if step > 1 else None, step_time)
        if recorded:
            self._cost = _smoothed(self._cost if step > 1 else None, cost)
            self._next = step + self.stride

    @property
    def stride(self) -> int:
        """From how many steps one is recorded at the present costs."""
        if self._every is not None:
            return self._every
        if not self._cost or not self._step_time:
            return 1
        return max(1, math.ceil(self._cost / (self._budget * self._step_time)))


def _smoothed(mean: float | None, newest: float) -> float:
    return newest if mean is None else (1 - _SMOOTHING) * mean + _SMOOTHING * newest
