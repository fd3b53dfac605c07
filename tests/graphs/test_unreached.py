"""What does not lead to the loss: of real models, and of random trees of calls."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from graph_makers import Forward, Value, architecture, captured_forward
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradscope.graphs.unreached import Unreached, operations_made, unreached
from gradscope.run.captured_graph import CapturedGraph, Registered

SEEDS = st.integers(0, 2**32 - 1)


class Parts(nn.Module):
    """Layers ``a`` to ``e``, with whatever forward a test gives it."""

    def __init__(self, forward: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        for name in "abcde":
            setattr(self, name, nn.Linear(3, 3))
        self.pair = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Tanh(), nn.Linear(3, 3)))
        self.scale = nn.Parameter(torch.ones(3))
        self._forward = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._forward(self, x)


def told(
    forward: Callable[[Any, torch.Tensor], torch.Tensor], *, frozen: str = ""
) -> dict[str, Unreached]:
    """What is told of a model besides the layers that a test does not use."""
    model = Parts(forward)
    for name in frozen.split():
        model.get_submodule(name).requires_grad_(False)
    captured = captured_forward(model, lambda: model(torch.ones(2, 3)).sum())
    found = unreached(captured)
    assert len({each.path for each in found}) == len(found)
    return {each.path: each for each in found}


def reasons(found: dict[str, Unreached]) -> dict[str, str]:
    return {path: each.why for path, each in found.items()}


NOT_CALLED = dict.fromkeys(("a", "b", "c", "d", "e", "pair"), "not called") | {"scale": "unused"}


def besides(found: dict[str, Unreached], *called: str) -> dict[str, str]:
    """The reasons, but for what was not expected to be called."""
    rest = reasons(found)
    for path, why in NOT_CALLED.items():
        if path not in called:
            assert rest.pop(path) == why
    return rest


def test_all_that_leads_to_the_loss_is_not_told() -> None:
    def everything(model: Any, x: torch.Tensor) -> torch.Tensor:
        for name in "abcde":
            x = getattr(model, name)(x)
        return model.pair(x) * model.scale

    assert told(everything) == {}


def test_a_detached_module_was_cut_off_with_all_its_parameters_and_its_takers() -> None:
    found = told(lambda model, x: model.b(model.a(x).detach()) + model.c(x))
    assert besides(found, "a", "b", "c") == {"a": "cut off"}
    a = found["a"]
    assert (a.what, a.why, a.taken_by) == ("Linear", "cut off", ("b",))
    assert [param.names for param in a.params] == [("a.weight",), ("a.bias",)]
    assert a.n_operations == 2


def test_a_module_called_without_gradients() -> None:
    def forward(model: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = model.a(x)
        return model.b(y) + model.c(y)

    found = told(forward)
    assert besides(found, "a", "b", "c") == {"a": "no grad"}
    assert found["a"].taken_by == ("b", "c")
    assert found["a"].n_operations == 0


def test_a_result_that_nobody_puts_into_the_loss() -> None:
    def forward(model: Any, x: torch.Tensor) -> torch.Tensor:
        model.b(model.a(x))
        return model.a(x)

    found = told(forward)
    assert besides(found, "a", "b") == {"b": "cut off"}
    assert found["b"].taken_by == ()


@pytest.mark.parametrize("reached", [0, 1, 2])
def test_a_module_is_reached_if_one_of_its_calls_is(reached: int) -> None:
    def forward(model: Any, x: torch.Tensor) -> torch.Tensor:
        results = []
        for number in range(3):
            with torch.set_grad_enabled(number == reached or number == 1):
                results.append(model.a(x))
        return results[reached]

    assert besides(told(forward), "a") == {}


def test_a_module_with_two_calls_that_are_both_cut_is_told_once() -> None:
    found = told(lambda model, x: model.b(model.a(model.a(x)).detach()))
    assert besides(found, "a", "b") == {"a": "cut off"}


def test_of_modules_inside_of_each_other_the_outermost_is_told() -> None:
    found = told(lambda model, x: model.b(model.pair(x).detach()))
    assert besides(found, "b", "pair") == {"pair": "cut off"}
    assert len(found["pair"].params) == 4
    assert found["pair"].n_operations == 5


def test_frozen_modules() -> None:
    found = told(lambda model, x: model.b(model.a(x)), frozen="a")
    assert besides(found, "a", "b") == {"a": "frozen"}
    assert len(found["a"].params) == 2


def test_a_frozen_module_through_which_a_gradient_passes_has_frozen_parameters() -> None:
    found = told(lambda model, x: model.b(model.a(x)), frozen="b")
    assert besides(found, "a", "b") == {"b.weight": "frozen", "b.bias": "frozen"}
    assert found["b.bias"].what == "parameter"


def test_a_frozen_module_under_no_grad_is_frozen_in_the_first_place() -> None:
    def forward(model: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = model.a(x)
        return model.b(x)

    assert besides(told(forward, frozen="a"), "a", "b") == {"a": "frozen"}


def test_a_parameter_whose_own_module_leads_to_the_loss_is_unused() -> None:
    def everything_but_scale(model: Any, x: torch.Tensor) -> torch.Tensor:
        for name in "abcde":
            x = getattr(model, name)(x)
        return model.pair(x)

    found = told(everything_but_scale)
    assert reasons(found) == {"scale": "unused"}
    assert found["scale"].call == -1


def test_modules_in_a_container_that_is_only_indexed() -> None:
    found = told(lambda model, x: model.pair[0](x))
    assert besides(found, "pair") == {"pair.1": "not called"}
    assert len(found["pair.1"].params) == 2


def test_a_parameter_used_by_its_owner_though_its_module_never_ran() -> None:
    found = told(lambda model, x: x @ model.a.weight)
    assert besides(found, "a") == {"a.bias": "unused"}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_what_runs_inside_of_a_checkpoint_is_not_told(use_reentrant: bool) -> None:
    def forward(model: Any, x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(model.a, x.requires_grad_(), use_reentrant=use_reentrant)
        x = checkpoint(model.pair, x, use_reentrant=use_reentrant)
        return model.b(x)

    assert besides(told(forward), "a", "b", "pair") == {}


class Doubled(torch.autograd.Function):
    """Runs a module in its forward, without gradients, as reversible networks do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: nn.Module) -> torch.Tensor:
        return 2 * module(x)

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> Any:
        return 2 * grad[0], None


