"""One watch: listens to the taps, reads what is to be read, and keeps the recording.

The handlers run inside the program's training step. They read tensors at the moment an event
happens, and hand what they read to the ledger in order, once all values are there.
"""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn

from gradscope.config import WatchOptions
from gradscope.instruments.late import Late, scalar_of
from gradscope.instruments.source_lines import SourceLines
from gradscope.instruments.weight_facts import read_norms
from gradscope.run.recording import Recording
from gradscope.run.schema import STEP_PRE_HOOKS
from gradscope.run.weight_step import WeightStep
from gradscope.session.all_gradients import AllGradients
from gradscope.session.attempts import Attempts
from gradscope.session.backwards import Backwards
from gradscope.session.census import Census, is_compiled
from gradscope.session.compiled_parts import CompiledParts
from gradscope.session.costs import Costs
from gradscope.session.cut_search import CutSearch
from gradscope.session.failures import Failures
from gradscope.session.graph_capture import GraphCapture
from gradscope.session.in_order import InOrder
from gradscope.session.ledger import Ledger
from gradscope.session.looks import Looks
from gradscope.session.nonfinite_search import NonfiniteSearch
from gradscope.session.ranks import Place, is_in_group, place_now
from gradscope.session.saving import Saving
from gradscope.session.source_names import assigned_name, called_name
from gradscope.taps.clipping import clipping
from gradscope.taps.compiled_code import compiled_code
from gradscope.taps.engine import BackwardCall, engine, inside_backward, inside_transform
from gradscope.taps.grad_scaler import grad_scaler
from gradscope.taps.model_calls import model_calls
from gradscope.taps.modes import modes
from gradscope.taps.module_calls import module_calls
from gradscope.taps.module_creation import module_creation
from gradscope.taps.optimizer_creation import optimizer_creation
from gradscope.taps.optimizer_steps import optimizer_steps
from gradscope.taps.schedulers import schedulers
from gradscope.taps.tap import Tap
from gradscope.taps.user_frame import (
    Location,
    columns_of,
    inside_method_of,
    making_frame,
    user_frame,
    user_location,
)
from gradscope.taps.zero_grad import zero_grad

_TAPS: tuple[Tap, ...] = (
    engine,
    optimizer_steps,
    model_calls,
    zero_grad,
    clipping,
    grad_scaler,
    schedulers,
    modes,
    compiled_code,  # after the steps, which see the edges of a compiled step first
)

_EVERY_TAP: tuple[Tap, ...] = (*_TAPS, optimizer_creation, module_creation)

_SHARE_OF_LOOKING_AROUND = 0.005
"""The share of time that may go into finding out whether the models have changed."""

_sequence_nr: Callable[[], int] = torch._C._autograd._get_sequence_nr


def _timed(handle: Callable[..., Any]) -> Callable[..., Any]:
    """Count the time that a handler takes, instruments left out, as that of the structure.

    A broken watch that could not be stopped yet handles nothing, and is stopped if it can be.
    """

    @functools.wraps(handle)
    def timed(self: Session, *arguments: Any) -> Any:
        if self._broken and self._retire():
            return None
        if threading.get_ident() not in (self._thread, self._started_in):
            return handle(self, *arguments)
        self._costs.begin()
        try:
            return handle(self, *arguments)
        finally:
            self._costs.end("structure")

    return timed


def _exclusive(handle: Callable[..., None]) -> Callable[..., None]:
    """Let a handler exclude the others, and :meth:`Session._is_here`, in other threads."""

    @functools.wraps(handle)
    def exclusive(self: Session, *arguments: Any) -> None:
        if self._thread in (None, threading.get_ident()):
            with self._lock:
                if not self._broken:
                    handle(self, *arguments)
                    return
        handle(self, *arguments)

    return exclusive


