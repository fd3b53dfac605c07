"""Models that are compiled: watched from outside, compiled no more often than without us."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch import nn

import gradscope
from gradscope.rules.finding import Severity
from gradscope.scope import Scope

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.filterwarnings("default"),  # the compiler has warnings of its own
    pytest.mark.filterwarnings("error:.*global hooks:UserWarning"),  # and this one is of ours
]


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for i in range(5):
        optimizer.zero_grad()
        model(torch.full((2, 4), float(i))).pow(2).mean().backward()
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("compiled_during_the_watch", [False, True])
def test_a_compiled_model_gets_no_extra_frame_and_no_graph_break(
    in_place: bool, compiled_during_the_watch: bool
) -> None:
    from torch._dynamo.testing import CompileCounter
    from torch._dynamo.utils import counters

    frames, scopes, weights = [], [], []
    for watched in (False, True):
        torch._dynamo.reset()
        counters.clear()
        counter = CompileCounter()
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def compiled(model: nn.Module, counter: CompileCounter = counter) -> nn.Module:
            if in_place:
                model.compile(backend=counter)
                return model
            return torch.compile(model, backend=counter)

        run = model if compiled_during_the_watch else compiled(model)
        if watched:
            with gradscope.watch(run, optimizer, on_error="raise") as scope:
                train(compiled(run) if compiled_during_the_watch else run, optimizer)
                frames.append((counter.frame_count, dict(counters["graph_break"])))
            scopes.append(scope)
        else:
            train(compiled(run) if compiled_during_the_watch else run, optimizer)
            frames.append((counter.frame_count, dict(counters["graph_break"])))
        weights.append([p.detach().clone() for p in model.parameters()])
    assert frames[0] == frames[1]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    scope: Scope = scopes[0]
    assert scope.steps["n_forward"].tolist() == [1] * 5
    assert scope.params["param"].tolist() == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert (scope.grads["status"] == "fresh").all()
    assert "unobserved" in scope.events["event"].tolist()
    assert "is compiled: its inside is not seen" in " ".join(str(scope).split())


def steps_of(
    model: nn.Module,
    step: Callable[[], None],
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[torch.Tensor], torch.Tensor] = lambda out: out.square().mean(),
) -> None:
    for i in range(6):
        optimizer.zero_grad()
        loss_of(model(torch.full((2, 4), float(i)))).backward()
        step()


@pytest.mark.parametrize("in_place", [False, True])
def test_the_calls_around_a_compiled_part_are_followed(in_place: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    part = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    if in_place:
        part.compile(backend="eager")
    compiled = part if in_place else torch.compile(part, backend="eager")
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), compiled, nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        steps_of(model, optimizer.step, optimizer)
    calls = scope.calls
    assert sorted(set(calls["module"])) == ["", "0", "1", "2", "3"]
    assert set(calls.loc[calls["module"] == "2", "module_type"]) == {"Sequential"}
    assert sorted(calls["step"].unique()) == [0, 1, 4]
    assert (calls["runs"] == 1).all()
    assert scope.models["compiled"].tolist() == ["2"]
    assert scope._recording.notes == ["part 2 (Sequential) is compiled: its inside is not seen"]
    (graph,) = scope._recording.graphs.values()
    made_by = {graph.calls.path(call) for call in graph.call.tolist() if call >= 0}
    assert made_by >= {"0", "1", "2", "3"}
    assert [f.code for f in scope.findings if f.severity is not Severity.INFO] == []


def test_a_module_that_is_compiled_between_two_looks_was_not_left_out() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(10):
            steps_of(model, optimizer.step, optimizer)
            model[1].compile(backend="eager")
    assert "1.0" in set(scope.calls["module"])
    assert [f.code for f in scope.findings if f.severity is not Severity.INFO] == []


def test_a_compiled_critic_beside_a_generator_that_is_not() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    generator, critic = nn.Linear(3, 4), torch.compile(small_model(), backend="eager")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (generator, critic)]
    with gradscope.watch([generator, critic], optimizers, on_error="raise") as scope:
        for _ in range(5):
            fake = generator(torch.randn(2, 3))
            for loss, optimizer in zip(
                (critic(fake).mean(), critic(fake.detach()).square().mean()),
                optimizers,
                strict=True,
            ):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    assert set(scope.calls["module"]) == {"generator", "critic"}
    assert scope._recording.notes == ["Sequential is compiled: its inside is not seen"]


def test_a_compiled_step_is_seen_from_outside() -> None:
    weights = []
    for watched in (False, True):
        torch._dynamo.reset()
        model = small_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        step = torch.compile(optimizer.step, backend="eager")
        scope = gradscope.watch(model, optimizer, every=1, on_error="raise")
        if watched:
            scope.start()
        steps_of(model, step, optimizer)
        scope.stop()
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert scope.steps["order"].tolist() == ["zero_grad, forward, backward, step"] * 6
    assert (scope.updates["residual"] < 1e-3).all()
    assert (scope.grads["status"] == "fresh").all()
    assert scope._recording.notes == []


def test_a_step_inside_of_compiled_code_is_said_to_be_unseen() -> None:
    torch._dynamo.reset()
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def update() -> None:
        optimizer.step()

    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(4):
            steps_of(model, torch.compile(update, backend="eager"), optimizer)
    name = f"{test_a_step_inside_of_compiled_code_is_said_to_be_unseen.__name__}.<locals>.update"
    assert scope._recording.notes == [
        f"{name} is compiled: its inside is not seen",
        "compiled code moves the weights of optimizer: these updates are not seen; those of "
        "torch.compile(optimizer.step) are",
    ]
    assert [f.code for f in scope.findings if f.severity is not Severity.INFO] == []


def test_a_compiled_step_that_raises_is_abandoned() -> None:
    torch._dynamo.reset()
    model = small_model()

    class Raises(torch.optim.SGD):
        fails = True

        def step(self, closure: object = None) -> None:
            if self.fails:
                raise ValueError("of the program")
            super().step()

    optimizer = Raises(model.parameters(), lr=0.1)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        with pytest.raises(ValueError, match="of the program"):
            steps_of(model, torch.compile(optimizer.step, backend="eager"), optimizer)
        optimizer.fails = False
        steps_of(model, optimizer.step, optimizer)
    assert scope.steps["outcome"].tolist() == ["abandoned"] + ["stepped"] * 6


def test_a_function_that_is_compiled_first_in_an_armed_step(tmp_path: Path) -> None:
    """Under ``gradscope run``, where the compiler is imported long after the watch has begun."""
    (tmp_path / "train.py").write_text(
        """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loss_of = None