def test_what_runs_inside_of_a_custom_function_may_be_reached() -> None:
    def forward(model: Any, x: torch.Tensor) -> torch.Tensor:
        return Doubled.apply(model.b(x), model.pair)

    assert besides(told(forward), "b", "pair") == {}


def test_what_ran_without_gradients_beside_a_custom_function_is_told() -> None:
    def forward(model: Any, x: torch.Tensor) -> torch.Tensor:
        x = Doubled.apply(model.b(x), model.pair)
        x = x * 2
        with torch.no_grad():
            y = model.a(x)
        return model.c(y) + x

    assert besides(told(forward), "a", "b", "c", "pair") == {"a": "no grad"}


def test_the_detached_encoder_of_the_examples() -> None:
    found = {each.path: each for each in unreached(architecture("detached_encoder"))}
    assert reasons(found) == {
        "encoder": "cut off",
        "aux": "cut off",
        "unused": "not called",
        "output.weight": "frozen",
        "output.bias": "frozen",
    }
    assert found["encoder"].taken_by == ("decoder", "aux")


@pytest.mark.parametrize(
    "name", ["gpt2", "resnet", "lstm_classifier", "tied_autoencoder", "gradient_penalty"]
)
def test_nothing_is_told_of_models_that_learn(name: str) -> None:
    assert unreached(architecture(name)) == []


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_nothing_is_told_of_a_checkpointed_model(use_reentrant: bool) -> None:
    captured = architecture("checkpointed_gpt2", n_layers=3, use_reentrant=use_reentrant)
    assert unreached(captured) == []


# -- graphs written by hand ---------------------------------------------------------------------


def test_without_a_record_of_calls_parameters_are_told() -> None:
    forward = Forward()
    loss = forward.op("Mm", forward.leaf("a.w", "tied.w"), forward.leaf())
    registered = [
        Registered(("a.w",), (2, 3), True),
        Registered(("other", "tied.w"), (2, 3), True),
        Registered(("b.w",), (2, 3), True),
        Registered(("c.w",), (2, 3), False),
    ]
    found = unreached(forward.captured(loss, registered=registered))
    assert [(each.path, each.what, each.why) for each in found] == [
        ("b.w", "parameter", "unused"),
        ("c.w", "parameter", "frozen"),
    ]


def test_without_a_record_of_calls_a_custom_function_may_reach_anything() -> None:
    forward = Forward()
    loss = forward.op("Loss", forward.leaf("a.w"))
    registered = [Registered(("b.w",), (), True), Registered(("c.w",), (), False)]
    captured = forward.captured(loss, registered=registered)
    renamed = tuple(op.replace("LossBackward0", "LossBackward") for op in captured.ops)
    object.__setattr__(captured, "ops", renamed)
    assert [each.path for each in unreached(captured)] == ["c.w"]


def test_leaves_without_names_alone_tell_nothing_of_trainable_parameters() -> None:
    forward = Forward()
    loss = forward.op("Loss", forward.leaf())  # a shard stands in for the parameters
    registered = [Registered(("w",), (2, 3), True), Registered(("frozen",), (2, 3), False)]
    found = unreached(forward.captured(loss, registered=registered))
    assert [each.path for each in found] == ["frozen"]


