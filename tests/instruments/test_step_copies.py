"""What is copied around a step, driven by hand, against copies made by the test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from gradscope.formulas import FORMULAS
from gradscope.instruments import flat_copies
from gradscope.instruments.anatomy import Anatomy
from gradscope.instruments.flat_copies import TRACKED
from gradscope.instruments.step_copies import StepCopies, formula_of, group_numbers
from gradscope.run.weight_step import TrackedWeights


@dataclass
class Around:
    """One step as the test saw it, and what was made of it."""

    before: list[torch.Tensor]
    after: list[torch.Tensor]
    gradients: list[torch.Tensor | None]
    anatomy: Anatomy
    tracked: TrackedWeights | None


def parameters_of(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def step(
    copies: StepCopies,
    optimizer: torch.optim.Optimizer,
    parameters: list[Any],
    gradient: Callable[[torch.Tensor], torch.Tensor | None] = torch.randn_like,
) -> Around:
    for parameter in parameters:
        parameter.grad = gradient(parameter)
    before = [p.detach().clone() for p in parameters]
    gradients = [None if p.grad is None else p.grad.detach().clone() for p in parameters]
    copies.before(optimizer, parameters)
    copies.gradients([p.grad for p in parameters], None)
    optimizer.step()
    anatomy = copies.after(parameters).value()
    tracked = copies.tracked(np.arange(10, 10 + len(parameters))).value()
    after = [p.detach().clone() for p in parameters]
    return Around(before, after, gradients, anatomy, tracked)


def squares(x: torch.Tensor) -> float:
    x = torch.view_as_real(x) if x.is_complex() else x
    return float(x.double().square().sum())


SHAPES = [(4, 3), (10_000,), (), (5,), (100, 90), (2, 2)]


@pytest.mark.parametrize("room", [0, 60_000, 100_000])
@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad", "Adafactor"])
def test_where_there_is_no_room_for_all_they_take_turns(
    name: str, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat_copies, "MOST_BYTES", room)
    parameters = parameters_of(*SHAPES)
    optimizer = getattr(torch.optim, name)(parameters, lr=0.05, weight_decay=0.1)
    copies = StepCopies(optimizer, parameters)
    seen = np.zeros(len(SHAPES), int)
    n_steps = 12
    for number in range(n_steps):
        around = step(copies, optimizer, parameters)
        known = ~np.isnan(around.anatomy.residual)
        seen += known
        assert 0 < known.sum() < len(SHAPES)
        for i, is_known in enumerate(known):
            assert_norms(around, i)
            if not is_known:
                assert copies.weight(i, 0, (0,) * len(SHAPES[i])) is None
                continue
            assert around.anatomy.residual[i] <= 1e-6 * around.anatomy.update[i], number
            index = tuple(n - 1 for n in SHAPES[i])
            found = copies.weight(i, max(int(np.prod(SHAPES[i])) - 1, 0), index)
            assert found.weight_stored == around.after[i][index].item()
            found_before = np.asarray(found.given["weight_before"])
            whole = found_before[index] if found_before.ndim else found_before
            assert whole == around.before[i][index].item()
        if name != "Adafactor":
            assert_tracked(around, known)
    # Everybody has had the same number of turns, or one more.
    assert seen.min() >= 1
    assert seen.max() - seen.min() <= 1


def assert_tracked(around: Around, known: npt.NDArray[np.bool_]) -> None:
    """Of every parameter some weights are tracked; of those it is the turn of, also the rest."""
    tracked = around.tracked
    for i in range(len(SHAPES)):
        own = tracked.param == 10 + i
        positions = tracked.position[own]
        assert len(positions) == min(TRACKED, around.before[i].numel())
        for name, weights in (("before", around.before[i]), ("after", around.after[i])):
            expected = weights.reshape(-1)[positions].numpy()
            assert np.array_equal(tracked.values[f"weight_{name}"][own], expected)
        index = (0,) * len(SHAPES[i])
        assert (tracked.weight(10 + i, 0, index) is not None) == known[i]


def assert_norms(around: Around, i: int) -> None:
    before, after = around.before[i], around.after[i]
    found = around.anatomy
    assert found.weight_before[i] == pytest.approx(squares(before), rel=1e-5)
    assert found.weight_after[i] == pytest.approx(squares(after), rel=1e-5)
    if before.is_complex():
        change = after.to(torch.complex128) - before.to(torch.complex128)
    else:
        change = after.double() - before.double()
    assert found.update[i] == pytest.approx(squares(change), rel=1e-4)


def test_norms_of_those_whose_turn_it_is_not_whatever_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flat_copies, "MOST_BYTES", 0)
    torch.manual_seed(0)
    parameters = [
        torch.nn.Parameter(torch.randn(shape, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.complex64)
        for shape in ((3, 2), (4,), (5, 5), (0, 3), (), (30, 1_000))
    ]
    parameters.append(torch.nn.Parameter(torch.randn(6, 4).T))
    parameters.append(torch.nn.Parameter(torch.full((4,), 1e-30)))
    parameters.append(torch.nn.Parameter(torch.tensor([1.0, float("nan")])))
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    copies = StepCopies(optimizer, parameters)
    weight = parameters[0].detach()
    for _ in range(6):
        around = step(copies, optimizer, parameters)
        for i in range(len(parameters) - 1):
            assert_norms(around, i)
        assert np.isnan(around.anatomy.update[-1])
    # A step that does nothing says so.
    optimizer.param_groups[0]["lr"] = 0.0
    around = step(copies, optimizer, parameters)
    assert (around.anatomy.update[:-1] == 0).all()
    # What is asked of the program's own memory can still be resized.
    weight.resize_(3, 4)


def test_tracked_weights_are_spread_over_each_parameter() -> None:
    parameters = parameters_of(*SHAPES, (16,), (17,))
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    copies = StepCopies(optimizer, parameters)
    for number in range(3):
        around = step(copies, optimizer, parameters)
        for i, parameter in enumerate(parameters):
            own = around.tracked.param == 10 + i
            positions = around.tracked.position[own]
            assert len(positions) == min(TRACKED, parameter.numel())
            assert (positions[0], positions[-1]) == (0, parameter.numel() - 1)
            if len(positions) > 1:
                gaps = np.diff(positions)
                assert gaps.min() > 0
                assert gaps.max() <= gaps.min() + 1
            for position in positions.tolist():
                index = tuple(map(int, np.unravel_index(position, parameter.shape)))
                found = around.tracked.weight(10 + i, position, index)
                assert found.given["weight_before"] == around.before[i][index].item()
                assert found.given["g"] == around.gradients[i][index].item()
                assert found.weight_stored == around.after[i][index].item()
                assert found.given["t_before"] == number
                assert found.formula == "AdamW"
    assert around.tracked.weight(10, 99, (9, 9)) is None
    assert around.tracked.weight(9, 0, (0, 0)) is None


def test_gradients_that_are_still_scaled_are_unscaled_in_the_copies_only() -> None:
    parameters = parameters_of((3,), (9_000,))
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    copies = StepCopies(optimizer, parameters)
    gradients = [1024 * torch.randn_like(p) for p in parameters]
    held = [g.clone() for g in gradients]
    copies.before(optimizer, parameters)
    copies.gradients(gradients, torch.tensor(1024.0))
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(0.5 * gradient / 1024)
    anatomy = copies.after(parameters).value()
    assert all(torch.equal(a, b) for a, b in zip(gradients, held, strict=True))
    for i, gradient in enumerate(gradients):
        assert anatomy.gradient[i] == pytest.approx(squares(gradient / 1024), rel=1e-5)
        assert anatomy.residual[i] <= 1e-10 * anatomy.update[i]


def test_a_closure_that_runs_again_gives_the_gradients_that_count() -> None:
    parameters = parameters_of((4,), (3, 2))
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    copies = StepCopies(optimizer, parameters)
    copies.before(optimizer, parameters)
    for size in (100.0, 1.0):
        for parameter in parameters:
            parameter.grad = size * torch.ones_like(parameter)
        copies.gradients([p.grad for p in parameters], None)
    optimizer.step()
    anatomy = copies.after(parameters).value()
    assert anatomy.gradient.tolist() == [4, 6]
    assert (anatomy.residual <= 1e-10).all()


def test_gradients_that_come_and_go() -> None:
    """What is left in the buffers from an earlier step must not be taken for this step's."""
    parameters = parameters_of((4,), (9_000,), (3, 2), (2,))
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.3)
    copies = StepCopies(optimizer, parameters)
    pattern = [(1, 1, 1, 1), (0, 1, 0, 1), (1, 0, 0, 1), (0, 0, 0, 0), (1, 1, 1, 1), (0, 0, 1, 0)]
    for present in pattern:
        given = iter(present)
        around = step(
            copies,
            optimizer,
            parameters,
            lambda p, g=given: torch.randn_like(p) if next(g) else None,
        )
        for i, there in enumerate(present):
            if there:
                assert around.anatomy.gradient[i] == pytest.approx(squares(around.gradients[i]))
                assert around.anatomy.residual[i] <= 1e-6 * around.anatomy.update[i]
                assert around.anatomy.formula[i] > 0
            else:
                assert np.isnan(around.anatomy.gradient[i])
                assert around.anatomy.update[i] == around.anatomy.residual[i] == 0
                assert "g" not in copies.weight(i, 0, (0,)).given


