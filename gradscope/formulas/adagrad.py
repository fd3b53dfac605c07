"""Adagrad, for dense and sparse gradients."""

from __future__ import annotations

from gradscope.formulas.arithmetic import sqrt
from gradscope.formulas.formula import Formula
from gradscope.formulas.gradient import ascending, regularized, sum_of_parts
from gradscope.formulas.worksheet import Worksheet


def _step(s: Worksheet) -> None:
    g = regularized(s)
    s.t = s.t_before + 1
    s.G = (s.initial_accumulator_value if s.is_first else s.G_before) + g**2
    s.lr_decayed = s.lr / (1 + s.t_before * s.lr_decay)
    s.denominator = sqrt(s.G) + s.eps
    s.eps_dominates = s.denominator < 2 * s.eps
    s.effective_lr = s.lr_decayed / s.denominator
    if s.get("weight_decay"):
        s.decay = -s.weight_decay * s.effective_lr * s.weight_before
    s.fresh = -s.effective_lr * ascending(s)
    s.update = sum_of_parts(s)


ADAGRAD = Formula(
    "Adagrad",
    "Duchi, Hazan and Singer (2011), Adaptive Subgradient Methods for Online Learning and "
    "Stochastic Optimization, figure 1 with diagonal matrices and no projection, with the decay of "
    "the learning rate that torch.optim.Adagrad documents",
    _step,
    {"step": "t", "sum": "G"},
    symbols={
        "lr_decay": r"\eta",
        "lr_decayed": r"\tilde\gamma_t",
        "initial_accumulator_value": "G_0",
    },
)
