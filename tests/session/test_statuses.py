"""What a gradient is when its optimizer steps, seen through real loops of torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradscope


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(5, 6), torch.randint(0, 3, (5,))


def set_to_none(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=True)


def set_to_zero(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=False)


def model_zero_grad(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.zero_grad()


def assign_none(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for p in model.parameters():
        p.grad = None


def zero_in_place(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad.zero_()


def zero_data(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad.data.zero_()


def multiply_by_zero(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad.detach().mul_(0)


def fresh_zeros(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


SPELLINGS = {
    set_to_none: ("none", "optimizer.zero_grad"),
    set_to_zero: ("zero", "optimizer.zero_grad"),
    model_zero_grad: ("none", "module.zero_grad"),
    assign_none: ("none", "hand"),
    zero_in_place: ("zero", "hand"),
    zero_data: ("zero", "hand"),
    multiply_by_zero: ("zero", "hand"),
    fresh_zeros: ("zero", "hand"),
}

Clear = Callable[[nn.Module, torch.optim.Optimizer], None]


@pytest.mark.parametrize("before_forward", [True, False])
@pytest.mark.parametrize("clear", SPELLINGS, ids=lambda clear: clear.__name__)
def test_every_spelling_of_clearing_leaves_fresh_gradients(
    clear: Clear, before_forward: bool
) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(5):
            x, y = batch()
            if before_forward:
                clear(model, optimizer)
            loss = F.cross_entropy(model(x), y)
            if not before_forward:
                clear(model, optimizer)
            loss.backward()
            optimizer.step()
    how, by = SPELLINGS[clear]
    later = scope.steps.iloc[1:]
    assert (scope.grads["status"] == "fresh").all()
    assert (later["zeroed"] == how).all()
    assert (later["zeroed_by"] == by).all()
    assert (later["n_fresh"] == 4).all()
    assert not scope.findings


@pytest.mark.parametrize("clear", SPELLINGS, ids=lambda clear: clear.__name__)
def test_accumulation_over_micro_batches_is_accumulated(clear: Clear) -> None:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for i in range(12):
            x, y = batch()
            (F.cross_entropy(model(x), y) / 4).backward()
            if i % 4 == 3:
                optimizer.step()
                clear(model, optimizer)
    assert (scope.grads["status"] == "accumulated").all()
    assert (scope.grads["n_writes"] == 4).all()
    assert scope.steps["n_backward"].tolist() == [4, 4, 4]
    assert not scope.findings


def test_without_clearing_every_later_gradient_is_compounded() -> None:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(4):
            x, y = batch()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert scope.steps["n_fresh"].tolist() == [4, 0, 0, 0]
    assert scope.steps["n_compounded"].tolist() == [0, 4, 4, 4]
    assert scope.steps["zeroed"].tolist() == ["none", "never", "never", "never"]
    assert set(scope.grads.loc[scope.grads["step"] > 0, "carried_from"]) == {0}


def test_a_step_without_a_new_backward_is_stale() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = batch()
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.step()
    assert scope.steps["n_stale"].tolist() == [0, 4]
    assert (scope.grads.loc[scope.grads["step"] == 1, "carried_from"] == 0).all()


def test_gradients_wiped_before_the_step_are_none_or_zeroed() -> None:
    for set_to_none_, status in ((True, "none"), (False, "zeroed")):
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with gradscope.watch(model, optimizer, on_error="raise") as scope:
            x, y = batch()
            F.cross_entropy(model(x), y).backward()
            optimizer.zero_grad(set_to_none=set_to_none_)
            optimizer.step()
        assert (scope.grads["status"] == status).all()
        assert "backward, zero_grad, step" in scope.steps["order"].iloc[0]


def test_gradients_of_the_programs_own_making_are_assigned() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(3):
            x, y = batch()
            loss = F.cross_entropy(model(x), y)
            grads = torch.autograd.grad(loss, list(model.parameters()))
            for p, grad in zip(model.parameters(), grads, strict=True):
                p.grad = grad
            optimizer.step()
    assert (scope.grads["status"] == "assigned").all()
    assert (scope.backwards["function"] == "grad").all()
    assert scope.steps["n_backward"].tolist() == [0, 0, 0]
    assert not scope.findings


def test_a_gan_whose_discriminator_is_cleared_before_its_own_step_is_fresh() -> None:
    torch.manual_seed(0)
    g, d = nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
    opt_g = torch.optim.Adam(g.parameters())
    opt_d = torch.optim.Adam(d.parameters())
    bce = nn.BCEWithLogitsLoss()
    ones, zeros = torch.ones(5, 1), torch.zeros(5, 1)
    with gradscope.watch([d, g], [opt_d, opt_g], on_error="raise") as scope:
        for _ in range(5):
            real, noise = torch.randn(5, 6), torch.randn(5, 4)
            d.zero_grad()
            bce(d(real), ones).backward()
            fake = g(noise)
            bce(d(fake.detach()), zeros).backward()
            opt_d.step()
            g.zero_grad()
            bce(d(fake), ones).backward()  # adds onto the gradients that opt_d has just used
            opt_g.step()
    steps = scope.steps
    assert (steps["n_compounded"] == 0).all()
    assert (steps.loc[steps["optimizer"] == "opt_d", "n_accumulated"] == 4).all()
    assert (steps.loc[steps["optimizer"] == "opt_g", "n_fresh"] == 2).all()
    assert set(scope.params["param"]) == {"d.0.weight", "d.0.bias", "d.2.weight", "d.2.bias",
                                          "g.weight", "g.bias"}  # fmt: skip
    assert not scope.findings


def test_two_losses_back_propagated_in_turn_count_as_two_writes_and_their_sum() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = batch()
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        first = F.cross_entropy(model(x), y)
        second = model(x).pow(2).mean()
        optimizer.zero_grad()
        first.backward()
        second.backward()
        optimizer.step()
    step = scope.steps.iloc[0]
    assert step["n_accumulated"] == 4
    assert step["loss"] == pytest.approx(first.item() + second.item())


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.LBFGS])
def test_a_closure_is_read_after_it_has_run(optimizer_class: type[torch.optim.Optimizer]) -> None:
    model = small_model()
    optimizer = optimizer_class(model.parameters(), lr=0.1)
    x, y = batch()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(3):
            optimizer.step(closure)
    assert (scope.grads["status"] == "fresh").all()
    assert (scope.grads["norm"] > 0).all()
    assert not scope.findings


def test_a_closure_that_forgets_to_clear_is_found() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = batch()

    def closure() -> torch.Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(3):
            optimizer.step(closure)
    assert scope.steps["n_compounded"].tolist() == [0, 4, 4]


def test_a_step_that_the_scaler_skips_is_skipped_and_uses_nothing() -> None:
    for fused in (False, True):
        model = small_model()
        optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        with gradscope.watch(model, optimizer, on_error="raise") as scope:
            losses = []
            for i in range(4):
                x, y = batch()
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                losses.append(loss.item())
                scaler.scale(loss).backward()
                if i == 1:
                    model[0].weight.grad[0, 0] = float("inf")
                scaler.step(optimizer)
                scaler.update()
        assert scope.steps["outcome"].tolist() == ["stepped", "skipped", "stepped", "stepped"]
        assert scope.steps["loss"].tolist() == pytest.approx(losses)
        assert (scope.grads["status"] == "fresh").all()
        assert (
            scope.steps["scaled"].tolist() == [fused] * 4
            if fused
            else not any(scope.steps["scaled"])
        )
        assert not scope.findings


def test_zeros_that_backward_computes_are_fresh() -> None:
    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 2, bias=False)
            self.b = nn.Linear(2, 3, bias=False)
            nn.init.zeros_(self.b.weight)  # as LoRA does: the gradient of a is exactly zero

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    model = Adapter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(2):
            x, y = batch()
            optimizer.zero_grad(set_to_none=False)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert (scope.grads["status"] == "fresh").all()


def test_clipping_is_an_edit_and_the_norm_is_that_after_it() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(2):
            x, y = batch()
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
    assert scope.grads["edited"].all()
    assert scope.steps["grad_norm"].tolist() == pytest.approx([0.01, 0.01], rel=1e-3)
    assert scope.steps["order"].iloc[0] == "zero_grad, forward, backward, clip, step"
    assert (scope.events["event"] == "clip").sum() == 2


def test_evaluation_inside_the_loop_does_not_count_as_a_forward_of_the_step() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(2):
            x, y = batch()
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                model(x)
            model.train()
    assert scope.steps["n_forward"].tolist() == [1, 1]
    assert scope.steps["train_mode"].all()
    assert scope.steps["order"].iloc[1].startswith("forward without grad")


def test_gradients_left_over_from_before_the_watch_are_not_compounded() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert (scope.grads["status"] == "accumulated").all()


def test_a_backward_without_a_step_is_an_open_attempt() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = batch()
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        F.cross_entropy(model(x), y).backward()
    assert scope.steps["outcome"].tolist() == ["open"]


def test_a_step_that_raises_is_abandoned_and_the_next_one_is_seen() -> None:
    class Moody(torch.optim.SGD):
        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            if self.moody:
                raise RuntimeError("not today")
            return super().step(closure)

    model = small_model()
    optimizer = Moody(model.parameters(), lr=0.1)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for optimizer.moody in (True, False):
            x, y = batch()
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            with contextlib.suppress(RuntimeError):
                optimizer.step()
    assert scope.steps["outcome"].tolist() == ["abandoned", "stepped"]


def test_a_subclass_that_calls_its_parents_step_makes_one_attempt() -> None:
    class Wrapped(torch.optim.AdamW):
        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            return super().step(closure)

    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # now the parent's step has hooks too
    model = small_model()
    optimizer = Wrapped(model.parameters())
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(2):
            x, y = batch()
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert len(scope.steps) == 2


@pytest.mark.parametrize("n_layers", [1, 4, 5, 20])
def test_steps_without_any_gradient_of_models_of_every_size(n_layers: int) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(n_layers)))
    optimizer = torch.optim.AdamW(model.parameters())
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(3):
            optimizer.step()
    assert list(scope.grads["status"].unique()) == ["none"]
    assert len(scope.grads) == 3 * 2 * n_layers


@pytest.mark.parametrize("clears", [True, False])
def test_every_backward_of_a_closure_belongs_to_the_step_that_called_it(clears: bool) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    x = torch.randn(8, 3)
    roots: list[list[float]] = []

    def closure() -> torch.Tensor:
        if clears:
            optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        roots[-1].append(loss.item())
        return loss

    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(5):
            optimizer.zero_grad()
            roots.append([])
            optimizer.step(closure)
    steps, backwards = scope.steps, scope.backwards
    assert steps["n_backward"].tolist() == [len(of_step) for of_step in roots]
    assert backwards["step"].tolist() == [i for i, of_step in enumerate(roots) for _ in of_step]
    assert steps["loss"].tolist() == pytest.approx([of_step[-1] for of_step in roots])
    grads = scope.grads
    assert set(grads["status"]) == {"fresh" if clears else "compounded"}
    # Nobody changed a gradient between two calls of the closure.
    assert not grads["edited_after_use"].any()
    if not clears:
        assert grads["carried_from"].tolist() == grads["step"].tolist()
        (finding,) = scope.findings
        assert (finding.code, finding.count) == ("GS201", 5)
        assert "at the beginning of the closure" in finding.fix
