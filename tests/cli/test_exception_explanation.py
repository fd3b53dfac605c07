"""What is said when a program dies of one of autograd's common complaints."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gradscope.cli.program import script_program
from gradscope.config import WatchOptions
from gradscope.run.entries import ParameterEntry
from gradscope.run.recording import Recording
from gradscope.session.session import Session
from gradscope.views.exception_explanation import ExceptionExplanation, explain_exception

BEGINNING = """
import torch
from torch import nn
torch.manual_seed(0)
x = torch.randn(6, 4)
net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
opt = torch.optim.SGD(net.parameters(), lr=0.1)
scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
"""


Explained = Callable[[str], ExceptionExplanation]


@pytest.fixture
def explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Explained:
    """Returns what is said about a program that raises."""

    def explained(rest: str) -> ExceptionExplanation:
        script = tmp_path / "train.py"
        script.write_text(BEGINNING + rest, "utf-8")
        monkeypatch.setattr(sys, "argv", sys.argv)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
        session = Session(WatchOptions(on_error="raise"), discovers=True)
        session.start()
        try:
            ended = script_program(str(script), []).run()
        finally:
            session.stop()
        assert ended.error is not None
        explanation = explain_exception(
            session.recording, type(ended.error).__name__, str(ended.error), str(script), 1
        )
        assert explanation is not None, str(ended.error)
        assert "gradscope: what led to this" in str(explanation)
        return explanation

    return explained


def line_of(rest: str, text: str) -> int:
    lines = (BEGINNING + rest).splitlines()
    return next(n for n, line in enumerate(lines, 1) if text in line)


def test_another_optimizers_step_between_forward_and_backward(explained: Explained) -> None:
    said = explained(
        """
critic = nn.Linear(8, 1)
opt_c = torch.optim.SGD(critic.parameters(), lr=0.1)
h = net[0](x)
loss_c, loss = critic(h).mean(), critic(h).pow(2).mean()
loss_c.backward(retain_graph=True)
opt_c.step()
loss.backward()
"""
    )
    assert "opt_c.step() changed critic.weight in place after the forward" in said.cause
    assert "before opt_c.step()" in said.fix
    assert said.order[0][0] == "step 0 (opt_c)"


def test_its_own_step_between_forward_and_second_backward(explained: Explained) -> None:
    said = explained(
        """
loss = net(x).pow(2).mean()
loss.backward(retain_graph=True)
opt.step()
loss.backward()
"""
    )
    assert "opt.step() changed 2.weight in place" in said.cause
    assert "forward again" in said.fix
    assert said.order[0] == ("step 0", "forward, backward, step")
    assert said.order[1][1].startswith("backward ← raised")


def test_an_activation_that_was_changed_in_place(explained: Explained) -> None:
    said = explained("h = torch.sigmoid(net(x))\nh += 1\nopt.zero_grad()\nh.mean().backward()\n")
    assert "shape (6, 1), made by Sigmoid," in said.cause
    assert "+=" in said.fix


def test_the_same_loss_twice(explained: Explained) -> None:
    rest = "loss = net(x).pow(2).mean()\nloss.backward()\nloss.backward()  # again\n"
    said = explained(rest)
    assert "second backward of the very same loss" in said.cause
    assert f"train.py:{line_of(rest, 'loss.backward()')}" in said.cause


def test_two_losses_that_share_a_graph(explained: Explained) -> None:
    said = explained(
        "h = net(x)\na, b = h.pow(2).mean(), h.exp().mean()\na.backward()\nb.backward()\n"
    )
    assert "shares" in said.cause
    assert "(loss_a + loss_b).backward()" in said.fix


def test_a_hidden_state_that_was_not_detached(explained: Explained) -> None:
    said = explained(
        """
cell = nn.RNNCell(4, 8)
opt = torch.optim.SGD(cell.parameters(), lr=0.1)
h = torch.zeros(6, 8)
for _ in range(3):
    h = cell(x, h)
    loss = h.pow(2).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
