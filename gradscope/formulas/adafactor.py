"""Adafactor: of a matrix's second moment only the means of rows and columns are kept."""

from __future__ import annotations

from gradscope.formulas.arithmetic import machine_epsilon, maximum, mean, minimum, rms, sqrt
from gradscope.formulas.formula import Formula
from gradscope.formulas.gradient import ascending, sum_of_parts
from gradscope.formulas.worksheet import Worksheet


def _step(s: Worksheet) -> None:
    g = ascending(s)
    eps1, eps2 = s.eps
    if eps1 is None:
        eps1 = machine_epsilon(s.dtype)
    s.t = s.t_before + 1
    s.beta2_complement = s.t**s.beta2_decay
    s.rho = minimum(s.lr, 1 / sqrt(s.t))
    s.alpha = maximum(rms(s.weight_before), eps2) * s.rho
    s.g_squared = g**2
    if g.ndim > 1:
        s.R = (1 - s.beta2_complement) * s.R_before + s.beta2_complement * mean(s.g_squared, -1)
        s.C = (1 - s.beta2_complement) * s.C_before + s.beta2_complement * mean(s.g_squared, -2)
        s.V_hat = s.R @ s.C / maximum(mean(s.R, -2), eps1)
    else:
        s.V = (1 - s.beta2_complement) * s.V_before + s.beta2_complement * s.g_squared
        s.V_hat = s.V
    s.denominator = sqrt(maximum(s.V_hat, eps1**2))
    s.eps_dominates = s.V_hat < eps1**2
    s.U = g / s.denominator
    s.clip = maximum(rms(s.U) / s.d, 1)
    s.effective_lr = s.alpha / s.clip / s.denominator
    if s.get("weight_decay"):
        s.decay = -s.lr * s.weight_decay * s.weight_before
    s.fresh = -s.alpha / s.clip * s.U
    s.update = sum_of_parts(s)


ADAFACTOR = Formula(
    "Adafactor",
    "Shazeer and Stern (2018), Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, "
    "algorithms 4 and 5, with lr, weight decay and the place of epsilon 1 as torch.optim.Adafactor "
    "documents them",
    _step,
    {"step": "t", "row_var": "R", "col_var": "C", "variance": "V"},
    symbols={
        "beta2_complement": r"\left(1 - \hat\beta_{2t}\right)",
        "beta2_decay": r"\tau",
        "rho": r"\rho_t",
        "alpha": r"\alpha_t",
        "g_squared": "g_t^2",
        "V_hat": r"\hat V_t",
        "U": "U_t",
        "clip": r"\mathrm{clip}_t",
    },
    elementwise=False,
)
