"""GS306 and GS315: evaluation mode, and batch normalisation that does not do what it is for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
    other = nn.Sequential(nn.Dropout())
    if i == 4:
        model.eval()  # left on
    other.eval()  # which is no part of what is watched


def in_eval_mode_from_the_start(model: nn.Module, i: int) -> None:
    model.eval()


def test_eval_mode_that_was_left_on_is_an_error() -> None:
    findings = judged(evaluated_and_left)
    assert told(findings) == ["GS306"]
    assert findings[0].step_first == 4
    assert findings[0].severity == 2
    assert findings[0].modules == ("1",)
    lines = Path(__file__).read_text("utf-8").splitlines()
    assert lines[findings[0].line - 1].endswith("# left on")


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


def test_a_generator_left_in_eval_mode_beside_a_discriminator_that_trains() -> None:
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    judge = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 1))
    made_by, judged_by = (torch.optim.Adam(m.parameters(), lr=1e-3) for m in (generator, judge))
    with gradscope.watch([generator, judge], [made_by, judged_by], on_error="raise") as scope:
        for i in range(24):
            fake = generator(torch.randn(16, 4))
            judged_by.zero_grad()
            scores = judge(torch.randn(16, 2)), judge(fake.detach())
            (F.softplus(-scores[0]) + F.softplus(scores[1])).mean().backward()
            judged_by.step()
            made_by.zero_grad()
            F.softplus(-judge(fake)).mean().backward()
            made_by.step()
            if i == 6:
                generator.eval()
    assert told(scope.findings) == ["GS306"]
    assert scope.findings[0].modules == ("generator.1",)


def test_parts_called_one_after_the_other_in_eval_mode() -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2))
    decoder = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 3))
    optimizer = torch.optim.SGD([*encoder.parameters(), *decoder.parameters()], lr=0.05)
    encoder.eval()
    decoder.eval()
    with gradscope.watch([encoder, decoder], optimizer, on_error="raise") as scope:
        for _ in range(12):
            x = torch.randn(8, 6)
            optimizer.zero_grad()
            F.cross_entropy(decoder(encoder(x)), (x[:, 0] > 0).long()).backward()
            optimizer.step()
    assert told(scope.findings) == ["GS306"]


def test_a_new_model_per_fold_evaluated_with_gradients_enabled() -> None:
    torch.manual_seed(0)
    session_models = [
        nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        for _ in range(3)
    ]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in session_models]
    with gradscope.watch(session_models, optimizers, on_error="raise") as scope:
        for model, optimizer in zip(session_models, optimizers, strict=True):
            for _ in range(9):
                x = torch.randn(8, 6)
                optimizer.zero_grad()
                F.cross_entropy(model(x), (x[:, 0] > 0).long()).backward()
                optimizer.step()
            model.eval()
            model(torch.randn(8, 6))
    assert told(scope.findings) == []


def test_a_new_normalisation_whose_weights_are_frozen_too_is_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )
    model[1].requires_grad_(False)
    assert told(judged(lambda m, i: m[1].eval() and None, model)) == ["GS315"]


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_pretrained_normalisation_of_standardised_data_that_is_frozen(pretrained: bool) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(2)
    for _ in range(200 if pretrained else 0):
        norm(torch.randn(256, 2, 6))
    model = nn.Sequential(norm, nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    named = told(judged(lambda m, i: m[0].eval() and None, model))
    assert named == ([] if pretrained else ["GS315"])
