"""Rprop: steps of a size of their own for every weight, of the gradient only its sign."""

from __future__ import annotations

from gradscope.formulas.arithmetic import maximum, minimum, sign, where
from gradscope.formulas.formula import Formula
from gradscope.formulas.gradient import ascending
from gradscope.formulas.worksheet import Worksheet


def _step(s: Worksheet) -> None:
    g = ascending(s)
    s.t = s.t_before + 1
    least, greatest = s.step_sizes
    if s.is_first:
        s.step_size = minimum(maximum(s.lr, least), greatest)
        s.prev = g
    else:
        shrink, grow = s.etas
        s.agreement = g * s.prev_before
        wanted = where(
            s.agreement > 0,
            grow * s.step_size_before,
            where(s.agreement < 0, shrink * s.step_size_before, s.step_size_before),
        )
        s.step_size = minimum(maximum(wanted, least), greatest)
        # A weight that went too far waits for one step.
        s.prev = where(s.agreement < 0, 0.0, g)
    s.update = -s.step_size * sign(s.prev)


RPROP = Formula(
    "Rprop",
    "Riedmiller and Braun (1993), A Direct Adaptive Method for Faster Backpropagation Learning: "
    "The RPROP Algorithm, without weight-backtracking: Igel and Hüsken (2000), Improving the Rprop "
    "Learning Algorithm, algorithm iRprop-; as in torch.optim.Rprop",
    _step,
    {"step": "t", "prev": "prev", "step_size": "step_size"},
    symbols={
        "prev": "g^{\\mathrm{prev}}_t",
        "step_size": r"\eta_t",
        "etas": r"\eta^{\mp}",
        "step_sizes": r"\Gamma",
        "agreement": r"g_t\,g^{\mathrm{prev}}_{t-1}",
    },
)
