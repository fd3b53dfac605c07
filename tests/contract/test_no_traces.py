"""After a watch, however it ends, torch and the program's objects are as they were before."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, lr_scheduler
from traces import Snapshot, snapshot
from training_loops import LOOPS, Encoder, batch, perceptron, prepared_step, sequences
from twins import Training, everything_of, seed_everything

import gradscope

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


class ProgramError(Exception):
    """What the user's program raises."""


def of(training: Training) -> Snapshot:
    return snapshot(training.models, training.optimizers)


# -- the snapshot itself --------------------------------------------------------------------


def test_the_snapshot_sees_hooks_patches_attributes_and_modes() -> None:
    model = perceptron()
    optimizer = AdamW(model.parameters())
    before = snapshot([model], [optimizer])
    original = torch.autograd.graph._engine_run_backward
    try:
        handles = [
            model[0].register_forward_hook(print),
            model[0].weight.register_hook(print),
            nn.modules.module.register_module_forward_pre_hook(print),
            optimizer.register_step_pre_hook(print),
        ]
        model[2].seen = True
        optimizer.seen = True
        torch.autograd.graph._engine_run_backward = lambda *args: original(*args)
        with torch.device("cpu"):
            found = snapshot([model], [optimizer]).differences_from(before)
    finally:
        torch.autograd.graph._engine_run_backward = original
        for handle in handles:
            handle.remove()
    assert found == [
        "function modes",
        "model 0 0.weight: hooks",
        "model 0 0: _forward_hooks",
        "model 0 2: attributes",
        "optimizer 0: _optimizer_step_pre_hooks",
        "optimizer 0: attributes",
        "torch.autograd.graph._engine_run_backward",
        "torch.nn.modules.module._global_forward_pre_hooks",
    ]


def test_while_watching_there_are_hooks_and_patches_but_none_on_the_programs_objects() -> None:
    training = prepared_step(LOOPS[0])
    before = of(training)
    with gradscope.watch(training.models, training.optimizers):
        inside = of(training).differences_from(before)
        training.step(1)
        after_a_step = of(training).differences_from(before)
    assert {
        "torch.autograd._engine_run_backward",
        "torch.autograd.graph._engine_run_backward",
        "torch.optim.optimizer._global_optimizer_pre_hooks",
        "class Optimizer.zero_grad",
        "class Module.zero_grad",
        "class Module.__call__",
        "class GradScaler.step",
        "class LRScheduler.step",
    } <= set(inside)
    for name in (*inside, *after_a_step):
        assert not name.startswith(("model", "optimizer "))


# -- ways to end ----------------------------------------------------------------------------


@pytest.mark.parametrize("make", LOOPS, ids=lambda make: make.__name__)
def test_nothing_is_left_after_any_kind_of_loop(make: Callable[[], Training]) -> None:
    training = prepared_step(make)
    before = of(training)
    for graph in ("first", "every"):
        with gradscope.watch(training.models, training.optimizers, graph=graph):  # type: ignore[arg-type]
            for number in range(1, 4):
                training.step(number)
        assert of(training).differences_from(before) == []


@pytest.mark.parametrize("make", LOOPS, ids=lambda make: make.__name__)
def test_nothing_is_left_after_a_loop_that_never_steps(make: Callable[[], Training]) -> None:
    training = prepared_step(make)
    before = of(training)
    with gradscope.watch(training.models, training.optimizers):
        for model in training.models:
            with pytest.raises(TypeError):
                model()
    assert of(training).differences_from(before) == []


N_LINES = 14


def loop_of_many_lines(
    maybe_raise: Callable[[int], None], training: Training, n_steps: int
) -> None:
    """A loop that asks between any two lines whether it is to raise there."""
    (model,), (optimizer,), (scheduler,) = training.models, training.optimizers, training.others
    for step in range(n_steps):
        maybe_raise(step * N_LINES + 0)
        x, y = batch()
        maybe_raise(step * N_LINES + 1)
        model.eval()
        with torch.no_grad():
            maybe_raise(step * N_LINES + 2)
            model(x)
            maybe_raise(step * N_LINES + 3)
        model.train()
        maybe_raise(step * N_LINES + 4)
        with torch.device("cpu"):
            maybe_raise(step * N_LINES + 5)
            logits = model(x)
            maybe_raise(step * N_LINES + 6)
        loss = F.cross_entropy(logits, y)
        maybe_raise(step * N_LINES + 7)
        optimizer.zero_grad()
        maybe_raise(step * N_LINES + 8)
        loss.backward()
        maybe_raise(step * N_LINES + 9)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        maybe_raise(step * N_LINES + 10)
        nn.utils.clip_grad_value_(model.parameters(), 1.0)
        maybe_raise(step * N_LINES + 11)
        optimizer.step()
        maybe_raise(step * N_LINES + 12)
        scheduler.step()
        maybe_raise(step * N_LINES + 13)


