"""GS307 to GS311, GS608: what loss functions are given, and how they are called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradscope
from gradscope.rules import Findings

MakeLoss = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]

LOSS_RULES = {"GS307", "GS308", "GS309", "GS310", "GS311", "GS603", "GS608"}


def judged(make_loss: MakeLoss, n_out: int = 3) -> Findings:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, n_out))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(12):
            loss = make_loss(model, torch.randn(8, 6), torch.randint(0, 3, (8,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return scope.findings


def softmax_into_cross_entropy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(torch.softmax(model(x), 1), y)  # bad


def clamped_softmax(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x).softmax(1).clamp(1e-6, 1), y)  # bad


def softmax_into_nll(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.nll_loss(F.softmax(model(x), dim=1), y)  # bad


def logits_into_nll(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.nll_loss(3 * model(x), y)  # bad


def teacher(x: torch.Tensor) -> torch.Tensor:
    return (2 * x[:, :3]).softmax(1)


def weighted_softmax_into_nll(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.nll_loss(F.softmax(model(x), dim=1) * (1 + x[:, :1].abs()), y)  # bad


def softmax_into_kl_div(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.kl_div(model(x).softmax(1), teacher(x), reduction="batchmean")  # bad


def logits_into_kl_div(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = model(x) / 0.1
    return nn.KLDivLoss(reduction="batchmean")(out, teacher(x))  # bad


def sigmoid_into_bce_with_logits(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    out = torch.sigmoid(model(x)[:, 0])  # bad
    return nn.BCEWithLogitsLoss()(out, (y > 0).float())


def column_against_row(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(model(x)[:, :1], y.float())  # bad


def column_against_row_of_two_dimensions(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    return F.mse_loss(model(x)[:, :1], y.float()[None])  # bad


def column_minus_row(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (model(x)[:, :1] - y.float()).pow(2).mean()  # bad


def log_softmax_over_batch(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.nll_loss(torch.log_softmax(model(x), dim=0), y)  # bad


def summed_and_divided(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y, reduction="sum") / len(x)


def picked_by_hand(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    logp = torch.log_softmax(model(x), dim=0)  # bad
    return -logp[torch.arange(len(x)), y].mean()


def drawn_from_probabilities(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    chosen = torch.distributions.Categorical(model(x).softmax(0))  # bad
    return -(chosen.log_prob(y) * torch.randn(len(x))).mean()


def of_a_map_over_examples(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    logp = F.log_softmax(model(x)[:, :, None].expand(-1, -1, 5), dim=0)  # bad
    return F.nll_loss(logp, y[:, None].expand(-1, 5))


def of_a_sequence_over_its_places(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    logits = model(x[:, None] + torch.randn(5, 6))
    logp = logits.transpose(1, 2).log_softmax(-1)  # bad
    return F.nll_loss(logp, y[:, None].expand(-1, 5))


def negated(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return -F.cross_entropy(10 * model(x), y)  # bad


def summed(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y, reduction="sum")  # bad


BROKEN: dict[MakeLoss, str] = {
    softmax_into_cross_entropy: "GS307",
    clamped_softmax: "GS307",
    softmax_into_nll: "GS308",
    logits_into_nll: "GS308",
    weighted_softmax_into_nll: "GS308",
    softmax_into_kl_div: "GS308",
    logits_into_kl_div: "GS308",
    sigmoid_into_bce_with_logits: "GS309",
    column_against_row: "GS310",
    column_against_row_of_two_dimensions: "GS310",
    column_minus_row: "GS310",
    log_softmax_over_batch: "GS311",
    picked_by_hand: "GS311",
    drawn_from_probabilities: "GS311",
    of_a_map_over_examples: "GS311",
    of_a_sequence_over_its_places: "GS311",
    negated: "GS603",
    summed: "GS608",
}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("make_loss", BROKEN, ids=lambda f: f.__name__)
def test_a_loss_that_is_given_the_wrong_thing_is_named_with_its_line(make_loss: MakeLoss) -> None:
    findings = [f for f in judged(make_loss) if f.code in LOSS_RULES]
    assert [finding.code for finding in findings] == [BROKEN[make_loss]]
    lines = Path(__file__).read_text("utf-8").splitlines()
    assert lines[findings[0].line - 1].endswith("# bad")


def test_the_softmax_module_is_named() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.Softmax(dim=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(3):
            optimizer.zero_grad()
            nn.CrossEntropyLoss()(model(torch.randn(8, 6)), torch.zeros(8).long()).backward()
            optimizer.step()
    finding = next(f for f in scope.findings if f.code == "GS307")
    assert finding.modules == ("1",)
    assert "Softmax" in finding.message


# -- healthy --------------------------------------------------------------------------------


def cross_entropy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


def softmax_only_as_target(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        target = model(x).softmax(1)
    return F.cross_entropy(model(x), target)


def softmax_for_the_accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = model(x)
    F.cross_entropy(out.softmax(1).detach(), y)
    return F.cross_entropy(out, y)


def nll_of_log_softmax(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.nll_loss(F.log_softmax(model(x), dim=1), y)


def nll_of_a_clamped_logarithm(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.nll_loss(model(x).softmax(1).clamp(min=1e-6).log(), y)


def nll_of_weighted_log_softmax(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.nll_loss(F.log_softmax(model(x), dim=1) * x[:, :1] / 2, y)


def kl_div_of_log_softmax(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.kl_div(model(x).log_softmax(1), teacher(x), reduction="batchmean")


def kl_div_of_a_logarithm(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    logs = (model(x).softmax(1) + 1e-8).log()
    return F.kl_div(logs, teacher(x).log(), reduction="batchmean", log_target=True)


def bce_of_sigmoid(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy(torch.sigmoid(model(x)[:, 0]), (y > 0).float())


def same_shapes(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(model(x)[:, 0], y.float())


def one_target_for_all(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(model(x), torch.ones(1, 3))


def all_pairs_of_predictions(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = model(x)[:, 0]
    return (out[:, None] - out).pow(2).mean() + F.cross_entropy(model(x), y)


def energy_distance(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    made, real = model(x), torch.randn(len(x), 3)
    between = F.l1_loss(made[:, None], real[None])
    return 2 * between - F.l1_loss(made[:, None], made[None])


def energy_distance_of_numbers(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    made = model(x)[:, 0]
    between = (made[:, None] - torch.randn(len(x))).abs().mean()
    return 2 * between - (made[:, None] - made).abs().mean()


def quantiles_against_quantiles(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out, target = model(x), torch.randn(len(x), 3)
    pairs = F.huber_loss(out[:, :, None], target[:, None], reduction="none")
    return (pairs * torch.rand(1, 3, 1)).sum(1).mean()


def quantiles_of_a_sample(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.huber_loss(model(x)[:, :1], torch.linspace(-1, 1, 7)[None])


def contrastive_over_both_sides(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    a, b = model(x), model(x + 0.1)
    similar = a @ b.T
    right = torch.arange(len(x))
    return -(similar.log_softmax(0)[right, right] + similar.log_softmax(1)[right, right]).mean()


def attention_over_the_first_dimension(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    weights = model(x)[:, :1].softmax(0)
    return F.cross_entropy(model(x) + (weights * x[:, :1]).sum(), y)


def classes_first(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.nll_loss(model(x).T.log_softmax(0).T, y)


def classes_last_and_moved(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    logp = model(x[:, None] + torch.randn(5, 6)).log_softmax(-1)
    target = y[:, None].expand(-1, 5)
    return (
        F.nll_loss(logp.permute(0, 2, 1), target)
        + F.nll_loss(logp.transpose(-1, -2), target)
        + F.nll_loss(logp.view(-1, 3), target.flatten())
        + F.nll_loss(logp.movedim(2, 1)[:, :, None].contiguous(), target[:, None])
    )


def categorical_of_probabilities(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    chosen = torch.distributions.Categorical(model(x).softmax(1))
    return -(chosen.log_prob(y) * torch.randn(len(x))).mean()


def entropy_bonus(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    chosen = torch.distributions.Categorical(logits=model(x))
    return -(chosen.log_prob(y) * torch.randn(len(x))).mean() - 0.01 * chosen.entropy().mean()


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize(
    "make_loss",
    [
        cross_entropy,
        softmax_only_as_target,
        softmax_for_the_accuracy,
        nll_of_log_softmax,
        nll_of_a_clamped_logarithm,
        nll_of_weighted_log_softmax,
        kl_div_of_log_softmax,
        kl_div_of_a_logarithm,
        bce_of_sigmoid,
        same_shapes,
        one_target_for_all,
        all_pairs_of_predictions,
        energy_distance,
        energy_distance_of_numbers,
        quantiles_against_quantiles,
        quantiles_of_a_sample,
        contrastive_over_both_sides,
        attention_over_the_first_dimension,
        classes_first,
        classes_last_and_moved,
        categorical_of_probabilities,
        entropy_bonus,
    ],
    ids=lambda f: f.__name__,
)
def test_a_healthy_loss_is_silent(make_loss: MakeLoss) -> None:
    assert not [f for f in judged(make_loss) if f.severity > 0 and f.code in LOSS_RULES]


@pytest.mark.parametrize(
    ("loss_of", "times"),
    [
        (lambda out, y: F.cross_entropy(out, y, reduction="sum"), 8),
        (lambda out, y: F.cross_entropy(out, F.one_hot(y, 3).float(), reduction="sum"), 8),
        (lambda out, y: F.mse_loss(out, F.one_hot(y, 3).float(), reduction="sum"), 24),
        (
            lambda out, y: F.cross_entropy(
                out[:, :, None].expand(-1, -1, 5), y[:, None].expand(-1, 5), reduction="sum"
            ),
            40,
        ),
    ],
)
def test_how_many_losses_a_sum_adds_up(
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], times: int
) -> None:
    (finding,) = (f for f in judged(lambda model, x, y: loss_of(model(x), y)) if f.code == "GS608")
    assert f"about {times} times" in finding.message
    assert "GS608" not in {f.code for f in judged(summed_and_divided)}


class Attention(nn.Module):
    """Attention over the moments of [examples, moments, 6], or what the weights are made over."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.q, self.k, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2) / 6**0.5
        weights = scores.softmax(self.dim)  # attention
        return self.out(x + weights @ x)


