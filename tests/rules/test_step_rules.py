"""Rules about the step, the clearing and the parameters: broken loops and healthy look-alikes."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradscope
from gradscope.instruments import flat_copies

Loop = Callable[[nn.Module, torch.optim.Optimizer], None]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def loss_of(model: nn.Module) -> torch.Tensor:
    return F.cross_entropy(model(torch.randn(5, 6)), torch.randint(0, 3, (5,)))


def codes(loop: Loop, steps: int = 12, **options: float) -> set[str]:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), **{"lr": 0.1, **options})
    with gradscope.watch(model, optimizer, on_error="raise", every=1) as scope:
        for _ in range(steps):
            loop(model, optimizer)
    assert not scope.findings.unchecked
    return {finding.code for finding in scope.findings if finding.severity > 0}


def usual(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


def no_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss_of(model).backward()


def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    no_step(model, optimizer)
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad


def cleared_too_early(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss_of(model).backward()
    optimizer.zero_grad()
    optimizer.step()


def micro_batches_cleared(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        (loss_of(model) / 3).backward()
    optimizer.step()


def sharpness_aware(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


def sharpness_aware_by_a_helper(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def descend() -> None:
        optimizer.zero_grad()
        loss_of(model).backward()

    descend()
    with torch.no_grad():
        steps = [0.05 * p.grad for p in model.parameters()]
        torch._foreach_add_(list(model.parameters()), steps)
    descend()
    with torch.no_grad():
        torch._foreach_sub_(list(model.parameters()), steps)
    optimizer.step()


def shrunk(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    usual(model, optimizer)
    for p in model.parameters():
        p.data.mul_(0.5)


def clamped_without_effect(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    usual(model, optimizer)
    for p in model.parameters():
        p.data.clamp_(-100, 100)


@pytest.mark.parametrize(
    ("loop", "options", "code"),
    [
        (no_step, {}, "GS501"),
        (usual, {"lr": 0.0}, "GS503"),
        (cleared_too_early, {}, "GS202"),
        (micro_batches_cleared, {}, "GS202"),
        (shrunk, {}, "GS512"),
    ],
)
def test_broken(loop: Loop, options: dict[str, float], code: str) -> None:
    assert code in codes(loop, **options)


@pytest.mark.parametrize(
    "loop",
    [usual, by_hand, sharpness_aware, sharpness_aware_by_a_helper, clamped_without_effect],
)
def test_healthy(loop: Loop) -> None:
    assert not codes(loop)


def reset_at_times(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if optimizer.state_dict()["param_groups"][0]["lr"] and next(EVERY_FIFTH) == 0:
        for layer in (model[0], model[2]):  # type: ignore[index]
            layer.reset_parameters()
    usual(model, optimizer)


def back_to_the_start(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if next(EVERY_FIFTH) == 0:
        model.load_state_dict(net().state_dict())
    usual(model, optimizer)


def swapped_for_an_evaluation(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    usual(model, optimizer)
    if next(EVERY_FIFTH) == 4:
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(net().state_dict())
        model.load_state_dict(kept)


def taken_back_if_worse(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    usual(model, optimizer)
    if next(EVERY_FIFTH) == 4:
        model.load_state_dict(kept)


EVERY_FIFTH = (i % 5 for i in itertools.count())


@pytest.mark.parametrize("takes_turns", [False, True])
@pytest.mark.parametrize(
    ("loop", "is_broken"),
    [
        (reset_at_times, True),
        (back_to_the_start, True),
        (swapped_for_an_evaluation, False),
        (taken_back_if_worse, False),
    ],
)
def test_weights_written_now_and_then(
    loop: Loop, is_broken: bool, takes_turns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    global EVERY_FIFTH
    if takes_turns:
        monkeypatch.setattr(flat_copies, "MOST_BYTES", 0)
    EVERY_FIFTH = (i % 5 for i in itertools.count())
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(60):
            loop(model, optimizer)
    assert ("GS512" in {f.code for f in scope.findings if f.severity > 0}) is is_broken


@pytest.mark.parametrize("loads_the_first_count", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_folds_that_begin_anew(with_state: bool, loads_the_first_count: bool) -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    if loads_the_first_count:
        usual(model, optimizer)
    first = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for step in range(60):
            if step % 12 == 0:
                model.load_state_dict(first[0])
                if with_state:
                    optimizer.load_state_dict(copy.deepcopy(first[1]))
            usual(model, optimizer)
    assert ("GS512" in {f.code for f in scope.findings if f.severity > 0}) is not with_state


@pytest.mark.parametrize("takes_turns", [False, True])
@pytest.mark.parametrize("shrinks", [False, True])
def test_batches_with_nothing_to_learn_and_weights_that_are_shrunk(
    shrinks: bool, takes_turns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a step without gradient nobody can tell how far those before it went."""
    if takes_turns:
        monkeypatch.setattr(flat_copies, "MOST_BYTES", 0)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with gradscope.watch(model, optimizer, on_error="raise", budget=1e-9) as scope:
        for n in range(140):
            optimizer.zero_grad()
            is_doubled = n >= 8 and n & (n - 1) == 0  # those that are recorded
            (loss_of(model) * (0.0 if is_doubled else 1.0)).backward()
            optimizer.step()
            with torch.no_grad():
                for weight in model.parameters() if shrinks else ():
                    weight.mul_(0.9)
    assert scope.steps.query("step == 128").update_norm.item() == 0
    assert ({f.code for f in scope.findings if f.severity > 0} == {"GS512"}) is shrinks


