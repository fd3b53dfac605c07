"""ASGD: gradient descent whose weights are averaged on the side."""

from __future__ import annotations

from gradscope.formulas.arithmetic import maximum
from gradscope.formulas.formula import Formula
from gradscope.formulas.gradient import ascending, sum_of_parts
from gradscope.formulas.worksheet import Worksheet


def _step(s: Worksheet) -> None:
    s.t = s.t_before + 1
    # This step is made with the rate and the weight of the average that the last one left behind.
    eta = s.lr if s.is_first else s.eta_before
    mu = 1 if s.is_first else s.mu_before
    s.effective_lr = eta
    decay = s.lambd + s.weight_decay if s.get("weight_decay") else s.lambd
    if s.get("weight_decay") or s.get("lambd"):
        s.decay = -eta * decay * s.weight_before
    s.fresh = -eta * ascending(s)
    update = sum_of_parts(s)
    s.ax = s.ax_before + mu * (s.weight_before + update - s.ax_before)
    s.eta = s.lr / (1 + s.lambd * s.lr * s.t) ** s.alpha
    s.mu = 1 / maximum(1, s.t - s.t0)
    s.update = update


ASGD = Formula(
    "ASGD",
    "Polyak and Juditsky (1992), Acceleration of Stochastic Approximation by Averaging, with the "
    "schedules of Bottou's sgd 2.0, as in torch.optim.ASGD",
    _step,
    {"step": "t", "eta": "eta", "mu": "mu", "ax": "ax"},
    scalars=("t", "eta", "mu"),
    symbols={"lambd": r"\lambda_{\mathrm{ASGD}}", "ax": r"\bar\theta_t", "t0": "t_0"},
)
