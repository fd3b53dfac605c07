"""When to look closer, and what becomes of what was seen."""

from __future__ import annotations

import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from gradscope.instruments.late import Late
from gradscope.instruments.symmetry import SymmetryReading, n_stacked, read_symmetry
from gradscope.instruments.weight_facts import read_norms
from gradscope.run.recording import Recording
from gradscope.session.census import Census
from gradscope.session.closer_look import CloserLook
from gradscope.session.costs import Costs
from gradscope.session.failures import Failures
from gradscope.session.in_order import InOrder
from gradscope.taps.compiled_code import compiled_code
from gradscope.taps.user_frame import Location

_FIRST_LOOKS = 2
_MOST_LOOKS = 24
_MOST_LOOKS_IN_ALL = 128

_FREE = 16
"""Up to this attempt of a training looks are due whatever they cost."""

_LEAST_BETWEEN = 4
"""An optimizer that comes after fewer attempts than this belongs to the same training: a loop may
make a new one at every step."""

_SHARE = 0.5
"""The share of the budget that later looks may take."""

_MOST_MADE = 100_000

_MOST_CALLS = 16
"""After how many calls of models a look ends for which no optimizer has stepped."""

_sequence_nr: Callable[[], int] = torch._C._autograd._get_sequence_nr


class Looks:
    """Looks closer at the first two steps of a training, and whenever their number has doubled.

    A program may train several models one after the other, or one in several phases. Looks begin
    anew with an optimizer that comes in the middle of the run; after the first few of these the
    budget has to pay for all of them, for a search may train hundreds of models.

    Args:
        recording: where the rows go.
        census: who is who.
        in_order: does things once their values have arrived.
        failures: runs the instruments.
        costs: what watching costs.
        budget: the share of the step time that watching may take.

    Attributes:
        now: the look that is under way.
        begins_phase: whether that is the first look at a training that is not the first.
        is_free: whether the last look was due whatever it cost.
    """

    def __init__(
        self,
        recording: Recording,
        census: Census,
        in_order: InOrder,
        failures: Failures,
        costs: Costs,
        budget: float,
    ) -> None:
        self._recording = recording
        self._census = census
        self._in_order = in_order
        self._failures = failures
        self._n_looks = 0
        self._strangers: list[weakref.ref[torch.Tensor]] = []
        self._stepped: set[int] = set()
        self._n_calls = 0
        # Where the last attempts ended in autograd's numbering of nodes.
        self._ends: deque[int] = deque([0], maxlen=9)
        self._made: dict[int, tuple[weakref.ref[nn.Module], Location]] = {}
        self.now: CloserLook | None = None
        self._costs = costs
        self._share = _SHARE * budget
        self._next = 0
        self._n_in_all = 0
        # The attempt with which this training began, and whether its first looks are free.
        self._began = 0
        self._is_early = True
        self._has_begun_anew = False
        self.begins_phase = False
        # Optimizers that have stepped, and those of them that have not since this training began.
        self._known: set[int] = set()
        self._idle: set[int] = set()
        self._cost_before = 0.0
        self._not_before = 0.0
        self.is_free = True

    def is_due(self, n_attempts: int) -> bool:
        """Whether it is time for a look."""
        self._n_calls += 1
        if self.now is not None and self._n_calls > _MOST_CALLS:
            self.end()
        is_enough = self._n_looks >= _MOST_LOOKS or self._n_in_all >= _MOST_LOOKS_IN_ALL
        if self.now is not None or is_enough or _has_compiled():
            return False
        if n_attempts < self._next:
            return False
        return self._costs_nothing(n_attempts) or time.perf_counter() >= self._not_before

    def someone_came(self, n_attempts: int, *, is_early: bool) -> None:
        """Begin anew with an optimizer that comes in the middle of a run.

        Args:
            n_attempts: how many attempts have ended.
            is_early: whether it is one of the first, whose first looks are free.
        """
        if n_attempts - self._began < _LEAST_BETWEEN:
            return
        self._began = self._next = n_attempts
        self._is_early = is_early
        self._has_begun_anew = True
        self._n_looks = 0
        self._idle = set(self._known)

    def _costs_nothing(self, n_attempts: int) -> bool:
        return self._is_early and n_attempts - self._began <= _FREE

    def begin(self, step: int) -> CloserLook | None:
        """Begin a look; None if it fails.

        Args:
            step: the number that the next attempt will have.
        """
        self._n_looks += 1
        self._n_in_all += 1
        self._n_calls = 0
        self.begins_phase, self._has_begun_anew = self._has_begun_anew, False
        if self._n_looks >= _FIRST_LOOKS:
            self._next = self._began + max(1 << self._n_looks, 2 * (step - self._began))
        self._cost_before = self._costs.total
        self.is_free = self._costs_nothing(step)
        self._stepped.clear()
        self.now = self._failures.run(
            "closer_look",
            CloserLook,
            step,
            self._census,
            self._made_at,
            self._strangers,
            self._failed,
        )
        return self.now

    def module_created(self, module: nn.Module, location: Location | None) -> None:
        """Remember where a module was made."""
        if location is not None and len(self._made) < _MOST_MADE:
            self._made[id(module)] = (weakref.ref(module), location)

    def _made_at(self, module: nn.Module) -> Location | None:
        known = self._made.get(id(module))
        return known[1] if known is not None and known[0]() is module else None

    def backward_started(self, roots: Sequence[torch.Tensor], n_optimizers: int) -> dict[str, Any]:
        """Return what a look tells of the graph of a backward; nothing without one."""
        if self.now is None:
            return {}
        oldest = self._ends[max(0, len(self._ends) - max(1, n_optimizers))]
        facts: dict[str, Any] | None = self._failures.run(
            "closer_look", self.now.backward_started, roots, oldest
        )
        if facts is None:  # what it has not reached would be told to be cut off
            self.give_up()
        return facts or {}

    def step_started(self, optimizer: int) -> None:
        """Read what there is of a symmetry in weights and gradients."""
        if self.now is None:
            return
        params = self._census.params_of(optimizer).tolist()
        tensors = [reference() for reference in self._census.references(params)]
        entries = [self._recording.parameters[number] for number in params]
        stacked = [n_stacked(entry.module_type, entry.name) for entry in entries]
        reading: SymmetryReading | None = self._failures.run(
            "symmetry", read_symmetry, tensors, stacked
        )
        if reading is None or not reading.places:
            return

        def account() -> None:
            flags = reading.flags.value()
            for place, (rows, columns) in zip(reading.places, flags.tolist(), strict=True):
                entry = self._recording.parameters[params[place]]
                entry.n_looks += 1
                entry.n_symmetric_looks += bool(rows)
                entry.n_symmetric_columns_looks += bool(columns)

        self._in_order.do(account, reading.flags)

    def step_ended(
        self, optimizer: int, optimizers: Sequence[int], n_attempts: int, *, is_early: bool
    ) -> bool:
        """Take note of the end of an attempt; returns whether the look is over.

        A generator's losses belong to the look that began with its discriminator's. What has only
        stepped in an earlier training is not waited for.

        Args:
            optimizer: whose.
            optimizers: all that are there.
            n_attempts: how many attempts have ended, this one included.
            is_early: whether the optimizer is one of the first.
        """
        self._ends.append(_sequence_nr())
        self._stepped.add(optimizer)
        self._idle.discard(optimizer)
        if optimizer not in self._known:
            self._known.add(optimizer)
            if self.now is None:  # made long ago, and its turn has come
                self.someone_came(n_attempts, is_early=is_early)
                self._idle.discard(optimizer)
        return self.now is not None and self._stepped.issuperset(set(optimizers) - self._idle)

    def end(self) -> float:
        """End a look, and write its rows once all values are there.

        Returns:
            The seconds that it took; 0 if there was none, or it failed.
        """
        self._stepped.clear()
        look = self.now
        if look is None:
            return 0.0
        look.end()
        self.now = None
        if not look.is_whole:
            return 0.0
        self._strangers = look.strangers
        awaited: list[Late[Any]] = look.awaited
        # Models of a function are gone when the watch ends.
        norms: Late[dict[int, float]] | None = self._failures.run(
            "weight_norms", read_norms, self._census.alive()
        )
        if norms is not None:
            self._in_order.do(lambda: self._recording.set_norms("norm_last", norms.value()), norms)

        def account() -> None:
            for table, rows in look.rows().items():
                self._recording.rows(table).extend_by_rows(rows)

        self._in_order.do(account, *awaited)
        cost = self._costs.total - self._cost_before
        self._not_before = time.perf_counter() + cost / self._share
        return cost

    def give_up(self) -> None:
        """Leave nothing behind, whatever has failed."""
        if self.now is not None:
            self.now.end()
            self.now = None

    def _failed(self, error: Exception) -> None:
        self._failures.silence("closer_look", "instrument-failed", error)


def _has_compiled() -> bool:
    """Whether anything was compiled in this process, and it is not known where that is run.

    A mode or hook would be compiled into such code, to other bits (torch 2.13).
    """
    if compiled_code.sees_edges:
        return False
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and bool(dynamo.counters["frames"])
