from __future__ import annotations

import contextlib
import inspect
import statistics

import pytest
import torch

import gradscope
from gradscope.demo.char_gpt import CharGPT
from gradscope.demo.loops import train, train_without_zero_grad
from gradscope.demo.text import CharText
from gradscope.rules import Severity


def losses(loop, n_steps: int, **sizes: int) -> list[float]:
    torch.manual_seed(0)
    text = CharText()
    model = CharGPT(text.vocab_size, **sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return list(loop(model, optimizer, text.get_batch, n_steps))


def test_thirty_steps_are_enough_to_see_it_learn() -> None:
    loss = losses(train, 30)
    assert loss[0] == pytest.approx(4.7, abs=0.2)
    assert statistics.mean(loss[-5:]) < 3.4


@pytest.mark.slow
def test_a_hundred_steps_bring_the_loss_well_below_three() -> None:
    assert statistics.mean(losses(train, 100)[-10:]) < 2.8


def test_the_same_seed_gives_the_same_losses() -> None:
    assert losses(train, 3) == losses(train, 3)


def test_without_zero_grad_the_loss_falls_at_first_and_the_gradients_pile_up() -> None:
    torch.manual_seed(0)
    text = CharText()
    model = CharGPT(text.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = list(train_without_zero_grad(model, optimizer, text.get_batch, 15))
    assert loss[-1] < loss[0] - 0.5
    # Twelve steps' gradients sum to far more than any one of them.
    piled_up = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    optimizer.zero_grad()
    model(*text.get_batch("train"))[1].backward()
    fresh = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert piled_up > 3 * fresh


@pytest.mark.parametrize(("loop", "codes"), [(train, []), (train_without_zero_grad, ["GS201"])])
def test_only_the_loop_without_zero_grad_has_a_finding(loop, codes: list[str]) -> None:
    torch.manual_seed(0)
    text = CharText()
    model = CharGPT(text.vocab_size, n_layers=1, width=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        list(loop(model, optimizer, text.get_batch, 12))
    told = scope.findings.at_least(Severity.WARNING)
    assert [finding.code for finding in told] == codes


@pytest.mark.parametrize("loop", [train, train_without_zero_grad])
def test_watching_changes_no_bit_of_the_losses_and_weights(loop) -> None:
    def run(watched: bool) -> tuple[list[float], list[torch.Tensor]]:
        torch.manual_seed(0)
        text = CharText()
        model = CharGPT(text.vocab_size, n_layers=2, width=64)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        watch = gradscope.watch(model, optimizer) if watched else contextlib.nullcontext()
        with watch:
            loss = list(loop(model, optimizer, text.get_batch, 12))
        return loss, [parameter.detach() for parameter in model.parameters()]

    plain_loss, plain_weights = run(watched=False)
    loss, weights = run(watched=True)
    assert loss == plain_loss
    assert all(map(torch.equal, weights, plain_weights))


def test_the_two_loops_differ_by_one_line() -> None:
    def body(loop) -> list[str]:
        lines = inspect.getsource(loop).splitlines()
        return lines[next(i for i, line in enumerate(lines) if "for _ in" in line) :]

    proper, broken = body(train), body(train_without_zero_grad)
    assert [line.strip() for line in proper if line not in broken] == [
        "optimizer.zero_grad(set_to_none=True)"
    ]
    assert [line for line in broken if line not in proper] == []
