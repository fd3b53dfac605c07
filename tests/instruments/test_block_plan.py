"""What a plan of blocks gives, against the same arithmetic done as it is written, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gradscope.instruments import anatomy
from gradscope.instruments.anatomy import LARGE
from gradscope.instruments.block_plan import BlockPlan, NotPlannedError
from gradscope.instruments.segments import HostSegments, HostWhole
from gradscope.instruments.step_copies import StepCopies

OPTIMIZERS = [
    ("AdamW", {"weight_decay": 0.1}),
    ("AdamW", {"amsgrad": True, "maximize": True}),
    ("Adam", {"weight_decay": 0.1}),
    ("NAdam", {"weight_decay": 0.1}),
    ("RAdam", {"betas": (0.9, 0.99)}),
    ("Adamax", {}),
    ("Adagrad", {}),
    ("Adadelta", {}),
    ("ASGD", {"weight_decay": 0.1}),
    ("RMSprop", {"centered": True, "momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("SGD", {}),
]
# Alike ones, which are reduced as the rows of a matrix; others; and more than one block.
SHAPES = [(8, 4)] * 9 + [(5,), (3, 7), (LARGE,), (2 * anatomy._BLOCK + 48,)]


def copied_step(name: str, options: dict[str, Any], n_before: int) -> Any:
    """The copies around one step, and the runs that they are cut into."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = getattr(torch.optim, name)(parameters, lr=1e-2, **options)

    def backward() -> None:
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape)

    for _ in range(n_before):
        backward()
        optimizer.step()
    copies = StepCopies(optimizer, parameters)
    backward()
    copies.before(optimizer, parameters)
    copies.gradients([parameter.grad for parameter in parameters], None)
    optimizer.step()
    copies.after(parameters)
    return copies._parts[0]


@pytest.mark.parametrize("n_before", [0, 1, 7])
@pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
def test_a_plan_gives_what_the_rule_gives(
    name: str, options: dict[str, Any], n_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = copied_step(name, options, n_before)

    def rows() -> Any:
        found = np.full((len(anatomy._ROWS), len(SHAPES)), np.nan)
        with np.errstate(all="ignore"):
            for run in part._runs:
                anatomy._work_out_run(part.copies, run, found)
        return found

    for run in part._runs if n_before else ():
        anatomy._planned(part.copies, run)  # none but a first step, whose moments are 0, is refused
    planned = rows()

    def refuse(*_: Any) -> Any:
        raise NotPlannedError

    monkeypatch.setattr(anatomy, "_planned", refuse)
    numpy = torch.Tensor.numpy
    monkeypatch.setattr(torch.Tensor, "numpy", lambda t: numpy(t).astype(np.float64))
    written = rows()
    # What rounding leaves of a difference of equals is noise.
    assert anatomy._is_trustworthy(planned).all()
    residual = anatomy._ROWS["residual"]
    planned[residual] = written[residual] = 0
    # Sums near zero of gradients and penalties, or of random signs, have fewer digits than terms.
    products = [anatomy._ROWS["update_gradient"], anatomy._ROWS["momentum_gradient"]]
    np.testing.assert_allclose(planned[products], written[products], rtol=1e-3)
    planned[products] = written[products] = 0
    np.testing.assert_allclose(planned, written, rtol=1e-3)


def test_a_wrong_update_shows_in_a_plan() -> None:
    part = copied_step("AdamW", {}, 1)
    part.copies.flat("weight_after", 0, 5)[:] += 1
    found = np.full((len(anatomy._ROWS), len(SHAPES)), np.nan)
    anatomy._work_out_run(part.copies, part._runs[0], found)
    residual = found[anatomy._ROWS["residual"]]
    assert residual.max() == pytest.approx(5, rel=1e-5)
    assert np.count_nonzero(residual > 1e-3) == 1


@pytest.mark.parametrize("n", [1, 2, 100])
def test_segments_of_one_length_are_reduced_like_any_others(n: int) -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal(4 * n).astype(np.float32) for _ in range(2))
    plan = BlockPlan(["x", "y"], torch.float32)
    a, b = plan.arrays["x"], plan.arrays["y"]
    made = 2 - 3 * a * b / (abs(b) + 1)
    found = {
        "total": plan.total(made),
        "least": plan.least(-2 * made),
        "product": plan.product(made, a),
        "count": plan.count((made > 1) & (b != 0)),
        "number": plan.total(0.5),
    }
    wide, other = x.astype(np.float64), y.astype(np.float64)
    value = 2 - 3 * wide * other / (abs(other) + 1)
    rows = value.reshape(4, n)
    expected = [
        rows.sum(1),
        (-2 * rows).min(1),
        (value * wide).reshape(4, n).sum(1),
        (rows > 1).sum(1),
        np.full(4, 0.5 * n),
    ]
    segments = HostSegments(np.arange(0, 4 * n, n), 4 * n)
    raw = np.array(plan.work_out([x, y], segments), np.float64)
    np.testing.assert_allclose(plan.finished(found.values(), raw), expected, rtol=1e-4, atol=1e-5)
    whole = np.array([plan.work_out([x[:n], y[:n]], HostWhole(n))], np.float64).T
    first = [row[:1] for row in expected]
    np.testing.assert_allclose(plan.finished(found.values(), whole), first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [0.0, 1e-13, 1e7, float("nan"), float("inf")])
def test_a_factor_that_could_hide_an_overflow_is_refused(factor: float) -> None:
    array = BlockPlan(["x"], torch.float32).arrays["x"]
    with pytest.raises(NotPlannedError):
        factor * array
    with pytest.raises(NotPlannedError):
        array / 0
