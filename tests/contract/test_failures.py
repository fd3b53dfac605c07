"""An error inside gradscope is told once, and training goes on as if nobody had watched."""

from __future__ import annotations

import functools
import inspect
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.optim import SGD, AdamW, lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from traces import snapshot
from training_loops import batch, perceptron
from twins import Training, everything_of, seed_everything

import gradscope
from gradscope.config import WatchOptions
from gradscope.errors import GradscopeWarning
from gradscope.instruments import graph_cut
from gradscope.instruments.call_log import CallLog
from gradscope.instruments.gradients import GradientReader
from gradscope.instruments.graph_cut import GraphCutFinder
from gradscope.instruments.optimizer_state import StateReader
from gradscope.instruments.statistics import StatisticsReader
from gradscope.instruments.step_copies import StepCopies
from gradscope.rules import RULES
from gradscope.run.columns import Columns
from gradscope.run.recording import Recording
from gradscope.scope import Scope
from gradscope.session import recorder, session
from gradscope.session.all_gradients import AllGradients
from gradscope.session.attempts import Attempts
from gradscope.session.census import Census
from gradscope.session.cut_search import CutSearch
from gradscope.session.failures import Failures
from gradscope.session.gradients import GradientHistory
from gradscope.session.ledger import Ledger
from gradscope.session.looks import Looks
from gradscope.session.nonfinite_search import NonfiniteSearch
from gradscope.session.schedule import Schedule
from gradscope.session.session import Session
from gradscope.session.step_observer import StepObserver
from gradscope.taps.module_calls import module_calls
from gradscope.taps.torch_functions import TorchFunctionTap

N_STEPS = 6


class BrokenError(RuntimeError):
    """What a broken part of gradscope raises."""


