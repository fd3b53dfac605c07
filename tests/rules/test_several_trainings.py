"""Programs that train one thing after the other: phases, folds, seeds, a teacher and a student."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradscope.config import WatchOptions
from gradscope.rules import Findings, diagnose
from gradscope.session.session import Session

Program = Callable[[], None]
LossOf = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]

N_STEPS = 30


def judged(program: Program) -> Findings:
    torch.manual_seed(0)
    session = Session(WatchOptions(on_error="raise"), discovers=True)
    session.start()
    try:
        program()
    finally:
        session.stop()
    return diagnose(session.recording)


def alarms(program: Program) -> dict[str, str]:
    return {f.code: f.message for f in judged(program) if f.severity > 0}


def batch(n: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Points and which of three coordinates is the greatest."""
    x = torch.randn(n, 6)
    return x, x[:, :3].argmax(1)


def classifier(width: int = 16, *after: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3), *after)


def cross_entropy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


def fit(model: nn.Module, loss_of: LossOf = cross_entropy, scale: float = 1.0) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(N_STEPS):
        x, y = batch()
        loss = loss_of(model, x * scale, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# -- what is wrong with a training that is not the first ---------------------------------------


class CachesItsBody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)
        self.kept: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kept is None:
            self.kept = self.body(x).mean(0).detach()
        return self.head(self.kept + 0 * x[:, :1])


def far_too_large() -> nn.Module:
    model = classifier()
    nn.init.normal_(model[2].weight, std=40.0)
    return model


def binary(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(model(x), F.one_hot(y, 3).float())


@pytest.mark.parametrize(
    ("make", "loss_of", "scale", "code"),
    [
        (lambda: classifier(16, nn.Softmax(1)), cross_entropy, 1.0, "GS307"),
        (lambda: classifier(16, nn.Sigmoid()), binary, 1.0, "GS309"),
        (far_too_large, cross_entropy, 1.0, "GS604"),
        (classifier, cross_entropy, 500.0, "GS607"),
        (CachesItsBody, cross_entropy, 1.0, "GS314"),
    ],
    ids=["softmax", "sigmoid", "large weights", "large inputs", "cached"],
)
def test_a_defect_of_the_second_training_is_named(
    make: Callable[[], nn.Module], loss_of: LossOf, scale: float, code: str
) -> None:
    def program() -> None:
        fit(classifier(), loss_of)  # goes through the same lines
        fit(make(), loss_of, scale)

    assert code in alarms(program)


def test_what_is_wrong_in_every_fold_is_said_once() -> None:
    def program() -> None:
        for _ in range(3):
            fit(classifier(16, nn.Softmax(1)))

    assert [f.code for f in judged(program) if f.code == "GS307"] == ["GS307"]


class WithHint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.head = nn.Linear(8, 3)
        self.hint = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.given = self.hint(self.body(x))
        return self.head(self.body(x))


def test_a_module_that_ran_unseen_is_not_said_never_to_have_run() -> None:
    def program() -> None:
        for _ in range(12):  # more than have looks that are free
            fit(classifier())
        fit(WithHint())

    found = {f.code: f for f in judged(program)}
    assert "never ran" not in found["GS105"].message
    assert "modules_that_never_ran" not in found["GS105"].evidence


def test_a_module_that_never_ran_is_said_not_to_have() -> None:
    class Forgets(WithHint):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x))

    def program() -> None:
        fit(classifier())
        fit(Forgets())

    found = {f.code: f for f in judged(program)}
    assert "hint never ran" in found["GS105"].message
    assert found["GS105"].evidence["modules_that_never_ran"].endswith("hint")


# -- healthy ones --------------------------------------------------------------------------------


def pretrain_and_probe() -> None:
    encoder, decoder = nn.Linear(6, 4), nn.Linear(4, 6)
    both = nn.ModuleList([encoder, decoder])
    fit(both, lambda m, x, y: F.mse_loss(decoder(torch.relu(encoder(x))), x))
    encoder.requires_grad_(False).eval()
    fit(nn.Linear(4, 3), lambda m, x, y: F.cross_entropy(m(torch.relu(encoder(x))), y))


def folds() -> None:
    for fold in range(5):
        torch.manual_seed(fold)
        model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
        fit(model)
        model.eval()
        with torch.no_grad():
            model(batch()[0])


def search() -> None:
    for number in range(12):
        fit(classifier(4 + 4 * number))


def pretrained_generator() -> None:
    generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 6))
    critic = nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(), nn.Linear(16, 1))
    fit(generator, lambda m, x, y: F.mse_loss(m(torch.randn(32, 4)).mean(0), x.mean(0)))
    of_critic = torch.optim.Adam(critic.parameters(), lr=2e-3)
    of_generator = torch.optim.Adam(generator.parameters(), lr=2e-3)
    bce, real, fake = F.binary_cross_entropy_with_logits, torch.ones(32, 1), torch.zeros(32, 1)
    for _ in range(N_STEPS):
        made = generator(torch.randn(32, 4))
        of_critic.zero_grad()
        (bce(critic(batch()[0]), real) + bce(critic(made.detach()), fake)).backward()
        of_critic.step()
        of_generator.zero_grad()
        bce(critic(made), real).backward()
        of_generator.step()


def teacher_and_student() -> None:
    teacher = classifier(32)
    fit(teacher)
    teacher.eval()

    def distil(student: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = F.softmax(teacher(x), 1)
        given = student(x)
        divergence = F.kl_div(F.log_softmax(given, 1), wanted, reduction="batchmean")
        return F.cross_entropy(given, y) + divergence

    fit(classifier(4), distil)


def new_head() -> None:
    model = classifier()
    fit(model, lambda m, x, y: F.cross_entropy(m(x), (y > 0).long()))
    model[2] = nn.Linear(16, 3)
    fit(model)


def another_optimizer() -> None:
    model = classifier()
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    for number in range(2 * N_STEPS):
        optimizer = adam if number < N_STEPS else sgd
        optimizer.zero_grad()
        cross_entropy(model, *batch()).backward()
        optimizer.step()


def another_initialisation() -> None:
    model = classifier()
    for seed in range(3):
        torch.manual_seed(seed)
        model[0].reset_parameters()
        model[2].reset_parameters()
        fit(model)


class TwoTasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.first, self.second = nn.Linear(8, 6), nn.Linear(8, 3)
        self.is_second = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.body(x))
        return self.second(hidden) if self.is_second else self.first(hidden)


def another_head_of_one_model() -> None:
    model = TwoTasks()
    fit(model, lambda m, x, y: F.mse_loss(m(x), x))
    model.is_second = True
    fit(model)


def parameter_in_no_model() -> None:
    for _ in range(4):
        temperature = nn.Parameter(torch.ones(()))
        fit(classifier(), lambda m, x, y, t=temperature: F.cross_entropy(m(x) / t, y))  # type: ignore[misc]


@pytest.mark.parametrize(
    "program",
    [
        pretrain_and_probe,
        folds,
        search,
        pretrained_generator,
        teacher_and_student,
        new_head,
        another_optimizer,
        another_initialisation,
        another_head_of_one_model,
        parameter_in_no_model,
    ],
    ids=lambda program: program.__name__,
)
def test_healthy_trainings_one_after_the_other(program: Program) -> None:
    assert not alarms(program)
