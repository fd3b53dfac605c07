"""Losses that a program writes out itself: GS309, GS310, GS311, GS603, GS604 and their facts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradscope
from gradscope.scope import Scope

MakeLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

RULES = {"GS307", "GS308", "GS309", "GS310", "GS311", "GS603", "GS604", "GS606"}


def watched(
    make_loss: MakeLoss,
    *,
    steps: int = 40,
    n_out: int = 3,
    maximize: bool = False,
    std: float | None = None,
    penalty: Callable[[nn.Module], torch.Tensor | float] = lambda model: 0.0,
) -> Scope:
    """Trains on 16 examples a step of three classes that can be told apart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, n_out))
    if std is not None:
        for weight in (model[0].weight, model[2].weight):
            nn.init.normal_(weight, std=std)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, maximize=maximize)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(steps):
            x = torch.randn(16, 6)
            loss = make_loss(model(x), x[:, :3].argmax(1))
            extra = penalty(model)
            loss = loss + extra if isinstance(extra, torch.Tensor) else loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return scope


def told(scope: Scope) -> list[str]:
    return [f.code for f in scope.findings if f.severity > 0 and f.code in RULES]


def one_hot(y: torch.Tensor) -> torch.Tensor:
    return F.one_hot(y, 3).float()


# -- cross-entropies as they are written ------------------------------------------------------


