"""GS301: losses without a path to any parameter, and healthy ones that look alike."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradscope
from gradscope.rules import Severity
from gradscope.scope import Scope

MakeLoss = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def watched(make_loss: MakeLoss, steps: int = 4) -> Scope:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(steps):
            x, y = torch.randn(5, 6), torch.randint(0, 3, (5,))
            loss = make_loss(model, x, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return scope


# -- broken: each cuts the graph in the line that ends with the word "cut" --------------------


def detached_output(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = model(x).detach()  # cut
    return F.cross_entropy(out, y).requires_grad_()


def data_of_the_loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss = F.cross_entropy(model(x), y)
    return torch.autograd.Variable(loss.data, requires_grad=True)  # cut


def rebuilt_from_its_value(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss = F.cross_entropy(model(x), y)
    return torch.tensor(loss.item(), requires_grad=True)  # cut


def forward_without_grad(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model(x)  # cut
    return F.cross_entropy(out, y).requires_grad_()


def accuracy_as_loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    wrong = model(x).argmax(1) != y  # cut
    return wrong.float().mean().requires_grad_()


def threshold(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    hard = model(x) > 0  # cut
    return (hard.float() - 1).pow(2).mean().requires_grad_()


def through_numpy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = model(x)
    values = out.detach().numpy()  # cut
    return F.cross_entropy(torch.from_numpy(values), y).requires_grad_()


def detached_beside_harmless_ones(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    out = model(x)
    accuracy = (out.argmax(1) == y).float().mean().item()
    target = torch.zeros_like(out)
    loss = F.mse_loss(out, target).detach()  # cut
    assert accuracy >= 0
    return loss.requires_grad_()


BROKEN: list[MakeLoss] = [
    detached_output,
    data_of_the_loss,
    rebuilt_from_its_value,
    forward_without_grad,
    accuracy_as_loss,
    threshold,
    through_numpy,
    detached_beside_harmless_ones,
]


def line_of_the_cut(make_loss: MakeLoss) -> int:
    first = make_loss.__code__.co_firstlineno
    source = Path(__file__).read_text("utf-8").splitlines()
    return next(i for i in range(first, first + 20) if source[i - 1].endswith("# cut"))


@pytest.mark.parametrize("make_loss", BROKEN, ids=lambda f: f.__name__)
def test_the_line_that_cut_the_graph_is_named(make_loss: MakeLoss) -> None:
    findings = watched(make_loss).findings
    # What has no derivative at all is named for that.
    code = "GS304" if make_loss in (accuracy_as_loss, threshold) else "GS301"
    assert [finding.code for finding in findings] == [code]
    assert findings[0].severity == 2
    assert findings[0].file == __file__
    assert findings[0].line == line_of_the_cut(make_loss)


def test_backward_raises_as_without_us_and_the_cut_is_named() -> None:
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scope = gradscope.watch(model, optimizer, on_error="raise")
    with scope:
        loss = model(torch.randn(2, 6)).sum().detach()
        with pytest.raises(RuntimeError, match="element 0 of tensors does not require grad"):
            loss.backward()
    finding = scope.findings[0]
    source = Path(__file__).read_text("utf-8").splitlines()
    assert finding.code == "GS301"
    assert ".sum().detach()" in source[finding.line - 1]
    assert "raised RuntimeError" in finding.message
    assert scope.events["event"].tolist().count("exception") == 1


def prediction_cut_and_made_a_leaf(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    out = model(x).detach().requires_grad_()  # cut
    return F.cross_entropy(out, y)


def data_made_a_leaf(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = model(x)
    print("spread", float(out.detach().std()))
    out = out.data  # cut
    return F.cross_entropy(out.requires_grad_(), y)


def mean_of_numbers(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    parts = [F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]) for i in range(2)]
    return torch.tensor([part.item() for part in parts], requires_grad=True).mean()  # cut


@pytest.mark.parametrize(
    "make_loss",
    [prediction_cut_and_made_a_leaf, data_made_a_leaf, mean_of_numbers],
    ids=lambda f: f.__name__,
)
def test_a_graph_that_ends_in_a_cut_tensor_is_detached_too(make_loss: MakeLoss) -> None:
    findings = watched(make_loss).findings
    assert [finding.code for finding in findings] == ["GS301"]
    assert findings[0].line == line_of_the_cut(make_loss)
    assert findings[0].count == 4


def test_after_the_armed_steps_the_line_of_backward_is_named() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(3))
    holder = nn.ParameterList([weight])
    optimizer = torch.optim.SGD(holder.parameters(), lr=0.1)
    with gradscope.watch(holder, optimizer, on_error="raise") as scope:
        for _ in range(3):
            loss = weight.detach().sum().requires_grad_()  # no model is called: nothing is armed
            loss.backward()
            optimizer.step()
    source = Path(__file__).read_text("utf-8").splitlines()
    assert source[scope.findings[0].line - 1].strip() == "loss.backward()"


# -- healthy --------------------------------------------------------------------------------


def plain(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


def with_detached_targets_and_metrics(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    out = model(x)
    with torch.no_grad():
        target = model(x).softmax(1)
    out.detach().argmax(1).float().mean().item()
    return F.kl_div(out.log_softmax(1), target, reduction="batchmean") + 1e-3 * out.pow(2).mean()


def after_an_attack_on_the_input(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    for p in model.parameters():
        p.requires_grad_(False)
    x = x.requires_grad_()
    F.cross_entropy(model(x), y).backward()  # reaches no parameter, and is not meant to
    for p in model.parameters():
        p.requires_grad_(True)
    return F.cross_entropy(model((x + 0.01 * x.grad.sign()).detach()), y)


@pytest.mark.parametrize(
    "make_loss", [plain, with_detached_targets_and_metrics, after_an_attack_on_the_input]
)
def test_a_healthy_loss_is_silent(make_loss: MakeLoss) -> None:
    assert not watched(make_loss).findings


def test_a_few_batches_without_a_valid_example_are_silent() -> None:
    calls = iter(range(100))

    def constant_now_and_then(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if next(calls) % 4 == 1:
            return torch.zeros((), requires_grad=True)
        return F.cross_entropy(model(x), y)

    assert not watched(constant_now_and_then, steps=12).findings


def test_an_optimized_input_with_a_frozen_network_is_silent() -> None:
    network = nn.Sequential(nn.Linear(6, 3))
    network.requires_grad_(False)
    image = nn.Parameter(torch.randn(1, 6))
    optimizer = torch.optim.Adam([image], lr=0.1)
    with gradscope.watch(network, optimizer, on_error="raise") as scope:
        for _ in range(4):
            optimizer.zero_grad()
            (-network(image)[0, 1]).backward()
            optimizer.step()
    assert not scope.findings.at_least(Severity.WARNING)
    assert scope.steps["n_fresh"].tolist() == [1] * 4


def test_a_policy_gradient_with_detached_advantages_is_silent() -> None:
    def reinforce(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        chosen = torch.distributions.Categorical(logits=model(x))
        action = chosen.sample()
        advantage = (action == y).float() - 0.5
        return -(chosen.log_prob(action) * advantage.detach()).mean()

    assert not watched(reinforce).findings


def test_gradients_of_a_copy_assigned_by_hand_are_silent() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(4):
            replica = copy.deepcopy(model)
            F.cross_entropy(replica(torch.randn(5, 6)), torch.zeros(5, dtype=torch.long)).backward()
            for p, q in zip(model.parameters(), replica.parameters(), strict=True):
                p.grad = q.grad
            optimizer.step()
    assert scope.steps["n_assigned"].tolist() == [2] * 4
    assert not scope.findings


def test_one_batch_whose_error_is_caught_is_silent() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for i in range(6):
            optimizer.zero_grad()
            loss = model(torch.randn(2, 6)).sum() if i != 2 else torch.zeros(())
            with contextlib.suppress(RuntimeError):
                loss.backward()
                optimizer.step()
    assert not scope.findings


def test_losses_that_become_constant_when_all_is_learnt_are_silent() -> None:
    calls = iter(range(100))

    def satisfied(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if next(calls) >= 4:
            return torch.zeros((), requires_grad=True)
        return F.cross_entropy(model(x), y)

    assert not watched(satisfied, steps=12).findings
