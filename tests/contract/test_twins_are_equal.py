"""Two runs of the same training are equal, whichever steps of them were recorded in full."""

from __future__ import annotations

from typing import Any

import pytest
from training_loops import LOOPS, every_optimizer_of_torch, with_optimizer
from twins import seed_everything

import gradscope

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


def watched(make: Any, every: int | None, n_steps: int = 7) -> gradscope.Scope:
    seed_everything()
    training = make()
    with gradscope.watch(training.models, training.optimizers, every=every) as scope:
        for step in range(n_steps):
            training.step(step)
    return scope


@pytest.mark.parametrize("make", LOOPS, ids=lambda make: make.__name__)
def test_twins_of_every_loop_are_equal(make: Any) -> None:
    usual = watched(make, 1)
    for every in (1, 2, None):
        found = gradscope.diff(usual, watched(make, every))
        assert not found, found


@pytest.mark.parametrize("kind", every_optimizer_of_torch(), ids=lambda kind: kind.__name__)
def test_twins_of_every_optimizer_are_equal(kind: Any) -> None:
    usual = watched(lambda: with_optimizer(kind), 1)
    found = gradscope.diff(usual, watched(lambda: with_optimizer(kind), 2))
    assert not found, found
    if kind.__name__ != "LBFGS":  # what it does besides is its own affair
        assert found.comparison.compared["update"]
