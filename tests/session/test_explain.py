"""``scope.explain``: which weights of which steps, and what is said where nothing is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from stepping import Seen, holder, watched_steps
from torch import nn

import gradscope
from gradscope.errors import ScopeStateError, UsageError
from gradscope.instruments import flat_copies
from gradscope.scope import Scope
from gradscope.views.explanation import Explanation

SHAPES = ((), (1,), (7,), (4, 3), (10_000,))


def adamw(**options: Any) -> tuple[Scope, list[Seen]]:
    torch.manual_seed(0)
    model = holder([nn.Parameter(torch.randn(shape)) for shape in SHAPES])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    return watched_steps(optimizer, model, **options)


def of(seen: list[Seen], name: str, step: int) -> Seen:
    (found,) = (each for each in seen if (each.name, each.step) == (name, step))
    return found


def assert_is(e: Any, each: Seen, index: tuple[int, ...]) -> None:
    """The numbers of one weight, each from the clones that the test made around the step."""
    t = each.step + 1
    m, v = (each.state_after[key].double()[index].item() for key in ("exp_avg", "exp_avg_sq"))
    held = each.state_before
    assert isinstance(e, Explanation)
    assert (e.param, e.index, e.step) == (each.name, index, each.step)
    assert e.weight_before == each.before[index].item()
    assert e.weight_stored == each.after[index].item()
    assert each.gradient is not None
    assert e.g == each.gradient[index].item()
    assert e.m_before == (held["exp_avg"][index].item() if held else 0)
    assert e.v_before == (held["exp_avg_sq"][index].item() if held else 0)
    assert (e.t_before, e.t) == (each.step, t)
    assert (e.lr, e.beta1, e.beta2, e.eps, e.weight_decay) == (0.05, 0.9, 0.999, 1e-8, 0.1)
    assert e.m == pytest.approx(m, rel=1e-5, abs=1e-7)
    assert e.v == pytest.approx(v, rel=1e-5)
    assert e.bias_correction1 == pytest.approx(1 - 0.9**t, rel=1e-12)
    assert e.bias_correction2 == pytest.approx(1 - 0.999**t, rel=1e-12)
    denominator = (v / (1 - 0.999**t)) ** 0.5 + 1e-8
    assert e.denominator == pytest.approx(denominator, rel=1e-5)
    assert e.effective_lr == pytest.approx(0.05 / (1 - 0.9**t) / denominator, rel=1e-5)
    assert e.decay == pytest.approx(-0.05 * 0.1 * e.weight_before, rel=1e-12)
    assert e.decay + e.momentum + e.fresh == pytest.approx(e.update, rel=1e-12, abs=1e-15)
    assert e.weight_formula == pytest.approx(e.weight_before + e.update, rel=1e-15)
    assert e.agrees is True


def test_any_weight_of_the_last_step() -> None:
    scope, seen = adamw()
    for name, index in {
        "p.0": (),
        "p.1": (0,),
        "p.2": (5,),
        "p.3": (3, 1),
        "p.4": (8_765,),
    }.items():
        assert_is(scope.explain(name, index), of(seen, name, 4), index)
    for index in np.ndindex(4, 3):
        assert_is(scope.explain("p.3", index, 4), of(seen, "p.3", 4), index)


def test_sixteen_weights_of_every_step() -> None:
    scope, seen = adamw()
    for step in range(5):
        for name, n in {"p.1": 1, "p.2": 7, "p.4": 10_000}.items():
            for position in {0, n - 1}:
                assert_is(scope.explain(name, position, step), of(seen, name, step), (position,))
        assert_is(scope.explain("p.0", (), step), of(seen, "p.0", step), ())
        for index in np.ndindex(4, 3):
            assert_is(scope.explain("p.3", index, step), of(seen, "p.3", step), index)


def test_any_weight_of_every_step_that_was_kept() -> None:
    scope, seen = adamw(keep="p.4", keep_steps=3)
    for step in (2, 3, 4):
        e = scope.explain("p.4", 1_234, step)
        assert_is(e, of(seen, "p.4", step), (1_234,))
        after = of(seen, "p.4", step).state_after
        assert e.stored["m"] == after["exp_avg"][1_234].item()
        assert e.stored["v"] == after["exp_avg_sq"][1_234].item()
        assert e.stored["t"] == step + 1
        assert all(line.agrees for line in e.compared)
    with pytest.raises(ScopeStateError, match=r"pass keep=\['p\.4'\], keep_steps=\[1\] to watch"):
        scope.explain("p.4", 1_234, 1)


def test_a_weight_that_is_not_known_is_said_with_what_to_pass() -> None:
    scope, _ = adamw()
    with pytest.raises(ScopeStateError) as error:
        scope.explain("p.4", 1_234, 2)
    text = str(error.value)
    assert text.startswith("nothing was kept of p.4[1234] at step 2. To have it, pass keep=['p.4']")
    assert "keep_steps=[2]" in text
    # Those named are there.
    assert "(0,), (666,)" in text
    assert "(9999,)" in text
    assert scope.explain("p.4", 666, 2).agrees is True


def test_steps_from_the_end_and_indices_from_the_end() -> None:
    scope, seen = adamw()
    for step in range(-5, 0):
        assert_is(scope.explain("p.3", (-1, -3), step), of(seen, "p.3", 5 + step), (3, 0))
    assert_is(scope.explain("p.4", -1), of(seen, "p.4", 4), (9_999,))
    assert_is(scope.explain("p.4", [0]), of(seen, "p.4", 4), (0,))
    assert_is(scope.explain("p.3", np.array([2, 1])), of(seen, "p.3", 4), (2, 1))
    assert_is(scope.explain("p.2", np.int64(3)), of(seen, "p.2", 4), (3,))
    assert_is(scope.explain("p.3", torch.tensor([2, 1])), of(seen, "p.3", 4), (2, 1))
    scope, seen = adamw(every=2)
    assert scope.explain("p.3", (0, 0), -1).step == 4
    assert scope.explain("p.3", (0, 0), -2).step == 2
    with pytest.raises(ScopeStateError, match=r"step=-4: only 3 steps are there, 0, 2, 4"):
        scope.explain("p.3", (0, 0), -4)


@pytest.mark.parametrize(
    ("param", "index", "message"),
    [
        ("p.3", (4, 0), r"index=\(4, 0\): p\.3 has the shape \(4, 3\), so pass a tuple of 2 numb"),
        ("p.3", (-5, 0), r"index=\(-5, 0\): p\.3 has the shape"),
        ("p.3", 1, r"index=1: p\.3 has the shape \(4, 3\), so pass a tuple of 2 numbers within"),
        ("p.3", (1, 2, 0), r"p\.3 has the shape \(4, 3\)"),
        ("p.3", ("a", "b"), r"index=\('a', 'b'\): p\.3 has the shape"),
        ("p.2", (7,), r"index=\(7,\): p\.2 has the shape \(7,\), so pass one number within it"),
        ("p.2", "seven", r"index='seven': p\.2 has the shape"),
        ("p.0", 0, r"index=0: p\.0 has the shape \(\), so pass index=\(\) for its only weight"),
        ("p.9", 0, r"no parameter is called 'p\.9': did you mean p\."),
        ("weights", 0, r"no parameter is called 'weights': there is p\.0, p\.1, p\.2, p\.3, p\.4"),
    ],
)
def test_what_is_no_weight(param: str, index: Any, message: str) -> None:
    scope, _ = adamw(steps=1)
    with pytest.raises(UsageError, match=message):
        scope.explain(param, index)


def test_steps_that_are_no_recorded_steps() -> None:
    scope, _ = adamw(every=3)
    with pytest.raises(ScopeStateError, match=r"there is no step 17; the last one is 4"):
        scope.explain("p.3", (0, 0), 17)
    with pytest.raises(ScopeStateError, match=r"step 1 was not recorded in full; recorded: 0, 3"):
        scope.explain("p.3", (0, 0), 1)
    with pytest.raises(ScopeStateError, match=r"keep_steps=\[1\] to watch\(\), or every=1"):
        scope.explain("p.3", (0, 0), 1)


def test_before_any_step_and_of_what_is_in_no_optimizer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = torch.optim.AdamW(model[0].parameters())
    with gradscope.watch(model, optimizer, every=1, on_error="raise") as scope:
        with pytest.raises(ScopeStateError, match=r"0\.weight was in no recorded step yet"):
            scope.explain("0.weight", (0, 0))
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        with pytest.raises(ScopeStateError, match=r"1\.weight is in no optimizer"):
            scope.explain("1.weight", (0, 0))
        assert scope.explain("0.weight", (0, 0)).step == 0
    with pytest.raises(ScopeStateError, match=r"1\.weight is in no optimizer"):
        scope.explain("1.weight")


def test_an_explanation_stays_what_it_was_when_the_loop_goes_on() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(40))
    model = holder([weight])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    told: dict[int, tuple[Explanation, str, float]] = {}
    tensors: dict[int, dict[str, Any]] = {}
    copies: dict[int, dict[str, Any]] = {}
    with gradscope.watch(model, optimizer, every=1, keep="*", on_error="raise") as scope:
        for step in range(4):
            weight.grad = torch.randn(40)
            optimizer.step()
            e = scope.explain("p.0", 17)
            told[step] = (e, str(e), weight[17].item())
            tensors[step] = scope.tensors("p.0")
            copies[step] = {name: array.copy() for name, array in tensors[step].items()}
    for step, (e, text, after) in told.items():
        assert e.step == step
        assert e.weight_stored == after
        assert str(e) == text == str(scope.explain("p.0", 17, step))
        for name, array in copies[step].items():
            assert np.array_equal(tensors[step][name], array)
            assert np.array_equal(scope.tensors("p.0", step)[name], array)


def test_without_keep_the_last_step_is_told_until_the_next_is_recorded() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(400))
    model = holder([weight])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    after = []
    with gradscope.watch(model, optimizer, every=3, on_error="raise") as scope:
        for step in range(6):
            weight.grad = torch.randn(400)
            optimizer.step()
            after.append(weight.detach().clone())
            e = scope.explain("p.0", 123)
            assert e.step == step // 3 * 3
            assert e.weight_stored == after[e.step][123].item()
            assert e.agrees is True
    with torch.no_grad():
        weight.zero_()
    assert scope.explain("p.0", 123).weight_stored == after[3][123].item()
    with pytest.raises(ScopeStateError, match="nothing was kept"):
        scope.explain("p.0", 123, 0)


def test_two_optimizers_each_with_its_own_last_step() -> None:
    torch.manual_seed(0)
    d, g = nn.Linear(30, 3), nn.Linear(30, 3)
    opt_d = torch.optim.AdamW(d.parameters(), lr=0.05)
    opt_g = torch.optim.SGD(g.parameters(), lr=0.1)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    with gradscope.watch([d, g], [opt_d, opt_g], every=1, on_error="raise") as scope:
        for _ in range(3):
            for model, optimizer in ((d, opt_d), (g, opt_g)):
                optimizer.zero_grad()
                model(torch.randn(5, 30)).square().mean().backward()
                before = model.weight.detach().clone()
                optimizer.step()
                seen.append((before, model.weight.detach().clone()))
    names = scope.params["param"].tolist()
    assert names == ["d.weight", "d.bias", "g.weight", "g.bias"]
    assert scope.steps["optimizer"].tolist() == ["opt_d", "opt_g"] * 3
    for name, step, rule in (("d.weight", 4, "AdamW"), ("g.weight", 5, "SGD")):
        e = scope.explain(name, (1, 17))  # no tracked one
        assert (e.step, e.rule, e.optimizer) == (step, rule, f"opt_{name[0]}")
        assert e.weight_before == seen[step][0][1, 17].item()
        assert e.weight_stored == seen[step][1][1, 17].item()
        assert e.agrees is True
    assert scope.explain("d.weight", (0, 0), -3).step == 0
    assert scope.explain("g.weight", (0, 0), -3).step == 1
    with pytest.raises(
        ScopeStateError, match=r"step 1 is one of opt_g, but d\.weight is updated b"
    ):
        scope.explain("d.weight", (0, 0), 1)


def test_one_parameter_in_two_optimizers() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(50))
    model = holder([weight])
    first, second = torch.optim.SGD([weight], lr=0.1), torch.optim.AdamW([weight], lr=0.05)
    after = []
    with gradscope.watch(model, [first, second], every=1, keep="*", on_error="raise") as scope:
        for step in range(4):
            weight.grad = torch.randn(50)
            (first, second)[step % 2].step()
            after.append(weight.detach().clone())
    for step in range(4):
        e = scope.explain("p.0", 20, step)
        assert e.rule == ("SGD", "AdamW")[step % 2]
        assert e.weight_stored == after[step][20].item()
        assert e.agrees is True


@pytest.mark.parametrize("keep", [False, True])
def test_where_there_is_no_room_for_all_parameters_take_turns(
    keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat_copies, "MOST_BYTES", 0)
    scope, seen = adamw(steps=8, **({"keep": "p.3"} if keep else {}))
    known = scope.updates["residual"].notna()
    assert 0 < known.sum() < len(known)
    assert (scope.updates.loc[known, "residual"] <= 1e-3).all()
    for row in scope.updates.to_dict("records"):
        each = of(seen, row["param"], row["step"])
        change = float((each.after.double() - each.before.double()).norm())
        assert row["update_norm"] == pytest.approx(change, rel=1e-4)
        for name, weight in (("before", each.before), ("after", each.after)):
            norm = float(weight.double().norm())
            assert row[f"weight_norm_{name}"] == pytest.approx(norm, rel=1e-5)
    for step, row in scope.steps.set_index("step").iterrows():
        own = scope.updates[scope.updates["step"] == step]
        for of_all, each in (
            ("update_norm", "update_norm"),
            ("weight_norm", "weight_norm_before"),
        ):
            assert row[of_all] == pytest.approx(float((own[each] ** 2).sum() ** 0.5), rel=1e-5)
    for row in scope.updates[known].to_dict("records"):
        each = of(seen, row["param"], row["step"])
        first = (0,) * each.before.dim()
        assert_is(scope.explain(each.name, first, each.step), each, first)
    for row in scope.updates[~known].to_dict("records"):
        each = of(seen, row["param"], row["step"])
        first = (0,) * each.before.dim()
        if keep and each.name == "p.3":
            assert_is(scope.explain(each.name, first, each.step), each, first)
        else:
            own = scope.updates.loc[known & (scope.updates["param"] == each.name), "step"]
            said = f"take turns, and it had its own at {', '.join(map(str, own))}"
            with pytest.raises(ScopeStateError, match=said):
                scope.explain(each.name, first, each.step)
    # Counted from the end are the steps at which it was its turn.
    for name, own in scope.updates[known].groupby("param"):
        first = (0,) * of(seen, str(name), 0).before.dim()
        assert scope.explain(str(name), first).step == own["step"].max()
        assert scope.explain(str(name), first, -len(own)).step == own["step"].min()


def test_a_whole_parameter_in_sum() -> None:
    scope, seen = adamw()
    for step in (0, 3, 4):
        each = of(seen, "p.3", step)
        summary = scope.explain("p.3", step=step)
        assert (summary.param, summary.step) == ("p.3", step)
        assert summary.rows["updates"]["update_norm"] == pytest.approx(
            float((each.after - each.before).norm()), rel=1e-5
        )
        assert summary.rows["groups"]["lr"] == 0.05
        held = {(row["when"], row["key"]) for row in summary.rows["state"]}
        assert ("after", "exp_avg") in held
        assert (("before", "exp_avg") in held) == (step > 0)
        assert "p.3, step" in str(summary)


def test_what_watching_cost_adds_up() -> None:
    scope, _ = adamw(keep="*")
    overhead = scope.overhead
    parts, total = overhead.drop(index="all"), overhead.loc["all"]
    assert {"anatomy", "optimizer_state", "gradient_statistics", "kept_tensors"} <= set(parts.index)
    assert {"structure", "tables"} <= set(parts.index)
    assert (parts["total_ms"] >= 0).all()
    assert (parts["calls"] > 0).all()
    for column in ("calls", "total_ms", "ms_per_step", "share"):
        assert parts[column].sum() == pytest.approx(total[column], rel=1e-9), column
    assert (overhead["ms_per_call"] * overhead["calls"]).tolist() == pytest.approx(
        overhead["total_ms"].tolist()
    )
    assert (overhead["ms_per_step"] * 5).tolist() == pytest.approx(overhead["total_ms"].tolist())
    assert total["share"] > 0
    assert parts["total_ms"].is_monotonic_decreasing
    # Before, gradients, after, tracked weights: all of them at each of five steps.
    assert parts.loc["optimizer_state", "calls"] == 10
    observed = scope.steps["observe_ms"].sum()
    assert observed <= total["total_ms"] * 1.001


def test_nothing_watched_costs_nothing() -> None:
    model = nn.Linear(2, 2)
    scope = gradscope.watch(model, torch.optim.SGD(model.parameters(), lr=0.1))
    overhead = scope.overhead
    assert overhead.loc["all", "calls"] == 0
    assert overhead.loc["all", "total_ms"] == 0
