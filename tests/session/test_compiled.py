"""Models that are compiled: watched from outside, compiled no more often than without us."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradscope
from gradscope.scope import Scope


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for i in range(5):
        optimizer.zero_grad()
        model(torch.full((2, 4), float(i))).pow(2).mean().backward()
        optimizer.step()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler has warnings of its own
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