class Session:
    """Follows one training run from :meth:`start` to :meth:`stop`.

    Args:
        options: what the watch was told.
        discovers: whether models and optimizers are found as the program uses them; else those
            passed to :meth:`watch_model` and :meth:`watch_optimizer` are all.

    Attributes:
        recording: what has been seen.
        running: between :meth:`start` and :meth:`stop`.
        paused: between :meth:`pause` and :meth:`resume`.
    """

    def __init__(self, options: WatchOptions, *, discovers: bool = False) -> None:
        self.recording = Recording()
        self.running = False
        self.paused = False
        self._discovers = discovers
        self._costs = Costs(self.recording)
        self._failures = Failures(
            self._note_failure, self._costs, raises=options.on_error == "raise"
        )
        self._census = Census(self.recording, options.include, options.exclude)
        self._others: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._hooked: set[int] = set()
        self._ledger = Ledger()
        self._in_order = InOrder(lambda error: self.failed("ledger", error))
        self._attempts = Attempts(
            self.recording,
            self._census,
            self._ledger,
            self._in_order,
            self._failures,
            self._costs,
            options,
        )
        self._all = AllGradients(self._census)
        lines = SourceLines()
        self._cuts = CutSearch(self._failures, self.event, lines)
        self._nonfinite = NonfiniteSearch(self.recording, self._failures, self.event)
        self._attempts.on_ranks_apart = self._ranks_apart
        self._attempts.on_end = self._nonfinite.step_ended
        self._looks = Looks(
            self.recording,
            self._census,
            self._in_order,
            self._failures,
            self._costs,
            options.budget,
        )
        self._compiled = CompiledParts(
            self._census,
            self._attempts,
            self.event,
            lambda number: self.recording.optimizers[number].name,
        )
        self._graphs = GraphCapture(options.graph, self._census, self._failures, lines)
        self._backwards = Backwards(
            self.recording,
            self._census,
            self._ledger,
            self._in_order,
            self._attempts,
            self._failures,
            self._all,
            self._graphs,
            self._cuts,
            self._nonfinite,
            self._looks,
            self.event,
        )
        self._followed = 0.0
        self._call: tuple[float, int] = (0.0, 0)
        self._scale: Late[Any] | None = None
        self._scaler_stepped = False
        self._in_scaler_step = False
        self._broken = False
        self._saving: Saving | None = None
        self._place: Place | None = None
        self._began = 0.0
        self._next_look = 0.0
        self._started_in = 0
        self._thread: int | None = None
        self._lock = threading.RLock()

    # -- beginning and end ------------------------------------------------------------------

    def watch_model(self, model: nn.Module, name: str) -> None:
        """Take a model in."""
        self._census.add_model(model, name)

    def watch_optimizer(self, optimizer: torch.optim.Optimizer, name: str) -> None:
        """Take an optimizer in."""
        is_differentiable = any(group.get("differentiable") for group in optimizer.param_groups)
        number = self._census.add_optimizer(optimizer, name)
        self._attempts.follow(number, is_differentiable=is_differentiable)
        self._looks.someone_came(self._attempts.n_ended, is_early=self._attempts.is_early(number))
        if is_differentiable:
            self.event(
                "unobserved",
                f"{self.recording.optimizers[number].name} is differentiable: its steps are part "
                "of the graph, so its state and its updates are not read",
            )
        self._tell_holdings()

    def save_to(
        self, path: Path, criteria: dict[str, Any], stored: Any = None, *, waits: bool = False
    ) -> None:
        """Write the recording to a directory, from the start on; to be called before that.

        Args:
            path: the directory.
            criteria: by what the run is judged, as plain data.
            stored: the run that lies there, to be gone on with; None if there is none.
            waits: whether nothing is written before something trains.

        Raises:
            UsageError: if the run that lies there is of another training.
        """
        saving = Saving(
            path,
            self.recording,
            lambda: self.elapsed,
            self.last_copies,
            self.settle,
            waits=waits,
        )
        saving.criteria = criteria
        if stored is not None:
            made = saving.take_up(stored)
            backwards = self.recording.rows("backwards").array("backward")
            n_backwards = int(backwards[-1]) + 1 if len(backwards) else 0
            self._in_order.settle(wait=True)
            self._ledger.go_on(stored.n_steps, n_backwards, made)
            self._attempts.go_on(stored.n_steps)
            self.event("seam", f"goes on after {stored.n_steps} steps that were recorded before")
        self._saving = saving

    @property
    def has_trained(self) -> bool:
        """Whether a backward or a step was seen."""
        return self._place is not None

    @property
    def is_saved(self) -> bool:
        """Whether the recording is in its directory, as far as was written."""
        saving = self._saving
        return saving is not None and not saving.has_failed and not saving.waits

    def finish_saving(self, ended: str, *, even_if_idle: bool = False) -> None:
        """Write what is left, once nothing more comes.

        Args:
            ended: how the run ended, in a few words.
            even_if_idle: whether that is written too in which nothing has trained.
        """
        if self._saving is not None:
            saving = self._saving
            try:
                if even_if_idle:
                    saving.something_trains()
                saving.stop(ended)
                self._tell_saving_failed()
            except Exception as error:
                self.saving_failed(error)

    def start(self) -> None:
        """Begin to listen."""
        if not self._broken:
            self.running = True
            self._guarded("taps", self._listen)
            if self._saving is not None:
                self._begin_saving(self._saving.start)

    def _begin_saving(self, begin: Callable[[], None]) -> None:
        try:
            begin()
        except Exception as error:
            self.saving_failed(error)

    def part_failed(self, part: str, error: Exception) -> None:
        """Take note that something that goes along with the watch has failed."""
        self._failures.silence(part, "instrument-failed", error)

    def saving_failed(self, error: Exception) -> None:
        """Take note that the recording is written no more."""
        if self._saving is not None:
            self._saving.failure_is_told()
        self._failures.silence("run_directory", "saving-failed", error)

    def stop(self) -> None:
        """Listen no more, and close what is still open."""
        if self.running:
            self.running = False
            if not self.paused:
                self._guarded("taps", self._hush)
            self.paused = False
            if not self._broken:
                self._guarded("ledger", self._close)

    def abandon(self) -> None:
        """Listen no more, in a process that was forked from the one that is watched.

        Nothing is accounted for: another thread may have held any lock when this one was copied.
        """
        self.running = False
        self._saving = None
        self._looks.give_up()
        self._guarded("graph_cut", self._cuts.give_up)
        self._guarded("module_calls", self._graphs.give_up)
        for tap in _EVERY_TAP:
            tap.remove(self)

    def pause(self) -> None:
        """Listen no more for a while."""
        if self.running and not self.paused:
            self.paused = True
            self._guarded("taps", self._hush)

    def resume(self) -> None:
        """Listen again after a pause."""
        if self.running and self.paused:
            self.paused = False
            self._guarded("taps", self._listen)

    def settle(self, *, wait: bool = True) -> None:
        """Account for what was seen so far.

        Args:
            wait: whether to wait for values that are still under way, so that this is everything.
        """
        self._guarded("ledger", lambda: self._in_order.settle(wait=wait))

    @property
    def n_steps(self) -> int:
        """How many attempts have ended, also those that are not accounted for yet."""
        return self._attempts.n_ended

    @property
    def elapsed(self) -> float:
        """Seconds watched so far, pauses left out."""
        clock = time.perf_counter() - self._began if self._began else 0.0
        return self.recording.seconds + clock

    def weight(
        self, step: int, param: int, position: int, index: tuple[int, ...]
    ) -> WeightStep | None:
        """Return any weight around the last recorded step; None if its copies are gone."""
        return self._attempts.weight(step, param, position, index)

    def last_copies(self) -> dict[int, dict[int, Any]]:
        """Return whole tensors around the last recorded step of each optimizer, by that step."""
        return self._attempts.last_copies()

    def event(
        self,
        event: str,
        detail: str = "",
        location: Location | None = None,
        optimizer: int | None = None,
    ) -> None:
        """Add a row to ``events``; an error in doing so goes where all errors of ours go."""
        self._guarded("events", lambda: self._record_event(event, detail, location, optimizer))

    def _record_event(
        self, event: str, detail: str, location: Location | None, optimizer: int | None
    ) -> None:
        self.recording.rows("events").append(
            {
                "time": self.elapsed,
                "step": self._attempts.n_ended,
                "event": event,
                "detail": detail,
                "subject": "" if optimizer is None else self.recording.optimizers[optimizer].name,
                **columns_of(location),
            }
        )
        if event == "unobserved":
            self.recording.notes.append(detail)

    def failed(self, where: str, error: Exception) -> None:
        """Stop watching after an error in a handler: what follows could not be trusted."""
        if not self._broken:
            self._broken = True
            self._failures.silence(where, "watch-failed", error)
        self._retire()

    def _retire(self) -> bool:
        """Stop a broken watch once that leaves nothing behind; returns whether it is broken."""
        with suppress(Exception):  # what failed may fail again; then it stops at the next call
            if self._broken and self._cuts.can_give_up and not optimizer_steps.inside_hook:
                self.stop()
        return self._broken

    # -- what the taps tell -----------------------------------------------------------------

    @_timed
    def takes_call(self, module: nn.Module) -> bool:
        """Take the outermost call of a watched model."""
        if not self._discovers and not self._census.is_member(module):
            return False
        # A checkpoint that computes its forward again, and calls that only trace the model.
        if inside_backward() or inside_transform() or torch._C._get_tracing_state():
            return False
        if not self._is_here():
            return False
        if not self._census.is_member(module) and not self._discover_model(module):
            return False
        self._compiled.model_called(module)
        is_new = self._attempts.someone_is_new
        if not compiled_code.is_inside:  # what is put up there would be compiled in
            self._look_closer(module, someone_is_new=is_new)
            if self._broken:  # arming, too, may be what fails; what is put up now would stay
                return False
            self._graphs.call_started(module, self._attempts.n_ended, someone_is_new=is_new)
        self._call = (time.perf_counter(), _sequence_nr())
        return True

    @_timed
    def call_ended(self, module: nn.Module) -> None:
        """Account for the outermost call of a watched model."""
        now = time.perf_counter()
        began, first_node = self._call
        optimizers = self._optimizers_of(module)
        training, with_grad = module.training, torch.is_grad_enabled()
        self._in_order.do(
            functools.partial(
                self._ledger.forward,
                optimizers,
                first_node=first_node,
                seconds=now - began,
                training=training,
                with_grad=with_grad,
            )
        )

    @_timed
    def zero_grad_called(self, owner: Any, location: Location | None) -> None:
        """Account for ``zero_grad`` of an optimizer or module."""
        if self._thread not in (None, threading.get_ident()):
            return
        if isinstance(owner, nn.Module):
            optimizers, by = self._census.optimizers_of(owner), "module.zero_grad"
            params = self._census.params_in(owner)
        else:
            number = self._census.number_of_optimizer(owner)
            optimizers, by = [] if number is None else [number], "optimizer.zero_grad"
            params = np.zeros(0, np.int64) if number is None else self._census.params_of(number)
        if optimizers:
            self._in_order.do(functools.partial(self._ledger.zero_grad, optimizers, params, by))
            self.event("zero_grad", by, location, optimizers[0] if len(optimizers) == 1 else None)

    @_timed
    @_exclusive
    def gradients_clipped(
        self, function: str, gradients: list[torch.Tensor], limit: Any, location: Location | None
    ) -> None:
        """Account for gradient clipping."""
        optimizers = self._census.optimizers_of_gradients(gradients)
        if optimizers or not gradients:
            everybody = optimizers or self._attempts.optimizers
            if not self._broken and self._is_here():
                for number in optimizers:
                    self._attempts.clipped(number, gradients)
            self._in_order.do(lambda: self._ledger.note(everybody, "clip"))
            detail = f"{function}, limit {limit}, {len(gradients)} gradients"
            self.event("clip", detail, location, optimizers[0] if len(optimizers) == 1 else None)

    @_timed
    def scheduler_stepped(self, scheduler: Any, location: Location | None) -> None:
        """Account for a learning rate scheduler's step."""
        number = self._census.number_of_optimizer(scheduler.optimizer)
        if number is not None:
            self._in_order.do(lambda: self._ledger.note([number], "scheduler"))
            name = self._census.name_of_scheduler(scheduler, number)
            self.event("scheduler", name, location, number)

    @_timed
    def mode_set(self, module: nn.Module, location: Location | None) -> None:
        """Note where a model, or one that may become one of ours, was switched to which mode."""
        if self._census.is_member(module) or (self._discovers and not self._attempts.n_ended):
            mode = "train" if module.training else "eval"
            self.event("mode", f"{mode} {type(module).__name__}", location)

    @_timed
    def gradients_unscaled(self, scaler: Any, optimizer: Any, location: Location | None) -> None:
        """Account for ``GradScaler.unscale_``."""
        number = self._census.number_of_optimizer(optimizer)
        if number is not None:
            self._in_order.do(lambda: self._ledger.note([number], "unscale"))
            self.event("unscale", "", location, number)

    def loss_scaled(self, scaler: Any, outputs: Any) -> None:
        """Remember that a backward from this tensor gives scaled gradients."""
        if self._broken:
            return
        for output in outputs if isinstance(outputs, list | tuple) else (outputs,):
            if isinstance(output, torch.Tensor):
                self._backwards.roots.scaled(output)

    def scale_updated(self, scaler: Any, location: Location | None) -> None:
        """Account for ``GradScaler.update``."""
        if self._broken:
            return
        self.event("scale_update", "", location)

    def scaler_step_started(self, scaler: Any, optimizer: Any) -> None:
        """Remember that the optimizer's next step, if it comes, is the scaler's doing."""
        if self._broken:
            return
        self._scaler_stepped = False
        self._in_scaler_step = bool(scaler.is_enabled())
        scale = getattr(scaler, "_scale", None)
        self._scale = None if scale is None else scalar_of(scale)

    @_timed
    def scaler_step_ended(self, scaler: Any, optimizer: Any) -> None:
        """Account for a step that the scaler skipped: none of the optimizer's hooks has fired."""
        self._in_scaler_step = False
        number = self._census.number_of_optimizer(optimizer)
        if number is not None and not self._scaler_stepped:
            self._attempts.end_without_step(number, self._scale, outcome="skipped")
        self._scale = None

    @_timed
    @_exclusive
    def backward_started(self, call: BackwardCall) -> None:
        """Look at the gradients as a backward finds them, and at the graph it walks."""
        if self._broken or not self._is_here(binding=True):
            return
        if self._place is None:
            self._something_trains()
        if call.accumulates:
            for number in self._census.grown():  # before its new parameters get gradients
                self._refresh_groups(number)
            self._tell_holdings()
        self._backwards.started(call, first_node=self._call[1])

    @_timed
    @_exclusive
    def backward_ended(self, call: BackwardCall, error: BaseException | None) -> None:
        """Look at what a backward wrote."""
        if not self._broken and self._is_here():
            self._backwards.ended(call, error)

    @_timed
    @_exclusive
    def step_started(self, optimizer: torch.optim.Optimizer, has_closure: bool) -> None:
        """Begin to read around an update."""
        if not self._is_here(binding=True):
            return
        if self._place is None:
            self._something_trains()
        number = self._census.number_of_optimizer(optimizer)
        if number is None and (self._discovers or self._trains_ours(optimizer)):
            name = None if self._in_scaler_step else called_name(user_frame())
            self._take_in(optimizer, (name or "").removesuffix(".step"), user_frame())
            number = self._census.number_of_optimizer(optimizer)
            if number is not None:
                self._adopt_gradients()
                self._in_order.do(functools.partial(self._ledger.takes_over, number))
        if number is None:
            return
        self._scaler_stepped = True
        if self._attempts.is_open(number):
            self._abandon(number)
        self._refresh_groups(number)
        if optimizer._optimizer_step_pre_hooks and number not in self._hooked:
            self._hooked.add(number)
            name = self.recording.optimizers[number].name
            text = f"{name} has {STEP_PRE_HOOKS}: they run after its gradients are read"
            self.event("unobserved", text, None, number)
        self._backwards.used_inside(number)
        self._looks.step_started(number)
        if not has_closure:
            self._cuts.look_away()
        self._attempts.begin(
            number,
            self._scale,
            has_closure=has_closure,
            through_scaler=self._in_scaler_step,
        )

    @_timed
    @_exclusive
    def closure_ended(self, optimizer: torch.optim.Optimizer) -> None:
        """Read the gradients that a closure has computed."""
        number = self._census.number_of_optimizer(optimizer)
        if number is not None and not self._broken and self._is_here():
            self._attempts.closure_ended(number)

    @_timed
    @_exclusive
    def step_ended(self, optimizer: torch.optim.Optimizer) -> None:
        """Read what an update did."""
        number = self._census.number_of_optimizer(optimizer)
        if number is None or self._broken or not self._is_here():
            return
        self._cuts.look_back()
        recorded = self._attempts.end(number)
        self._count_followed()
        if self._looks.step_ended(
            number,
            self._attempts.optimizers,
            self._attempts.n_ended,
            is_early=self._attempts.is_early(number),
        ):
            self._end_look()
        if self._looks.now is None:
            self._cuts.step_ended()
        if self._discovers and not self.recording.models and not compiled_code.is_inside:
            # Tensors without a module: there is no call with which a step begins.
            self._look_closer(None, someone_is_new=False)
        if self._graphs.has_notes:
            self._graphs.step_ended(number, self._attempts.optimizers)
        if recorded:
            self._look_around()
        self._tell_saving_failed()

    @_timed
    def compiled_code_entered(self, function: Any, args: Any, kwargs: Any) -> None:
        """Say that a function is compiled, and look whether it will have moved weights."""
        if not self._broken and self._is_here():
            self._compiled.entered(function)

    @_timed
    def compiled_code_left(self, succeeded: bool, result: Any) -> None:
        """Say so if it has, and no step was seen."""
        if not self._broken and self._is_here():
            self._compiled.left()

    @_exclusive
    def optimizer_created(self, optimizer: torch.optim.Optimizer) -> None:
        """Take in an optimizer that the program has just made."""
        if self._broken:
            return
        # One made by another thread than the watched one is taken in when the watched one steps it.
        if self._thread not in (None, threading.get_ident()):
            return
        frame = making_frame(optimizer)
        self._take_in(optimizer, assigned_name(frame), frame)

    def _trains_ours(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer that nobody gave us holds what is watched, as one made later does.

        One that steps inside of another's step, the base of a wrapper, is that one's own affair.
        """
        if optimizer in self._others or any(map(self._attempts.is_open, self._attempts.optimizers)):
            return False
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(map(self._census.knows, held)):
            self._census.refresh_models()  # it may be that of a layer that was put in just now
        if any(map(self._census.knows, held)):
            return True
        self._others.add(optimizer)
        return False

    def _take_in(
        self, optimizer: torch.optim.Optimizer, name: str | None, frame: FrameType | None
    ) -> None:
        if inside_method_of(torch.optim.Optimizer, "torch.distributed.", optimizer):
            return  # the part of ZeroRedundancyOptimizer that steps this rank's share
        self.watch_optimizer(optimizer, name or "optimizer")
        self.event(
            "optimizer_found",
            type(optimizer).__name__,
            user_location(frame),
            self._census.number_of_optimizer(optimizer),
        )

    def module_created(self, module: nn.Module, location: Location | None) -> None:
        """Remember where a module was made."""
        if self._broken:
            return
        self._looks.module_created(module, location)

    # -- inside -----------------------------------------------------------------------------

    def _something_trains(self) -> None:
        """Take note of which rank this is: who trains with others has met them by now."""
        self._place = place_now()
        place, recording = self._place, self.recording
        recording.rank_in_group, recording.world_size = place.rank, place.world_size
        if place.world_size > 1 and is_in_group():
            self._attempts.compares_ranks = True
            self._failures.run("replicas", self._census.find_replicas)
            spread = sorted({e.placements for e in recording.parameters if "Shard" in e.placements})
            if spread:
                recording.notes.append(
                    f"parameters are spread over ranks ({'; '.join(spread[:3])}): norms are those "
                    "of this rank's part, which run.global_norms() of an opened run adds up"
                )
        if self._saving is not None:
            self._begin_saving(self._saving.something_trains)

    def _refresh_groups(self, number: int) -> None:
        if self._census.refresh_groups(number):
            self._tell_holdings()
            self.event("parameters_changed", self.recording.optimizers[number].name)

    def _ranks_apart(self, optimizer: int, ranks: list[int]) -> None:
        self.event("out_of_sync", ", ".join(map(str, ranks)), None, optimizer)

    def _tell_saving_failed(self) -> None:
        error = None if self._saving is None else self._saving.failure
        if error is not None:
            self.saving_failed(error)

    def _look_closer(self, module: nn.Module | None, *, someone_is_new: bool) -> None:
        """Follow every call of the step that begins, if there is a reason to."""
        is_search = self._cuts.wants_to_search(someone_is_new=someone_is_new)
        # An evaluation tells nothing of the step; an encoder without gradients is part of it.
        is_step = torch.is_grad_enabled() or (module is not None and module.training)
        is_due = is_step and self._looks.is_due(self._attempts.n_ended)
        if not (is_search or is_due):
            return
        if module is not None and not is_compiled(module):
            self._compiled.tell_parts(module)
        if not self._cuts.is_armed:
            if module is not None and is_compiled(module):
                return
            self._cuts.arm()
        if is_due and not self._broken:
            self._cuts.tell(self._looks.begin(self._attempts.n_ended))
            if self._looks.begins_phase:
                self.event("phase", "closer looks begin anew, for another training has begun")

    def _end_look(self) -> None:
        cost = self._looks.end()
        self._in_order.settle()  # many numbers in small tensors, which need not wait
        self._attempts.spend(cost, is_free=self._looks.is_free)

    def _count_followed(self) -> None:
        """Count what following every call has taken: it lies between all other parts."""
        followed = module_calls.seconds + self._cuts.seconds
        if followed > self._followed:
            self._costs.add("followed_calls", followed - self._followed)
            self._followed = followed

    def _is_here(self, *, binding: bool = False) -> bool:
        """Whether this is the thread that is watched.

        That is the one that began the watch; where models are discovered, the first one to call
        backward or step. Another thread's backward writes gradients without holding Python's lock;
        whoever reads a ``.grad`` at that moment crashes.
        """
        here = threading.get_ident()
        if self._thread is None:
            if binding:
                self._thread = here
            return binding or here == self._started_in
        if here != self._thread and binding and self._discovers and not self._broken:
            # Whose parameters it trains cannot be told. While the lock is held nobody reads a
            # gradient, and from here on nobody will.
            with self._lock:
                self._broken = True
                self.recording.notes.append(
                    "watching ended when a second thread began to train: threads are watched one "
                    "at a time, with a watch() of its own in each"
                )
        return here == self._thread

    def _listen(self) -> None:
        self._began = time.perf_counter()
        self._started_in = threading.get_ident()
        self._thread = None if self._discovers else self._started_in
        self._followed = module_calls.seconds + self._cuts.seconds
        self._guarded("census", self._adopt_gradients)
        if self._broken:
            return
        for tap in _TAPS:
            tap.add(self)
        if self._discovers:
            optimizer_creation.add(self)
            module_creation.add(self)

    def _hush(self) -> None:
        if not self._broken:
            self._guarded("closer_look", self._looks.end)
        leaving: list[Callable[[], None]] = [
            self._looks.give_up,
            self._cuts.give_up,
            self._graphs.give_up,
            *(functools.partial(tap.remove, self) for tap in _EVERY_TAP),
        ]
        for leave in leaving:
            try:
                leave()
            except Exception as error:  # the others are left all the same
                self.failed("taps", error)
                self._guarded("taps", leave)
        self.recording.seconds += time.perf_counter() - self._began if self._began else 0.0
        self._began = 0.0
        self._backwards.forget()

    def _close(self) -> None:
        for number in self._attempts.optimizers:
            if self._attempts.is_open(number):
                self._abandon(number)
        self._in_order.settle(wait=True)
        last: Late[dict[int, float]] | None = self._failures.run(
            "weight_norms", read_norms, self._census.alive()
        )
        if last is not None:
            self.recording.set_norms("norm_last", last.value())
        for number in self._attempts.optimizers:
            if self._attempts.awaits_step(number):
                self._attempts.end_without_step(number, None, outcome="open")
        self._in_order.settle(wait=True)
        self._census.refresh_thawed()

    def _abandon(self, number: int) -> None:
        """Close an attempt whose step raised before its end."""
        self.event("exception", f"{self.recording.optimizers[number].name}.step raised")
        self._attempts.end(number, outcome="abandoned")

    def _adopt_gradients(self) -> None:
        """Gradients that came while nobody watched are somebody's work all the same."""
        self._attempts.look_again()
        self._tell_holdings()
        self._read_first_norms()
        look = self._all.look()
        self._in_order.do(lambda: self._ledger.gradients.adopt(look.value()), look)

    def _read_first_norms(self) -> None:
        late: Late[dict[int, float]] | None = self._failures.run(
            "weight_norms", read_norms, self._census.unread()
        )
        if late is not None:
            self._in_order.do(lambda: self.recording.set_norms("norm_first", late.value()), late)

    def _tell_holdings(self) -> None:
        """Tell the ledger who holds what, if that has changed."""
        self._census.refresh_lazy()
        self._census.refresh_stand_ins()
        if self._all.up_to_date():
            return
        if self.running:
            self._read_first_norms()
        self._all.prepare()
        self._in_order.expect(len(self._all.params))
        now = time.perf_counter()
        holdings = {n: self._census.params_of(n) for n in self._attempts.optimizers}
        everybody = self._all.params

        def account() -> None:
            self._ledger.gradients.grow(int(everybody.max(initial=-1)) + 1)
            for number, params in holdings.items():
                self._ledger.holds(number, params, now)

        self._in_order.do(account)

    def _look_around(self) -> None:
        """See whether models have changed, or parameters been frozen, since the last look.

        Walking through a model of many modules takes as long as recording a step of it.
        """
        began = time.perf_counter()
        if began >= self._next_look:
            if self._census.refresh_models():
                self.event("parameters_changed", "a model has other parameters than before")
            now = time.perf_counter()
            self._next_look = now + (now - began) / _SHARE_OF_LOOKING_AROUND
        # Not at the calls of a model: one may be frozen for the time of an evaluation.
        for param in self._census.refresh_requires_grad(self._attempts.n_ended - 1):
            entry = self.recording.parameters[param]
            self.event("parameters_changed", f"{entry.name} requires_grad={entry.requires_grad}")

    def _discover_model(self, module: nn.Module) -> bool:
        if not self._discovers or next(module.parameters(), None) is None:
            return False
        self._census.add_model(module, called_name(user_frame()) or type(module).__name__)
        self._tell_holdings()
        self.event("model_found", type(module).__name__, user_location())
        return True

    def _optimizers_of(self, module: nn.Module) -> list[int]:
        optimizers = self._attempts.optimizers
        return optimizers if len(optimizers) == 1 else self._census.optimizers_of(module)

    def _note_failure(self, part: str, text: str) -> None:
        self.recording.notes.append(
            f"{part} failed at step {self._attempts.n_ended} and was switched off ({text})"
        )
        if part != "events":
            self.event("instrument_failed", f"{part}: {text}")

    def _guarded(self, part: str, function: Callable[[], Any]) -> None:
        try:
            function()
        except Exception as error:
            self.failed(part, error)