def test_a_graph_without_nodes_reaches_nothing() -> None:
    forward = Forward()
    with forward.module("", "Model"), forward.module("a", "A"):
        forward.op("Waste", forward.leaf("a.w"))
    found = unreached(forward.captured(registered=[Registered(("a.w",), (), True)]))
    assert [(each.path, each.why) for each in found] == [("", "cut off")]


def test_what_a_taker_inside_of_a_taker_was_given_is_told_of_the_outer_one() -> None:
    forward = Forward()
    with forward.module("", "Model"):
        with forward.module("a", "A") as giver, forward.module("a.inner", "I") as inner:
            forward.op("Waste", forward.leaf("a.inner.w"))
        with forward.module("b", "B") as outer_taker, forward.module("b.c", "I") as inner_taker:
            loss = forward.op("Loss", forward.leaf("b.c.w"))
    feeds = [(giver, outer_taker), (giver, inner_taker), (inner, giver), (inner, outer_taker)]
    (found,) = unreached(
        forward.captured(loss, feeds=feeds, registered=[Registered(("a.inner.w",), (), True)])
    )
    assert (found.path, found.taken_by) == ("a", ("b",))


@settings(deadline=None, max_examples=100)
@given(SEEDS)
def test_every_missing_parameter_is_told_once_and_no_other(seed: int) -> None:
    captured, names = random_calls(seed)
    found = unreached(captured)
    reached = {name for names in captured.params for name in names}
    listed = [name for each in found for param in each.params for name in param.names]
    assert sorted(listed) == sorted(set(names) - reached)
    # Who is told lies in no other that is told, and none of its calls leads to the loss.
    modules = [each for each in found if each.what != "parameter"]
    for each in modules:
        others = [other.path for other in modules if other is not each]
        assert not any(each.path.startswith(other + ".") for other in others)
        assert not any(name.startswith(each.path + ".") for name in reached)
        if each.why == "cut off":
            assert each.n_operations > 0
    frozen = {param.names[0] for param in captured.registered if not param.requires_grad}
    for each in found:
        trainable = {param.names[0] for param in each.params} - frozen
        assert not (each.why == "frozen" and trainable)
        assert not (each.why == "unused" and not trainable)


def random_calls(seed: int) -> tuple[CapturedGraph, list[str]]:
    """A tree of modules, each with a parameter, called or not, and detached here and there."""
    random = Random(seed)
    forward = Forward()
    registered: list[Registered] = []

    def call(path: str, depth: int, *, grad: bool, is_called: bool) -> None:
        nonlocal value
        requires_grad = random.random() < 0.8
        name = f"{path}.w".removeprefix(".")
        registered.append(Registered((name,), (2, 3), requires_grad))
        inner = [f"{path}.{i}".removeprefix(".") for i in range(random.choice([0, 0, 1, 2, 3]))]
        if not is_called:
            for each in inner if depth else ():
                call(each, depth - 1, grad=False, is_called=False)
            return
        with forward.module(path, f"M{depth}", grad=grad):
            if grad and (requires_grad or value):
                inputs = [forward.leaf(name)] if requires_grad else []
                value = forward.op("Mm", *([value] if value else []), *inputs)
            for each in inner if depth else ():
                is_off = random.random() < 0.1
                call(each, depth - 1, grad=grad and not is_off, is_called=random.random() < 0.9)
                if random.random() < 0.15:
                    value = None  # detached

    value: Value | None = None
    call("", 3, grad=True, is_called=True)
    names = [param.names[0] for param in registered]
    if value is None:
        value = forward.op("Loss", forward.leaf("last"))
    return forward.captured(value, registered=registered), names


@settings(deadline=None, max_examples=50)
@given(SEEDS)
def test_operations_are_counted_with_those_of_inner_calls(seed: int) -> None:
    captured, _ = random_calls(seed)
    made, got = operations_made(captured)
    calls = captured.calls
    for call in range(len(calls)):
        numbers = captured.sequence_nr[captured.param < 0]
        inside = (numbers >= calls.first[call]) & (numbers < calls.last[call])
        assert got[call] == inside.sum()
        assert made[call] >= got[call]


def test_thousands_of_modules_and_parameters_are_told_of() -> None:
    forward = Forward()
    registered = []
    with forward.module("", "Model"):
        value = forward.op("Start", forward.leaf("w"))
        for number in range(2000):
            path = f"layers.{number}"
            with forward.module(path, "Layer"):
                made = forward.op("Mm", value, forward.leaf(f"{path}.w"))
            value = made if number % 2 else value
            registered += [Registered((f"{path}.{name}",), (), True) for name in ("w", "unused")]
    found = unreached(forward.captured(value, registered=registered))
    assert [each.why for each in found] == ["cut off"] * 1000 + ["unused"] * 1000
