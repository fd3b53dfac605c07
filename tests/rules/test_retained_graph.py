"""GS305: graphs that are kept or walked again, and healthy loops that look alike."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradscope
from gradscope.rules import Findings


def judged(keep: str, steps: int = 40) -> Findings:
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    total: torch.Tensor | float = 0.0
    history: list[torch.Tensor] = []
    recent: deque[torch.Tensor] = deque(maxlen=10)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for i in range(steps):
            out = model(torch.randn(5, 6)).relu()
            loss = F.cross_entropy(out, torch.zeros(5, dtype=torch.long))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if keep == "sum":
                total = total + loss
            elif keep == "list":
                history.append(loss)
            elif keep == "predictions":
                history.append(out)
            elif keep == "list, cleared every ten":
                history = [] if i % 10 == 0 else [*history, loss]
            elif keep == "the last ten":
                recent.append(loss)
            else:
                total = total + loss.item()
                history += [loss.detach(), out.detach()]
    return scope.findings


@pytest.mark.parametrize("keep", ["sum", "list", "predictions"])
def test_a_loss_that_is_kept_is_named(keep: str) -> None:
    findings = judged(keep)
    assert [f.code for f in findings] == ["GS305"]
    assert findings[0].severity == 2
    assert findings[0].evidence["graphs_alive"] >= 38


@pytest.mark.parametrize("keep", ["list, cleared every ten", "the last ten", "values"])
def test_a_few_graphs_or_none_are_silent(keep: str) -> None:
    assert not [f for f in judged(keep) if f.code == "GS305"]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.RNNCell(4, 8), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.cell(x, h)
        return self.head(h), h


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("retain", [True, False])
def test_a_hidden_state_that_is_carried_over(detach: bool, retain: bool) -> None:
    torch.manual_seed(0)
    model = Recurrent()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    h = torch.zeros(2, 8)
    scope = gradscope.watch(model, optimizer, on_error="raise")
    with scope:
        try:
            for _ in range(6):
                out, h = model(torch.randn(2, 4), h.detach() if detach else h)
                optimizer.zero_grad()
                out.pow(2).mean().backward(retain_graph=retain)
                optimizer.step()
        except RuntimeError:
            assert not detach
    told = [f.code for f in scope.findings if f.severity > 0]
    assert told == ([] if detach else ["GS305"])


def test_a_state_whose_graph_grows_without_an_error() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 3, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    state = torch.zeros(3)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(20):
            state = state * 0.5 + model(torch.randn(3)).sum()
            optimizer.zero_grad()
            state.sum().backward(retain_graph=True)
            optimizer.step()
    assert "GS305" in [f.code for f in scope.findings]