def many_lines() -> Training:
    model = perceptron()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()
    return Training([model], [optimizer], lambda number: [], [scheduler])


@pytest.mark.parametrize("kind", [ProgramError, KeyboardInterrupt])
@pytest.mark.parametrize("line", range(2 * N_LINES))
def test_nothing_is_left_after_an_exception_at_any_line(
    line: int, kind: type[BaseException]
) -> None:
    seed_everything()
    training = many_lines()
    before = of(training)
    error = kind("here")

    def maybe_raise(number: int) -> None:
        if number == line:
            raise error

    scope = gradscope.watch(training.models, training.optimizers)
    with pytest.raises(kind) as caught, scope:
        loop_of_many_lines(maybe_raise, training, 2)
    assert caught.value is error
    assert of(training).differences_from(before) == []
    assert len(scope.steps) >= line // N_LINES
    assert f"{kind.__name__}: here" in set(scope.events["detail"])
    assert str(scope)


class RaisesInBackward(torch.autograd.Function):
    error: BaseException

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise RaisesInBackward.error


class RaisesInForward(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise self.error


class LinearRaises(nn.Linear):
    error: BaseException

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise self.error


class RaisesInEncoder(nn.Module):
    """Raises inside a TransformerEncoder in eval mode, when an armed function mode looks away."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        # With an odd number of heads it calls its parts one by one, so that one of them can raise.
        layer = nn.TransformerEncoderLayer(6, 1, 6, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.encoder.layers[0].linear1 = LinearRaises(6, 6)
        self.encoder.layers[0].linear1.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x[None])[0]


class StepRaisesBefore(SGD):
    error: BaseException

    def step(self, closure: Any = None) -> Any:
        if StepRaisesBefore.error is not None:
            raise StepRaisesBefore.error
        return super().step(closure)


class StepRaisesAfter(SGD):
    error: BaseException

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        raise StepRaisesAfter.error


def in_forward(error: BaseException, model: nn.Sequential, optimizer: Any) -> None:
    model.append(RaisesInForward(error))
    model(batch()[0])


def in_forward_without_grad(error: BaseException, model: nn.Sequential, optimizer: Any) -> None:
    model(batch()[0])
    model.append(RaisesInForward(error))
    with torch.no_grad():
        model(batch()[0])


def in_an_encoder_in_eval_mode(error: BaseException, model: nn.Sequential, optimizer: Any) -> None:
    model(batch()[0])
    RaisesInEncoder(error).eval()(batch()[0])


def in_an_encoder_without_grad(error: BaseException, model: nn.Sequential, optimizer: Any) -> None:
    model(batch()[0])
    with torch.no_grad():
        RaisesInEncoder(error).eval()(batch()[0])


def in_backward(error: BaseException, model: nn.Sequential, optimizer: Any) -> None:
    RaisesInBackward.error = error
    RaisesInBackward.apply(model(batch()[0])).sum().backward()


def in_a_gradient_hook(error: BaseException, model: nn.Sequential, optimizer: Any) -> None:
    def hook(gradient: torch.Tensor) -> None:
        raise error

    out = model(batch()[0])
    out.register_hook(hook)
    out.sum().backward()


def in_autograd_grad(error: BaseException, model: nn.Sequential, optimizer: Any) -> None:
    RaisesInBackward.error = error
    torch.autograd.grad(RaisesInBackward.apply(model(batch()[0])).sum(), list(model.parameters()))


def in_a_checkpoint_recomputed(error: BaseException, model: nn.Sequential, optimizer: Any) -> None:
    calls = []

    def block(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        if len(calls) == 2:
            raise error
        return model(x)

    x = batch()[0].requires_grad_()
    torch.utils.checkpoint.checkpoint(block, x, use_reentrant=True).sum().backward()


def in_a_closure(error: BaseException, model: nn.Sequential, optimizer: Any) -> None:
    def closure() -> Any:
        model(batch()[0]).sum().backward()
        raise error

    optimizer.step(closure)


def in_a_step_of_a_subclass(error: BaseException, model: nn.Sequential, optimizer: Any) -> None:
    StepRaisesBefore.error = error
    model(batch()[0]).sum().backward()
    optimizer.__class__ = StepRaisesBefore
    try:
        optimizer.step()
    finally:
        optimizer.__class__ = SGD


def in_a_step_after_the_update(error: BaseException, model: nn.Sequential, optimizer: Any) -> None:
    StepRaisesAfter.error = error
    model(batch()[0]).sum().backward()
    optimizer.__class__ = StepRaisesAfter
    try:
        optimizer.step()
    finally:
        optimizer.__class__ = SGD


def in_a_step_hook_of_the_program(
    error: BaseException, model: nn.Sequential, optimizer: Any
) -> None:
    def hook(*args: Any) -> None:
        raise error

    handle = optimizer.register_step_pre_hook(hook)
    model(batch()[0]).sum().backward()
    try:
        optimizer.step()
    finally:
        handle.remove()


def in_a_scheduler(error: BaseException, model: nn.Sequential, optimizer: Any) -> None:
    calls: list[int] = []

    def schedule(epoch: int) -> float:
        calls.append(epoch)
        if len(calls) > 1:
            raise error
        return 1.0

    model(batch()[0]).sum().backward()
    # It puts attributes on the optimizer, as it does without a watch.
    scheduler = lr_scheduler.LambdaLR(optimizer, schedule)
    optimizer.step()
    try:
        scheduler.step()
    finally:
        del optimizer.step, optimizer._opt_called
        for group in optimizer.param_groups:
            del group["initial_lr"]


WAYS = (
    in_forward,
    in_forward_without_grad,
    in_an_encoder_in_eval_mode,
    in_an_encoder_without_grad,
    in_backward,
    in_a_gradient_hook,
    in_autograd_grad,
    in_a_checkpoint_recomputed,
    in_a_closure,
    in_a_step_of_a_subclass,
    in_a_step_after_the_update,
    in_a_step_hook_of_the_program,
    in_a_scheduler,
)


@pytest.mark.parametrize("kind", [ProgramError, KeyboardInterrupt])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_nothing_is_left_after_an_exception_inside_torch(
    way: Callable[..., None], kind: type[BaseException]
) -> None:
    seed_everything()
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    before = snapshot([model], [optimizer])
    error = kind("here")
    scope = gradscope.watch(model, optimizer)
    with pytest.raises(kind) as caught, scope:
        way(error, model, optimizer)
    assert caught.value is error
    if isinstance(model[-1], RaisesInForward):
        del model[-1]
    assert snapshot([model], [optimizer]).differences_from(before) == []
    assert str(scope)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_watching_goes_on_after_an_exception_that_the_program_catches(
    way: Callable[..., None],
) -> None:
    seed_everything()
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    before = snapshot([model], [optimizer])
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        with pytest.raises(ProgramError):
            way(ProgramError(), model, optimizer)
        if isinstance(model[-1], RaisesInForward):
            del model[-1]
        for _ in range(3):
            optimizer.zero_grad()
            model(batch()[0]).sum().backward()
            optimizer.step()
    assert snapshot([model], [optimizer]).differences_from(before) == []
    assert list(scope.steps["outcome"])[-3:] == ["stepped"] * 3
    assert list(scope.steps["n_forward"])[-2:] == [1, 1]


def test_nothing_is_left_after_a_generator_is_closed_inside_its_watch() -> None:
    training = prepared_step(LOOPS[0])
    before = of(training)

    def losses() -> Iterator[torch.Tensor]:
        with gradscope.watch(training.models, training.optimizers):
            for number in range(1, 100):
                yield training.step(number)[0]

    running = losses()
    next(running)
    assert of(training).differences_from(before) != []
    running.close()
    assert of(training).differences_from(before) == []


# -- other ways to watch --------------------------------------------------------------------


def test_two_nested_watches_see_the_same_steps_and_leave_nothing() -> None:
    training = prepared_step(LOOPS[0])
    before = of(training)
    with gradscope.watch(training.models, training.optimizers) as outer:
        training.step(1)
        during_outer = of(training).differences_from(before)
        with gradscope.watch(training.models, training.optimizers) as inner:
            training.step(2)
        assert of(training).differences_from(before) == during_outer
        training.step(3)
    assert of(training).differences_from(before) == []
    assert len(outer.steps) == 3
    assert len(inner.steps) == 1
    assert outer.steps["loss"][1] == inner.steps["loss"][0]


def test_two_watches_that_overlap_without_nesting_leave_nothing() -> None:
    training = prepared_step(LOOPS[0])
    before = of(training)
    one = gradscope.watch(training.models, training.optimizers).start()
    training.models[0](batch()[0])
    two = gradscope.watch(training.models, training.optimizers).start()
    training.models[0](batch()[0])
    one.stop()
    training.step(1)
    two.stop()
    assert of(training).differences_from(before) == []
    assert len(two.steps) == 1


def test_the_same_scope_again_goes_on_where_it_stopped() -> None:
    training = prepared_step(LOOPS[0])
    before = of(training)
    scope = gradscope.watch(training.models, training.optimizers)
    for number in range(1, 4):
        with scope:
            training.step(number)
        assert of(training).differences_from(before) == []
        training.step(number)
    assert list(scope.steps["step"]) == [0, 1, 2]
    assert list(scope.steps["outcome"]) == ["stepped"] * 3
    assert not list(scope.findings)


def test_start_and_stop_leave_nothing_and_may_be_repeated() -> None:
    training = prepared_step(LOOPS[0])
    before = of(training)
    scope = gradscope.watch(training.models, training.optimizers)
    scope.stop()
    scope.start()
    training.step(1)
    scope.stop()
    scope.stop()
    assert of(training).differences_from(before) == []
    assert len(scope.steps) == 1


def test_a_paused_watch_has_left_torch_alone() -> None:
    training = prepared_step(LOOPS[0])
    before = of(training)
    with gradscope.watch(training.models, training.optimizers) as scope:
        training.step(1)
        with scope.pause():
            assert of(training).differences_from(before) == []
            training.step(2)
        training.step(3)
        scope.pause()
        scope.pause()
        assert of(training).differences_from(before) == []
        scope.resume()
        scope.resume()
        training.step(4)
        scope.pause()
    assert of(training).differences_from(before) == []
    assert len(scope.steps) == 3


def test_a_watch_that_ends_in_a_pause_has_lasted_no_longer_than_it_did() -> None:
    training = prepared_step(LOOPS[0])
    with gradscope.watch(training.models, training.optimizers) as scope:
        training.step(1)
        scope.pause()
    assert 0 < scope._recording.seconds < 60


def test_a_decorated_function_is_watched_at_each_call() -> None:
    training = prepared_step(LOOPS[0])
    before = of(training)
    scope = gradscope.watch(training.models, training.optimizers)

    @scope
    def train(n_steps: int) -> int:
        """Train."""
        for number in range(n_steps):
            training.step(number)
        return n_steps

    assert train(2) == 2
    assert train.__name__ == "train"
    assert of(training).differences_from(before) == []
    assert train(n_steps=1) == 1
    with pytest.raises(TypeError):
        train("many")
    assert of(training).differences_from(before) == []
    assert len(scope.steps) == 3


# -- threads --------------------------------------------------------------------------------


def in_threads(*functions: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    if errors:
        raise errors[0]


def function_modes() -> list[Any]:
    return list(torch.overrides._get_current_function_mode_stack())


def test_a_watch_in_a_thread_leaves_nothing_in_any_thread() -> None:
    training = prepared_step(LOOPS[0])
    before = of(training)
    seen: list[Any] = []

    def train() -> None:
        with gradscope.watch(training.models, training.optimizers, on_error="raise") as scope:
            for number in range(1, 4):
                training.step(number)
        seen.extend([len(scope.steps), function_modes()])

    in_threads(train)
    assert seen == [3, []]
    assert of(training).differences_from(before) == []


def test_watches_in_two_threads_keep_apart() -> None:
    # Both are in the middle of their first, armed step, and the one that began first ends first.
    meet = threading.Barrier(2, timeout=30)
    modes, steps = {}, {}

    def training_in(name: str, n_before_forward: int, n_before_backward: int) -> None:
        model = nn.Linear(6, 3)
        optimizer = SGD(model.parameters(), lr=0.1)
        with gradscope.watch(model, optimizer, on_error="raise") as scope:
            for _ in range(n_before_forward):
                meet.wait()
            loss = model(torch.ones(2, 6)).sum()
            for _ in range(n_before_backward):
                meet.wait()
            loss.backward()
            optimizer.step()
        modes[name] = function_modes()
        if name == "first":
            meet.wait()
        steps[name] = list(scope.steps["order"])

    in_threads(lambda: training_in("first", 0, 2), lambda: training_in("second", 1, 2))
    assert modes == {"first": [], "second": []}
    assert steps == {name: ["forward, backward, step"] for name in ("first", "second")}


def test_forwards_that_overlap_in_two_threads_are_both_seen() -> None:
    meet = threading.Barrier(2, timeout=30)
    n_forward = {}

    class Waits(nn.Linear):
        n_before, n_inside = 0, 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(self.n_inside):
                meet.wait()
            self.n_inside = 0
            return super().forward(x)

    def training_in(name: str, n_before: int, n_inside: int, n_after: int) -> None:
        model = Waits(6, 3)
        model.n_inside = n_inside
        optimizer = SGD(model.parameters(), lr=0.1)
        with gradscope.watch(model, optimizer, on_error="raise") as scope:
            for _ in range(n_before):
                meet.wait()
            model(torch.ones(2, 6))
            for _ in range(n_after):
                meet.wait()
            for _ in range(2):
                with torch.no_grad():
                    model(torch.ones(2, 6))
                model(torch.ones(2, 6)).sum().backward()
                optimizer.step()
            meet.wait()
        stepped = scope.steps[scope.steps["outcome"] == "stepped"]
        n_forward[name] = list(stepped["n_forward"])

    # first goes in, second goes in, first comes out, second comes out
    in_threads(lambda: training_in("first", 0, 2, 1), lambda: training_in("second", 1, 2, 0))
    assert n_forward == {"first": [2, 1], "second": [2, 1]}


# -- the watched model itself ---------------------------------------------------------------


@pytest.fixture
def armed() -> Iterator[tuple[nn.Module, torch.optim.Optimizer]]:
    """A model in the middle of its first watched step, when most is looked at."""
    seed_everything()
    model = Encoder()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    with gradscope.watch(model, optimizer, on_error="raise"):
        x, padding, y = sequences()
        loss = F.cross_entropy(model(x, padding), y)
        yield model, optimizer
        loss.backward()
        optimizer.step()


def test_the_model_pickles_while_watched(armed: Any) -> None:
    model, optimizer = armed
    again = pickle.loads(pickle.dumps(model))
    assert list(vars(again)) == list(vars(model))
    for part in again.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
    pickle.loads(pickle.dumps(optimizer))


def test_the_model_saves_and_loads_while_watched(armed: Any) -> None:
    model, optimizer = armed
    whole, states = io.BytesIO(), io.BytesIO()
    torch.save(model, whole)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, states)
    for file in (whole, states):
        assert b"gradscope" not in file.getvalue()
        file.seek(0)
    again = torch.load(whole, weights_only=False)
    assert list(again.state_dict()) == list(model.state_dict())
    loaded = torch.load(states, weights_only=True)
    again.load_state_dict(loaded["model"])
    AdamW(again.parameters()).load_state_dict(loaded["optimizer"])


@pytest.mark.parametrize("trained_by", ["its own optimizer", "a copied optimizer"])
def test_a_copy_trained_during_the_watch_leaves_the_scope_alone(trained_by: str) -> None:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, n_steps: int) -> None:
        for _ in range(n_steps):
            x, y = batch()
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    seed_everything()
    model = perceptron()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        loop(model, optimizer, 2)
        if trained_by == "its own optimizer":
            other_model = copy.deepcopy(model)
            other = AdamW(other_model.parameters(), lr=1e-2)
        else:
            other_model, other = copy.deepcopy((model, optimizer))
        loop(other_model, other, 3)
        loop(model, optimizer, 2)
    assert len(scope.steps) == 4
    assert list(scope.steps["n_forward"]) == [1] * 4
    assert list(scope.steps["n_backward"]) == [1] * 4
    assert list(scope.steps["order"].iloc[1:]) == [scope.steps["order"].iloc[0]] * 3
    assert scope.steps["loss"].max() < 3
    assert not list(scope.findings)


def test_a_copy_made_during_the_watch_works_like_the_original() -> None:
    training = prepared_step(LOOPS[0])
    with gradscope.watch(training.models, training.optimizers):
        training.step(1)
        again = copy.deepcopy(training.models[0])
    assert (
        everything_of(Training([again], [], training.step), [])[".models[0].0.weight"]
        == (everything_of(training, [])[".models[0].0.weight"])
    )
