"""RAdam: Adam whose step is rectified while its second moment rests on few gradients."""

from __future__ import annotations

from math import nan

from gradscope.formulas.arithmetic import is_ruled_out, sqrt, where
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
    s.rho_inf = 2 / (1 - s.beta2) - 1
    s.rho_t = s.rho_inf - 2 * s.t * s.beta2**s.t / s.bias_correction2
    is_adaptive = s.rho_t > 5
    if is_ruled_out(is_adaptive):
        s.effective_lr = s.lr / s.bias_correction1
    else:
        s.r = sqrt(
            (s.rho_t - 4)
            * (s.rho_t - 2)
            * s.rho_inf
            / ((s.rho_inf - 4) * (s.rho_inf - 2) * s.rho_t)
        )
        # torch adds eps before the bias correction.
        s.denominator = where(is_adaptive, sqrt(s.v) + s.eps, nan)
        s.eps_dominates = (s.denominator < 2 * s.eps) & is_adaptive
        s.effective_lr = where(
            is_adaptive,
            s.lr / s.bias_correction1 * s.r * sqrt(s.bias_correction2) / s.denominator,
            s.lr / s.bias_correction1,
        )
    if s.get("weight_decay"):
        if s.get("decoupled_weight_decay"):
            s.decay = -s.lr * s.weight_decay * s.weight_before
        else:
            s.decay = -(1 - s.beta1) * s.weight_decay * s.effective_lr * s.weight_before
    if not s.is_first:
        s.momentum = -s.beta1 * s.effective_lr * s.m_before
    s.fresh = -(1 - s.beta1) * s.effective_lr * ascending(s)
    s.update = sum_of_parts(s)


RADAM = Formula(
    "RAdam",
    "Liu, Jiang, He, Chen, Liu, Gao and Han (2020), On the Variance of the Adaptive Learning Rate "
    "and Beyond, algorithm 2, with the threshold of 5 and the eps of torch.optim.RAdam; decoupled "
    "weight decay: Loshchilov and Hutter (2019), Decoupled Weight Decay Regularization",
    _step,
    {"step": "t", "exp_avg": "m", "exp_avg_sq": "v"},
    symbols={"rho_inf": r"\rho_\infty", "rho_t": r"\rho_t", "r": "r_t"},
)
