"""The attempts of all optimizers to update: read around each, accounted for, written down."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gradscope.config import WatchOptions
from gradscope.instruments.checksums import Checksums
from gradscope.instruments.late import Late
from gradscope.run.captured_graph import CapturedGraph
from gradscope.run.columns import MISSING
from gradscope.run.kept_tensors import MOST_BYTES
from gradscope.run.recording import Recording
from gradscope.run.weight_step import WeightStep
from gradscope.session import recorder
from gradscope.session.census import Census
from gradscope.session.costs import Costs
from gradscope.session.failures import Failures
from gradscope.session.gradients import Consumption, GradientLook
from gradscope.session.in_order import InOrder
from gradscope.session.ledger import Ledger, StepRecord
from gradscope.session.live_comparison import ranks_apart
from gradscope.session.ranks import is_in_group
from gradscope.session.schedule import DENSE, Schedule, at_doublings
from gradscope.session.step_observer import StepObserver, StepReading

if TYPE_CHECKING:
    from gradscope.instruments.statistics import Reals

_sequence_nr: Callable[[], int] = torch._C._autograd._get_sequence_nr

_LOOKED_AT_CLOSELY = 8
"""How many optimizers have their first steps looked at closely; a program may make one per task."""


_MOST_LOOKS = 8
"""How many steps are recorded because the weights were written before them."""


_MOST_GONE = 2
"""Of how many optimizers that are gone the copies around the last step are kept."""


def _or_missing(checksums: Any) -> Any:
    return np.where(checksums < 0, MISSING, checksums)


class _Follower:
    """What is kept for one optimizer."""

    def __init__(
        self, observer: StepObserver, schedule: Schedule, *, is_differentiable: bool
    ) -> None:
        self.observer = observer
        # What such an optimizer does is part of the user's graph: nothing around it is copied.
        self.is_differentiable = is_differentiable
        self.schedule = schedule
        self.n_attempts = 0
        self.open: StepReading | None = None
        self.consumption: Consumption | None = None
        self.before_clipping: Late[Reals] | None = None
        # When its last attempt ended, and what watching had cost until then: in all, and by what
        # was chosen.
        self.ended = time.perf_counter()
        self.cost_before = 0.0
        self.chosen_before = 0.0
        # autograd's sequence number at the end of its last attempt: where this step's nodes begin.
        self.first_node = _sequence_nr()
        # The step whose copies are still there.
        self.copied_step: int | None = None
        self._n_looks = 0
        self._was_written = False

    def is_worth_a_look(self, written_between: float) -> bool:
        """Whether the program has just written what it usually leaves to the optimizer."""
        was_written, self._was_written = self._was_written, written_between > 0
        is_new = written_between > 0.5 and not was_written and self._n_looks < _MOST_LOOKS
        self._n_looks += is_new
        return is_new


class Attempts:
    """Follows every watched optimizer from attempt to attempt.

    Args:
        recording: where the rows go.
        census: who is who.
        ledger: what is inside every gradient.
        in_order: does things once their values have arrived.
        failures: runs the instruments.
        costs: what watching costs.
        options: what the watch was told.

    Attributes:
        graphs: captured graphs by the number of their backward, until the step that they belong to
            is over.
        n_ended: how many attempts have ended, of all optimizers together. The rows of the latest
            may not have been written yet.
        last_look: at all gradients, as the last backward left them.
        compares_ranks: whether checksums are taken, by which ranks are compared.
        on_ranks_apart: told the optimizer and the ranks whose weights differ and are not meant to.
        on_end: asked at the end of each attempt whom to tell the norm of its gradients and its
            loss, once they are known.
    """

    def __init__(
        self,
        recording: Recording,
        census: Census,
        ledger: Ledger,
        in_order: InOrder,
        failures: Failures,
        costs: Costs,
        options: WatchOptions,
    ) -> None:
        self._recording = recording
        self._census = census
        self._ledger = ledger
        self._in_order = in_order
        self._failures = failures
        self._costs = costs
        self._options = options
        self._followers: dict[int, _Follower] = {}
        self._gone: list[_Follower] = []
        self.graphs: dict[int, CapturedGraph] = {}
        self.n_ended = 0
        self.last_look: GradientLook | None = None
        self.compares_ranks = False
        self._checksums = Checksums()
        self.on_ranks_apart: Callable[[int, list[int]], None] = lambda optimizer, ranks: None
        self._chosen = 0.0
        self._n_written = 0
        in_order.settled = self._rows_are_there
        self.on_end: Callable[[], Callable[[float, float], None]] = lambda: lambda norm, loss: None
        self._n_new = 0
        if isinstance(options.keep_steps, int):
            recording.kept.n_last = options.keep_steps

    def follow(self, optimizer: int, *, is_differentiable: bool) -> None:
        """Follow one more optimizer.

        Args:
            optimizer: its number.
            is_differentiable: whether its steps are part of the graph; those are not recorded.
        """
        self._n_new += self.is_early(optimizer)
        dense = DENSE if self.is_early(optimizer) else 0
        self._followers[optimizer] = _Follower(
            StepObserver(self._census, optimizer, self._failures.run, self._options.keep),
            Schedule(self._options.budget, self._options.every, dense),
            is_differentiable=is_differentiable,
        )

    @staticmethod
    def is_early(optimizer: int) -> bool:
        """Whether an optimizer is one of the first, whose first steps are looked at closely."""
        return optimizer < _LOOKED_AT_CLOSELY

    @property
    def optimizers(self) -> list[int]:
        """Numbers of the optimizers followed that are still there."""
        gone = [n for n in self._followers if self._census.optimizer(n) is None]
        for number in gone:
            follower = self._followers.pop(number)
            if follower.copied_step is not None:  # a program's optimizer often ends before it does
                self._gone = [*self._gone, follower][-_MOST_GONE:]
        return list(self._followers)

    def look_again(self) -> None:
        """Begin to look, or begin again after a while in which anything may have happened."""
        for follower in self._followers.values():
            follower.observer.forget_versions()

    @property
    def someone_is_new(self) -> bool:
        """Whether one of the first optimizers, if there is any, has made no attempt yet."""
        return self._n_new > 0 or not self._followers

    def spend(self, seconds: float, *, is_free: bool) -> None:
        """Take note of what a closer look took, which the budget has to pay unless it is free."""
        self._chosen += seconds
        if not is_free:
            for follower in self._followers.values():
                follower.schedule.spend(seconds / len(self._followers))

    def is_open(self, optimizer: int) -> bool:
        """Whether a step of an optimizer has begun and not ended."""
        return self._followers[optimizer].open is not None

    def begin(
        self,
        optimizer: int,
        scale: Late[Any] | None,
        *,
        has_closure: bool,
        through_scaler: bool = False,
    ) -> None:
        """Read what there is before an update; with a closure, its gradients come later."""
        began = time.perf_counter()
        follower, options = self._followers[optimizer], self._options
        is_asked_for = options.keeps_step(self.n_ended)
        written = follower.observer.written_between()
        recorded = (
            is_asked_for
            or follower.schedule.is_recorded(follower.n_attempts)
            or follower.is_worth_a_look(written)
        )
        recorded = recorded and not follower.is_differentiable
        keeps = recorded and (is_asked_for or isinstance(options.keep_steps, int))
        if recorded:
            follower.copied_step = None
        reading = follower.open = follower.observer.begin(
            recorded=recorded, scale=scale, keeps=keeps and bool(options.keep)
        )
        reading.in_closure = has_closure
        reading.written_between = written
        reading.through_scaler = through_scaler
        if not has_closure:
            follower.observer.read_gradients(reading, self.last_look)
        reading.seconds += time.perf_counter() - began
        if self.compares_ranks and not has_closure:
            attempt, every = follower.n_attempts, options.sync_every
            is_live = every is not None and attempt % every == 0
            if is_live or at_doublings(attempt):  # of all ranks at the same, whatever time is
                self._failures.run("checksums", self._take_checksums, optimizer, attempt, is_live)

    def _take_checksums(self, optimizer: int, attempt: int, is_live: bool) -> None:
        """Read what weights and gradients are, to compare them with those of other ranks.

        Args:
            optimizer: whose.
            attempt: which one.
            is_live: whether the others are asked now.
        """
        params, step = self._census.params_of(optimizer), self.n_ended
        weights, gradients = map(
            self._checksums.read, self._followers[optimizer].observer.weights_and_gradients()
        )

        def account() -> None:
            self._recording.rows("checksums").extend(
                len(params),
                {
                    "step": step,
                    "param": params,
                    "optimizer": optimizer,
                    "attempt": attempt,
                    "weight": _or_missing(weights.value()),
                    "gradient": _or_missing(gradients.value()),
                },
            )

        self._in_order.do(account, weights, gradients)
        if is_live and is_in_group():
            entries = [self._recording.parameters[param] for param in params.tolist()]
            ranks = ranks_apart(
                [entry.name for entry in entries],
                weights.value(),
                gradients.value(),
                are_replicas=bool(entries) and all(entry.replicas for entry in entries),
            )
            if ranks:
                self.on_ranks_apart(optimizer, ranks)

    def versions(self) -> dict[int, tuple[int, list[int] | None]]:
        """Return of each optimizer how many attempts it has made, and versions of some weights."""
        return {
            number: (follower.n_attempts, follower.observer.versions())
            for number, follower in self._followers.items()
            if follower.open is None
        }

    def look_at_gradients(self, optimizer: int) -> GradientLook:
        """Look at the gradients of an optimizer without reading any."""
        return self._followers[optimizer].observer.look_at_gradients()

    def clipped(self, optimizer: int, gradients: list[torch.Tensor]) -> None:
        """Read the gradients that a clipping is about to change, at the first since the last step.

        Args:
            optimizer: number of an optimizer.
            gradients: what will be clipped.
        """
        follower = self._followers[optimizer]
        if follower.before_clipping is None:
            follower.before_clipping = follower.observer.read_before_clipping(gradients)

    def closure_ended(self, optimizer: int) -> None:
        """Read the gradients that a closure has computed, which the update is about to read."""
        reading = self._followers[optimizer].open
        if reading is not None:
            began = time.perf_counter()
            self._followers[optimizer].observer.read_gradients(reading)
            self._consume(optimizer, reading)
            reading.seconds += time.perf_counter() - began

    def weight(
        self, step: int, param: int, position: int, index: tuple[int, ...]
    ) -> WeightStep | None:
        """Return any weight around the last recorded step of an optimizer; None for other steps.

        Args:
            step: the step.
            param: number of the parameter.
            position: of the weight in the flattened parameter, a complex number being two.
            index: of the weight in the parameter.
        """
        for follower in (*self._followers.values(), *self._gone):
            if follower.copied_step == step:
                return follower.observer.weight(param, position, index)
        return None

    def last_copies(self) -> dict[int, dict[int, Any]]:
        """Return whole tensors around the last recorded step of each optimizer, by that step."""
        return {
            follower.copied_step: follower.observer.last_copies()
            for follower in (*self._gone, *self._followers.values())
            if follower.copied_step is not None
        }

    def go_on(self, n_steps: int) -> None:
        """Count on from a number of steps that were recorded before."""
        self.n_ended = n_steps

    def backward_ended(self) -> None:
        """Note a backward; one inside a step makes what was read before it out of date.

        A program may pass its optimizer any object that computes gradients, not only a closure.
        """
        for follower in self._followers.values():
            if follower.open is not None and not follower.open.is_consumed:
                follower.open.look = None

    def end(self, optimizer: int, *, outcome: str = "stepped") -> bool:
        """Read what an update did, and close the attempt; also one that raised on its way.

        Returns:
            Whether the attempt was recorded in full.
        """
        began = time.perf_counter()
        follower = self._followers[optimizer]
        reading, follower.open = follower.open, None
        if reading is None:
            return False
        reading.before_clipping, follower.before_clipping = follower.before_clipping, None
        if reading.look is None:
            follower.observer.read_gradients(reading)
        for other in self._followers.values():
            if other.open is not None:
                other.open.is_nested = reading.is_nested = True
        if not reading.is_consumed:
            self._consume(optimizer, reading)
        after = follower.observer.end(reading) if outcome == "stepped" else None
        reading.seconds += time.perf_counter() - began
        self._account(optimizer, reading, after, outcome)
        return reading.recorded

    def awaits_step(self, optimizer: int) -> bool:
        """Whether a backward has come that no step of any optimizer has answered yet.

        A generator's backward also writes the discriminator's gradients; once the generator has
        stepped, no step of the discriminator is missing.
        """
        return not self._recording.are_claimed(self._ledger.backwards_of(optimizer))

    def end_without_step(self, optimizer: int, scale: Late[Any] | None, *, outcome: str) -> None:
        """Close an attempt in which the optimizer's ``step`` was not called."""
        observer = self._followers[optimizer].observer
        reading = observer.begin(recorded=False, scale=scale)
        reading.through_scaler = outcome == "skipped"
        observer.read_gradients(reading)
        follower = self._followers[optimizer]
        reading.before_clipping, follower.before_clipping = follower.before_clipping, None
        self._account(optimizer, reading, None, outcome)

    def _consume(self, optimizer: int, reading: StepReading) -> None:
        """Account for the gradients read as used by the update."""
        reading.is_consumed = True
        if reading.in_closure:  # by the time this is accounted for, the next one has been read
            reading = copy.copy(reading)
        account = functools.partial(self._account_use, self._followers[optimizer], reading)
        self._in_order.do(account, *reading.awaited())

    # By the time that something is accounted for, the optimizer may be gone, and its follower from
    # the list of those that are there.

    def _account_use(self, follower: _Follower, reading: StepReading) -> None:
        """Tell the ledger what an update has used."""
        look = reading.look
        assert look is not None
        look.squares = reading.squares()
        # What a skipped update finds, it does not use.
        account = self._ledger.describe if reading.skips() else self._ledger.consume
        follower.consumption = account(reading.optimizer, look)
        if reading.is_nested:  # what the inner one and the outer one use is used once
            nobody = np.zeros(len(follower.consumption.status), np.bool_)
            follower.consumption = replace(follower.consumption, used_by_another=nobody)

    def _account_end(
        self,
        follower: _Follower,
        reading: StepReading,
        after: GradientLook | None,
        tell: Callable[[float, float], None],
        *,
        outcome: str,
        now: float,
        observed: float,
        first_node: int,
    ) -> None:
        """Tell the ledger of the end of an attempt, and write its rows."""
        self._costs.begin()
        try:
            record = self._end_attempt(follower, reading, after, outcome, now)
            norm_and_loss = self._write(record, reading, observed, first_node)
            if reading.anatomy is not None and record.outcome != "skipped":
                follower.copied_step = record.step
            if record.attempt.taken:
                tell(*norm_and_loss)
        finally:
            self._costs.end("tables")

    def _account(
        self, optimizer: int, reading: StepReading, after: GradientLook | None, outcome: str
    ) -> None:
        """Close an attempt and write its rows, once all its values are there."""
        now = time.perf_counter()
        follower = self._followers[optimizer]
        number, follower.n_attempts = follower.n_attempts, follower.n_attempts + 1
        self._n_new -= number == 0 and self.is_early(optimizer)
        self.n_ended += 1
        observed = self._costs.total - follower.cost_before
        follower.cost_before += observed
        first_node, follower.first_node = follower.first_node, _sequence_nr()
        account = functools.partial(
            self._account_end,
            follower,
            reading,
            after,
            self.on_end(),
            outcome=outcome,
            now=now,
            observed=observed,
            first_node=first_node,
        )
        self._in_order.do(account, *reading.awaited())
        # The buffers that a recorded step was read into are those of the next one.
        began = time.perf_counter()
        self._in_order.step_ended(is_urgent=reading.recorded or not reading.is_finite())
        writing = time.perf_counter() - began if reading.recorded else 0.0
        cost = reading.seconds + writing if reading.recorded else 0.0
        usual = observed - (self._chosen - follower.chosen_before)
        follower.schedule.ended(
            number,
            training=max(now - follower.ended - observed, 0.0),
            watching=max(usual, 0.0),
            cost=cost,
            share=1 / len(self._followers),
        )
        self._chosen += cost
        # What was observed of this step was read before its rows were written.
        follower.chosen_before, follower.ended = self._chosen - writing, now

    def _end_attempt(
        self,
        follower: _Follower,
        reading: StepReading,
        after: GradientLook | None,
        outcome: str,
        now: float,
    ) -> StepRecord:
        optimizer, look, consumption = reading.optimizer, reading.look, follower.consumption
        assert look is not None
        if consumption is None:
            look.squares = reading.squares()
            consumption = self._ledger.describe(optimizer, look)
        follower.consumption = None
        if after is not None:
            self._ledger.gradients.look_after_step(after)
        elif reading.scaled:
            # The fused kernel writes unscaled gradients back, and moves no version.
            self._ledger.gradients.look_after_step(look)
        skipped = outcome == "stepped" and reading.skips()
        return self._ledger.end_attempt(
            optimizer, consumption, outcome="skipped" if skipped else outcome, now=now
        )

    def _write(
        self, record: StepRecord, reading: StepReading, observed: float, first_node: int
    ) -> tuple[float, float]:
        """Write the rows of an attempt; returns the norm of its gradients, and its loss."""
        run, step, optimizer = self._recording, record.step, record.optimizer
        if record.outcome == "skipped":
            # A fused step that found infinite gradients did nothing that could be taken apart.
            reading = replace(
                reading,
                recorded=False,
                state_before=None,
                state_after=None,
                anatomy=None,
                tracked=None,
                kept={},
            )
        params = reading.params
        statistics = reading.statistics.value() if reading.statistics is not None else None
        sums = reading.squares()
        unclipped = None if reading.before_clipping is None else reading.before_clipping.value()
        if record.outcome == "stepped":
            recorder.record_groups(run, step, optimizer, reading.groups)
        grad_norm, grad_norm_before_clipping = recorder.record_gradients(
            run, step, optimizer, params, record.consumption, statistics, sums, unclipped
        )
        weight_norm = update_norm = float("nan")
        anatomy = None if reading.anatomy is None else reading.anatomy.value()
        if anatomy is not None:
            weight_norm, update_norm = recorder.record_updates(
                run, step, optimizer, params, anatomy
            )
        for when, state in (("before", reading.state_before), ("after", reading.state_after)):
            if state is not None:
                recorder.record_state(run, step, optimizer, params, when, state)
        if reading.state_after is not None:
            recorder.record_moments(run, step, optimizer, params, reading, anatomy)
        self._keep(step, reading)
        if reading.tracked is not None and (tracked := reading.tracked.value()) is not None:
            run.track(step, tracked)
        recorder.record_step(
            run,
            record,
            grad_norm=grad_norm,
            grad_norm_before_clipping=grad_norm_before_clipping,
            weight_norm=weight_norm,
            update_norm=update_norm,
            loss_scale=1.0 if reading.scale is None else float(reading.scale.value()),
            scaled=reading.scaled,
            through_scaler=reading.through_scaler,
            in_closure=reading.in_closure,
            written_between=reading.written_between,
            recorded=reading.recorded,
            observe_seconds=observed,
        )
        for number in record.attempt.backwards:
            if number in self.graphs:
                run.keep_graph(step, replace(self.graphs.pop(number), began=first_node))
        self._n_written += 1
        # A norm that nobody could read is no sign of anything.
        return 0.0 if sums is None else grad_norm, record.attempt.loss

    def _rows_are_there(self) -> None:
        """Tell the recording which rows will not change any more."""
        n_written, self._n_written = self._n_written, 0
        if n_written:
            self._recording.steps_ended(self._ledger.first_open_backward(), n_written)

    def _keep(self, step: int, reading: StepReading) -> None:
        """Keep the tensors that the program asked for."""
        run = self._recording
        for place, (tensors, common) in reading.kept.items():
            scale = float(reading.scale.value()) if reading.scaled and reading.scale else 1.0
            had_forgotten = run.kept.forgot
            given = replace(common.value(), loss_scale=scale)
            with run.lock:
                run.kept.keep(step, int(reading.params[place]), tensors.value(), given)
            if run.kept.forgot and not had_forgotten:
                run.notes.append(
                    f"kept tensors came to more than {MOST_BYTES >> 20} MiB at step {step}: from "
                    "here on the oldest make room for the latest"
                )
