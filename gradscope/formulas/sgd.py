"""Stochastic gradient descent, with momentum, and with Nesterov's."""

from __future__ import annotations

from gradscope.formulas.formula import Formula
from gradscope.formulas.gradient import ascending, regularized, sum_of_parts
from gradscope.formulas.worksheet import Worksheet


def _step(s: Worksheet) -> None:
    g = regularized(s)
    s.effective_lr = s.lr
    rate = s.lr
    if s.get("mu"):
        if s.is_first:
            # Of the first gradient nothing is dampened.
            s.b = g
        else:
            s.b = s.mu * s.b_before + (1 - s.dampening) * g
            rate = s.lr * (1 - s.dampening)
        if s.get("nesterov"):
            rate = s.lr + s.mu * rate
    if s.get("weight_decay"):
        s.decay = -rate * s.weight_decay * s.weight_before
    if s.get("mu") and not s.is_first:
        carried = s.mu**2 if s.get("nesterov") else s.mu
        s.momentum = -s.lr * carried * s.b_before
    s.fresh = -rate * ascending(s)
    s.update = sum_of_parts(s)


SGD = Formula(
    "SGD",
    "Robbins and Monro (1951), A Stochastic Approximation Method; momentum: Polyak (1964), Some "
    "Methods of Speeding up the Convergence of Iteration Methods; Nesterov's: Sutskever, Martens, "
    "Dahl and Hinton (2013), On the Importance of Initialization and Momentum in Deep Learning, "
    "section 2; both in the form that torch.optim.SGD documents",
    _step,
    {"momentum_buffer": "b"},
    scalars=(),
)
