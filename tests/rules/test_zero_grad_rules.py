"""What is left in `.grad`: accumulation and two optimizers, broken and healthy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradscope

Loop = Callable[[nn.Module, torch.optim.Optimizer, int], None]


def loss_of(model: nn.Module) -> torch.Tensor:
    return F.cross_entropy(model(torch.randn(5, 6)), torch.randint(0, 3, (5,)))


def codes(loop: Loop, steps: int = 24) -> set[str]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradscope.watch(model, optimizer, on_error="raise", every=1) as scope:
        for i in range(steps):
            loop(model, optimizer, i)
    assert not scope.findings.unchecked
    return {finding.code for finding in scope.findings}


def divided(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
    (loss_of(model) / 4).backward()
    if i % 4 == 3:
        optimizer.step()
        optimizer.zero_grad()


def undivided(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
    loss_of(model).backward()
    if i % 4 == 3:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def cleared_inside(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
    optimizer.zero_grad()
    (loss_of(model) / 4).backward()
    if i % 4 == 3:
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()


def tail_dropped(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
    if i % 6 == 0:
        optimizer.zero_grad()
    (loss_of(model) / 4).backward()
    if i % 6 == 3:
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("loop", "code"), [(undivided, "GS204"), (cleared_inside, "GS202"), (tail_dropped, "GS205")]
)
def test_accumulation_broken(loop: Loop, code: str) -> None:
    assert code in codes(loop)


@pytest.mark.parametrize(
    ("is_given_up", "evaluates"), [(True, False), (False, False), (False, True)]
)
def test_groups_that_are_given_up(is_given_up: bool, evaluates: bool) -> None:
    """Two backwards of a group are cleared, for a batch without a loss or for nothing."""
    in_group = 0

    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
        nonlocal in_group
        gives_up = i in (6, 20)
        if gives_up and evaluates:
            with torch.no_grad():
                loss_of(model)
        if not gives_up or is_given_up:
            loss = loss_of(model)
        if gives_up:
            optimizer.zero_grad()
            in_group = 0
            return
        (loss / 4).backward()
        in_group += 1
        if in_group == 4:
            optimizer.step()
            optimizer.zero_grad()
            in_group = 0

    assert ("GS205" in codes(loop, 37)) is not is_given_up


def test_accumulation_healthy() -> None:
    assert not codes(divided) & {"GS201", "GS202", "GS203", "GS204", "GS205"}


@pytest.mark.parametrize("is_divided", [False, True])
def test_accumulation_under_a_scaler(is_divided: bool) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)

    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
        loss = loss_of(model)
        scaler.scale(loss / 4 if is_divided else loss).backward()
        if i % 4 == 3:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    assert ("GS204" in codes(loop)) is not is_divided


def adversaries(order: str, *, detach: bool = True, steps: int = 12) -> dict[str, str]:
    """Train two networks against each other; returns severities by code.

    Args:
        order: what happens in an iteration, by letters: ``z`` and ``Z`` clear the gradients of
            the generator and the discriminator, ``g`` and ``d`` train them.
        detach: whether the discriminator's loss leaves the generator alone.
        steps: how many iterations.
    """
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    discriminator = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))
    g_opt = torch.optim.SGD(generator.parameters(), lr=0.01)
    d_opt = torch.optim.SGD(discriminator.parameters(), lr=0.01)
    bce = F.binary_cross_entropy_with_logits
    ones, zeros = torch.ones(8, 1), torch.zeros(8, 1)

    def train_generator() -> None:
        bce(discriminator(generator(torch.randn(8, 3))), ones).backward()
        g_opt.step()

    def train_discriminator() -> None:
        fake = generator(torch.randn(8, 3))
        fake = fake.detach() if detach else fake
        loss = bce(discriminator(torch.randn(8, 2)), ones) + bce(discriminator(fake), zeros)
        loss.backward()
        d_opt.step()

    do = {
        "z": g_opt.zero_grad,
        "Z": d_opt.zero_grad,
        "g": train_generator,
        "d": train_discriminator,
    }
    nets, optimizers = [generator, discriminator], [g_opt, d_opt]
    with gradscope.watch(nets, optimizers, on_error="raise", every=1) as scope:
        for _ in range(steps):
            for letter in order:
                do[letter]()
    return {finding.code: str(finding.severity) for finding in scope.findings}


def test_leftovers_of_the_generators_loss() -> None:
    assert adversaries("dZzg").get("GS203") == "error"
    assert adversaries("zZgd").get("GS203") == "warning"


def test_discriminator_that_reaches_the_generator() -> None:
    assert adversaries("zZdg", detach=False).get("GS206") == "error"


@pytest.mark.parametrize("order", ["Zdzg", "zgZd", "ZdZdzg"])
def test_adversaries_that_clear_in_time(order: str) -> None:
    assert not adversaries(order).keys() & {"GS201", "GS202", "GS203", "GS206"}


@pytest.mark.parametrize("is_divided", [True, False])
def test_a_sum_that_makes_the_steps_too_large_is_their_cause(is_divided: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=8.0)
    with gradscope.watch(model, optimizer, on_error="raise", every=1) as scope:
        for i in range(96):
            loss = loss_of(model)
            (loss / 8 if is_divided else loss).backward()
            if i % 8 == 7:
                optimizer.step()
                optimizer.zero_grad()
    told = [(f.code, str(f.severity)) for f in scope.findings if f.severity > 0]
    assert told == [("GS505" if is_divided else "GS204", "warning")]
