"""Training with and without a watch is the same to the last bit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from training_loops import (
    ALSO_IN_THE_MATRIX,
    LOOPS,
    TRANSFORMERS,
    Encoder,
    attention_evaluated_without_grad,
    sequences,
)
from twins import Training, differing, everything_of, seed_everything

import gradscope

# Said once a process by torch's own fast path.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")

Make = Callable[[], Training]

# What tests/matrix looks at for some steps is looked at for fifty in the slow tier only.
FIFTY_STEPS = [
    pytest.param(
        make,
        every,
        id=f"{make.__name__}-{how}",
        marks=pytest.mark.slow if every is None or make in ALSO_IN_THE_MATRIX else (),
    )
    for make in LOOPS
    for every, how in ((1, "every step"), (None, "by budget"))
]


def run(training: Training, n_steps: int) -> list[torch.Tensor]:
    return [seen for number in range(n_steps) for seen in training.step(number)]


@functools.cache
def unwatched(make: Make, n_steps: int) -> dict[str, bytes]:
    seed_everything()
    training = make()
    return everything_of(training, run(training, n_steps))


def watched(
    make: Make, n_steps: int, every: int | None
) -> tuple[dict[str, bytes], gradscope.Scope, Training]:
    seed_everything()
    training = make()
    # Under "raise" nothing can pass because an instrument has failed and fallen silent.
    # Whoever records every step also captures every graph.
    graph: Any = "every" if every == 1 else "first"
    with gradscope.watch(
        training.models, training.optimizers, every=every, graph=graph, on_error="raise"
    ) as scope:
        seen = run(training, n_steps)
    return everything_of(training, seen), scope, training


@pytest.mark.parametrize(("make", "every"), FIFTY_STEPS)
def test_fifty_steps_leave_the_same_bits(make: Make, every: int | None) -> None:
    result, scope, training = watched(make, 50, every)
    assert differing(unwatched(make, 50), result) == []
    assert len(scope.steps) == 50 * training.expected_steps
    assert scope._recording.notes == []


@pytest.mark.parametrize("every", [1, None], ids=["every step", "by budget"])
@pytest.mark.parametrize(
    ("make", "kernel"),
    [
        *((make, "_transformer_encoder_layer_fwd") for make in TRANSFORMERS),
        (attention_evaluated_without_grad, "_native_multi_head_attention"),
    ],
    ids=lambda of: getattr(of, "__name__", None),
)
def test_the_fast_paths_of_torch_stay_in_use(
    make: Make, kernel: str, every: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fast_path = getattr(torch, kernel)

    def counted(*args: object, **kwargs: object) -> Any:
        calls.append(torch.is_grad_enabled())
        return fast_path(*args, **kwargs)

    monkeypatch.setattr(torch, kernel, counted)
    seed_everything()
    run(make(), 5)
    without = calls.copy()
    calls.clear()
    watched(make, 5, every)
    assert len(without) >= 5
    assert calls == without


class DoesNothing(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


def test_a_function_mode_would_change_the_bits_of_a_transformer() -> None:
    # What makes the tests above worth something: the fast path and the other one do differ.
    seed_everything()
    model = Encoder().eval()
    x, _, _ = sequences()
    with torch.no_grad():
        fast = model(x)
        with DoesNothing():
            slow = model(x)
    assert not torch.equal(fast, slow)


def test_the_scaler_loops_do_skip_steps() -> None:
    for make in LOOPS:
        if not make.__name__.startswith("scaler"):
            continue
        _, scope, _ = watched(make, 20, None)
        outcomes = scope.steps["outcome"].value_counts()
        assert outcomes["skipped"] >= 4
        assert outcomes["stepped"] >= 10


def test_the_comparison_sees_a_single_bit() -> None:
    seed_everything()
    training = LOOPS[0]()
    before = everything_of(training, [])
    with torch.no_grad():
        weight = training.models[0][0].weight
        weight.view(torch.int32)[0, 0] ^= 1
    assert differing(before, everything_of(training, [])) == [".models[0].0.weight"]
    torch.rand(1)
    assert ".torch rng" in differing(before, everything_of(training, []))


def test_tables_read_in_the_middle_of_the_loop_change_nothing() -> None:
    make = LOOPS[0]
    seed_everything()
    training = make()
    seen = []
    with gradscope.watch(training.models, training.optimizers, on_error="raise") as scope:
        for number in range(50):
            seen += training.step(number)
            if number % 10 == 0:
                assert str(scope)
                assert scope.latest["step"] == number
                assert len(scope.tables["steps"]) == number + 1
    assert differing(unwatched(make, 50), everything_of(training, seen)) == []


def test_a_pause_in_the_middle_changes_nothing() -> None:
    make = LOOPS[0]
    seed_everything()
    training = make()
    seen = []
    with gradscope.watch(training.models, training.optimizers, on_error="raise") as scope:
        for number in range(50):
            if number == 20:
                scope.pause()
            if number == 30:
                scope.resume()
            seen += training.step(number)
    assert differing(unwatched(make, 50), everything_of(training, seen)) == []
    assert len(scope.steps) == 40