def test_a_sparse_gradient_then_a_dense_one() -> None:
    parameters = parameters_of((5, 2))
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    copies = StepCopies(optimizer, parameters)

    def sparse(parameter: torch.Tensor) -> torch.Tensor:
        return torch.sparse_coo_tensor(
            [rows], torch.randn(3, 2), parameter.shape, check_invariants=True
        )

    for gradient, rows in ((sparse, [0, 1, 1]), (torch.randn_like, []), (sparse, [1, 4, 1])):
        around = step(copies, optimizer, parameters, gradient)
        given = copies.weight(0, 2, (1, 0)).given
        assert given["touched"] == 1
        assert given["g"] == pytest.approx(around.gradients[0].to_dense()[1, 0].item())
        for row in range(5):
            is_touched = gradient is not sparse or row in rows
            assert copies.weight(0, 2 * row, (row, 0)).given["touched"] == is_touched
        assert around.anatomy.residual[0] <= 1e-10 * around.anatomy.update[0]


def test_empty_parameters_have_an_update_of_nothing() -> None:
    parameters = parameters_of((0,), (3,), (2, 0))
    optimizer = torch.optim.AdamW(parameters)
    around = step(StepCopies(optimizer, parameters), optimizer, parameters)
    assert around.anatomy.update[[0, 2]].tolist() == [0, 0]
    assert around.anatomy.residual[[0, 2]].tolist() == [0, 0]
    assert around.anatomy.update[1] > 0