class Heads(nn.Module):
    """The same with two heads, and dropout of the weights."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) / 3**0.5
        weights = F.dropout(scores.softmax(self.dim), 0.1)  # heads
        return self.out(x + (weights @ v).transpose(1, 2).reshape(n, length, width))


class Routing(nn.Module):
    """Experts compete for every moment, and have a matrix product each: dimension 0 is theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.out = nn.Parameter(torch.randn(4, 6, 5)), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared = x.flatten(0, 1).expand(4, -1, -1)
        gates = (shared @ self.keys).softmax(0)
        mixed = gates.transpose(1, 2) @ shared
        again = gates @ mixed
        return self.out(again.sum(0)).view(*x.shape[:2], 3)


def trained(model: nn.Module) -> list[tuple[str, int | None]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(6):
            x = torch.randn(7, 5, 6)
            loss = F.cross_entropy(model(x).flatten(0, 1), x[:, :, :3].argmax(2).flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return [(f.code, f.line) for f in scope.findings if f.severity > 0 and f.code in LOSS_RULES]


def test_attention_over_the_batch() -> None:
    torch.manual_seed(0)
    lines = Path(__file__).read_text("utf-8").splitlines()
    line, of_heads = (
        next(number for number, text in enumerate(lines, 1) if text.endswith(f"# {word}"))
        for word in ("attention", "heads")
    )
    assert trained(Attention(0)) == [("GS311", line)]
    assert trained(Heads(0)) == trained(Heads(1)) == [("GS311", of_heads)]
    assert not trained(Heads(-1))
    assert not trained(Heads(2))
    assert not trained(Attention(-1))
    assert not trained(Attention(1))  # over queries, as slots that compete
    assert not trained(Routing())
