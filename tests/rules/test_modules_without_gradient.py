"""GS302 to GS304 and GS312 to GS314: modules that never get a gradient, each for its reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradscope
from gradscope.config import WatchOptions
from gradscope.rules import Findings, Severity, diagnose
from gradscope.session.session import Session

RULES = {"GS302", "GS303", "GS304", "GS312", "GS313", "GS314"}
Forward = Callable[["Net", torch.Tensor], torch.Tensor]


class Net(nn.Module):
    def __init__(self, run: Forward) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.other = nn.Linear(6, 8)
        self.decoder = nn.Linear(8, 3)
        self.kept: torch.Tensor | None = None
        self.run = run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self, x)


def judged(run: Forward, steps: int = 8) -> Findings:
    torch.manual_seed(0)
    model = Net(run)
    held = [*model.encoder.parameters(), *model.decoder.parameters()]
    optimizer = torch.optim.SGD(held, lr=0.1)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(steps):
            loss = F.cross_entropy(model(torch.randn(5, 6)), torch.randint(0, 3, (5,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return scope.findings


def told(findings: Findings) -> list[str]:
    return [f.code for f in findings if f.severity > 0 and f.code in RULES]


# -- broken ---------------------------------------------------------------------------------


def detached(model: Net, x: torch.Tensor) -> torch.Tensor:
    return model.decoder(model.encoder(x).detach())


def detached_and_changed(model: Net, x: torch.Tensor) -> torch.Tensor:
    return model.decoder(model.encoder(x).detach() * 2 + 1)


def through_numpy(model: Net, x: torch.Tensor) -> torch.Tensor:
    return model.decoder(torch.from_numpy(model.encoder(x).detach().numpy().copy()))


def without_gradients(model: Net, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        h = model.encoder(x)
    return model.decoder(h)


def rounded(model: Net, x: torch.Tensor) -> torch.Tensor:
    return model.decoder(torch.round(3 * model.encoder(x)))


def checkpointed(model: Net, x: torch.Tensor) -> torch.Tensor:
    return model.decoder(checkpoint(model.encoder, x, use_reentrant=True))


def kept_from_the_first_step(model: Net, x: torch.Tensor) -> torch.Tensor:
    if model.kept is None:
        model.kept = model.encoder(x).detach()
    return model.decoder(model.kept)


BROKEN: dict[Forward, str] = {
    detached: "GS302",
    detached_and_changed: "GS302",
    through_numpy: "GS302",
    without_gradients: "GS303",
    rounded: "GS304",
    checkpointed: "GS313",
    kept_from_the_first_step: "GS314",
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("run", BROKEN, ids=lambda run: run.__name__)
def test_a_module_that_gets_no_gradient_is_named_for_its_reason(run: Forward) -> None:
    findings = judged(run)
    assert told(findings) == [BROKEN[run]]
    finding = next(f for f in findings if f.code == BROKEN[run])
    assert set(finding.params) == {"encoder.0.weight", "encoder.0.bias"}


def test_a_generator_whose_optimizer_has_nothing_to_train_is_named() -> None:
    torch.manual_seed(0)
    net_g, net_d = nn.Linear(4, 6), nn.Linear(6, 1)
    opt_g = torch.optim.SGD(net_g.parameters(), lr=0.1)
    opt_d = torch.optim.SGD(net_d.parameters(), lr=0.1)
    with gradscope.watch([net_g, net_d], [opt_g, opt_d], on_error="raise") as scope:
        for _ in range(6):
            fake = net_g(torch.randn(3, 4))
            opt_d.zero_grad()
            (net_d(torch.randn(3, 6)) - net_d(fake.detach())).mean().backward()
            opt_d.step()
            opt_g.zero_grad()
            net_d(fake.detach()).mean().backward()
            opt_g.step()
    assert told(scope.findings) == ["GS302"]
    assert scope.findings[0].optimizer == "opt_g"


def test_a_loss_that_is_overwritten_is_named_with_its_line() -> None:
    torch.manual_seed(0)
    trunk, head, decoder = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 6)
    model = nn.ModuleDict({"trunk": trunk, "head": head, "decoder": decoder})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = Session(WatchOptions(on_error="raise"), discovers=True)
    session.watch_model(model, "model")
    session.watch_optimizer(optimizer, "optimizer")
    session.start()
    for _ in range(4):
        x = torch.randn(5, 6)
        h = torch.relu(trunk(x))
        loss = F.cross_entropy(head(h), torch.zeros(5, dtype=torch.long))  # overwritten
        loss = F.mse_loss(decoder(h), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    session.stop()
    findings = diagnose(session.recording)
    assert told(findings) == ["GS312"]
    finding = next(f for f in findings if f.code == "GS312")
    assert any("head" in name for name in finding.params)
    with open(__file__, encoding="utf-8") as source:
        assert source.read().splitlines()[finding.line - 1].endswith("# overwritten")


# -- healthy --------------------------------------------------------------------------------


def plain(model: Net, x: torch.Tensor) -> torch.Tensor:
    return model.decoder(model.encoder(x))


def straight_through(model: Net, x: torch.Tensor) -> torch.Tensor:
    h = model.encoder(x)
    return model.decoder(h + (h.round() - h).detach())


def a_detached_branch_beside_the_real_one(model: Net, x: torch.Tensor) -> torch.Tensor:
    h = model.encoder(x)
    return model.decoder(h) + model.decoder(h.detach())


def one_that_nobody_trains(model: Net, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        target = model.other(x)
    return model.decoder(model.encoder(x) + target)


def modern_checkpoint(model: Net, x: torch.Tensor) -> torch.Tensor:
    return model.decoder(checkpoint(model.encoder, x, use_reentrant=False))


def reentrant_checkpoint_with_gradients(model: Net, x: torch.Tensor) -> torch.Tensor:
    return model.decoder(checkpoint(model.encoder, x.requires_grad_(), use_reentrant=True))


def skipped_now_and_then(model: Net, x: torch.Tensor) -> torch.Tensor:
    model.kept = x
    return model.decoder(model.encoder(x) if x[0, 0] > 0 else torch.zeros(5, 8))


@pytest.mark.parametrize(
    "run",
    [
        plain,
        straight_through,
        a_detached_branch_beside_the_real_one,
        one_that_nobody_trains,
        modern_checkpoint,
        reentrant_checkpoint_with_gradients,
        skipped_now_and_then,
    ],
    ids=lambda run: run.__name__,
)
def test_a_healthy_forward_is_silent(run: Forward) -> None:
    assert not told(judged(run))


def test_an_output_that_nobody_wants_is_no_alarm() -> None:
    class WithPooler(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.pooler = nn.Linear(6, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            h = torch.tanh(self.body(x))
            return h, torch.tanh(self.pooler(h))

    torch.manual_seed(0)
    model = WithPooler()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(5, 6))[0].pow(2).mean().backward()
            optimizer.step()
    assert not told(scope.findings)


def test_a_teacher_moved_by_an_average_is_silent() -> None:
    torch.manual_seed(0)
    student, teacher = nn.Linear(6, 3), nn.Linear(6, 3)
    model = nn.ModuleDict({"student": student, "teacher": teacher})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(6):
            x = torch.randn(5, 6)
            with torch.no_grad():
                target = teacher(x)
            optimizer.zero_grad()
            F.mse_loss(student(x), target).backward()
            optimizer.step()
            with torch.no_grad():
                for p, q in zip(teacher.parameters(), student.parameters(), strict=True):
                    p.lerp_(q, 0.1)
    assert not told(scope.findings)


def test_a_result_kept_with_its_graph_is_named() -> None:
    torch.manual_seed(0)
    encoder, decoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 3)
    optimizer = torch.optim.SGD([*encoder.parameters(), *decoder.parameters()], lr=0.01)
    kept = None
    with gradscope.watch([encoder, decoder], optimizer, on_error="raise") as scope:
        for _ in range(9):
            kept = encoder(torch.randn(5, 6)) if kept is None else kept
            loss = F.cross_entropy(decoder(kept), torch.randint(0, 3, (5,)))
            optimizer.zero_grad()
            loss.backward(retain_graph=True)
            optimizer.step()
    (found,) = (f for f in scope.findings if f.code == "GS314")
    assert found.modules == ("encoder",)
    assert "that first call's graph" in found.message


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.proj, self.head = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.relu(self.body(x))
        return self.head(h), self.proj(h)


def judged_with(loss_of: Callable[[TwoHeads, torch.Tensor], torch.Tensor]) -> Findings:
    """Train a model with two heads, as a program of its own would."""
    torch.manual_seed(0)
    net = TwoHeads()
    session = Session(WatchOptions(on_error="raise"), discovers=True)
    session.start()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(8):
        loss = loss_of(net, torch.randn(16, 6))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    session.stop()
    return diagnose(session.recording)


def test_a_cut_is_named_where_another_model_is_met_after_it() -> None:
    teacher = nn.Linear(6, 4).requires_grad_(False)

    def loss_of(net: TwoHeads, x: torch.Tensor) -> torch.Tensor:
        logits, z = net(x)
        return F.cross_entropy(logits, x[:, :3].argmax(1)) + F.mse_loss(z.detach(), teacher(x))

    found = {f.code: f for f in judged_with(loss_of)}
    assert found["GS302"].modules == ("net.proj",)
    assert set(found["GS302"].params) == {"net.proj.weight", "net.proj.bias"}


def test_a_cut_between_two_models_is_an_error() -> None:
    torch.manual_seed(0)
    session = Session(WatchOptions(on_error="raise"), discovers=True)
    session.start()
    encoder, decoder = nn.Linear(6, 8), nn.Linear(8, 3)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-2)
    for _ in range(8):
        loss = F.cross_entropy(decoder(encoder(torch.randn(5, 6)).detach()), torch.arange(5) % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    session.stop()
    findings = diagnose(session.recording)
    assert told(findings) == ["GS302"]
    assert findings[0].modules == ("encoder",)
    assert findings[0].evidence["taken_by"] == "decoder"


def test_a_cut_is_named_where_another_model_is_trained_later() -> None:
    torch.manual_seed(0)
    session = Session(WatchOptions(on_error="raise"), discovers=True)
    session.start()
    net, other = Net(detached), nn.Linear(6, 3)
    for model in (net, other):
        held = [p for name, p in model.named_parameters() if "other" not in name]
        optimizer = torch.optim.Adam(held, lr=1e-2)
        for _ in range(8):
            loss = F.cross_entropy(model(torch.randn(5, 6)), torch.arange(5) % 3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    session.stop()
    found = {f.code: f for f in diagnose(session.recording)}
    assert set(found["GS302"].params) == {"model.encoder.0.weight", "model.encoder.0.bias"}


def towards_ones(z: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(z, torch.ones(4).expand_as(z))


@pytest.mark.parametrize(
    "cut",
    [
        lambda z: z.detach(),
        lambda z: 2 * z.detach() + 1,
        lambda z: (2 * z + 1).detach(),
        lambda z: z.data,
        lambda z: torch.tensor(z.tolist()),
    ],
    ids=["detached", "changed after", "changed before", "data", "numbers"],
)
def test_a_result_that_is_cut_and_goes_into_the_loss_is_an_error(
    cut: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    def loss_of(net: TwoHeads, x: torch.Tensor) -> torch.Tensor:
        logits, z = net(x)
        return F.cross_entropy(logits, x[:, :3].argmax(1)) + towards_ones(cut(z))

    findings = judged_with(loss_of)
    assert told(findings) == ["GS302"]
    assert findings[0].severity == Severity.ERROR
    assert findings[0].modules == ("proj",)
    assert findings[0].line == cut.__code__.co_firstlineno


def test_a_result_that_is_cut_and_only_looked_at_is_a_note() -> None:
    def loss_of(net: TwoHeads, x: torch.Tensor) -> torch.Tensor:
        logits, z = net(x)
        assert torch.isfinite(z.detach().norm())
        return F.cross_entropy(logits, x[:, :3].argmax(1))

    found = {f.code: f for f in judged_with(loss_of)}
    assert found["GS302"].severity == Severity.INFO


def test_a_result_that_is_cut_in_one_term_and_trained_in_another_is_silent() -> None:
    def loss_of(net: TwoHeads, x: torch.Tensor) -> torch.Tensor:
        logits, z = net(x)
        weight = 1 + z.detach().square().mean()
        return weight * F.cross_entropy(logits, x[:, :3].argmax(1)) + towards_ones(z)

    assert not told(judged_with(loss_of))
