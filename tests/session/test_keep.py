"""``keep=`` and ``keep_steps=``, and ``scope.tensors`` against clones made by the program."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from stepping import holder, watched_steps
from torch import nn
from torch.nn import functional as F

import gradscope
from gradscope.errors import ScopeStateError, UsageError
from gradscope.run import kept_tensors
from gradscope.scope import Scope

MANY = 12


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def kept_steps(param: str = "0.weight", steps: int = MANY, **options: Any) -> list[int]:
    """The steps of which tensors of a parameter can be had after a loop."""
    scope = trained(model_of(), steps, **options)
    found = []
    for step in range(steps):
        try:
            scope.tensors(param, step)
        except ScopeStateError:
            continue
        found.append(step)
    return found


def trained(model: nn.Module, steps: int = MANY, **options: Any) -> Scope:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    with gradscope.watch(model, optimizer, on_error="raise", **options) as scope:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.ones(3, 4)).square().mean().backward()
            optimizer.step()
    return scope


def test_of_which_steps_tensors_are_kept() -> None:
    assert kept_steps(every=1) == []
    assert kept_steps(every=1, keep="*", steps=20) == list(range(4, 20))
    assert kept_steps(every=1, keep="*", keep_steps=3) == [9, 10, 11]
    assert kept_steps(every=1, keep="*", keep_steps=1) == [11]
    assert kept_steps(every=4, keep="*", keep_steps=2) == [4, 8]
    assert kept_steps(every=1, keep="*", keep_steps=[2, 5]) == [2, 5]
    assert kept_steps(every=1, keep="*", keep_steps=range(3, 6)) == [3, 4, 5]
    assert kept_steps(every=1, keep="*", keep_steps=[100]) == []


def test_steps_asked_for_are_recorded_in_any_case() -> None:
    scope = trained(model_of(), every=5, keep="0.*", keep_steps=[3, 7])
    assert scope.steps.loc[scope.steps["recorded"], "step"].tolist() == [0, 3, 5, 7, 10]
    assert set(scope.updates["step"]) == {0, 3, 5, 7, 10}
    assert kept_steps(every=5, keep="*", keep_steps=[3, 7]) == [3, 7]
    # What is not to be kept is no reason to record.
    scope = trained(model_of(), every=5, keep_steps=[3, 7])
    assert scope.steps.loc[scope.steps["recorded"], "step"].tolist() == [0, 5, 10]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ("0.weight", {"0.weight"}),
        ("*.weight", {"0.weight", "2.weight"}),
        (["0.bias", "2.*"], {"0.bias", "2.weight", "2.bias"}),
        ("*", {"0.weight", "0.bias", "2.weight", "2.bias"}),
    ],
)
def test_of_which_parameters_tensors_are_kept(keep: Any, expected: set[str]) -> None:
    scope = trained(model_of(), 3, every=1, keep=keep)
    names = {name for name, _ in model_of().named_parameters()}
    for name in expected:
        assert "weight_after" in scope.tensors(name)
    for name in names - expected:
        with pytest.raises(ScopeStateError, match="were kept: pass keep="):
            scope.tensors(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "1.weight"}, r"keep='1\.weight' matches no parameter; there is 0\.weight"),
        ({"keep": ["0.weight", "x*"]}, r"keep='x\*' matches no parameter"),
        ({"keep": 3}, r"keep=3: pass a pattern of parameter names such as 'head\.\*'"),
        ({"keep": [3]}, r"keep=\(3,\): pass a pattern"),
        ({"keep": "*", "keep_steps": 0}, r"keep_steps=0: pass how many of the latest"),
        ({"keep": "*", "keep_steps": -1}, r"keep_steps=-1: pass how many of the latest"),
        ({"keep": "*", "keep_steps": [1, -2]}, r"keep_steps=\[1, -2\]: pass how many"),
        ({"keep": "*", "keep_steps": []}, r"keep_steps=\[\]: pass how many"),
        ({"keep": "*", "keep_steps": 2.5}, r"keep_steps=2\.5: pass how many"),
        ({"keep": "*", "keep_steps": "last"}, r"keep_steps='last': pass how many"),
        ({"keep": "*", "keep_steps": True}, r"keep_steps=True: pass how many"),
    ],
)
def test_what_cannot_be_kept_is_said_at_once(options: dict[str, Any], message: str) -> None:
    model = model_of()
    with pytest.raises(UsageError, match=message):
        gradscope.watch(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


def test_what_was_not_kept_is_said_with_what_to_pass() -> None:
    scope = trained(model_of(), every=1, keep="0.weight", keep_steps=[2, 4])
    with pytest.raises(UsageError, match=r"no parameter is called '0\.wieght': did you mean 0\.w"):
        scope.tensors("0.wieght")
    with pytest.raises(
        ScopeStateError, match=r"of step 3, only of 2, 4: pass keep=\['0\.weight'\]"
    ):
        scope.tensors("0.weight", 3)
    with pytest.raises(ScopeStateError, match=r"keep_steps=\[3\]"):
        scope.tensors("0.weight", 3)
    with pytest.raises(
        ScopeStateError, match=r"no tensors of 2\.bias were kept: pass keep=\['2\.b"
    ):
        scope.tensors("2.bias")
    with pytest.raises(ScopeStateError, match=r"step=-3: only 2 steps are there, 2, 4"):
        scope.tensors("0.weight", -3)
    latest, first = scope.tensors("0.weight"), scope.tensors("0.weight", -2)
    assert np.array_equal(latest["weight_after"], scope.tensors("0.weight", 4)["weight_after"])
    assert np.array_equal(first["weight_after"], scope.tensors("0.weight", 2)["weight_after"])


def test_what_does_not_fit_is_forgotten_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of the first step fewer tensors are there: the state has not been made yet.
    full = trained(model_of(), 3, every=1, keep="0.weight").tensors("0.weight", 2)
    size = sum(array.nbytes for array in full.values())
    monkeypatch.setattr(kept_tensors, "MOST_BYTES", 3 * size + size // 2)
    scope = trained(model_of(), every=1, keep="0.weight")
    assert scope.tensors("0.weight", 9)
    with pytest.raises(ScopeStateError, match="only of 9, 10, 11"):
        scope.tensors("0.weight", 8)
    (note,) = scope._recording.notes
    assert "the oldest make room" in note


def as_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


@pytest.mark.parametrize("name", ["AdamW", "SGD", "ASGD", "Adafactor", "Rprop", "Muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_tensors_are_those_of_the_program(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = holder([nn.Parameter(torch.randn(s, dtype=dtype)) for s in ((4, 3), (3, 5))])
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.05, **options)

    def gradient(parameter: torch.Tensor, step: int) -> torch.Tensor | None:
        return None if step == 2 and parameter.shape == (3, 5) else torch.randn_like(parameter)

    scope, seen = watched_steps(optimizer, model, gradient=gradient, keep="*")
    for each in seen:
        expected = {"weight_before": each.before, "weight_after": each.after}
        if each.gradient is not None:
            expected["gradient"] = each.gradient
        for when, state in (("before", each.state_before), ("after", each.state_after)):
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    expected[f"{key}_{when}"] = value
        found = scope.tensors(each.name, each.step)
        assert set(found) == set(expected)
        for key, tensor in expected.items():
            assert np.array_equal(found[key], as_array(tensor)), key
            assert found[key].shape == tuple(tensor.shape)


def test_the_gradient_is_the_one_that_was_clipped() -> None:
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    clipped, unclipped = [], []
    with gradscope.watch(model, optimizer, every=1, keep="0.weight", on_error="raise") as scope:
        for _ in range(4):
            optimizer.zero_grad()
            (100 * model(torch.randn(3, 4)).square().mean()).backward()
            unclipped.append(model[0].weight.grad.clone())
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            clipped.append(model[0].weight.grad.clone())
            optimizer.step()
    for step in range(4):
        gradient = scope.tensors("0.weight", step)["gradient"]
        assert np.array_equal(gradient, clipped[step])
        assert not np.array_equal(gradient, unclipped[step])
        assert scope.explain("0.weight", (2, 1), step).g == clipped[step][2, 1].item()


def scaled_training(model: nn.Module, *, fused: bool, bad_step: int = -1) -> tuple[Scope, Any]:
    """A loop with a gradient scaler, which a fused step is told of instead of unscaling first."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    seen = []
    with gradscope.watch(model, optimizer, every=1, keep="*", on_error="raise") as scope:
        for step in range(6):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(torch.randn(3, 4)), torch.tensor([0, 1, 0]))
            factor = float("inf") if step == bad_step else 1.0
            scaler.scale(loss * factor).backward()
            scale = scaler.get_scale()
            weight = model[0].weight
            held = (scale, weight.grad.clone(), weight.detach().clone())
            scaler.step(optimizer)
            scaler.update()
            seen.append((*held, weight.detach().clone()))
    return scope, seen