def picked(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return -torch.log_softmax(out, -1)[torch.arange(len(y)), y].mean()


def gathered(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return -out.log_softmax(1).gather(1, y[:, None]).squeeze(1).sum() / len(y)


def negated_before(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (-out.log_softmax(1)).gather(1, y[:, None]).mean()


def weighed(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (-one_hot(y) * out.log_softmax(1)).sum(1).mean()


def weighed_after(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return -(one_hot(y) * torch.log(out.softmax(1) + 1e-9)).sum(1).mean()


def logarithm_of_the_picked(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return -torch.log(out.softmax(1)[range(len(y)), y].clamp_min(1e-9)).mean()


def in_a_loop(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    halves = [picked(out[:8], y[:8]), picked(out[8:], y[8:])]
    return sum(halves) / 2


WRITTEN = [
    picked,
    gathered,
    negated_before,
    weighed,
    weighed_after,
    logarithm_of_the_picked,
    in_a_loop,
]


def named(make_loss: MakeLoss) -> str:
    return make_loss.__name__


@pytest.mark.parametrize("make_loss", WRITTEN, ids=named)
def test_a_written_cross_entropy_is_read_as_one(make_loss: MakeLoss) -> None:
    given = []

    def noted(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        given.append(F.cross_entropy(out.detach(), y).item())
        return make_loss(out, y)

    scope = watched(noted)
    rows = scope.losses.loc[scope.losses["function"] == "written_cross_entropy"]
    assert len(rows) >= 3
    assert rows["n_classes"].tolist() == [3] * len(rows)
    assert rows["value"].tolist() == pytest.approx([given[step] for step in rows["step"]], rel=1e-4)
    assert not told(scope)


@pytest.mark.parametrize("make_loss", WRITTEN, ids=named)
def test_a_written_cross_entropy_without_its_minus(make_loss: MakeLoss) -> None:
    scope = watched(lambda out, y: -make_loss(out, y))
    assert told(scope) == ["GS603"]
    (finding,) = [f for f in scope.findings if f.code == "GS603"]
    assert finding.file == __file__
    # The same with an optimizer that maximises is right, and without the minus it is wrong.
    assert not told(watched(lambda out, y: -make_loss(out, y), maximize=True))
    assert told(watched(make_loss, maximize=True)) == ["GS603"]


@pytest.mark.parametrize("make_loss", WRITTEN, ids=named)
def test_a_written_cross_entropy_that_begins_far_off(make_loss: MakeLoss) -> None:
    assert "GS604" in told(watched(make_loss, steps=2, std=8.0))
    # With a temperature, large logits are meant.
    assert not told(watched(lambda out, y: make_loss(out / 0.02, y), steps=2))
    assert not told(watched(lambda out, y: F.cross_entropy(50 * out, y), steps=2))


def test_a_softmax_over_the_batch_in_a_written_cross_entropy() -> None:
    def over_batch(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        p = torch.softmax(out, dim=0)  # bad
        return -(one_hot(y) * torch.log(p + 1e-9)).sum(1).mean()

    (finding,) = [f for f in watched(over_batch).findings if f.code in RULES]
    assert finding.code == "GS311"
    assert Path(__file__).read_text("utf-8").splitlines()[finding.line - 1].endswith("# bad")


# -- of two classes -----------------------------------------------------------------------------


def binary(p: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (y * torch.log(p) + (1 - y) * torch.log(1 - p)).mean()


def of_a_logit(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    y, z = (y == 0).float(), out[:, 0]
    return (y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z)).mean()


def kept_from_zero(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return binary(torch.sigmoid(out[:, 0]).clamp(1e-6, 1 - 1e-6), (y == 0).float())


@pytest.mark.parametrize("make_loss", [of_a_logit, kept_from_zero], ids=named)
def test_a_written_binary_cross_entropy(make_loss: MakeLoss) -> None:
    scope = watched(lambda out, y: -make_loss(out, y))
    rows = scope.losses.loc[scope.losses["function"] == "written_binary_cross_entropy"]
    assert len(rows) >= 3
    assert (rows["value"] > 0).all()
    assert not told(scope)
    assert told(watched(make_loss)) == ["GS603"]


def test_labels_that_meet_a_column_of_probabilities() -> None:
    def column(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return -binary(torch.sigmoid(out[:, :1]), (y == 0).float())

    assert told(watched(column)) == ["GS310"]
    assert not told(watched(lambda out, y: -binary(out[:, 0].sigmoid(), (y == 0).float())))


def test_clamped_probabilities_as_logits() -> None:
    def clamped(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        p = torch.sigmoid(out[:, 0]).clamp(1e-6, 1 - 1e-6)
        return F.binary_cross_entropy_with_logits(p, (y == 0).float())

    def clamped_logits(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(out[:, 0].clamp(-20, 20), (y == 0).float())

    assert told(watched(clamped)) == ["GS309"]
    assert not told(watched(clamped_logits))


def test_a_penalty_on_weights_beside_a_flipped_loss() -> None:
    def penalty(model: nn.Module) -> torch.Tensor:
        return 1e-4 * sum(p.pow(2).sum() for p in model.parameters())

    assert told(watched(lambda out, y: -F.cross_entropy(out, y), penalty=penalty)) == ["GS603"]
    assert not told(watched(F.cross_entropy, penalty=penalty))


# -- healthy --------------------------------------------------------------------------------------


def policy_gradient_of_costs(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    action = torch.distributions.Categorical(logits=out.detach()).sample()
    cost = (action != y).float()
    return (cost * out.log_softmax(1).gather(1, action[:, None])[:, 0]).mean()


def policy_gradient_of_negative_rewards(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    action = torch.distributions.Categorical(logits=out.detach()).sample()
    reward = -(action != y).float()
    return (reward * F.cross_entropy(out, action, reduction="none")).mean()


def entropy_is_raised(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    logp = out.log_softmax(1)
    return (logp.exp() * logp).sum(1).mean()


def saturating_generator(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.log(1 - torch.sigmoid(out[:, 0])).mean()


def unlikelihood(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    wrong = (y + 1) % 3
    return -torch.log(1 - out.softmax(1).gather(1, wrong[:, None]) + 1e-6).mean()


def kullback_leibler(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    target = 0.9 * one_hot(y) + 0.1 / 3
    return (target * (target.log() - out.log_softmax(1))).sum(1).mean()


def focal(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    logp = out.log_softmax(1).gather(1, y[:, None])
    return -((1 - logp.exp()) ** 2 * logp).mean()


def distilled(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    teacher = (3 * one_hot(y)).softmax(1)
    return -(teacher * (out / 2).log_softmax(1)).sum(1).mean() * 4


def all_pairs(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    unit = F.normalize(out, dim=1)
    here = torch.arange(len(y))
    return -(unit @ unit.detach().T / 0.05).log_softmax(1)[here, here.roll(1)].mean()


def mixture(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    parts = torch.distributions.Normal(torch.arange(3.0), 0.1).log_prob(y[:, None].float())
    return -(out.log_softmax(1) + parts).logsumexp(1).mean()


def hidden_by_a_mask(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    is_allowed = torch.arange(len(y)) % 4 > 0
    allowed = out.masked_fill(~is_allowed[:, None] & (one_hot(y) > 0), -1e9)
    logp = allowed.log_softmax(1).gather(1, y[:, None])[:, 0]
    return -(logp * is_allowed).sum() / is_allowed.sum()


def advantage_in_the_labels(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (one_hot(y) * torch.rand(len(y), 1) * out.log_softmax(1)).sum(1).mean() * -1


def ranking_of_a_list(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return -(one_hot(y).softmax(0) * out.log_softmax(0)).sum(0).mean()


def negative_likelihood_of_a_flow(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    scale = torch.sigmoid(out[:, 0]) + 1e-3
    return (0.5 * ((0.01 * y - 0.01 * out[:, 1]) / scale) ** 2 + torch.log(scale)).mean()


@pytest.mark.parametrize(
    "make_loss",
    [
        policy_gradient_of_costs,
        policy_gradient_of_negative_rewards,
        entropy_is_raised,
        saturating_generator,
        unlikelihood,
        kullback_leibler,
        focal,
        distilled,
        all_pairs,
        mixture,
        hidden_by_a_mask,
        advantage_in_the_labels,
        ranking_of_a_list,
        negative_likelihood_of_a_flow,
    ],
    ids=named,
)
def test_a_healthy_objective_is_silent(make_loss: MakeLoss) -> None:
    assert not told(watched(make_loss, steps=80))


def test_an_evidence_lower_bound() -> None:
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(12, 4), nn.Linear(2, 12)
    params = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(params, lr=1e-2)
    with gradscope.watch(nn.ModuleList([encoder, decoder]), optimizer, on_error="raise") as scope:
        for _ in range(40):
            x = (torch.rand(16, 1) < torch.linspace(0.1, 0.9, 12)).float()
            mean, log_var = encoder(x).chunk(2, dim=1)
            p = torch.sigmoid(decoder(mean + (0.5 * log_var).exp() * torch.randn_like(mean)))
            divergence = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(1).mean()
            loss = divergence - 12 * binary(p, x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert not told(scope)