@pytest.mark.parametrize("every_time", [True, False])
@pytest.mark.parametrize("kind", ["adam", "momentum"])
def test_a_state_that_is_emptied(every_time: bool, kind: str) -> None:
    model = net()
    optimizer = (
        torch.optim.Adam(model.parameters(), lr=0.01)
        if kind == "adam"
        else torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    )
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for i in range(12):
            if every_time or i == 6:
                optimizer.state.clear()
            usual(model, optimizer)
    assert ("GS507" in {f.code for f in scope.findings if f.severity > 0}) is every_time


class WorksOnCopies(torch.optim.Optimizer):
    def __init__(self, params: object, lr: float) -> None:
        super().__init__(params, {"lr": lr})  # type: ignore[arg-type]

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.detach().clone().sub_(group["lr"] * p.grad)


def test_an_optimizer_that_works_on_copies() -> None:
    model = net()
    optimizer = WorksOnCopies(model.parameters(), lr=0.1)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(12):
            usual(model, optimizer)
    (found,) = (f for f in scope.findings if f.code == "GS513")
    assert "rounding" not in found.message
    assert "in place" in found.fix


class GathersGradients(torch.optim.Optimizer):
    """Moves weights at every tenth step only, by the mean of ten gradients."""

    def __init__(self, params: object, lr: float) -> None:
        super().__init__(params, {"lr": lr})  # type: ignore[arg-type]
        self.turn = 0

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        self.turn += 1
        for group in self.param_groups:
            for p in group["params"]:
                gathered = self.state[p].setdefault("sum", torch.zeros_like(p))
                gathered += p.grad
                if self.turn % 10 == 0:
                    p.sub_(gathered, alpha=group["lr"] / 10)
                    gathered.zero_()


@pytest.mark.parametrize("is_reset", [False, True])
def test_an_optimizer_that_moves_weights_at_steps_that_are_not_recorded(is_reset: bool) -> None:
    model = net()
    optimizer = GathersGradients(model.parameters(), lr=0.5)
    with gradscope.watch(model, optimizer, on_error="raise", budget=1e-9) as scope:
        for n in range(140):
            if is_reset and n in (32, 64, 128):
                model.load_state_dict(net().state_dict())
            usual(model, optimizer)
    assert (scope.steps["update_norm"].dropna() == 0).all()
    found = {f.code for f in scope.findings if f.severity > 0}
    assert found & {"GS512", "GS513"} == ({"GS512", "GS513"} if is_reset else set())


@pytest.mark.parametrize(
    ("steps_by", "updates", "is_broken"),
    [
        ("scaler", False, True),
        ("optimizer", False, True),
        ("scaler", True, False),
    ],
)
def test_a_second_unscale_that_raises(steps_by: str, updates: bool, is_broken: bool) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    watching = gradscope.watch(model, optimizer, on_error="raise")
    with contextlib.suppress(RuntimeError), watching:
        for _ in range(4):
            optimizer.zero_grad()
            scaler.scale(loss_of(model)).backward()
            scaler.unscale_(optimizer)
            if steps_by == "scaler":
                scaler.step(optimizer)
            else:
                optimizer.step()
            if updates:
                scaler.update()
    assert ("GS515" in {f.code for f in watching.findings if f.severity > 0}) is is_broken


def test_a_search_that_has_converged() -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    x = torch.randn(16, 2)
    y = x.sum(1, keepdim=True)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=50, tolerance_grad=1e-3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    with gradscope.watch(model, optimizer, on_error="raise", every=1) as scope:
        for _ in range(8):
            optimizer.step(closure)
    assert (scope.steps["update_norm"] == 0).all()
    assert not [f.code for f in scope.findings if f.severity > 0]


def test_steps_while_nobody_watched_are_not_writes() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scope = gradscope.watch(model, optimizer, on_error="raise")
    for _ in range(3):
        with scope:
            for _ in range(2):
                usual(model, optimizer)
        usual(model, optimizer)
    written = scope.steps["written_between"]
    assert list(written.isna()) == [True, False] * 3
    assert (written.dropna() == 0).all()


def judged(
    model: nn.Module, optimizer: torch.optim.Optimizer, n_steps: int = 60
) -> dict[str, gradscope.Finding]:
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(n_steps):
            usual(model, optimizer)
    return {found.code: found for found in scope.findings if found.severity > 0}


