"""One watch: listens to the taps, reads what is to be read, and keeps the recording.

The handlers run inside the program's training step. They read tensors at the moment an event
happens, and hand what they read to the ledger in order, once all values are there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gradscope.config import WatchOptions
from gradscope.instruments.autograd_graph import capture_graph
from gradscope.instruments.graph_cut import GraphCutFinder
from gradscope.instruments.late import Known, Late, scalar_of
from gradscope.run.captured_graph import CapturedGraph
from gradscope.run.recording import Recording
from gradscope.session import recorder
from gradscope.session.all_gradients import AllGradients
from gradscope.session.census import Census
from gradscope.session.failures import Failures
from gradscope.session.gradients import Consumption, GradientLook
from gradscope.session.in_order import InOrder
from gradscope.session.ledger import Ledger, StepRecord
from gradscope.session.schedule import Schedule
from gradscope.session.source_names import assigned_name, called_name
from gradscope.session.step_observer import StepObserver, StepReading
from gradscope.taps.clipping import clipping
from gradscope.taps.engine import BackwardCall, engine, inside_backward
from gradscope.taps.grad_scaler import grad_scaler
from gradscope.taps.module_calls import module_calls
from gradscope.taps.optimizer_creation import optimizer_creation
from gradscope.taps.optimizer_steps import optimizer_steps
from gradscope.taps.schedulers import schedulers
from gradscope.taps.user_frame import Location, user_frame, user_location
from gradscope.taps.zero_grad import zero_grad

_TAPS = (engine, optimizer_steps, module_calls, zero_grad, clipping, grad_scaler, schedulers)

_MOST_GRAPHS_WAITING = 8
"""How many captured graphs wait for the step they belong to; a loop may never step."""

_MOST_ARMED = 8
"""How many steps are armed at most, in a loop that is suspicious at every step."""

_sequence_nr: Callable[[], int] = torch._C._autograd._get_sequence_nr


class Session:
    """Follows one training run from :meth:`start` to :meth:`stop`.

    Args:
        options: what the watch was told.
        discovers: whether models and optimizers are found as the program uses them; else those
            passed to :meth:`watch_model` and :meth:`watch_optimizer` are all.

    Attributes:
        recording: what has been seen.
        step_finished: called after each finished attempt, with its row of ``steps``.
    """

    def __init__(self, options: WatchOptions, *, discovers: bool = False) -> None:
        self.recording = Recording()
        self._options = options
        self._discovers = discovers
        self._failures = Failures(raises=options.on_error == "raise")
        self._census = Census(self.recording, options.include, options.exclude)
        self._ledger = Ledger()
        self._in_order = InOrder(lambda error: self.failed("ledger", error))
        self._observers: dict[int, StepObserver] = {}
        self._schedules: dict[int, Schedule] = {}
        self._n_attempts: dict[int, int] = {}
        self._open: dict[int, StepReading] = {}
        self._consumed: dict[int, Consumption] = {}
        self._spent_since: dict[int, float] = {}
        self._all = AllGradients(self._census)
        self._cuts: GraphCutFinder | None = None
        self._wants_cut = True
        self._n_armed = 0
        self._graphs: dict[int, CapturedGraph] = {}
        self._outermost: tuple[nn.Module, float, int] | None = None
        self._backward: tuple[float, int, CapturedGraph | None] | None = None
        self._scale: Late[Any] | None = None
        self._scaler_stepped = False
        self._broken = False
        self.running = False
        self.paused = False
        self._began = 0.0

    # -- beginning and end ------------------------------------------------------------------

    def watch_model(self, model: nn.Module, name: str) -> None:
        """Take a model in."""
        self._census.add_model(model, name)

    def watch_optimizer(self, optimizer: torch.optim.Optimizer, name: str) -> None:
        """Take an optimizer in."""
        number = self._census.add_optimizer(optimizer, name)
        self._observers[number] = StepObserver(self._census, number, self._instrument)
        self._schedules[number] = Schedule(self._options.budget, self._options.every)
        self._n_attempts[number] = 0
        self._tell_holdings()

    def start(self) -> None:
        """Begin to listen."""
        if self._broken:
            return
        self.running = True
        self._listen()

    def stop(self) -> None:
        """Listen no more, and close what is still open."""
        if not self.running:
            return
        self.running = False
        self.paused = False
        self._hush()
        self._guarded("ledger", self._close)

    def pause(self) -> None:
        """Listen no more for a while."""
        if self.running and not self.paused:
            self.paused = True
            self._hush()

    def resume(self) -> None:
        """Listen again after a pause."""
        if self.running and self.paused and not self._broken:
            self.paused = False
            self._listen()

    def _listen(self) -> None:
        self._began = time.perf_counter()
        self._guarded("census", self._adopt_gradients)
        for tap in _TAPS:
            tap.add(self)
        if self._discovers:
            optimizer_creation.add(self)

    def _hush(self) -> None:
        self._disarm()
        for tap in (*_TAPS, optimizer_creation):
            tap.remove(self)
        self.recording.seconds += time.perf_counter() - self._began
        self._began = 0.0
        self._outermost = self._backward = None

    def settle(self) -> None:
        """Wait for values that are still under way, and account for everything seen so far."""
        self._guarded("ledger", lambda: self._in_order.settle(wait=True))

    def event(self, event: str, detail: str = "", location: Location | None = None) -> None:
        """Add a row to ``events``."""
        clock = time.perf_counter() - self._began if self._began else 0.0
        self.recording.rows("events").append(
            {
                "time": self.recording.seconds + clock,
                "step": self._ledger.n_steps,
                "event": event,
                "detail": detail,
                **_place(location),
            }
        )

    # -- what the taps tell -----------------------------------------------------------------

    def call_started(self, module: nn.Module) -> None:
        """Note the outermost call of a watched model."""
        if self._cuts is not None:
            self._instrument("graph_cut", self._cuts.call_started, module)
        if self._outermost is not None or inside_backward():
            return
        if id(module) not in self._census.members and not self._discover_model(module):
            return
        if self._wants_cut:
            self._arm(module)
        self._outermost = (module, time.perf_counter(), _sequence_nr())

    def call_ended(self, module: nn.Module, result: Any) -> None:
        """Account for the outermost call of a watched model."""
        if self._cuts is not None:
            self._instrument("graph_cut", self._cuts.call_ended, module, result)
        if self._outermost is None or self._outermost[0] is not module:
            return
        _, began, first_node = self._outermost
        self._outermost = None
        now = time.perf_counter()
        optimizers = self._optimizers_of(module)
        training, with_grad = module.training, torch.is_grad_enabled()
        self._in_order.do(
            lambda: self._ledger.forward(
                optimizers,
                first_node=first_node,
                seconds=now - began,
                training=training,
                with_grad=with_grad,
            )
        )
        self._spend("structure", now)

    def zero_grad_called(self, owner: Any, location: Location | None) -> None:
        """Account for ``zero_grad`` of an optimizer or module."""
        if isinstance(owner, nn.Module):
            optimizers, by = self._census.optimizers_of(owner), "module.zero_grad"
        else:
            number = self._census.number_of_optimizer(owner)
            optimizers, by = [] if number is None else [number], "optimizer.zero_grad"
        if optimizers:
            self._in_order.do(lambda: self._ledger.zero_grad(optimizers, by))
            self.event("zero_grad", by, location)

    def gradients_clipped(
        self, function: str, gradients: list[torch.Tensor], limit: Any, location: Location | None
    ) -> None:
        """Account for gradient clipping."""
        optimizers = self._census.optimizers_of_gradients(gradients)
        if optimizers or not gradients:
            self._in_order.do(
                lambda: self._ledger.note(optimizers or list(self._observers), "clip")
            )
            self.event("clip", f"{function}, limit {limit}, {len(gradients)} gradients", location)

    def scheduler_stepped(self, scheduler: Any, location: Location | None) -> None:
        """Account for a learning rate scheduler's step."""
        number = self._census.number_of_optimizer(scheduler.optimizer)
        if number is not None:
            self._in_order.do(lambda: self._ledger.note([number], "scheduler"))
            self.event("scheduler", type(scheduler).__name__, location)

    def gradients_unscaled(self, scaler: Any, optimizer: Any, location: Location | None) -> None:
        """Account for ``GradScaler.unscale_``."""
        number = self._census.number_of_optimizer(optimizer)
        if number is not None:
            self._in_order.do(lambda: self._ledger.note([number], "unscale"))
            self.event("unscale", "", location)

    def scale_updated(self, scaler: Any, location: Location | None) -> None:
        """Account for ``GradScaler.update``."""
        self.event("scale_update", "", location)

    def scaler_step_started(self, scaler: Any, optimizer: Any) -> None:
        """Remember that the optimizer's next step, if it comes, is the scaler's doing."""
        self._scaler_stepped = False
        scale = getattr(scaler, "_scale", None)
        self._scale = None if scale is None else scalar_of(scale)

    def scaler_step_ended(self, scaler: Any, optimizer: Any) -> None:
        """Account for a step that the scaler skipped: none of the optimizer's hooks has fired."""
        number = self._census.number_of_optimizer(optimizer)
        if number is not None and not self._scaler_stepped:
            began = time.perf_counter()
            reading = self._observers[number].begin(recorded=False, scale=self._scale)
            self._observers[number].read_gradients(reading)
            self._finish(number, reading, None, outcome="skipped")
            self._spend("structure", began)
        self._scale = None

    def backward_started(self, call: BackwardCall) -> None:
        """Look at the gradients as a backward finds them, and at the graph it walks."""
        began = time.perf_counter()
        captured = None
        if call.accumulates:
            self._tell_holdings()
            look = self._all.look()
            self._in_order.do(lambda: self._ledger.backward_started(look.value()), look)
            first = not all(self._n_attempts.values()) or not self._n_attempts
            if first and len(self._graphs) < _MOST_GRAPHS_WAITING:
                captured = self._instrument(
                    "autograd_graph", capture_graph, call.roots, self._census.names_of
                )
        self._spend("structure", began)
        self._backward = (time.perf_counter(), _sequence_nr(), captured)

    def backward_ended(self, call: BackwardCall, error: BaseException | None) -> None:
        """Look at what a backward wrote."""
        began = time.perf_counter()
        if self._backward is None:
            return
        started, last_node, captured = self._backward
        self._backward = None
        root = call.roots[0] if len(call.roots) == 1 else None
        value: Late[Any] = Known(float("nan")) if root is None else scalar_of(root)
        row = {
            "function": "backward" if call.accumulates else "grad",
            "root_shape": ", ".join(str(tuple(root.shape)) for root in call.roots),
            "root_grad_fn": ", ".join(
                r.grad_fn.name() for r in call.roots if r.grad_fn is not None
            ),
            "root_requires_grad": any(root.requires_grad for root in call.roots),
            "retain_graph": call.retain_graph,
            "create_graph": call.create_graph,
            "error": "" if error is None else type(error).__name__,
            **_place(call.location),
        }
        if not call.accumulates:
            self._in_order.do(lambda: self._record_backward(None, value, row, None), value)
            return
        look = self._all.look_at_identities()
        seconds = began - started
        if not self._all.changed and captured is None:
            captured = self._instrument(
                "autograd_graph", capture_graph, call.roots, self._census.names_of
            )
        if captured is not None:
            row["n_in_graph"] = sum(bool(names) for names in captured.params)

        def account() -> None:
            number, wrote = self._ledger.backward_ended(
                look, root=float(value.value()), last_node=last_node, seconds=seconds
            )
            if captured is not None:
                self._graphs[number] = captured
            for param in look.params[wrote].tolist():
                self.recording.parameters[param].reached = True
            self._record_backward(number, value, row, int(wrote.sum()))

        self._in_order.do(account, value)
        if not self._all.changed:
            self._find_cut(call)
        if error is not None:
            self.event("exception", f"backward: {type(error).__name__}: {error}", call.location)
        self._spend("structure", began)

    def step_started(self, optimizer: torch.optim.Optimizer, has_closure: bool) -> None:
        """Begin an attempt's reading; with a closure, its gradients come later."""
        began = time.perf_counter()
        number = self._census.number_of_optimizer(optimizer)
        if number is None:
            if not self._discovers:
                return
            self.optimizer_created(optimizer)
            number = self._census.number_of_optimizer(optimizer)
            assert number is not None
        self._outermost = None
        self._scaler_stepped = True
        if number in self._open:
            self._abandon(number)
        if self._census.refresh_groups(number):
            self._tell_holdings()
            self.event("parameters_changed", self.recording.optimizers[number].name)
        recorded = self._schedules[number].is_recorded(self._n_attempts[number])
        reading = self._observers[number].begin(recorded=recorded, scale=self._scale)
        self._open[number] = reading
        if not has_closure:
            self._read_gradients(number, reading)
        reading.extra += time.perf_counter() - began

    def closure_ended(self, optimizer: torch.optim.Optimizer) -> None:
        """Read the gradients that a closure has computed, which the update is about to read."""
        number = self._census.number_of_optimizer(optimizer)
        if number is not None and number in self._open:
            began = time.perf_counter()
            reading = self._open[number]
            self._read_gradients(number, reading)
            reading.extra += time.perf_counter() - began

    def step_ended(self, optimizer: torch.optim.Optimizer) -> None:
        """Read what the update did, and close the attempt."""
        number = self._census.number_of_optimizer(optimizer)
        if number is None or number not in self._open:
            return
        began = time.perf_counter()
        reading = self._open.pop(number)
        if reading.look is None:  # a closure that was never called
            self._read_gradients(number, reading)
        after = self._observers[number].end(reading)
        self._finish(number, reading, after, outcome="stepped", began=began)

    def optimizer_created(self, optimizer: torch.optim.Optimizer) -> None:
        """Take in an optimizer that the program has just made."""
        frame = user_frame()
        self.watch_optimizer(optimizer, assigned_name(frame) or "optimizer")
        self.event("optimizer_found", type(optimizer).__name__, user_location())

    def failed(self, where: str, error: Exception) -> None:
        """Take note of an error in a handler: what follows can no longer be trusted."""
        self._failures.take(where, "watch-failed", error)
        if not self._broken:
            self._broken = True
            self.recording.notes.append(
                f"watching ended at step {self._ledger.n_steps}: {where} failed with "
                f"{type(error).__name__}: {error}"
            )
        try:
            self.stop()
        except Exception as another:
            self._failures.take("stop", "watch-failed", another)

    # -- inside -----------------------------------------------------------------------------

    def _read_gradients(self, number: int, reading: StepReading) -> None:
        self._observers[number].read_gradients(reading)
        look = reading.look
        assert look is not None

        def consume() -> None:
            look.zero = _zeros(reading, look)
            if _skips(reading):
                self._consumed[number] = self._ledger.describe(number, look)
            else:
                self._consumed[number] = self._ledger.consume(number, look)

        self._in_order.do(consume, *reading.awaited())

    def _finish(
        self,
        number: int,
        reading: StepReading,
        after: GradientLook | None,
        *,
        outcome: str,
        began: float | None = None,
    ) -> None:
        """Close an attempt and write its rows, once all its values are there."""
        now = time.perf_counter()
        if began is not None:
            reading.extra += now - began
        attempt_number = self._n_attempts[number]
        self._n_attempts[number] += 1
        if self._cuts is not None:
            self._disarm()
            # Each optimizer's first step is looked at closely.
            self._wants_cut = self._n_armed < _MOST_ARMED and not all(self._n_attempts.values())
        spent = self._spent_since.pop(number, 0.0)
        part = "recorded_steps" if reading.recorded else "every_step"
        self._count(part, reading.extra)

        def account() -> None:
            look = reading.look
            assert look is not None
            skipped = outcome == "stepped" and _skips(reading)
            if outcome == "skipped":
                look.zero = _zeros(reading, look)
                self._consumed[number] = self._ledger.describe(number, look)
            if after is not None:
                self._ledger.gradients.look_after_step(after)
            consumption = self._consumed.pop(number)
            record = self._ledger.end_attempt(
                number, consumption, outcome="skipped" if skipped else outcome, now=now
            )
            observed = spent + reading.extra
            self._schedules[number].measured(
                attempt_number,
                recorded=reading.recorded,
                cost=reading.extra,
                step_time=max(record.seconds - observed, 1e-9),
            )
            self._record(record, reading, observed)

        self._in_order.do(account, *reading.awaited())
        if reading.recorded:
            self._look_around()

    def _look_around(self) -> None:
        """See whether models have changed, or parameters been frozen, since the last look."""
        if self._census.refresh_models():
            self.event("parameters_changed", "a model has other parameters than before")
        for param in self._census.refresh_requires_grad(self._ledger.n_steps):
            entry = self.recording.parameters[param]
            self.event("parameters_changed", f"{entry.name} requires_grad={entry.requires_grad}")

    def _record(self, record: StepRecord, reading: StepReading, observed: float) -> None:
        step, optimizer, params = record.step, record.optimizer, record.consumption.params
        statistics = reading.statistics.value() if reading.statistics is not None else None
        sums = reading.sums_of_squares.value() if reading.sums_of_squares is not None else None
        if record.outcome == "stepped":
            recorder.record_groups(self.recording, step, optimizer, reading.groups)
        grad_norm = recorder.record_gradients(
            self.recording, step, optimizer, record.consumption, statistics, sums
        )
        weight_norm = update_norm = float("nan")
        if reading.change is not None:
            weight_norm, update_norm = recorder.record_updates(
                self.recording, step, optimizer, params, reading
            )
        for when, state in (("before", reading.state_before), ("after", reading.state_after)):
            if state is not None:
                recorder.record_state(self.recording, step, optimizer, params, when, state)
        if reading.state_after is not None:
            recorder.record_moments(self.recording, step, optimizer, params, reading)
        recorder.record_step(
            self.recording,
            record,
            grad_norm=grad_norm,
            weight_norm=weight_norm,
            update_norm=update_norm,
            loss_scale=1.0 if reading.scale is None else float(reading.scale.value()),
            scaled=reading.scaled,
            recorded=reading.recorded,
            observe_seconds=observed,
        )
        for number in record.attempt.backwards:
            if number in self._graphs:
                self.recording.graphs[step] = self._graphs.pop(number)

    def _record_backward(
        self, number: int | None, value: Late[Any], row: dict[str, Any], n_reached: int | None
    ) -> None:
        if number is None:
            number = self._ledger.other_backward()
        self.recording.rows("backwards").append(
            {"backward": number, "root": float(value.value()), "n_reached": n_reached or 0, **row}
        )

    def _abandon(self, number: int) -> None:
        """Close an attempt whose step raised before its end."""
        reading = self._open.pop(number)
        if reading.look is None:
            self._read_gradients(number, reading)
        self.event("exception", f"{self.recording.optimizers[number].name}.step raised")
        self._finish(number, reading, None, outcome="abandoned")

    def _close(self) -> None:
        for number in list(self._open):
            self._abandon(number)
        self._in_order.settle(wait=True)
        for number, observer in self._observers.items():
            if self._ledger.has_backward(number):
                reading = observer.begin(recorded=False, scale=None)
                observer.read_gradients(reading)
                if reading.look is None:
                    continue
                self._finish_open(number, reading)
        self._in_order.settle(wait=True)

    def _finish_open(self, number: int, reading: StepReading) -> None:
        look = reading.look
        assert look is not None

        def account() -> None:
            look.zero = _zeros(reading, look)
            record = self._ledger.end_attempt(
                number,
                self._ledger.describe(number, look),
                outcome="open",
                now=time.perf_counter(),
            )
            self._record(record, reading, 0.0)

        self._in_order.do(account, *reading.awaited())

    def _arm(self, module: nn.Module) -> None:
        """Look for cuts of the graph from this outermost call on."""
        self._wants_cut = False
        self._n_armed += 1
        cuts: GraphCutFinder | None = self._instrument(
            "graph_cut", GraphCutFinder, lambda error: self._silence("graph_cut", error)
        )
        if cuts is not None:
            self._cuts = cuts
            self.event("armed", "graph_cut")
            self._instrument("graph_cut", cuts.call_started, module)

    def _disarm(self) -> None:
        if self._cuts is not None:
            self._cuts.disarm()
            self._cuts = None

    def _find_cut(self, call: BackwardCall) -> None:
        """Find where the graph of a root without parameters was cut, or arm for the next time."""
        if self._cuts is None:
            self._wants_cut = self._n_armed < _MOST_ARMED
            return
        cut = self._instrument("graph_cut", self._cuts.cut_of, call.roots)
        if cut is not None:
            self._n_armed = _MOST_ARMED
            self.event("cut", cut.function, cut.location)

    def _optimizers_of(self, module: nn.Module) -> list[int]:
        if len(self._observers) == 1:
            return list(self._observers)
        return self._census.optimizers_of(module)

    def _discover_model(self, module: nn.Module) -> bool:
        if not self._discovers or next(module.parameters(), None) is None:
            return False
        self._census.add_model(module, called_name(user_frame()) or type(module).__name__)
        self._tell_holdings()
        self.event("model_found", type(module).__name__, user_location())
        return True

    def _adopt_gradients(self) -> None:
        """Gradients that came while nobody watched are somebody's work all the same."""
        self._tell_holdings()
        look = self._all.look()
        self._in_order.do(lambda: self._ledger.gradients.adopt(look.value()), look)

    def _tell_holdings(self) -> None:
        """Tell the ledger who holds what, if that has changed."""
        if self._all.up_to_date():
            return
        self._all.prepare()
        now = time.perf_counter()
        holdings = {number: self._census.params_of(number) for number in self._observers}
        everybody = self._all.params

        def account() -> None:
            self._ledger.gradients.grow(int(everybody.max(initial=-1)) + 1)
            for number, params in holdings.items():
                self._ledger.holds(number, params, now)

        self._in_order.do(account)

    def _instrument(self, part: str, function: Callable[..., Any], *args: Any) -> Any:
        """Run one instrument; None once it has failed."""
        if part in self._failures.silent:
            return None
        try:
            return function(*args)
        except Exception as error:
            self._silence(part, error)
            return None

    def _silence(self, part: str, error: Exception) -> None:
        text = self._failures.take(part, "instrument-failed", error)
        self.recording.notes.append(f"{part} failed and was switched off: {text}")
        self.event("instrument_failed", f"{part}: {text}")

    def _guarded(self, part: str, function: Callable[[], Any]) -> None:
        try:
            function()
        except Exception as error:
            self.failed(part, error)

    def _spend(self, part: str, began: float) -> None:
        seconds = time.perf_counter() - began
        self._count(part, seconds)
        for number in self._observers:
            self._spent_since[number] = self._spent_since.get(number, 0.0) + seconds

    def _count(self, part: str, seconds: float) -> None:
        spent = self.recording.observe_seconds
        spent[part] = spent.get(part, 0.0) + seconds


def _zeros(reading: StepReading, look: GradientLook) -> Any:
    """Which gradients of a step are all zeros, from what was read of them; None if nothing was."""
    if reading.statistics is not None:
        return reading.statistics.value().sum_of_squares == 0
    if reading.sums_of_squares is not None:
        return reading.sums_of_squares.value() == 0
    return None


def _skips(reading: StepReading) -> bool:
    """Whether a fused optimizer found infinite gradients under a scaler, and will do nothing."""
    return reading.found_inf is not None and float(reading.found_inf.value()) != 0


def _place(location: Location | None) -> dict[str, Any]:
    return {} if location is None else {"file": location.file, "line": location.line}
