"""An error inside gradscope is told once, and training goes on as if nobody had watched.

Here every handler, instrument and rule fails as a whole; ``test_faults.py`` lets every call that
any of them makes fail.
"""

from __future__ import annotations

import functools
import inspect
import io
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_loops import cut_loss, everything_at_once
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.optim import SGD, AdamW
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from traces import snapshot
from training_loops import batch, perceptron
from twins import everything_of, seed_everything

import gradscope
from gradscope.config import WatchOptions
from gradscope.errors import GradscopeWarning
from gradscope.instruments.call_log import CallLog
from gradscope.instruments.graph_cut import GraphCutFinder
from gradscope.instruments.optimizer_state import StateReader
from gradscope.rules import RULES
from gradscope.scope import Scope
from gradscope.session import session
from gradscope.session.census import Census
from gradscope.session.failures import Failures
from gradscope.session.session import Session
from gradscope.taps.module_calls import module_calls
from gradscope.taps.torch_functions import TorchFunctionTap

N_STEPS = 6


class BrokenError(RuntimeError):
    """What a broken part of gradscope raises."""


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


def test_a_model_that_is_met_inside_of_a_closure_fails_nothing() -> None:
    scope, told = train_watched(discovers=True)
    assert told == []
    assert len(scope.steps) == 2 * N_STEPS


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
    ("hyperparameters", "read"),
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
    ("graph_cut", "cuts_within"),
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


@functools.cache
def healthy_tables() -> dict[str, Any]:
    scope, _ = train_watched()
    return scope.tables


@pytest.mark.parametrize(("part", "name"), CASES)
def test_a_failing_instrument_is_told_once_and_falls_silent(
    part: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = healthy_tables()
    failing = break_instrument(monkeypatch, part, name, 0)
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
        assert list(scope.steps["order"]) == list(healthy["steps"]["order"])
        assert list(scope.grads["status"]) == list(healthy["grads"]["status"])
    assert_told_once(failing[0], scope, told)
    assert failing[0].n_calls == 1
    assert told[0].slug == "instrument-failed"
    assert part in str(told[0])


# -- rules ------------------------------------------------------------------------------------


@functools.cache
def judged() -> tuple[Scope, set[str]]:
    """A loop in which several things are wrong, and the codes of what is found in it."""
    seed_everything()
    model = perceptron()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    with gradscope.watch(model, optimizer) as scope:
        for number in range(5):
            x, y = batch()
            logits = model(x) if number else model(x).detach().requires_grad_()
            F.cross_entropy(logits, y).backward()
            optimizer.step()
    return scope, {finding.code for finding in scope.findings}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_failing_rule_silences_itself_only(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scope, whole = judged()
    break_function(monkeypatch, rule, "check")
    found = scope.findings
    codes = {finding.code for finding in found}
    assert codes - {"GS901", "GS902", "GS903"} >= whole - {rule.code}
    assert rule.code not in codes
    assert found.unchecked[rule.code] == "BrokenError: broken on purpose"
    # A few rules ask another one.
    assert len(found.unchecked) <= 3


def test_a_rule_that_failed_is_named_on_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    scope, _ = judged()
    break_function(monkeypatch, RULES[3], "check")
    assert RULES[3].code in str(scope)


# -- what is the program's own ----------------------------------------------------------------


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("event", EVENTS)
def test_an_interrupt_is_the_programs_own_wherever_it_comes(
    event: str, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Session, *args: Any) -> None:
        raise kind("now")

    training = everything_at_once()
    before = snapshot(training.models, training.optimizers)
    monkeypatch.setattr(Session, event, interrupted)
    scope = gradscope.watch(training.models, training.optimizers, on_finding="warn")

    def train() -> None:
        for number in range(N_STEPS):
            training.step(number)

    with pytest.raises(kind, match="now"):
        scope(train)()
    assert snapshot(training.models, training.optimizers).differences_from(before) == []
    assert any(kind.__name__ in detail for detail in scope.events["detail"].tail(5))


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("cannot even be printed")


@pytest.mark.parametrize("where", ["loop", "backward"])
def test_an_exception_that_cannot_be_printed_is_not_hidden(where: str) -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            raise UnprintableError

    model = nn.Linear(2, 2)
    optimizer = SGD(model.parameters(), lr=0.1)
    scope = gradscope.watch(model, optimizer)

    def train() -> None:
        if where == "loop":
            raise UnprintableError
        Fails.apply(model(torch.ones(1, 2))).sum().backward()

    with pytest.raises(UnprintableError):
        scope(train)()
    assert scope._recording.notes == []
    assert scope.events["detail"].iloc[-2] == "UnprintableError"


def test_a_watch_that_fails_at_once_is_no_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    training = everything_at_once()
    break_function(monkeypatch, Census, "add_model")
    with pytest.warns(GradscopeWarning, match=r"nothing is watched.*\[watch-failed\]"):
        scope = gradscope.watch(training.models, training.optimizers)
    with scope:
        seen = [t for number in range(N_STEPS) for t in training.step(number)]
    result = everything_of(training, seen)
    assert [name for name in result if result[name] != unwatched()[name]] == []
    assert "BrokenError: broken on purpose" in repr(scope)
    assert "broken on purpose" in scope._repr_html_()
    with pytest.raises(BrokenError):
        gradscope.watch(training.models, training.optimizers, on_error="raise")


def test_a_watch_that_broke_off_is_left_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = everything_at_once()
    break_function(monkeypatch, Session, "step_ended", 2)
    scope = gradscope.watch(
        training.models, training.optimizers, save=tmp_path / "run", on_finding="warn"
    )

    def train() -> None:
        for number in range(N_STEPS):
            training.step(number)

    with pytest.warns(GradscopeWarning, match="watch-failed"):
        scope(train)()
    run = gradscope.open(tmp_path / "run")
    assert run.about["how_it_ended"] == "finished"
    assert len(run.steps) == 2
    assert any("step_ended failed" in note for note in run.notes)
    assert "gradscope-writer" not in [thread.name for thread in threading.enumerate()]


def test_where_warnings_cannot_be_shown_they_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ValueError("the program's own way to show warnings fails")

    training = everything_at_once()
    break_function(monkeypatch, StateReader, "read")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", broken)
        with gradscope.watch(training.models, training.optimizers) as scope:
            training.step(0)
    assert capsys.readouterr().err.count("[instrument-failed]") == 1
    assert len(scope.steps) == 2


def test_where_there_is_no_standard_error_training_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training = everything_at_once()
    break_function(monkeypatch, StateReader, "read")
    closed = io.StringIO()
    closed.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(sys, "stderr", closed)
        with gradscope.watch(training.models, training.optimizers) as scope:
            training.step(0)
        monkeypatch.undo()
    assert len(scope.steps) == 2


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
