"""Fifty steps of a small GPT: every number of single weights, worked out again with ``math``."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

import gradscope
from gradscope.demo.char_gpt import CharGPT
from gradscope.demo.text import CharText
from gradscope.scope import Scope

STEPS = 50
LR, BETA1, BETA2, EPS, DECAY = 1e-2, 0.9, 0.95, 1e-8, 0.1
TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 8


@dataclass
class Trained:
    """A run, and what the loop itself noted of some weights, by name and index."""

    scope: Scope
    weights: list[tuple[str, tuple[int, ...]]]
    gradients: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    values: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    state: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def trained() -> Trained:
    torch.manual_seed(0)
    text = CharText(TEXT, block_size=8, batch_size=4)
    model = CharGPT(text.vocab_size, block_size=8, n_layers=2, n_heads=2, width=16)
    # No decay for biases and norms, as is usual.
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=LR,
        betas=(BETA1, BETA2),
        eps=EPS,
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    weights = some_weights(model)
    scope = gradscope.watch(model, optimizer, every=1, keep="*", keep_steps=STEPS, on_error="raise")
    run = Trained(scope, weights)
    named = {name: p for name, p in model.named_parameters() if name in {w for w, _ in weights}}
    for name, p in named.items():
        run.values[name], run.gradients[name] = [p.detach().clone()], []
    with scope:
        for _ in range(STEPS):
            optimizer.zero_grad()
            _, loss = model(*text.get_batch("train"))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            run.rates.append(float(optimizer.param_groups[0]["lr"]))
            for name, p in named.items():
                run.gradients[name].append(p.grad.clone())
            optimizer.step()
            for name, p in named.items():
                run.values[name].append(p.detach().clone())
            scheduler.step()
    run.state = {name: dict(optimizer.state[p]) for name, p in named.items()}
    return run


def some_weights(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    chosen = random.Random(0)
    parameters = dict(model.named_parameters())
    names = [*parameters, "position_embedding.weight", "token_embedding.weight"]
    return [
        (name, tuple(chosen.randrange(size) for size in parameters[name].shape))
        for name in chosen.sample(names, 20)
    ]


def spacing(value: float) -> float:
    """Between a float32 and the next."""
    return 2.0 ** (math.frexp(value)[1] - 24)


def test_twenty_weights_are_followed_through_all_fifty_steps(trained: Trained) -> None:
    """The moments are carried on in double precision from the first step to the last."""
    assert len(trained.weights) == 20
    for name, index in trained.weights:
        decay_rate = DECAY if trained.values[name][0].dim() > 1 else 0.0
        m = v = greatest_m = greatest_v = 0.0
        for step in range(STEPS):
            t, lr = step + 1, trained.rates[step]
            g = trained.gradients[name][step][index].item()
            before = trained.values[name][step][index].item()
            after = trained.values[name][step + 1][index].item()
            e = trained.scope.explain(name, index, step)

            assert (e.g, e.weight_before, e.weight_stored) == (g, before, after)
            assert (e.t_before, e.t) == (step, t)
            assert (e.lr, e.beta1, e.beta2, e.eps) == (lr, BETA1, BETA2, EPS)
            assert e.weight_decay == decay_rate

            # Each step's rounding of what is stored is carried on: no more than so many of them.
            assert e.m_before == pytest.approx(m, rel=1e-5, abs=1e-6 * greatest_m)
            assert e.v_before == pytest.approx(v, rel=1e-5, abs=1e-6 * greatest_v)
            m, v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g * g
            greatest_m, greatest_v = max(greatest_m, abs(m)), max(greatest_v, v)

            # From what was stored before this step, to the last digit.
            m_now = BETA1 * e.m_before + (1 - BETA1) * g
            v_now = BETA2 * e.v_before + (1 - BETA2) * g * g
            correction1, correction2 = 1 - math.pow(BETA1, t), 1 - math.pow(BETA2, t)
            denominator = math.sqrt(v_now / correction2) + EPS
            rate = lr / correction1 / denominator
            decay = -lr * decay_rate * before
            momentum, fresh = -rate * BETA1 * e.m_before, -rate * (1 - BETA1) * g
            update = decay + momentum + fresh
            for what, number in {
                "m": m_now,
                "v": v_now,
                "bias_correction1": correction1,
                "bias_correction2": correction2,
                "denominator": denominator,
                "effective_lr": rate,
                "decay": decay,
                "momentum": momentum,
                "fresh": fresh,
            }.items():
                assert getattr(e, what) == pytest.approx(number, rel=1e-11, abs=1e-30), what
            largest = max(abs(decay), abs(momentum), abs(fresh))
            assert e.update == pytest.approx(update, rel=1e-11, abs=1e-14 * largest)
            assert e.weight_formula == pytest.approx(before + update, rel=1e-12, abs=1e-16)

            # What torch stored: the formula's, to the rounding of float32.
            allowed = 2 * spacing(max(abs(before), abs(after))) + 1e-5 * abs(largest)
            assert abs(e.weight_formula - after) <= allowed
            assert abs(e.residual) <= e.rounding
            assert e.agrees is True
            assert e.residual == after - e.weight_formula
            assert all(line.agrees for line in e.compared)
            assert e.stored["t"] == t
        state = trained.state[name]
        assert e.stored["m"] == state["exp_avg"][index].item()
        assert e.stored["v"] == state["exp_avg_sq"][index].item()
        assert e.stored["t"] == state["step"].item()


def test_the_whole_run_follows_the_rule(trained: Trained) -> None:
    scope = trained.scope
    updates = scope.updates
    n_params = len(scope.params)
    assert len(updates) == STEPS * n_params
    # The rate falls to nothing, until a weight's last digit is a good part of its update.
    assert (updates["residual"] <= (4 * updates["rounding"]).clip(lower=1e-3)).all()
    assert (updates["residual"][updates["rounding"] < 1e-4] <= 1e-3).all()
    moments = scope.moments
    assert moments["step_count"].tolist() == [s + 1 for s in range(STEPS) for _ in range(n_params)]
    groups = scope.groups
    assert groups["lr"].tolist() == pytest.approx([r for r in trained.rates for _ in range(2)])


def test_lines_say_the_numbers_that_the_attributes_have(trained: Trained) -> None:
    for name, index in trained.weights[:5]:
        e = trained.scope.explain(name, index, 25)
        for line in e.lines:
            assert line.value == getattr(e, line.name)
        assert e.lines[-1].stored == e.weight_stored
        assert str(e).count("MORE") == 0
        assert f"step 25 of {name}[" in str(e)
