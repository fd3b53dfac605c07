"""NAdam: Adam with Nesterov's momentum, and NAdamW, the same with decoupled weight decay."""

from __future__ import annotations

from gradscope.formulas.arithmetic import sqrt
from gradscope.formulas.formula import Formula
from gradscope.formulas.gradient import ascending, regularized, sum_of_parts
from gradscope.formulas.worksheet import Worksheet


def _step(s: Worksheet) -> None:
    g = regularized(s)
    s.t = s.t_before + 1
    s.m = s.beta1 * s.m_before + (1 - s.beta1) * g
    s.v = s.beta2 * s.v_before + (1 - s.beta2) * g**2
    s.bias_correction2 = 1 - s.beta2**s.t
    s.mu_now = s.beta1 * (1 - 0.5 * 0.96 ** (s.t * s.momentum_decay))
    s.mu_next = s.beta1 * (1 - 0.5 * 0.96 ** ((s.t + 1) * s.momentum_decay))
    # An empty product is 1.
    s.mu_product = s.mu_now if s.is_first else s.mu_product_before * s.mu_now
    # What is added to the weight is -effective_lr * (m_factor * m + g_factor * g).
    s.m_factor = s.mu_next / (1 - s.mu_product * s.mu_next)
    s.g_factor = (1 - s.mu_now) / (1 - s.mu_product)
    s.denominator = sqrt(s.v / s.bias_correction2) + s.eps
    s.eps_dominates = s.denominator < 2 * s.eps
    s.effective_lr = s.lr / s.denominator
    # The gradient is in m as well.
    s.fresh_factor = s.m_factor * (1 - s.beta1) + s.g_factor
    if s.get("weight_decay"):
        if s.get("decoupled_weight_decay"):
            s.decay = -s.lr * s.weight_decay * s.weight_before
        else:
            s.decay = -s.fresh_factor * s.weight_decay * s.effective_lr * s.weight_before
    s.momentum = -s.m_factor * s.beta1 * s.effective_lr * s.m_before
    s.fresh = -s.fresh_factor * s.effective_lr * ascending(s)
    s.update = sum_of_parts(s)


NADAM = Formula(
    "NAdam",
    "Dozat (2016), Incorporating Nesterov Momentum into Adam, with the momentum "
    "schedule that torch.optim.NAdam documents; decoupled weight decay: Loshchilov and Hutter "
    "(2019), Decoupled Weight Decay Regularization",
    _step,
    {"step": "t", "mu_product": "mu_product", "exp_avg": "m", "exp_avg_sq": "v"},
    scalars=("t", "mu_product"),
    symbols={
        "momentum_decay": r"\psi",
        "mu_now": r"\mu_t",
        "mu_next": r"\mu_{t+1}",
        "mu_product": r"\prod_{i=1}^{t} \mu_i",
        "mu_product_before": r"\prod_{i=1}^{t-1} \mu_i",
        "m_factor": r"c^{m}_t",
        "g_factor": r"c^{g}_t",
        "fresh_factor": r"c^{\mathrm{fresh}}_t",
    },
)