def test_groups_in_any_order_and_each_with_numbers_of_its_own() -> None:
    parameters = parameters_of((3,), (4,), (9_000,), (2, 2), (9_001,), (5,))
    second, first = parameters[::2], parameters[1::2]
    optimizer = torch.optim.AdamW(
        [{"params": first, "lr": 0.5, "weight_decay": 0.3}, {"params": second, "lr": 0.01}]
    )
    assert group_numbers(optimizer, parameters).tolist() == [1, 0, 1, 0, 1, 0]
    copies = StepCopies(optimizer, parameters)
    for _ in range(3):
        around = step(copies, optimizer, parameters)
        for i, (before, after) in enumerate(zip(around.before, around.after, strict=True)):
            change = after.double() - before.double()
            assert around.anatomy.update[i] == pytest.approx(squares(change), rel=1e-4)
            assert around.anatomy.residual[i] <= 1e-6 * around.anatomy.update[i]
            lr, decay = (0.5, 0.3) if i % 2 else (0.01, 0.01)
            assert around.anatomy.decay[i] == pytest.approx(squares(lr * decay * before), rel=1e-4)
            together = copies.common(i).value()
            assert (together.given["lr"], together.given["weight_decay"]) == (lr, decay)
            assert together.formula == "AdamW"


def test_the_state_of_an_optimizer_is_not_added_to() -> None:
    parameters = parameters_of((3,))
    optimizer = torch.optim.AdamW(parameters)
    copies = StepCopies(optimizer, parameters)
    copies.before(optimizer, parameters)
    copies.gradients([None], None)
    copies.after(parameters).value()
    assert not optimizer.state


class KeepsStep(torch.optim.AdamW):
    pass


class OwnStep(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class AdamW(torch.optim.Optimizer):
    """Not torch's, in spite of its name."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        pass


def test_whose_rule_is_known() -> None:
    one = [nn.Parameter(torch.zeros(2, 2))]
    for name, formula in FORMULAS.items():
        assert formula_of(getattr(torch.optim, name)(one)) is formula
    assert formula_of(KeepsStep(one)) is FORMULAS["AdamW"]
    for other in (OwnStep(one), AdamW(one), torch.optim.LBFGS(one)):
        assert formula_of(other) is None


def test_the_wrapper_of_a_scheduler_changes_nothing() -> None:
    """A scheduler puts a function of its own in the place of the instance's step."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    assert formula_of(optimizer) is FORMULAS["AdamW"]


def test_what_is_written_past_the_version_counters_between_two_steps_is_seen() -> None:
    parameters = [torch.nn.Parameter(torch.randn(n)) for n in (5, 9_000)]
    optimizer = torch.optim.AdamW(parameters)
    copies = StepCopies(optimizer, parameters)
    for _ in range(2):
        for parameter in parameters:
            parameter.data.copy_(torch.randn(parameter.shape))
            parameter.grad = torch.randn(parameter.shape)
            for moment in ("exp_avg", "exp_avg_sq") if optimizer.state[parameter] else ():
                optimizer.state[parameter][moment].data.fill_(0.25)
        found = [parameter.detach().clone() for parameter in parameters]
        copies.before(optimizer, parameters)
        copies.gradients([parameter.grad for parameter in parameters], None)
        optimizer.step()
        anatomy = copies.after(parameters).value()
    for place, weight in enumerate(found):
        whole = copies.whole(place)
        assert whole is not None
        assert whole[0]["weight_before"].tolist() == weight.tolist()
        assert set(whole[0]["m_before"].tolist()) == {0.25}
        assert set(whole[0]["v_before"].tolist()) == {0.25}
    assert anatomy.first_moment.tolist() == pytest.approx([5 / 16, 9_000 / 16])
    assert (anatomy.residual < 1e-9 * anatomy.update + 1e-12 * anatomy.weight_after).all()
