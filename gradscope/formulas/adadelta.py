"""Adadelta."""

from __future__ import annotations

from gradscope.formulas.arithmetic import sqrt
from gradscope.formulas.formula import Formula
from gradscope.formulas.gradient import ascending, regularized, sum_of_parts
from gradscope.formulas.worksheet import Worksheet


def _step(s: Worksheet) -> None:
    g = regularized(s)
    s.t = s.t_before + 1
    s.v = s.rho * s.v_before + (1 - s.rho) * g**2
    s.denominator = sqrt(s.v + s.eps)
    s.eps_dominates = s.v < s.eps
    s.ratio = sqrt(s.u_before + s.eps) / s.denominator
    s.delta = s.ratio * g
    s.u = s.rho * s.u_before + (1 - s.rho) * s.delta**2
    s.effective_lr = s.lr * s.ratio
    if s.get("weight_decay"):
        s.decay = -s.weight_decay * s.effective_lr * s.weight_before
    s.fresh = -s.effective_lr * ascending(s)
    s.update = sum_of_parts(s)


ADADELTA = Formula(
    "Adadelta",
    "Zeiler (2012), ADADELTA: An Adaptive Learning Rate Method, algorithm 1, with the learning "
    "rate of torch.optim.Adadelta",
    _step,
    {"step": "t", "square_avg": "v", "acc_delta": "u"},
    symbols={
        "delta": r"\Delta x_t",
        "ratio": r"\frac{\mathrm{RMS}[\Delta x]_{t-1}}{\mathrm{RMS}[g]_t}",
    },
)
