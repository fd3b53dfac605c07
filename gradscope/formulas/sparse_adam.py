"""SparseAdam: Adam only where a sparse gradient has elements."""

from __future__ import annotations

from gradscope.formulas.arithmetic import sqrt
from gradscope.formulas.formula import Formula
from gradscope.formulas.gradient import ascending, sum_of_parts
from gradscope.formulas.worksheet import Worksheet


def _step(s: Worksheet) -> None:
    g = ascending(s)
    s.t = s.t_before + 1
    s.m = s.m_before + (1 - s.beta1) * s.touched * (g - s.m_before)
    s.v = s.v_before + (1 - s.beta2) * s.touched * (g**2 - s.v_before)
    s.bias_correction1 = 1 - s.beta1**s.t
    s.bias_correction2 = 1 - s.beta2**s.t
    # torch adds eps before the bias correction.
    s.denominator = sqrt(s.v) + s.eps
    s.eps_dominates = s.denominator < 2 * s.eps
    s.effective_lr = (
        s.lr * sqrt(s.bias_correction2) / s.bias_correction1 * s.touched / s.denominator
    )
    s.momentum = -s.beta1 * s.effective_lr * s.m_before
    s.fresh = -(1 - s.beta1) * s.effective_lr * g
    s.update = sum_of_parts(s)


SPARSE_ADAM = Formula(
    "SparseAdam",
    "Kingma and Ba (2015), Adam: A Method for Stochastic Optimization, section 2, masked as "
    "torch.optim.SparseAdam documents",
    _step,
    {"step": "t", "exp_avg": "m", "exp_avg_sq": "v"},
    symbols={"touched": r"\mathbb{1}_{\mathrm{touched}}"},
)