"""
    )
    assert "an earlier iteration" in said.cause
    assert "hidden.detach()" in said.fix


def test_a_weight_computed_once_before_the_loop(explained: Explained) -> None:
    said = explained(
        """
scale = nn.Parameter(torch.ones(4))
weight = scale.exp()
opt = torch.optim.SGD([*net.parameters(), scale], lr=0.1)
for _ in range(3):
    opt.zero_grad()
    net(x * weight).pow(2).mean().backward()
    opt.step()
"""
    )
    assert "made before the last step and used again" in said.cause
    assert "inside the loop" in said.fix


@pytest.mark.parametrize(
    ("rest", "cause", "fix"),
    [
        ("net(x).round().argmax(1).float().mean().backward()\n", "argmax at train.py:", "argmax"),
        (
            "opt.param_groups.clear()\nfrozen = nn.Linear(4, 1).requires_grad_(False)\n"
            "torch.optim.SGD(frozen.parameters())\nfrozen(x).mean().backward()\n",
            "no path to any parameter that asks for a gradient",
            "no_grad()",
        ),
        (
            "for _ in range(2):\n    scaler.scale(net(x).mean()).backward()\n"
            "    scaler.unscale_(opt)\n",
            "unscale_() was called at train.py:",
            "once for each step",
        ),
        (
            "scaler.scale(net(x).mean()).backward()\nscaler.step(opt)\nscaler.unscale_(opt)\n",
            "has already used",
            "before scaler.step()",
        ),
        (
            "for _ in range(2):\n    scaler.scale(net(x).mean()).backward()\n"
            "    scaler.step(opt)\n",
            "update() was never called",
            "scaler.update()",
        ),
        (
            "other = nn.Linear(4, 1)\nscaler.scale(other(x).mean()).backward()\nscaler.step(opt)\n",
            "none of the 4 parameters that opt holds",
            "make opt from",
        ),
        (
            "w = torch.randn(3, requires_grad=True) * 2\ntorch.optim.SGD([w], lr=1.0)\n",
            "result of an operation",
            "requires_grad_()",
        ),
        ("net[0].weight[0] = 0.0\n", "written in place", "no_grad()"),
        ("net[0].bias.add_(1.0)\n", "written in place", "no_grad()"),
        (
            "loss = nn.functional.mse_loss(net(x), torch.zeros(6, 1), reduction='none')\n"
            "loss.backward()\n",
            "mse_loss at train.py:",
            "loss.mean()",
        ),
        (
            "late = nn.Linear(4, 1, device='meta')\ntorch.optim.SGD(late.parameters())\nlate(x)\n",
            "most parameters are on cpu, but",
            "model.to('cpu')",
        ),
    ],
)
def test_the_other_complaints(explained: Explained, rest: str, cause: str, fix: str) -> None:
    said = explained(rest)
    assert cause in said.cause
    assert fix in said.fix or fix in said.cause


def test_devices_of_several_parameters_are_told_apart() -> None:
    run = Recording()
    run.parameters += [
        ParameterEntry(name="a.weight", device="cuda:0"),
        ParameterEntry(name="a.bias", device="cuda:0"),
        ParameterEntry(name="late.weight", device="cpu"),
    ]
    message = "Expected all tensors to be on the same device, but found at least two devices"
    said = explain_exception(run, "RuntimeError", message)
    assert said is not None
    assert "late.weight on cpu" in said.cause


def test_a_model_that_is_frozen_as_a_whole() -> None:
    run = Recording()
    run.parameters.append(ParameterEntry(name="weight", requires_grad=False))
    message = "element 0 of tensors does not require grad and does not have a grad_fn"
    said = explain_exception(run, "RuntimeError", message)
    assert said is not None
    assert "all 1 parameters are frozen" in said.cause


def test_an_exception_of_the_programs_own_is_left_alone() -> None:
    assert explain_exception(Recording(), "ValueError", "no such batch") is None
