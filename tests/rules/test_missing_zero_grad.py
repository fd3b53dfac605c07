"""GS201: loops that forget to clear, and healthy ones that look alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradscope
from gradscope.rules import Findings

Loop = Callable[[nn.Module, torch.optim.Optimizer, int], None]


def judged(loop: Loop, steps: int = 6) -> Findings:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for i in range(steps):
            loop(model, optimizer, i)
    return scope.findings


def loss_of(model: nn.Module) -> torch.Tensor:
    return F.cross_entropy(model(torch.randn(5, 6)), torch.randint(0, 3, (5,)))


# -- broken ---------------------------------------------------------------------------------


def never_cleared(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
    loss_of(model).backward()
    optimizer.step()


def cleared_every_third_step(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
    if i % 3 == 0:
        optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


def only_one_layer_cleared(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
    model[0].zero_grad()
    loss_of(model).backward()
    optimizer.step()


def clipped_but_never_cleared(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
    loss_of(model).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


def accumulated_and_never_cleared(
    model: nn.Module, optimizer: torch.optim.Optimizer, i: int
) -> None:
    (loss_of(model) / 2).backward()
    if i % 2:
        optimizer.step()


BROKEN: dict[Loop, int] = {
    never_cleared: 4,
    cleared_every_third_step: 4,
    only_one_layer_cleared: 2,
    clipped_but_never_cleared: 4,
    accumulated_and_never_cleared: 4,
}


@pytest.mark.parametrize("loop", BROKEN, ids=lambda loop: loop.__name__)
def test_a_loop_that_uses_gradients_twice_is_named(loop: Loop) -> None:
    findings = judged(loop)
    assert [finding.code for finding in findings] == ["GS201"]
    finding = findings[0]
    assert finding.severity == 2
    assert len(finding.params) == BROKEN[loop]
    assert finding.optimizer == "optimizer"
    assert finding.step_first == 1
    source = Path(finding.file).read_text("utf-8").splitlines()
    assert ".backward()" in source[finding.line - 1]
    assert "optimizer.zero_grad()" in finding.fix


def test_the_optimizer_is_called_what_the_program_calls_it() -> None:
    net = nn.Linear(3, 1)
    my_adam = torch.optim.Adam(net.parameters())
    with gradscope.watch(net, my_adam, on_error="raise") as scope:
        for _ in range(3):
            net(torch.randn(2, 3)).sum().backward()
            my_adam.step()
    assert "my_adam.step()" in scope.findings[0].message
    assert "my_adam.zero_grad()" in scope.findings[0].fix


# -- healthy --------------------------------------------------------------------------------


def step_then_clear_at_the_end(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad()


def clear_at_the_top_after_the_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, i: int
) -> None:
    if i:
        optimizer.step()
    optimizer.zero_grad()
    loss_of(model).backward()


def accumulate(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
    (loss_of(model) / 3).backward()
    if i % 3 == 2:
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def cleared_by_hand_in_a_helper(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None
    loss_of(model).backward()
    optimizer.step()


def several_steps_on_one_gradient(
    model: nn.Module, optimizer: torch.optim.Optimizer, i: int
) -> None:
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()
    optimizer.step()


def used_gradients_are_decayed_on_purpose(
    model: nn.Module, optimizer: torch.optim.Optimizer, i: int
) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_(0.9)
    loss_of(model).backward()
    optimizer.step()


def used_gradients_are_decayed_through_data(
    model: nn.Module, optimizer: torch.optim.Optimizer, i: int
) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad.data.mul_(0.9)
    loss_of(model).backward()
    optimizer.step()


def attack_between_step_and_clearing(
    model: nn.Module, optimizer: torch.optim.Optimizer, i: int
) -> None:
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()
    x = torch.randn(5, 6, requires_grad=True)
    model(x).sum().backward()  # for x.grad; the model's gradients are cleared before its next step


def sharpness_aware(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
    optimizer.zero_grad()
    loss_of(model).backward()
    with torch.no_grad():
        moves = [0.05 * p.grad / (p.grad.norm() + 1e-12) for p in model.parameters()]
        for p, move in zip(model.parameters(), moves, strict=True):
            p.add_(move)
    optimizer.zero_grad()
    loss_of(model).backward()
    with torch.no_grad():
        for p, move in zip(model.parameters(), moves, strict=True):
            p.sub_(move)
    optimizer.step()


def a_layer_is_skipped_at_random(
    model: nn.Module, optimizer: torch.optim.Optimizer, i: int
) -> None:
    optimizer.zero_grad()
    x = torch.randn(5, 6)
    hidden = model[0](x) if i % 2 else torch.zeros(5, 8)
    F.cross_entropy(model[2](hidden), torch.randint(0, 3, (5,))).backward()
    optimizer.step()


HEALTHY: list[Loop] = [
    step_then_clear_at_the_end,
    clear_at_the_top_after_the_step,
    accumulate,
    cleared_by_hand_in_a_helper,
    several_steps_on_one_gradient,
    used_gradients_are_decayed_on_purpose,
    used_gradients_are_decayed_through_data,
    attack_between_step_and_clearing,
    sharpness_aware,
    a_layer_is_skipped_at_random,
]


@pytest.mark.parametrize("loop", HEALTHY, ids=lambda loop: loop.__name__)
def test_a_healthy_loop_that_looks_alike_is_silent(loop: Loop) -> None:
    assert not judged(loop)


def test_two_optimizers_that_share_parameters_and_clear_them_are_silent() -> None:
    torch.manual_seed(0)
    trunk, head_a, head_b = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)
    opt_a = torch.optim.Adam([*trunk.parameters(), *head_a.parameters()])
    opt_b = torch.optim.Adam([*trunk.parameters(), *head_b.parameters()])
    with gradscope.watch([trunk, head_a, head_b], [opt_a, opt_b], on_error="raise") as scope:
        for _ in range(4):
            for optimizer, head in ((opt_a, head_a), (opt_b, head_b)):
                optimizer.zero_grad()
                loss_of(nn.Sequential(trunk, head)).backward()
                optimizer.step()
    assert not scope.findings


def test_a_watch_that_begins_in_the_middle_of_a_healthy_run_is_silent() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def iteration() -> None:
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    for _ in range(3):
        iteration()
    scope = gradscope.watch(model, optimizer, on_error="raise")
    with scope:
        for _ in range(3):
            iteration()
        with scope.pause():
            iteration()
        iteration()
    assert len(scope.steps) == 4
    assert not scope.findings


@pytest.mark.parametrize("clear_d", [True, False])
def test_a_gan_that_clears_through_data(clear_d: bool) -> None:
    torch.manual_seed(0)
    g, d = nn.Linear(4, 6), nn.Linear(6, 1)
    opt_g, opt_d = torch.optim.SGD(g.parameters(), lr=0.1), torch.optim.SGD(d.parameters(), lr=0.1)
    with gradscope.watch([g, d], [opt_g, opt_d], on_error="raise") as scope:
        for _ in range(4):
            if clear_d:
                for p in d.parameters():
                    if p.grad is not None:
                        p.grad.data.zero_()
            d_loss = (d(torch.randn(3, 6)) - d(g(torch.randn(3, 4)).detach())).mean()
            d_loss.backward()  # D
            opt_d.step()
            opt_g.zero_grad()
            d(g(torch.randn(3, 4))).mean().backward()  # G
            opt_g.step()
            losses = scope.steps.set_index("optimizer")["loss"]
            if clear_d:
                assert losses.loc[["opt_d"]].iloc[-1] == pytest.approx(d_loss.item())
    if clear_d:
        assert not scope.findings
        return
    assert [finding.optimizer for finding in scope.findings] == ["opt_d"]
    source = Path(__file__).read_text("utf-8").splitlines()
    assert source[scope.findings[0].line - 1].endswith("# D")
