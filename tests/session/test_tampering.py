"""A step that is not what its optimizer's rule says stands out, and no other does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from stepping import holder, noise, watched_steps
from torch import nn
from torch.optim import adam, sgd

from gradscope.scope import Scope

STEPS = 4
CLEARLY = 1e-2
"""By what share of the update the formula is off, at least, when something was tampered with."""

Change = Callable[[pytest.MonkeyPatch, torch.optim.Optimizer], None]
"""Tampers with torch or with an optimizer."""


def optimizer_of(name: str, **options: Any) -> tuple[torch.optim.Optimizer, nn.Module]:
    """Two groups with rates of their own."""
    torch.manual_seed(0)
    shapes = ((4, 3), (7,), (9_000,))
    model = holder([nn.Parameter(torch.randn(shape)) for shape in shapes])
    first, *others = model.parameters()
    groups = [{"params": [first], "lr": 0.1}, {"params": others, "lr": 0.02}]
    return getattr(torch.optim, name)(groups, **options), model


def watched(optimizer: torch.optim.Optimizer, model: nn.Module) -> Scope:
    torch.manual_seed(1)
    return watched_steps(optimizer, model, steps=STEPS, keep="*")[0]


def disagreeing(scope: Scope) -> pd.DataFrame:
    updates = scope.updates
    return updates[updates["residual"] > CLEARLY]


def assert_nothing_stands_out(scope: Scope) -> None:
    assert (scope.updates["residual"] < 1e-3).all()
    for row in scope.updates.to_dict("records"):
        shape = scope._recording.parameters[int(row["param"][2:])].shape
        e = scope.explain(row["param"], (0,) * len(shape), row["step"])
        assert e.agrees is True
        assert "MORE" not in e.verdict


def assert_all_stand_out(scope: Scope, params: list[str], first_step: int = 0) -> None:
    """Those parameters do from a step on, and nothing else does; every weight's explanation too."""
    expected = {(step, param) for step in range(first_step, STEPS) for param in params}
    found = disagreeing(scope)
    assert set(zip(found["step"], found["param"], strict=True)) == expected
    others = scope.updates.drop(found.index)
    assert (others["residual"] < 1e-3).all()
    for step, param in expected:
        index = (1, 2) if param == "p.0" else 5
        e = scope.explain(param, index, step)
        assert e.agrees is False
        assert "MORE than rounding" in e.verdict
        assert "MORE than rounding" in str(e)
        assert abs(e.residual) > e.rounding
        assert e.residual == e.weight_stored - e.weight_formula


def other_rate_for_one_group(patch: pytest.MonkeyPatch, optimizer: torch.optim.Optimizer) -> None:
    """The second group is moved at the rate of the first."""
    module = sgd if isinstance(optimizer, torch.optim.SGD) else adam
    name = "sgd" if module is sgd else "adam"
    right = getattr(module, name)

    def wrong(*args: Any, **kwargs: Any) -> None:
        right(*args, **{**kwargs, "lr": 0.1})

    patch.setattr(module, name, wrong)


def without_bias_correction(patch: pytest.MonkeyPatch, optimizer: torch.optim.Optimizer) -> None:
    patch.setattr(adam, "_single_tensor_adam", own_step(correct=False))


def stale_momentum(patch: pytest.MonkeyPatch, optimizer: torch.optim.Optimizer) -> None:
    """The weight moves by the average as it was before this step's gradient came in."""
    patch.setattr(adam, "_single_tensor_adam", own_step(stale=True))


def own_step(*, correct: bool = True, stale: bool = False) -> Callable[..., None]:
    """Adam's step written down once more, so that mistakes can be made in it."""

    def step(
        params: Any, grads: Any, exp_avgs: Any, exp_avg_sqs: Any, *others: Any, **options: Any
    ) -> None:
        lr, beta1, beta2 = options["lr"], options["beta1"], options["beta2"]
        for p, g, m, v, t in zip(params, grads, exp_avgs, exp_avg_sqs, others[1], strict=True):
            t += 1
            if options["decoupled_weight_decay"]:
                p.mul_(1 - lr * options["weight_decay"])
            used = m.clone()
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            corrections = (1 - beta1 ** float(t), 1 - beta2 ** float(t)) if correct else (1, 1)
            denominator = (v / corrections[1]).sqrt().add_(options["eps"])
            p.addcdiv_(used if stale else m, denominator, value=-lr / corrections[0])

    return step