def everything_at_once() -> Training:
    """A loop in which every tap has something to tell."""
    seed_everything()
    model, other = perceptron(dropout=0.2), nn.Linear(6, 3)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    closing = SGD(other.parameters(), lr=0.1, momentum=0.9)
    scheduler = lr_scheduler.StepLR(optimizer, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    optimizer._opt_called = False  # what the scheduler would add with the first step

    def step(number: int) -> list[torch.Tensor]:
        x, y = batch()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if number == 3:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        nn.utils.clip_grad_value_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()

        def closure() -> torch.Tensor:
            closing.zero_grad()
            loss = F.cross_entropy(other(x), y)
            loss.backward()
            return loss

        other_loss = closing.step(closure)
        model.eval()
        with torch.no_grad():
            held_out = model(x)
        model.train()
        return [loss.detach().clone(), other_loss.detach().clone(), held_out]

    return Training([model, other], [optimizer, closing], step, [scaler, scheduler])


@functools.cache
def unwatched() -> dict[str, bytes]:
    training = everything_at_once()
    return everything_of(training, [t for n in range(N_STEPS) for t in training.step(n)])


class Failing:
    """Stands in for a function, and raises from its n-th call on."""

    def __init__(self, original: Callable[..., Any], first: int = 0) -> None:
        self.original = original
        self.n_calls = 0
        self.first = first

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.n_calls += 1
        if self.n_calls > self.first:
            raise BrokenError("broken on purpose")
        return self.original(*args, **kwargs)

    @property
    def has_raised(self) -> bool:
        return self.n_calls > self.first


def break_function(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, first: int = 0
) -> Failing:
    failing = Failing(getattr(owner, name), first)
    if inspect.isclass(owner):

        def method(*args: Any, **kwargs: Any) -> Any:
            return failing(*args, **kwargs)

        monkeypatch.setattr(owner, name, method)
    else:
        monkeypatch.setattr(owner, name, failing)
    return failing


def train_watched(discovers: bool = False) -> tuple[Scope, list[GradscopeWarning]]:
    """Train under a watch; what must hold whatever is broken is asserted here."""
    training = everything_at_once()
    before = snapshot(training.models, training.optimizers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if discovers:
            scope = Scope(Session(WatchOptions(), discovers=True))
        else:
            scope = gradscope.watch(training.models, training.optimizers, keep="*")
        seen = []
        with scope:
            for number in range(N_STEPS):
                seen += training.step(number)
            if discovers:
                SGD(training.models[0].parameters(), lr=0.1)
    result = everything_of(training, seen)
    assert [name for name in result if result[name] != unwatched()[name]] == []
    assert result.keys() == unwatched().keys()
    assert snapshot(training.models, training.optimizers).differences_from(before) == []
    told = [w.message for w in caught if isinstance(w.message, GradscopeWarning)]
    assert [str(w.message) for w in caught if not isinstance(w.message, GradscopeWarning)] == []
    return scope, told


def assert_told_once(failing: Failing, scope: Scope, told: list[GradscopeWarning]) -> None:
    assert failing.has_raised
    assert len(told) == 1, [str(warning) for warning in told]
    assert re.fullmatch(r"[a-z]+(-[a-z]+)+", told[0].slug)
    assert f"[{told[0].slug}]" in str(told[0])
    assert "BrokenError: broken on purpose" in str(told[0])
    assert any("BrokenError: broken on purpose" in note for note in scope._recording.notes)
    assert str(scope)
    assert scope.findings is not None
    assert scope.steps is not None


def test_nothing_is_told_when_nothing_is_broken() -> None:
    scope, told = train_watched()
    assert told == []
    assert len(scope.steps) == 2 * N_STEPS
    assert "skipped" in set(scope.steps["outcome"])


# -- handlers -------------------------------------------------------------------------------

EVENTS = [
    event for tap in session._TAPS if tap is not session.compiled_code for event in tap.events
]


@pytest.mark.parametrize("first", [0, 1], ids=["first call", "second call"])
@pytest.mark.parametrize("event", EVENTS)
def test_a_failing_handler_is_told_once_and_watching_ends(
    event: str, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = break_function(monkeypatch, Session, event, first)
    scope, told = train_watched()
    assert_told_once(failing, scope, told)
    assert told[0].slug == "watch-failed"


def test_a_failing_handler_of_a_new_optimizer_is_told_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for event in session.optimizer_creation.events:
        failing = break_function(monkeypatch, Session, event)
        scope, told = train_watched(discovers=True)
        assert_told_once(failing, scope, told)


@pytest.mark.parametrize("first", [0, 5], ids=["first call", "sixth call"])
@pytest.mark.parametrize("event", [*TorchFunctionTap.events, *module_calls.events])
def test_a_failing_handler_of_an_armed_step_is_told_once_and_watching_goes_on(
    event: str, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = break_function(monkeypatch, GraphCutFinder, event, first)
    scope, told = train_watched()
    assert len(scope.steps) == 2 * N_STEPS
    assert_told_once(failing, scope, told)
    assert told[0].slug == "instrument-failed"


@pytest.mark.filterwarnings("default")  # the compiler has warnings of its own
@pytest.mark.parametrize("first", [0, 1], ids=["first call", "second call"])
@pytest.mark.parametrize("event", ["compiled_code_entered", "compiled_code_left"])
def test_a_failing_handler_at_the_edge_of_compiled_code_is_told_once(
    event: str, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = break_function(monkeypatch, Session, event, first)
    training = everything_at_once()
    compiled = torch.compile(lambda x: x.square().sum(), backend="eager")
    before = snapshot(training.models, training.optimizers)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", GradscopeWarning)
        with gradscope.watch(training.models, training.optimizers):
            for number in range(2):
                assert compiled(torch.ones(3)) == 3
                training.step(number)
                assert compiled(torch.ones(3)) == 3
    assert failing.has_raised
    assert [w.message.slug for w in told if isinstance(w.message, GradscopeWarning)] == [
        "watch-failed"
    ]
    assert snapshot(training.models, training.optimizers).differences_from(before) == []


@pytest.mark.parametrize("event", EVENTS)
def test_an_inner_watch_that_fails_leaves_the_outer_one_alone(
    event: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(getattr(Session, event))
    original = getattr(Session, event)
    training = everything_at_once()
    before = snapshot(training.models, training.optimizers)
    outer = gradscope.watch(training.models, training.optimizers)
    inner = gradscope.watch(training.models, training.optimizers)

    def handle(self: Session, *args: Any) -> Any:
        return (failing if self is inner._session else original)(self, *args)

    monkeypatch.setattr(Session, event, handle)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with outer, inner:
            for number in range(N_STEPS):
                training.step(number)
    assert failing.has_raised
    assert [type(warning.message) for warning in told] == [GradscopeWarning]
    assert len(outer.steps) == 2 * N_STEPS
    assert outer._recording.notes == []
    assert snapshot(training.models, training.optimizers).differences_from(before) == []


@pytest.mark.parametrize("event", ["step_started", "step_ended", "closure_ended"])
def test_a_failing_handler_does_not_disturb_step_hooks_of_others(
    event: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another tool's global hooks, registered after the watch began: torch walks over all of them.
    calls: list[str] = []
    break_function(monkeypatch, Session, event)
    training = everything_at_once()
    seen = []
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        with gradscope.watch(training.models, training.optimizers):
            handles = [
                register_optimizer_step_pre_hook(lambda *args: calls.append("before")),
                register_optimizer_step_post_hook(lambda *args: calls.append("after")),
            ]
            try:
                for number in range(N_STEPS):
                    seen += training.step(number)
            finally:
                for handle in handles:
                    handle.remove()
    result = everything_of(training, seen)
    assert [name for name in result if result[name] != unwatched()[name]] == []
    assert calls == ["before", "after"] * (2 * N_STEPS - 1)


@pytest.mark.parametrize(
    ("owner", "event"),
    [
        (Session, "takes_call"),
        (Session, "call_ended"),
        (GraphCutFinder, "module_started"),
        (GraphCutFinder, "module_ended"),
        (CallLog, "module_started"),
        (CallLog, "module_ended"),
    ],
)
def test_a_failing_handler_does_not_hide_the_programs_own_exception(
    owner: Any, event: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Raises(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyError("of the program")

    model = Raises(2, 2)
    optimizer = SGD(model.parameters(), lr=0.1)
    break_function(monkeypatch, owner, event)
    # Another tool's hook, registered after the watch began: torch walks over all of them.
    handles = []

    @gradscope.watch(model, optimizer)
    def forward() -> None:
        handles.append(register_module_forward_hook(_nothing, always_call=True))
        with torch.no_grad():
            model(torch.zeros(1, 2))

    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        try:
            with pytest.raises(KeyError, match="of the program"):
                forward()
        finally:
            for handle in handles:
                handle.remove()


def _nothing(*args: Any) -> None:
    """Do what a hook of another tool does."""


# -- instruments ----------------------------------------------------------------------------

CASES = [
    ("hyperparameters", "read_groups"),
    ("anatomy", "_copy"),
    ("anatomy", "_copy_gradients"),
    ("anatomy", "after"),
    ("anatomy", "tracked"),
    ("optimizer_state", "_read_state"),
    ("kept_tensors", "before"),
    ("kept_tensors", "gradients"),
    ("kept_tensors", "_kept"),
    ("gradient_statistics", "statistics"),
    ("gradient_norms", "sums_of_squares"),
    ("autograd_graph", "captured"),
    ("module_calls", "_follow"),
    ("graph_cut", "GraphCutFinder"),
    ("graph_cut", "cut_of"),
    ("closer_look", "CloserLook"),
    ("closer_look", "backward_started"),
    ("symmetry", "read_symmetry"),
    ("weight_norms", "read_norms"),
    ("roots", "met"),
    ("nonfinite", "has_singular"),
    ("nonfinite", "first_nonfinite"),
    ("precomputed", "precomputed_weights"),
]
"""Every instrument that a session runs, by its part and its function."""


def break_instrument(
    monkeypatch: pytest.MonkeyPatch, part: str, name: str, first: int
) -> list[Failing]:
    """Make one function of one instrument raise, whoever else may use it."""
    failing: list[Failing] = []
    original = Failures.run

    def run(self: Failures, of: str, function: Any, *args: Any) -> Any:
        if of == part and function.__name__ == name:
            if not failing:
                failing.append(Failing(function, first))
            failing[0].original = function
            function = failing[0]
        return original(self, of, function, *args)

    monkeypatch.setattr(Failures, "run", run)
    return failing


def cut_loss() -> Training:
    """A loop whose backward reaches no parameter, so that the cut is looked for."""
    seed_everything()
    model = perceptron()
    optimizer = AdamW(model.parameters(), lr=1e-2)

    def step(number: int) -> list[torch.Tensor]:
        x, y = batch()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).detach().requires_grad_(), y)
        loss.backward()
        optimizer.step()
        return [loss.detach().clone()]

    return Training([model], [optimizer], step)


def test_the_list_of_instruments_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    used: set[str] = set()
    original = Failures.run

    def run(self: Failures, part: str, function: Any, *args: Any) -> Any:
        used.add(f"{part}: {function.__name__}")
        return original(self, part, function, *args)

    monkeypatch.setattr(Failures, "run", run)
    train_watched()
    training = cut_loss()
    with gradscope.watch(training.models, training.optimizers):
        training.step(0)
    assert used == {f"{part}: {name}" for part, name in CASES}


@pytest.mark.parametrize("first", [0, 2], ids=["first call", "third call"])
@pytest.mark.parametrize(("part", "name"), CASES)
def test_a_failing_instrument_is_told_once_and_falls_silent(
    part: str, name: str, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rare = ("captured", "_follow", "GraphCutFinder", "cut_of", "CloserLook")
    rarer = ("first_nonfinite", "precomputed_weights", "has_singular", "symmetry")
    if first and name in (*rare, *rarer):
        pytest.skip("not called that often where nothing is wrong")
    healthy, _ = train_watched()
    failing = break_instrument(monkeypatch, part, name, first)
    if name == "cut_of":
        training = cut_loss()
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            with gradscope.watch(training.models, training.optimizers) as scope:
                for number in range(8):
                    training.step(number)
        told = [warning.message for warning in record]
        assert len(scope.steps) == 8
    else:
        scope, told = train_watched()
        # What the others measure is as before.
        assert len(scope.steps) == 2 * N_STEPS
        assert list(scope.steps["order"]) == list(healthy.steps["order"])
        assert list(scope.grads["status"]) == list(healthy.grads["status"])
    assert_told_once(failing[0], scope, told)
    assert failing[0].n_calls == first + 1
    assert told[0].slug == "instrument-failed"
    assert part in str(told[0])


# -- everything else that runs inside the program's step --------------------------------------


def _own_functions(*owners: Any) -> Iterator[tuple[Any, str]]:
    for owner in owners:
        for name, function in vars(owner).items():
            public = not name.startswith("_") or name == "__init__"
            if public and inspect.isfunction(function) and function.__module__ == owner.__module__:
                yield owner, name


INNER_PARTS = [
    *_own_functions(Ledger, GradientHistory, Schedule, AllGradients, StepObserver, Columns),
    *_own_functions(Attempts),
    (CutSearch, "wants_to_search"),
    (CutSearch, "look_away"),
    (CutSearch, "arm"),
    (CutSearch, "step_ended"),
    (Looks, "is_due"),
    (Looks, "begin"),
    (Looks, "backward_started"),
    (Looks, "step_started"),
    (Looks, "step_ended"),
    (Looks, "end"),
    (NonfiniteSearch, "backward_started"),
    (NonfiniteSearch, "step_read"),
    *_own_functions(GradientReader, StatisticsReader, StepCopies, StateReader, Census),
    *(
        (recorder, name)
        for name, function in vars(recorder).items()
        if name.startswith("record_") and inspect.isfunction(function)
    ),
    (Recording, "rows"),
    (session, "scalar_of"),
    (session, "user_location"),
    (graph_cut, "user_location"),
]


@pytest.mark.parametrize("first", [0, 3], ids=["first call", "fourth call"])
@pytest.mark.parametrize(
    ("owner", "name"), INNER_PARTS, ids=[f"{o.__name__}.{n}" for o, n in INNER_PARTS]
)
def test_a_failing_inner_part_does_not_reach_the_program(
    owner: Any, name: str, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    armed: list[Failing] = []
    start = Scope.start

    # What watch() does before the loop may raise: nothing has begun then. From start() on, nothing.
    def start_then_break(scope: Scope) -> Scope:
        armed.append(break_function(monkeypatch, owner, name, first))
        return start(scope)

    monkeypatch.setattr(Scope, "start", start_then_break)
    scope, told = train_watched()
    raised = armed[0].has_raised
    monkeypatch.undo()
    if raised and owner in (StatisticsReader, StateReader, GradientReader, Census):
        # Several instruments use these, and each that fails has its own word.
        assert 1 <= len({str(warning) for warning in told}) == len(told) <= 3
        told = told[:1]
    assert len(told) == raised, [str(warning) for warning in told]
    if raised:
        assert_told_once(armed[0], scope, told)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_failing_rule_silences_itself_only(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seed_everything()
    model = perceptron()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    with gradscope.watch(model, optimizer) as scope:
        for number in range(5):
            x, y = batch()
            logits = model(x) if number else model(x).detach().requires_grad_()
            F.cross_entropy(logits, y).backward()
            optimizer.step()
    whole = {finding.code for finding in scope.findings}
    break_function(monkeypatch, rule, "check")
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        codes = {finding.code for finding in scope.findings}
        assert codes - {"GS901", "GS902", "GS903"} >= whole - {rule.code}
        assert rule.code not in codes
        assert str(scope)


# -- where warnings are errors --------------------------------------------------------------

PROGRAM = """
import sys
import torch
import gradscope
from gradscope.instruments.optimizer_state import StateReader
from gradscope.session.session import Session

def broken(*args, **kwargs):
    raise RuntimeError("broken on purpose")

def train(watched):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scope = gradscope.watch(model, optimizer)
    if watched:
        scope.start()
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(3, 4)).square().mean().backward()
        optimizer.step()
    scope.stop()
    return model.weight.detach()

expected = train(False)
{breakage} = broken
assert torch.equal(train(True), expected)
print("trained")
"""


@pytest.mark.parametrize(
    ("breakage", "slug"),
    [("Session.step_ended", "watch-failed"), ("StateReader.read", "instrument-failed")],
)
def test_where_warnings_are_errors_training_still_ends_well(breakage: str, slug: str) -> None:
    root = Path(gradscope.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM.replace("{breakage}", breakage)],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "trained\n"
    assert done.stderr.count(f"[{slug}]") == 1
    assert "broken on purpose" in done.stderr
    assert "Traceback" not in done.stderr


def test_on_error_raise_lets_the_error_out(monkeypatch: pytest.MonkeyPatch) -> None:
    training = everything_at_once()
    before = snapshot(training.models, training.optimizers)
    break_function(monkeypatch, StateReader, "read")
    with (
        pytest.raises(BrokenError),
        gradscope.watch(training.models, training.optimizers, on_error="raise"),
    ):
        training.step(0)
    assert snapshot(training.models, training.optimizers).differences_from(before) == []