@pytest.mark.parametrize("fused", [False, True])
def test_the_gradient_under_a_scaler_is_what_the_update_reads(fused: bool) -> None:
    scope, seen = scaled_training(model_of(), fused=fused)
    assert scope.steps["scaled"].tolist() == [fused] * 6
    assert [scale for scale, *_ in seen] == [1024, 1024, 2048, 2048, 4096, 4096]
    for step, (scale, gradient, before, after) in enumerate(seen):
        found = scope.tensors("0.weight", step)
        assert np.array_equal(found["weight_before"], before)
        assert np.array_equal(found["weight_after"], after)
        for index in np.ndindex(5, 4):
            e = scope.explain("0.weight", index, step)
            assert e.g == pytest.approx(gradient[index].item() / scale, rel=1e-6)
            assert e.agrees is True
            assert e.weight_stored == after[index].item()
        rows = scope.updates[scope.updates["step"] == step]
        assert (rows["residual"] <= 1e-3).all()


@pytest.mark.parametrize("fused", [False, True])
def test_the_kept_gradient_under_a_scaler_is_unscaled(fused: bool) -> None:
    """As is promised: the gradient is what the update read."""
    scope, seen = scaled_training(model_of(), fused=fused)
    for step, (scale, gradient, *_) in enumerate(seen):
        found = scope.tensors("0.weight", step)["gradient"]
        np.testing.assert_allclose(found, gradient.numpy() / scale, rtol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips(fused: bool) -> None:
    scope, seen = scaled_training(model_of(), fused=fused, bad_step=3)
    assert scope.steps["outcome"].tolist() == ["stepped"] * 3 + ["skipped"] + ["stepped"] * 2
    assert torch.equal(seen[3][2], seen[3][3])
    assert set(scope.updates["step"]) == set(scope.state["step"]) == {0, 1, 2, 4, 5}
    assert (scope.updates["residual"] <= 1e-3).all()
    e = scope.explain("0.weight", (1, 1), 4)
    assert e.agrees is True
    assert e.t == 4
    with pytest.raises(ScopeStateError, match="step 3 did not update anything"):
        scope.explain("0.weight", (1, 1), 3)
    with pytest.raises(ScopeStateError, match="only of 0, 1, 2, 4, 5"):
        scope.tensors("0.weight", 3)


def test_of_several_evaluations_of_a_closure_the_last_one_counts() -> None:
    """The optimizer evaluates it twice, and the second time one parameter is left out."""

    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            with torch.enable_grad():
                closure()
                loss = closure()
            super().step()
            return loss

    model = model_of()
    optimizer = Twice(model.parameters(), lr=0.1)
    gradients = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.randn(3, 4)).square().mean()
        loss.backward()
        if len(gradients) % 2:
            model[0].bias.grad = None
        gradients.append(model[0].weight.grad.clone())
        return loss

    with gradscope.watch(model, optimizer, every=1, keep="0.*", on_error="raise") as scope:
        for _ in range(3):
            optimizer.step(closure)
    for step in range(3):
        kept = scope.tensors("0.weight", step)
        assert np.array_equal(kept["gradient"], gradients[2 * step + 1])
        assert "gradient" not in scope.tensors("0.bias", step)