def decay_twice(patch: pytest.MonkeyPatch, optimizer: torch.optim.Optimizer) -> None:
    right = adam.adam

    def wrong(params: Any, *args: Any, **kwargs: Any) -> None:
        for p in params:
            p.mul_(1 - kwargs["lr"] * kwargs["weight_decay"])
        right(params, *args, **kwargs)

    patch.setattr(adam, "adam", wrong)


def other_fused_kernel(patch: pytest.MonkeyPatch, optimizer: torch.optim.Optimizer) -> None:
    for name in ("_fused_adamw_", "_fused_adam_"):
        right = getattr(torch, name)

        def wrong(*args: Any, right: Any = right, **kwargs: Any) -> None:
            right(*args, **{**kwargs, "beta2": 0.9 * kwargs["beta2"]})

        patch.setattr(torch, name, wrong)


@pytest.mark.parametrize("implementation", ["for-loop", "foreach", "fused"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdamW", {"weight_decay": 0.5}),
        ("Adam", {"weight_decay": 0.5}),
        ("SGD", {"weight_decay": 0.5, "momentum": 0.9}),
    ],
)
def test_steps_that_nobody_tampers_with_do_not_stand_out(
    name: str, options: dict[str, Any], implementation: str
) -> None:
    flags = {flag: flag == implementation for flag in ("foreach", "fused")}
    assert_nothing_stands_out(watched(*optimizer_of(name, **options, **flags)))


