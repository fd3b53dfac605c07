"""What cannot be watched gets an error that names it; a watch switched off does nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from traces import snapshot
from training_loops import adamw_foreach, perceptron, prepared_step
from twins import seed_everything

import gradscope
from gradscope.errors import GradscopeError, ScopeStateError, UsageError

MODEL = perceptron()
OPTIMIZER = SGD(MODEL.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("model", "optimizer", "words"),
    [
        (None, OPTIMIZER, ["model=None", "torch.nn.Module"]),
        (MODEL, None, ["optimizer=None", "torch.optim.Optimizer"]),
        ([], OPTIMIZER, ["model=[]", "torch.nn.Module"]),
        (MODEL, [], ["optimizer=[]", "torch.optim.Optimizer"]),
        (OPTIMIZER, MODEL, ["model=SGD", "torch.nn.Module"]),
        (MODEL, MODEL, ["optimizer=Sequential", "torch.optim.Optimizer"]),
        ([MODEL, None], OPTIMIZER, ["model", "None", "torch.nn.Module"]),
        (MODEL, [OPTIMIZER, "sgd"], ["optimizer", "'sgd'", "torch.optim.Optimizer"]),
        (MODEL, list(MODEL.parameters()), ["optimizer", "Parameter", "torch.optim.Optimizer"]),
        (MODEL, MODEL.parameters(), ["optimizer", "generator", "torch.optim.Optimizer"]),
        (MODEL.parameters(), OPTIMIZER, ["model", "generator", "torch.nn.Module"]),
        (MODEL.state_dict(), OPTIMIZER, ["model", "OrderedDict", "torch.nn.Module"]),
        (nn.Sequential, OPTIMIZER, ["model", "Sequential", "torch.nn.Module"]),
        (MODEL, AdamW, ["optimizer", "AdamW", "torch.optim.Optimizer"]),
        (torch.zeros(3), OPTIMIZER, ["model", "Tensor", "torch.nn.Module"]),
        ("model", OPTIMIZER, ["model='model'", "torch.nn.Module"]),
        (7, OPTIMIZER, ["model=7", "torch.nn.Module"]),
        (nn.ReLU(), OPTIMIZER, ["ReLU", "no parameters"]),
        ([MODEL, nn.Sequential(nn.ReLU())], OPTIMIZER, ["Sequential", "no parameters"]),
    ],
)
def test_what_cannot_be_watched_is_named(model: Any, optimizer: Any, words: list[str]) -> None:
    before = snapshot([MODEL], [OPTIMIZER])
    with pytest.raises(UsageError) as caught:
        gradscope.watch(model, optimizer)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert isinstance(caught.value, GradscopeError)
    assert snapshot([MODEL], [OPTIMIZER]).differences_from(before) == []


def test_a_forgotten_argument_is_pythons_own_error() -> None:
    with pytest.raises(TypeError, match="optimizer"):
        gradscope.watch(MODEL)  # type: ignore[call-arg]


class HasNoRepr:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def test_a_thing_whose_repr_raises_is_still_named() -> None:
    with pytest.raises(UsageError, match="HasNoRepr"):
        gradscope.watch(HasNoRepr(), OPTIMIZER)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 0}, ["every=0"]),
        ({"every": -1}, ["every=-1"]),
        ({"every": 2.5}, ["every=2.5"]),
        ({"every": "2"}, ["every='2'"]),
        ({"every": True}, ["every=True"]),
        ({"budget": 0}, ["budget=0"]),
        ({"budget": -0.1}, ["budget=-0.1"]),
        ({"budget": 1.5}, ["budget=1.5"]),
        ({"budget": float("nan")}, ["budget=nan"]),
        ({"budget": None}, ["budget=None"]),
        ({"budget": "3%"}, ["budget='3%'"]),
        ({"budget": True}, ["budget=True"]),
        ({"on_error": "ignore"}, ["on_error='ignore'", "record", "raise"]),
        ({"on_error": None}, ["on_error=None"]),
        ({"params": 3}, ["params=3"]),
        ({"params": [1]}, ["params", "1"]),
        ({"exclude": 2}, ["exclude=2"]),
        ({"exclude": [None]}, ["exclude", "None"]),
    ],
    ids=str,
)
def test_a_bad_option_is_named_with_its_value(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        gradscope.watch(MODEL, OPTIMIZER, **options)
    for word in words:
        assert word in str(caught.value)


def test_entering_a_scope_that_watches_already_is_an_error_and_goes_on_watching() -> None:
    training = prepared_step(adamw_foreach)
    before = snapshot(training.models, training.optimizers)
    scope = gradscope.watch(training.models, training.optimizers)
    with scope:
        with pytest.raises(ScopeStateError, match="watching already"), scope:
            pass
        with pytest.raises(ScopeStateError, match="watching already"):
            scope.start()
        training.step(1)
    assert len(scope.steps) == 1
    assert snapshot(training.models, training.optimizers).differences_from(before) == []


def test_an_optimizer_that_holds_nothing_of_the_model_can_be_watched() -> None:
    # A finding, not an error: the loop must be able to run.
    seed_everything()
    model, other = perceptron(), perceptron()
    optimizer = SGD(other.parameters(), lr=0.1)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(2, 6)).sum().backward()
            optimizer.step()
    assert len(scope.steps) == 3
    assert set(scope.grads["status"]) == {"none"}
    assert str(scope)


def test_asking_before_anything_was_seen() -> None:
    scope = gradscope.watch(MODEL, OPTIMIZER)
    assert scope.steps.empty
    assert scope.latest == {}
    assert not list(scope.findings)
    assert "no step" in str(scope)
    with pytest.raises(ScopeStateError, match="no graph"):
        scope.graph()
    scope.stop()
    scope.resume()
    scope.pause()


# -- GRADSCOPE=0 ----------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["0", "off", "FALSE", " no "])
def test_a_watch_switched_off_is_a_no_op(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADSCOPE", value)
    training = prepared_step(adamw_foreach)
    before = snapshot(training.models, training.optimizers)
    scope = gradscope.watch(training.models, training.optimizers, every=1)
    with scope as entered:
        assert entered is scope
        assert snapshot(training.models, training.optimizers).differences_from(before) == []
        training.step(1)
        with scope.pause():
            training.step(2)
        scope.resume()
        with scope:  # nothing is running, so nothing is in the way
            training.step(3)
    assert scope.start() is scope
    assert scope.stop() is scope
    assert scope(training.step)(4)
    for name, table in scope.tables.items():
        assert table.empty, name
        assert len(table.columns) > 0
    assert scope.latest == {}
    assert not list(scope.findings)
    assert "GRADSCOPE=0" in str(scope)
    assert scope._repr_html_()
    with pytest.raises(ScopeStateError):
        scope.graph()


@pytest.mark.parametrize("value", ["", "1", "on"])
def test_any_other_value_leaves_it_on(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADSCOPE", value)
    training = prepared_step(adamw_foreach)
    with gradscope.watch(training.models, training.optimizers) as scope:
        training.step(1)
    assert len(scope.steps) == 1


def test_changing_a_table_changes_nothing_that_was_recorded() -> None:
    training = prepared_step(adamw_foreach)
    with gradscope.watch(training.models, training.optimizers) as scope:
        training.step(1)
    steps = scope.steps
    kept = copy.deepcopy(steps)
    steps["loss"] = 0.0
    assert scope.steps.equals(kept)
