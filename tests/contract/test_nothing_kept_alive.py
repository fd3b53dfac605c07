"""Watching keeps no graph, no activation, no gradient and no model alive."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW
from training_loops import (
    Residual,
    accumulation,
    adamw_closure,
    adamw_foreach,
    batch,
    gan,
    gradient_penalty,
    lbfgs_closure,
    perceptron,
    scaler_with_skipped_steps,
    sgd_nesterov_foreach,
)
from twins import seed_everything

import gradscope
from gradscope.run.captured_graph import CapturedGraph


class Sentinel:
    """Lives in the metadata of a graph's node, and so exactly as long as the node does."""


class Counter:
    """Counts the nodes of graphs that are still alive."""

    def __init__(self) -> None:
        self.nodes: weakref.WeakSet[Sentinel] = weakref.WeakSet()

    def graph(self, loss: torch.Tensor) -> None:
        pending: list[Any] = [loss.grad_fn]
        while pending:
            node = pending.pop()
            # A leaf's node lives as long as the program's graphs like.
            if node is None or type(node).__name__ == "AccumulateGrad":
                continue
            if "test" not in node.metadata:
                sentinel = node.metadata["test"] = Sentinel()
                self.nodes.add(sentinel)
                pending += [below for below, _ in node.next_functions]


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


LOOPS = (
    adamw_foreach,
    sgd_nesterov_foreach,
    accumulation,
    lbfgs_closure,
    adamw_closure,
    gan,
    gradient_penalty,
    scaler_with_skipped_steps,
)

EVERY = [
    pytest.param(1, id="every step"),
    pytest.param(None, id="by budget", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("make", LOOPS, ids=lambda make: make.__name__)
def test_as_many_tensors_live_at_step_200_as_at_step_20(
    make: Callable[[], Any], every: int | None
) -> None:
    seed_everything()
    training = make()
    graph: Any = "every" if every == 1 else "first"
    with gradscope.watch(
        training.models, training.optimizers, every=every, graph=graph, on_error="raise"
    ):
        for number in range(20):
            training.step(number)
        early = live_tensors()
        for number in range(20, 200):
            training.step(number)
        assert live_tensors() == early


@pytest.mark.parametrize("every", [1, None], ids=["every step", "by budget"])
def test_only_the_graph_of_the_present_step_is_alive(every: int | None) -> None:
    def train(watched: bool) -> list[int]:
        seed_everything()
        model = Residual()
        optimizer = AdamW(model.parameters(), lr=1e-2)
        counter, alive = Counter(), []
        graph: Any = "every" if every == 1 else "first"
        scope = gradscope.watch(model, optimizer, every=every, graph=graph, on_error="raise")
        if watched:
            scope.start()
        gc.disable()  # reference counts alone must free everything
        try:
            for _ in range(40):
                x, y = batch()
                loss = F.cross_entropy(model(x), y)
                counter.graph(loss)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                alive.append(len(counter.nodes))
        finally:
            gc.enable()
            scope.stop()
        return alive

    alive = train(watched=True)
    assert alive[0] > 5
    assert alive == train(watched=False)
    assert alive[0] == alive[-1]


def test_activations_and_gradients_die_as_if_nobody_watched() -> None:
    seed_everything()
    model = perceptron()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    gc.disable()
    try:
        with gradscope.watch(model, optimizer, every=1, on_error="raise"):
            for _ in range(5):
                x, y = batch()
                hidden = model[:3](x)
                loss = F.cross_entropy(model[3:](hidden), y)
                loss.backward()
                optimizer.step()
                dying = [weakref.ref(thing) for thing in (x, hidden, loss, model[0].weight.grad)]
                del x, hidden, loss
                optimizer.zero_grad()
                assert [reference() for reference in dying] == [None] * 4
    finally:
        gc.enable()


def test_a_step_that_raised_keeps_nothing_alive() -> None:
    seed_everything()
    model = perceptron()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    counter = Counter()

    def step() -> None:
        loss = F.cross_entropy(model(batch()[0]), batch()[1])
        counter.graph(loss)
        optimizer.zero_grad()

        def hook(gradient: torch.Tensor) -> None:
            raise KeyError("of the program")

        handle = model[0].weight.register_hook(hook)
        try:
            loss.backward()
        finally:
            handle.remove()

    with gradscope.watch(model, optimizer):
        for _ in range(3):
            with pytest.raises(KeyError):
                step()
            gc.collect()
            assert len(counter.nodes) == 0


def captured_graphs() -> int:
    gc.collect()
    return sum(type(thing) is CapturedGraph for thing in gc.get_objects())


def test_graphs_without_a_step_do_not_pile_up() -> None:
    before = captured_graphs()
    # A loop that forgets its step: what was captured of its graphs must stay bounded too.
    seed_everything()
    model = perceptron()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for number in range(100):
            F.cross_entropy(model(batch()[0]), batch()[1]).backward()
            if number == 40:  # when nobody looks closer any more
                early = live_tensors()
        assert live_tensors() == early
        assert 0 < captured_graphs() - before < 20
    assert set(scope.steps["outcome"]) == {"open"}


@pytest.mark.parametrize("when", ["inside the watch", "after the watch"])
def test_model_and_optimizer_can_go_while_the_scope_stays(when: str) -> None:
    seed_everything()
    model = nn.Sequential(perceptron())
    optimizer = AdamW(model.parameters(), lr=1e-2)
    scope = gradscope.watch(model, optimizer, every=1, on_error="raise")
    references = [weakref.ref(model), weakref.ref(optimizer), weakref.ref(model[0][0].weight)]
    with scope:
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch()[0]), batch()[1])
            loss.backward()
            optimizer.step()
        if when == "inside the watch":
            del model, optimizer, loss
            gc.collect()
            assert [reference() for reference in references] == [None] * 3
            # The scope goes on with other things.
            nn.Linear(2, 2)(torch.zeros(1, 2)).sum().backward()
    if when == "after the watch":
        del model, optimizer, loss
        gc.collect()
        assert [reference() for reference in references] == [None] * 3
    assert (scope.steps["outcome"] == "stepped").sum() == 3
    assert str(scope)
    assert len(scope.params) == 6


def test_a_model_interrupted_in_its_forward_can_go() -> None:
    class Interrupted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyboardInterrupt

    model = Interrupted(2, 2)
    optimizer = AdamW(model.parameters())
    scope = gradscope.watch(model, optimizer)
    with pytest.raises(KeyboardInterrupt), scope:
        model(torch.zeros(1, 2))
    reference = weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert reference() is None
    assert str(scope)


def test_a_scope_that_nobody_holds_goes() -> None:
    model = perceptron()
    scope = gradscope.watch(model, AdamW(model.parameters()))
    with scope:
        model(batch()[0]).sum().backward()
    reference = weakref.ref(scope._session)
    del scope
    gc.collect()
    assert reference() is None