for _ in range(6):
    optimizer.zero_grad()
    out = model(torch.randn(3, 4))
    if loss_of is None:
        @torch.compile(backend="aot_eager")
        def loss_of(out):
            loss = out.square().mean()
            torch._dynamo.graph_break()
            return loss + out.abs().mean()
    loss_of(out).backward()
    optimizer.step()
from torch._dynamo.utils import counters
print(model.weight.tolist(), counters["frames"]["total"])
""",
        "utf-8",
    )
    results = [
        subprocess.run(
            [sys.executable, *how, "train.py"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        for how in ([], ["-m", "gradscope", "run"])
    ]
    plain, watched = results
    assert plain.stdout, plain.stderr
    assert watched.stdout == plain.stdout, watched.stderr
    assert "loss_of is compiled: its inside is not seen" in " ".join(watched.stderr.split())


def test_what_lies_in_a_compiled_part_is_not_said_to_have_never_run() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    def message(*, compiled: bool) -> str:
        torch._dynamo.reset()
        part = Half()
        if compiled:
            part.compile(backend="eager")
        model = nn.Sequential(nn.Linear(4, 4), part, nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with gradscope.watch(model, optimizer, on_error="raise") as scope:
            steps_of(model, optimizer.step, optimizer)
        (found,) = [f.message for f in scope.findings if f.code == "GS105"]
        return found

    assert "1.unused never ran" in message(compiled=False)
    assert "never ran" not in message(compiled=True)


def test_a_capture_follows_the_calls_around_a_compiled_part() -> None:
    torch._dynamo.reset()
    part = torch.compile(small_model(), backend="eager")
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), part)
    with gradscope.capture(model, lines=True) as captured:
        loss = model(torch.ones(2, 4)).sum()
    calls = captured.graph(loss).captured.calls
    assert [calls.path(call) for call in range(len(calls))] == ["", "0", "1", "2"]
