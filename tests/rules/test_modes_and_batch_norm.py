"""GS306 and GS315: evaluation mode, and batch normalisation that does not do what it is for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradscope
from gradscope.rules import Findings

Between = Callable[[nn.Module, int], None]


def judged(
    between: Between, model: nn.Sequential | None = None, batch: int = 8, steps: int = 12
) -> Findings:
    torch.manual_seed(0)
    if model is None:
        model = nn.Sequential(
            nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
        )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for i in range(steps):
            between(model, i)
            x = torch.randn(batch, 2, 6)
            optimizer.zero_grad()
            F.cross_entropy(model(x), (x[:, 0, 0] > 0).long()).backward()
            optimizer.step()
    return scope.findings


def told(findings: Findings) -> list[str]:
    return [f.code for f in findings if f.severity > 0 and f.code in ("GS306", "GS315")]


def nothing(model: nn.Module, i: int) -> None:
    pass


def evaluated_and_left(model: nn.Module, i: int) -> None:
    if i == 4:
        model.eval()


def in_eval_mode_from_the_start(model: nn.Module, i: int) -> None:
    model.eval()


def test_eval_mode_that_was_left_on_is_an_error() -> None:
    findings = judged(evaluated_and_left)
    assert told(findings) == ["GS306"]
    assert findings[0].step_first == 4
    assert findings[0].severity == 2
    assert findings[0].modules == ("1",)


def test_eval_mode_from_the_start_is_a_warning() -> None:
    findings = judged(in_eval_mode_from_the_start)
    assert told(findings) == ["GS306"]
    assert findings[0].severity == 1


def evaluated_and_back(model: nn.Module, i: int) -> None:
    model.eval()
    with torch.no_grad():
        model(torch.randn(4, 2, 6))
    model.train()


def frozen_pretrained_statistics(model: nn.Module, i: int) -> None:
    if i == 0:
        nn.init.normal_(model[1].weight)
    model[1].eval()


@pytest.mark.parametrize("between", [nothing, evaluated_and_back])
def test_training_mode_is_silent(between: Between) -> None:
    assert not told(judged(between))


def test_a_model_without_modes_is_silent() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    assert not told(judged(in_eval_mode_from_the_start, model))


def test_a_pretrained_normalisation_that_is_frozen_is_silent() -> None:
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )
    nn.init.normal_(model[1].weight)
    assert not told(judged(lambda m, i: m[1].eval() and None, model))


def test_a_new_normalisation_that_is_frozen_is_named() -> None:
    findings = judged(lambda m, i: m[1].eval() and None)
    assert told(findings) == ["GS315"]
    assert findings[0].modules == ("1",)


def test_batches_of_one_are_named() -> None:
    assert told(judged(nothing, batch=1)) == ["GS315"]


def test_a_momentum_of_zero_is_named() -> None:
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4, momentum=0.0), nn.Flatten(), nn.Linear(16, 3)
    )
    assert told(judged(nothing, model)) == ["GS315"]
