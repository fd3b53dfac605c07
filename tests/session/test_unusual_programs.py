"""Programs that use torch in less usual ways: they run as without us, and are told truly."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import gradscope
from gradscope.config import WatchOptions
from gradscope.rules import diagnose
from gradscope.run.recording import Recording
from gradscope.session.session import Session

ROOT = Path(__file__).resolve().parents[2]


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def loss_of(model: nn.Module) -> torch.Tensor:
    return F.cross_entropy(model(torch.randn(3, 4)), torch.tensor([0, 1, 0]))


def test_a_lazy_module_is_watched_from_its_first_forward_on() -> None:
    model = nn.Sequential(nn.LazyLinear(5), nn.LazyLinear(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    assert scope.params["shape"].tolist() == ["(5, 4)", "(5,)", "(2, 5)", "(2,)"]
    assert (scope.grads["status"] == "fresh").all()
    assert (scope.grads["norm"] > 0).all()


def test_a_closure_with_arguments_is_called_with_them() -> None:
    class Twice(torch.optim.SGD):
        def step(self, closure: Callable[..., torch.Tensor]) -> None:  # type: ignore[override]
            with torch.enable_grad():
                closure(backward=True)
            super().step()

    model = small_model()
    optimizer = Twice(model.parameters(), lr=0.1)

    def closure(*, backward: bool) -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        if backward:
            loss.backward()
        return loss

    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(3):
            optimizer.step(closure)
    assert scope.steps["n_fresh"].tolist() == [4, 4, 4]


def test_an_object_passed_to_step_stays_what_it_is() -> None:
    class Objective:
        def __init__(self, model: nn.Module) -> None:
            self.model = model

        def __call__(self) -> torch.Tensor:
            return self.value()

        def value(self) -> torch.Tensor:
            return loss_of(self.model)

    class OfObjective(torch.optim.SGD):
        def step(self, objective: Objective) -> None:  # type: ignore[override]
            self.zero_grad()
            with torch.enable_grad():
                objective.value().backward()
            super().step()

    model = small_model()
    optimizer = OfObjective(model.parameters(), lr=0.1)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(3):
            optimizer.step(Objective(model))
    assert scope.steps["n_fresh"].tolist() == [4, 4, 4]
    assert not scope.findings


def test_tracing_scripting_and_transforms_inside_a_watch() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(3, 4)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        torch.fx.symbolic_trace(model)
        parameters = dict(model.named_parameters())

        def loss(parameters: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(model, parameters, (row,)).sum()

        per_sample = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        for name, p in model.named_parameters():
            p.grad = per_sample[name].mean(0)
        optimizer.step()
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert scope.steps["n_assigned"].tolist() == [4, 0]
    assert scope.steps["n_fresh"].tolist() == [0, 4]
    assert not scope.findings


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_trace_passes_its_own_check_while_watched() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradscope.watch(model, optimizer, on_error="raise"):
        traced = torch.jit.trace(model, torch.randn(3, 4))
        assert torch.equal(traced(torch.ones(1, 4)), model(torch.ones(1, 4)))


def test_modes_of_the_program_see_only_the_program() -> None:
    class Functions(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.seen.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    class Operations(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    for kind in (Functions, Operations):
        seen = []
        for watched in (False, True):
            model = small_model()
            optimizer = torch.optim.AdamW(model.parameters())
            scope = gradscope.watch(model, optimizer, every=1, on_error="raise")
            if watched:
                scope.start()
            with kind() as mode:
                for _ in range(3):
                    optimizer.zero_grad(set_to_none=False)
                    loss_of(model).backward()
                    optimizer.step()
            scope.stop()
            seen.append(mode.seen)
        assert seen[0] == seen[1]


def test_each_thread_has_its_own_watch() -> None:
    found: dict[int, Any] = {}

    def train(number: int) -> None:
        model = nn.Linear(4, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with gradscope.watch(model, optimizer, on_error="raise") as scope:
            for _ in range(50):
                optimizer.zero_grad()
                F.cross_entropy(model(torch.ones(3, 4)), torch.tensor([0, 1, 0])).backward()
                optimizer.step()
        found[number] = scope

    threads = [threading.Thread(target=train, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for scope in found.values():
        assert scope.steps["n_fresh"].tolist() == [2] * 50


def test_run_says_when_two_threads_train_and_watches_no_further(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        """
import threading, torch
from torch import nn
def train():
    net = nn.Sequential(*[nn.Linear(32, 32) for _ in range(20)])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        net(torch.randn(8, 32)).pow(2).mean().backward()
        optimizer.step()
