"""RMSprop, also centered and with momentum."""

from __future__ import annotations

from gradscope.formulas.arithmetic import sqrt
from gradscope.formulas.formula import Formula
from gradscope.formulas.gradient import ascending, regularized, sum_of_parts
from gradscope.formulas.worksheet import Worksheet


def _step(s: Worksheet) -> None:
    g = regularized(s)
    s.t = s.t_before + 1
    s.v = s.alpha * s.v_before + (1 - s.alpha) * g**2
    second = s.v
    if s.get("centered"):
        s.g_avg = s.alpha * s.g_avg_before + (1 - s.alpha) * g
        s.variance = s.v - s.g_avg**2
        second = s.variance
    s.denominator = sqrt(second) + s.eps
    s.eps_dominates = s.denominator < 2 * s.eps
    s.effective_lr = s.lr / s.denominator
    if s.get("weight_decay"):
        s.decay = -s.weight_decay * s.effective_lr * s.weight_before
    if s.get("mu"):
        s.b = s.mu * s.b_before + g / s.denominator
        if not s.is_first:
            s.momentum = -s.lr * s.mu * s.b_before
    s.fresh = -s.effective_lr * ascending(s)
    s.update = sum_of_parts(s)


RMSPROP = Formula(
    "RMSprop",
    "Hinton (2012), Neural Networks for Machine Learning, lecture 6e; centered: Graves (2013), "
    "Generating Sequences with Recurrent Neural Networks; eps and momentum as "
    "torch.optim.RMSprop documents them",
    _step,
    {"step": "t", "square_avg": "v", "grad_avg": "g_avg", "momentum_buffer": "b"},
    symbols={"g_avg": r"\bar g_t", "variance": r"\tilde v_t"},
)