def test_decay_that_forgets_although_the_weights_stay_large() -> None:
    def found(decay: float) -> dict[str, gradscope.Finding]:
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=decay)
        with gradscope.watch(model, optimizer, on_error="raise") as scope:
            for _ in range(80):
                optimizer.zero_grad()
                x = torch.randn(32, 6)
                F.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
                optimizer.step()
        return {found.code: found for found in scope.findings if found.severity > 0}

    assert "forgotten" in found(0.8)["GS511"].message
    assert not found(0.08)


def test_a_ridge_regression_shrinks_its_weights_on_purpose() -> None:
    torch.manual_seed(0)
    model = nn.Linear(20, 1)
    nn.init.normal_(model.weight)
    x = torch.randn(256, 20)
    y = 0.5 * x[:, :1] + 0.1 * torch.randn(256, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=0.25)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(200):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
    assert not [f.code for f in scope.findings if f.severity > 0]
    assert model.weight.norm() < 0.3 * 20**0.5


def test_first_updates_after_which_weights_have_grown() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3))
    found = judged(model, torch.optim.Adam(model.parameters(), lr=20.0), 60)
    assert set(found) == {"GS505"}
    model = net()  # zeros have to grow, and a loss that falls has been learned from
    nn.init.zeros_(model[2].weight)  # type: ignore[index]
    assert not judged(model, torch.optim.Adam(model.parameters(), lr=0.05), 60)


@pytest.mark.parametrize("is_mistaken", [True, False])
def test_a_second_scheduler_of_the_same_optimizer(is_mistaken: bool) -> None:
    models = net(), net()
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-3) for model in models]
    schedulers = [
        torch.optim.lr_scheduler.StepLR(of, 5)
        for of in (optimizers[0], optimizers[0 if is_mistaken else 1])
    ]
    with gradscope.watch(list(models), optimizers, on_error="raise") as scope:
        for _ in range(20):
            for model, optimizer in zip(models, optimizers, strict=True):
                usual(model, optimizer)
            for scheduler in schedulers:
                scheduler.step()
    found = {f.code: f for f in scope.findings if f.severity > 0}
    assert ("GS509" in found) is is_mistaken
    if is_mistaken:
        assert "has none" in found["GS509"].message


def test_schedules_of_one_optimizer_that_multiply_or_follow_each_other() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    kinds = torch.optim.lr_scheduler
    both = kinds.LambdaLR(optimizer, lambda i: min(1, (i + 1) / 5)), kinds.StepLR(optimizer, 30)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for i in range(20):
            usual(model, optimizer)
            for scheduler in both:
                scheduler.step()
            if i == 10:
                both = (kinds.StepLR(optimizer, 30), both[1])
    assert not [f.code for f in scope.findings if f.severity > 0]
    assert set(scope.events.query("event == 'scheduler'")["detail"]) == {
        "LambdaLR",
        "StepLR",
        "StepLR#2",
    }


def test_a_plateau_that_is_looked_for_in_the_wrong_direction() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=1)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for i in range(60):
            usual(model, optimizer)
            scheduler.step(1 / (i + 1))
    (found,) = (f for f in scope.findings if f.code == "GS504")
    assert "the mode that fits" in found.fix


@pytest.mark.parametrize("learns", [True, False])
def test_a_second_phase_at_a_thousandth_of_the_rate(learns: bool) -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
    head = nn.Linear(128, 2)
    x = torch.randn(200, 20)
    y = (x[:, :8].square().sum(1) > 7).long()
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0, momentum=0.9)
    with gradscope.watch(nn.Sequential(body, head), optimizer, on_error="raise") as scope:
        for step in range(120):
            if step == 20:
                optimizer.param_groups[0]["lr"] = 1e-3
                if learns:
                    optimizer.add_param_group({"params": body.parameters(), "lr": 2e-3})
            optimizer.zero_grad()
            F.cross_entropy(head(body(x)), y).backward()
            optimizer.step()
    assert ("GS504" in {f.code for f in scope.findings if f.severity > 0}) is not learns


@pytest.mark.parametrize("is_policy", [True, False])
def test_a_loss_that_rises_to_zero_from_below(is_policy: bool) -> None:
    """Costs of what a policy does: the surer it is, the nearer to 0 is their weighted logarithm."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=4.0 if is_policy else 14.0)
    cost = torch.randn(4, 3).abs()
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(60):
            state = torch.randint(4, (64,))
            out = model(F.one_hot(state, 4).float())
            if is_policy:
                chosen = torch.distributions.Categorical(logits=out)
                action = chosen.sample()
                loss = (chosen.log_prob(action) * cost[state, action]).mean()
            else:
                loss = F.mse_loss(out, cost[state]) - 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert scope.steps["loss"].iloc[0] < 0
    assert ("GS505" in {f.code for f in scope.findings if f.severity > 0}) is not is_policy


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_around_a_step(when: str) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def clip(*_: object) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)

    def shrink(*_: object) -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.9)

    if when == "before":
        optimizer.register_step_pre_hook(clip)
    else:
        optimizer.register_step_post_hook(shrink)
    found = judged(model, optimizer, 12)
    assert ("GS516" in found) is (when == "after")