threads = [threading.Thread(target=train) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print("done")
""",
        "utf-8",
    )
    result = subprocess.run(
        [sys.executable, "-m", "gradscope", "run", "train.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "done\n"
    assert "a second thread began to train" in " ".join(result.stderr.split())


def test_models_that_are_gone_leave_gaps_and_the_next_is_watched_all_the_same() -> None:
    session = Session(WatchOptions(on_error="raise"), discovers=True)
    session.start()
    try:
        kept = None
        for number in range(4):  # the second is kept as the best, while others go
            model = small_model()
            optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
            for _ in range(6):
                optimizer.zero_grad()
                loss_of(model).backward()
                optimizer.step()
            if number == 1:
                kept = model
            del model, optimizer
            gc.collect()
    finally:
        session.stop()
    assert kept is not None
    assert session.recording.n_steps == 24
    assert set(session.recording.frame("steps")["n_fresh"]) == {4}


def with_fast_weights(assigned: bool) -> Recording:
    """Adapt a copy of the weights to a task, and move the weights by what came of it."""
    session = Session(WatchOptions(on_error="raise"), discovers=True)
    session.start()
    net = small_model()
    meta = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(6):
        fast = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
        if not assigned:
            fast = {name: fast[name] + p for name, p in net.named_parameters()}
        x, y = torch.randn(3, 4), torch.tensor([0, 1, 0])
        loss = F.cross_entropy(torch.func.functional_call(net, fast, (x,)), y)
        meta.zero_grad()
        loss.backward()
        if assigned:
            for name, p in net.named_parameters():
                p.grad = fast[name].grad
        meta.step()
    session.stop()
    return session.recording


@pytest.mark.parametrize("assigned", [True, False], ids=["assigned", "through the graph"])
def test_a_model_met_in_a_functional_call_has_its_own_parameters(assigned: bool) -> None:
    run = with_fast_weights(assigned)
    assert [model.name for model in run.models] == ["net"]
    assert [e.name for e in run.parameters] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    for entry in run.parameters:
        assert entry.in_model
        assert entry.holders == [(0, 0)]
        assert entry.reached != assigned
    assert not [f for f in diagnose(run) if f.code == "GS102"]


def test_a_loss_function_of_many_examples_at_once_under_vmap() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(5, 4), torch.randn(5, 2)

    def loss(parameters: dict[str, torch.Tensor], row: torch.Tensor, to: torch.Tensor) -> Any:
        out = torch.func.functional_call(model, parameters, (row[None],))
        return F.mse_loss(out[:, :2], to[None, : out.shape[1]])

    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(3):
            loss_of(model)  # with which a closer look begins
            parameters = {name: p.detach() for name, p in model.named_parameters()}
            per_sample = torch.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y)
            for name, p in model.named_parameters():
                p.grad = per_sample[name].mean(0)
            optimizer.step()
    assert scope.steps["n_assigned"].tolist() == [4, 4, 4]
    assert not {f.code for f in scope.findings} & {"GS901"}


def test_an_optimizer_made_later_is_watched_if_it_holds_what_is_watched() -> None:
    model, other = small_model(), small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stranger = torch.optim.SGD(other.parameters(), lr=0.1)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for number in range(12):
            if number == 6:
                model[2] = nn.Linear(5, 2)
                optimizer_of_head = torch.optim.Adam(model[2].parameters(), lr=0.1)
            for each in (optimizer, stranger):
                each.zero_grad()
            (loss_of(model) + loss_of(other)).backward()
            optimizer.step()
            stranger.step()
            if number >= 6:
                optimizer_of_head.step()
                optimizer_of_head.zero_grad()
    steps = scope.steps
    assert steps["optimizer"].value_counts().to_dict() == {"optimizer": 12, "optimizer_of_head": 6}
    assert set(steps.loc[steps["optimizer"] == "optimizer_of_head", "n_fresh"]) == {2}
    assert "GS101" not in {f.code for f in scope.findings}


def test_the_base_of_a_wrapper_is_the_wrappers_own_affair() -> None:
    class Clipped(torch.optim.SGD):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.1)
            self.base = torch.optim.Adam(self.param_groups[0]["params"], lr=0.1)

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.base.step()

    model = small_model()
    optimizer = Clipped(model.parameters())
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(4):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    assert set(scope.steps["optimizer"]) == {"optimizer"}
    assert (scope.steps["update_norm"] > 0).any()


def test_an_optimizer_made_anew_goes_on_with_what_was_computed_before_its_first_step() -> None:
    model = small_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    losses = []
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for number in range(8):
            if number == 4:
                optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    steps = scope.steps
    assert steps["loss"].tolist() == pytest.approx(losses)
    assert steps["optimizer"].tolist() == ["optimizer"] * 4 + ["optimizer#2"] * 4
    assert set(steps["n_backward"]) == set(steps["n_forward"]) == {1}
    assert scope.backwards["step"].tolist() == list(range(8))
