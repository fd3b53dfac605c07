"""Which steps are recorded in full, and when a closer look is affordable."""

from __future__ import annotations

DENSE = 3
"""How many first steps are recorded whatever they cost: most defects show in the first step. After
these it is every step whose number is a power of two, which in a long run costs nothing."""

_SMOOTHING = 0.3
"""Weight of the newest measurement in the running means of costs."""

_LEAST = 0.25
"""The share of the budget that recording gets even where what is seen at every step takes more:
a loop of very short steps would otherwise never be looked at again."""


class Schedule:
    """Records a step whenever enough of the budget has been saved for it.

    What training takes brings in seconds, what watching takes spends them: so the budget holds
    whether steps are long or short, alike or not, and however costs and step times change.

    Args:
        budget: the share of the step time that watching may take.
        every: record every n-th step, whatever it costs; None for the budget.
        dense: how many first steps are recorded whatever they cost.
    """

    def __init__(self, budget: float, every: int | None, dense: int = DENSE) -> None:
        self._budget = budget
        self._every = every
        self._dense = dense
        self._saved = 0.0
        self._cost = 0.0

    def is_recorded(self, step: int) -> bool:
        """Tell whether a step, counted from 0 for its optimizer, is to be recorded in full."""
        if self._every is not None:
            return step % self._every == 0
        return self._is_free(step) or self._saved >= self._cost

    def ended(
        self, step: int, *, training: float, watching: float, cost: float, share: float = 1.0
    ) -> None:
        """Take note of what a step took.

        Args:
            step: as in :meth:`is_recorded`.
            training: seconds since the optimizer's step before, without watching.
            watching: seconds that watching took meanwhile as it does at every step.
            cost: seconds that it took to record the step in full, 0 if it was not.
            share: the part of the budget that is this optimizer's.
        """
        income = self._budget * share * training
        self._saved += max(income - share * watching, _LEAST * income)
        if cost:
            # The first step takes long for reasons of its own, such as memory being allocated.
            self._cost = _smoothed(self._cost if step > 1 else None, cost)
            if not self._is_free(step):
                self._saved -= cost
        # After a long pause, an evaluation say, two steps are recorded and not many.
        self._saved = min(self._saved, 2 * self._cost)

    def spend(self, seconds: float) -> None:
        """Take note of what something else took that the same budget has to pay."""
        self._saved -= seconds

    def _is_free(self, step: int) -> bool:
        return step < self._dense or (self._dense > 0 and at_doublings(step))


def at_doublings(number: int) -> bool:
    """Whether a number is 0, 1, 2, 4, 8 …: often at the beginning, and rarely in a long run."""
    return number & (number - 1) == 0


def _smoothed(mean: float | None, newest: float) -> float:
    return newest if mean is None else (1 - _SMOOTHING) * mean + _SMOOTHING * newest
