"""Adamax: Adam with the greatest gradient in place of the second moment."""

from __future__ import annotations

from gradscope.formulas.arithmetic import absolute, maximum
from gradscope.formulas.formula import Formula
from gradscope.formulas.gradient import ascending, regularized, sum_of_parts
from gradscope.formulas.worksheet import Worksheet


def _step(s: Worksheet) -> None:
    g = regularized(s)
    s.t = s.t_before + 1
    s.m = s.beta1 * s.m_before + (1 - s.beta1) * g
    s.u = maximum(s.beta2 * s.u_before, absolute(g) + s.eps)
    s.bias_correction1 = 1 - s.beta1**s.t
    s.denominator = s.u
    s.eps_dominates = s.denominator < 2 * s.eps
    s.effective_lr = s.lr / s.bias_correction1 / s.denominator
    if s.get("weight_decay"):
        s.decay = -(1 - s.beta1) * s.weight_decay * s.effective_lr * s.weight_before
    s.momentum = -s.beta1 * s.effective_lr * s.m_before
    s.fresh = -(1 - s.beta1) * s.effective_lr * ascending(s)
    s.update = sum_of_parts(s)


ADAMAX = Formula(
    "Adamax",
    "Kingma and Ba (2015), Adam: A Method for Stochastic Optimization, algorithm 2, with the eps "
    "of torch.optim.Adamax",
    _step,
    {"step": "t", "exp_avg": "m", "exp_inf": "u"},
)
