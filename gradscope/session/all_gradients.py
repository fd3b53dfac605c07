"""The gradients of every watched parameter at once, as a backward finds and leaves them."""

from __future__ import annotations

import numpy as np

from gradscope.instruments.gradients import GradientReader
from gradscope.instruments.late import Known, Late
from gradscope.instruments.statistics import Reals
from gradscope.session.census import Census
from gradscope.session.gradients import GradientLook, as_slice


class _LookWithZeros(Late[GradientLook]):
    """A look whose zeros may still be under way."""

    def __init__(self, look: GradientLook, sums_of_squares: Late[Reals]) -> None:
        self._look = look
        self._sums_of_squares = sums_of_squares

    def ready(self) -> bool:
        return self._sums_of_squares.ready()

    def value(self) -> GradientLook:
        self._look.squares = self._sums_of_squares.value()
        return self._look


class AllGradients:
    """Looks at the gradients of all watched parameters.

    Attributes:
        params: int64[n], their numbers.
        changed: whether the last look differed from the one before.
    """

    def __init__(self, census: Census) -> None:
        self._census = census
        self._generation = -1
        self.params = np.zeros(0, np.int64)
        self.changed = False

    def up_to_date(self) -> bool:
        """Whether the list of parameters is still that of the census."""
        return self._generation == self._census.generation

    def prepare(self) -> None:
        """Take over the list of parameters from the census."""
        self.params = self._census.all_params()
        self._references = self._census.references(self.params.tolist())
        self._at = as_slice(self.params)
        self._reader = GradientReader([reference() for reference in self._references])
        self._generation = self._census.generation
        self._last: tuple[list[int], list[int]] = ([], [])

    def look(self) -> Late[GradientLook]:
        """Look at every gradient, and read those that are there for whether they are zero."""
        gradients = self._reader.gradients([reference() for reference in self._references])
        tokens, versions, n_there = self._reader.identities(gradients)
        self._last = (tokens, versions)
        look = GradientLook(self._at, tokens, versions)
        if not n_there:
            return Known(look)
        return _LookWithZeros(look, self._reader.sums_of_squares(gradients))

    def look_at_identities(self) -> GradientLook:
        """Look at every gradient without reading any."""
        gradients = self._reader.gradients([reference() for reference in self._references])
        tokens, versions, _ = self._reader.identities(gradients)
        self.changed = (tokens, versions) != self._last
        return GradientLook(self._at, tokens, versions)