def test_the_step_written_down_once_more_does_not_stand_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is only the mistakes in it that do."""
    optimizer, model = optimizer_of("AdamW", foreach=False, weight_decay=0.1)
    monkeypatch.setattr(adam, "_single_tensor_adam", own_step())
    assert_nothing_stands_out(watched(optimizer, model))


@pytest.mark.parametrize(
    ("name", "options"),
    [("AdamW", {}), ("Adam", {"weight_decay": 0.1}), ("SGD", {}), ("SGD", {"momentum": 0.9})],
)
def test_a_group_that_moves_at_the_rate_of_another(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, model = optimizer_of(name, **options)
    other_rate_for_one_group(monkeypatch, optimizer)
    scope = watched(optimizer, model)
    assert_all_stand_out(scope, ["p.1", "p.2"])
    # The table has the rates that the groups say, as these are what is to be compared with.
    assert scope.explain("p.1", 0).lr == 0.02


@pytest.mark.parametrize(
    ("name", "tamper", "options"),
    [
        ("AdamW", without_bias_correction, {"foreach": False, "weight_decay": 0.1}),
        ("Adam", without_bias_correction, {"foreach": False}),
        ("Adam", stale_momentum, {"foreach": False}),
        ("AdamW", decay_twice, {"weight_decay": 1.0}),
        ("AdamW", decay_twice, {"weight_decay": 1.0, "fused": True}),
    ],
)
def test_a_rule_that_is_computed_wrongly(
    name: str, tamper: Change, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, model = optimizer_of(name, **options)
    tamper(monkeypatch, optimizer)
    assert_all_stand_out(watched(optimizer, model), ["p.0", "p.1", "p.2"])


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_a_fused_kernel_that_does_something_else(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, model = optimizer_of(name, fused=True)
    other_fused_kernel(monkeypatch, optimizer)
    scope = watched(optimizer, model)
    # With another beta2 the first step comes to the same, only not what it leaves behind.
    assert_all_stand_out(scope, ["p.0", "p.1", "p.2"], first_step=1)
    lines = {line.name: line.agrees for line in scope.explain("p.0", (0, 0), 0).compared}
    assert lines == {"t": True, "m": True, "v": False, "weight_formula": True}


@pytest.mark.parametrize(
    ("name", "options"), [("AdamW", {}), ("Adam", {"fused": True}), ("SGD", {"momentum": 0.9})]
)
def test_a_gradient_that_is_edited_after_it_was_read(name: str, options: dict[str, Any]) -> None:
    optimizer, model = optimizer_of(name, **options)
    _, second, _ = model.parameters()
    torch.manual_seed(1)
    edits = 0

    def edit(*_: Any) -> None:
        nonlocal edits
        edits += 1
        second.grad.neg_()

    def register(step: int) -> None:
        if step == 0:
            optimizer.register_step_pre_hook(edit)

    scope, _ = watched_steps(optimizer, model, steps=STEPS, keep="*", between=register)
    assert edits == STEPS - 1
    assert_all_stand_out(scope, ["p.1"], first_step=1)


@pytest.mark.parametrize(("name", "options"), [("AdamW", {}), ("SGD", {}), ("Adagrad", {})])
def test_weights_that_are_edited_inside_a_post_hook(name: str, options: dict[str, Any]) -> None:
    optimizer, model = optimizer_of(name, **options)
    _, _, third = model.parameters()

    @torch.no_grad()
    def clamp(*_: Any) -> None:
        third.clamp_(-0.1, 0.1)

    optimizer.register_step_post_hook(clamp)
    updates = watched(optimizer, model).updates
    first = updates[updates["step"] == 0].set_index("param")["residual"]
    assert first["p.2"] > 0.5
    assert (first[["p.0", "p.1"]] < 1e-3).all()


def test_one_weight_of_many_that_is_edited_is_told_from_its_neighbours() -> None:
    optimizer, model = optimizer_of("AdamW")
    _, _, third = model.parameters()

    @torch.no_grad()
    def edit(*_: Any) -> None:
        third[4321] += 0.5

    optimizer.register_step_post_hook(edit)
    scope = watched(optimizer, model)
    for step in range(STEPS):
        assert scope.explain("p.2", 4321, step).agrees is False
        assert scope.explain("p.2", 4321, step).residual == pytest.approx(0.5, rel=1e-4)
        assert scope.explain("p.2", 4320, step).agrees is True
        assert scope.explain("p.2", 4322, step).agrees is True
    assert set(disagreeing(scope)["param"]) == {"p.2"}


def test_state_that_is_edited_inside_the_step_is_told_line_by_line() -> None:
    optimizer, model = optimizer_of("AdamW")
    first, *_ = model.parameters()

    def edit(*_: Any) -> None:
        optimizer.state[first]["exp_avg"].mul_(0.5)

    optimizer.register_step_post_hook(edit)
    scope = watched(optimizer, model)
    for step in range(STEPS):
        lines = {line.name: line.agrees for line in scope.explain("p.0", (1, 1), step).compared}
        assert lines["m"] is False
        assert lines["v"] is lines["weight_formula"] is True
        lines = {line.name: line.agrees for line in scope.explain("p.1", 3, step).compared}
        assert lines["m"] is True
    # The weight itself moved by the rule at every step.
    assert not len(disagreeing(scope))


def test_what_the_program_does_between_steps_is_no_disagreement() -> None:
    optimizer, model = optimizer_of("AdamW", weight_decay=0.1)
    torch.manual_seed(1)

    @torch.no_grad()
    def between(step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] *= 2
            group["betas"] = (0.5, 0.9)
            group["weight_decay"] = 0.3 * step
        first, second, third = model.parameters()
        first.mul_(0.5)
        optimizer.state[second]["exp_avg"].zero_()
        optimizer.state[third]["step"] += 10
        if step == 1:
            optimizer.state.pop(first)
            optimizer.load_state_dict(optimizer.state_dict())

    scope, _ = watched_steps(optimizer, model, steps=STEPS, keep="*", between=between)
    assert_nothing_stands_out(scope)


@pytest.mark.parametrize("factor", [0.0, 0.5, -3.0])
def test_moments_written_through_data_between_steps_are_seen_before_the_next(factor: float) -> None:
    optimizer, model = optimizer_of("AdamW")
    torch.manual_seed(1)
    weight = next(model.parameters())

    def between(step: int) -> None:
        optimizer.state[weight]["exp_avg"].data.mul_(factor)  # which moves no version

    scope, _ = watched_steps(optimizer, model, steps=STEPS, between=between)
    state = scope.state.set_index("step")
    moments = state[(state["param"] == scope.params["param"][0]) & (state["key"] == "exp_avg")]
    before, after = (moments.loc[moments["when"] == when, "norm"] for when in ("before", "after"))
    for step in range(1, STEPS):
        assert before[step] == pytest.approx(abs(factor) * after[step - 1], rel=1e-5)


def test_a_parameter_moved_without_a_gradient_stands_out() -> None:
    """No rule moves it then."""
    optimizer, model = optimizer_of("AdamW")
    _, second, _ = model.parameters()
    torch.manual_seed(1)

    def gradient(parameter: torch.Tensor, step: int) -> torch.Tensor | None:
        return None if parameter is second and step >= 2 else noise(parameter, step)

    @torch.no_grad()
    def edit(*_: Any) -> None:
        if second.grad is None and int(optimizer.state[second]["step"]) == 2:
            second.add_(0.125)

    optimizer.register_step_post_hook(edit)
    scope, _ = watched_steps(optimizer, model, steps=STEPS, gradient=gradient)
    own = scope.updates[scope.updates["param"] == "p.1"]
    assert own["residual"].tolist()[2:] == [1.0, 1.0]
    assert own["update_norm"].tolist()[2:] == pytest.approx([0.125 * 7**0.5] * 2)
    assert max(own["residual"].tolist()[:2]) < 1e-3
