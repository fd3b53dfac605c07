"""GS407 to GS410: clipping in the wrong place or to nothing, and in its place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradscope

Loop = Callable[[nn.Module, torch.optim.Optimizer, torch.amp.GradScaler], None]


def judged(loop: Loop, steps: int = 8) -> gradscope.rules.Findings:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(steps):
            loop(model, optimizer, scaler)
    return scope.findings


def codes(loop: Loop) -> list[str]:
    return [finding.code for finding in judged(loop) if finding.severity > 0]


def loss_of(model: nn.Module) -> torch.Tensor:
    return F.cross_entropy(model(torch.randn(5, 6)), torch.randint(0, 3, (5,)))


def clip(model: nn.Module, limit: float = 1.0) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), limit)


# -- broken ---------------------------------------------------------------------------------


def scaled_gradients_are_clipped(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    optimizer.zero_grad()
    scaler.scale(loss_of(model)).backward()
    clip(model)
    scaler.step(optimizer)
    scaler.update()


def clipped_after_the_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()
    clip(model)


def clipped_before_backward(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    optimizer.zero_grad()
    clip(model)
    loss_of(model).backward()
    optimizer.step()


def clipped_to_a_ten_thousandth(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    optimizer.zero_grad()
    loss_of(model).backward()
    clip(model, 1e-5)
    optimizer.step()


def clipped_to_share(model: nn.Module, optimizer: torch.optim.Optimizer, share: float) -> None:
    optimizer.zero_grad()
    (0.3 * loss_of(model)).backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert norm < 1
    clip(model, share * float(norm))
    optimizer.step()


def clipped_to_half_a_hundredth(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    clipped_to_share(model, optimizer, 0.005)


BROKEN: dict[Loop, str] = {
    scaled_gradients_are_clipped: "GS407",
    clipped_after_the_step: "GS408",
    clipped_before_backward: "GS409",
    clipped_to_a_ten_thousandth: "GS410",
    clipped_to_half_a_hundredth: "GS410",
}


@pytest.mark.parametrize("loop", BROKEN, ids=lambda loop: loop.__name__)
def test_clipping_in_the_wrong_place_is_named_with_its_line(loop: Loop) -> None:
    findings = [finding for finding in judged(loop) if finding.code == BROKEN[loop]]
    assert len(findings) == 1
    assert findings[0].optimizer == "optimizer"
    # The call of clip_grad_norm_ stands in the helper.
    assert findings[0].file == __file__
    with open(__file__, encoding="utf-8") as source:
        assert "clip_grad_norm_" in source.read().splitlines()[findings[0].line - 1]


@pytest.mark.parametrize("loop", BROKEN, ids=lambda loop: loop.__name__)
def test_nothing_else_is_said_of_it(loop: Loop) -> None:
    assert [code for code in codes(loop) if code.startswith("GS4")] == [BROKEN[loop]]


# -- healthy --------------------------------------------------------------------------------


def unscaled_first(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    optimizer.zero_grad()
    scaler.scale(loss_of(model)).backward()
    scaler.unscale_(optimizer)
    clip(model)
    scaler.step(optimizer)
    scaler.update()


def clipped_in_time(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    optimizer.zero_grad()
    loss_of(model).backward()
    clip(model, 0.1)
    optimizer.step()


def accumulated_and_clipped(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    for _ in range(3):
        (loss_of(model) / 3).backward()
        clip(model)
    optimizer.step()
    optimizer.zero_grad()


def norm_is_measured_after_the_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()
    clip(model, float("inf"))


def a_large_loss_is_clipped(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    optimizer.zero_grad()
    (1e5 * loss_of(model)).backward()
    clip(model)
    optimizer.step()


def clipped_to_two_hundredths(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    clipped_to_share(model, optimizer, 0.02)


def the_rate_makes_up_for_it(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    optimizer.param_groups[0]["lr"] = 20.0
    clipped_to_share(model, optimizer, 0.005)


def large_gradients_are_clipped_to_one(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    optimizer.zero_grad()
    (200 * loss_of(model)).backward()
    clip(model)
    optimizer.step()


@pytest.mark.parametrize(
    "loop",
    [
        clipped_to_two_hundredths,
        the_rate_makes_up_for_it,
        large_gradients_are_clipped_to_one,
        unscaled_first,
        clipped_in_time,
        accumulated_and_clipped,
        norm_is_measured_after_the_step,
        a_large_loss_is_clipped,
    ],
    ids=lambda loop: loop.__name__,
)
def test_clipping_in_its_place_is_silent(loop: Loop) -> None:
    clipping = {"GS404", "GS407", "GS408", "GS409", "GS410"}
    assert not clipping.intersection(codes(loop))
