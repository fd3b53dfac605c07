"""Adam and AdamW, with and without amsgrad."""

from __future__ import annotations

from gradscope.formulas.arithmetic import maximum, sqrt
from gradscope.formulas.formula import Formula
from gradscope.formulas.gradient import ascending, regularized, sum_of_parts
from gradscope.formulas.worksheet import Worksheet


def _step(s: Worksheet) -> None:
    g = regularized(s)
    s.t = s.t_before + 1
    s.m = s.beta1 * s.m_before + (1 - s.beta1) * g
    s.v = s.beta2 * s.v_before + (1 - s.beta2) * g**2
    s.bias_correction1 = 1 - s.beta1**s.t
    s.bias_correction2 = 1 - s.beta2**s.t
    second = s.v
    if s.get("amsgrad"):
        s.v_max = maximum(s.v_max_before, s.v)
        second = s.v_max
    s.denominator = sqrt(second / s.bias_correction2) + s.eps
    s.eps_dominates = s.denominator < 2 * s.eps
    s.effective_lr = s.lr / s.bias_correction1 / s.denominator
    # Numbers first: on arrays, every product of two arrays is one more pass over memory.
    if s.get("weight_decay"):
        if s.get("decoupled_weight_decay"):
            s.decay = -s.lr * s.weight_decay * s.weight_before
        else:
            s.decay = -(1 - s.beta1) * s.weight_decay * s.effective_lr * s.weight_before
    s.momentum = -s.beta1 * s.effective_lr * s.m_before
    s.fresh = -(1 - s.beta1) * s.effective_lr * ascending(s)
    s.update = sum_of_parts(s)


_STATE = {"step": "t", "exp_avg": "m", "exp_avg_sq": "v", "max_exp_avg_sq": "v_max"}

ADAM = Formula(
    "Adam",
    "Kingma and Ba (2015), Adam: A Method for Stochastic Optimization, algorithm 1; amsgrad: "
    "Reddi, Kale and Kumar (2018), On the Convergence of Adam and Beyond, algorithm 2",
    _step,
    _STATE,
)

ADAMW = Formula(
    "AdamW",
    "Loshchilov and Hutter (2019), Decoupled Weight Decay Regularization, algorithm 2; amsgrad: "
    "Reddi, Kale and Kumar (2018), On the Convergence of Adam and Beyond, algorithm 2",
    _step,
    _STATE,
)
