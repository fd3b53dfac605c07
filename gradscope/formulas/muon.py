"""Muon: momentum whose matrix is made orthogonal before it is subtracted."""

from __future__ import annotations

from typing import Any

from gradscope.formulas.arithmetic import lerp, newton_schulz, sqrt
from gradscope.formulas.formula import Formula
from gradscope.formulas.worksheet import Worksheet


def _step(s: Worksheet) -> None:
    s.b = lerp(s.b_before, s.g, 1 - s.mu, s.dtype)
    direction = s.b
    if s.get("nesterov"):
        s.b_ahead = lerp(s.g, s.b, s.mu, s.dtype)
        direction = s.b_ahead
    s.O = newton_schulz(direction, s.ns_coefficients, s.ns_steps, s.eps)
    s.lr_adjusted = s.lr * _ratio(s)
    if s.get("weight_decay"):
        s.decay = -s.lr * s.weight_decay * s.weight_before
        s.update = s.decay - s.lr_adjusted * s.O
    else:
        s.update = -s.lr_adjusted * s.O


def _ratio(s: Worksheet) -> Any:
    rows, columns = s.weight_before.shape
    if s.get("adjust_lr_fn") == "match_rms_adamw":
        return 0.2 * sqrt(max(rows, columns))
    return sqrt(max(1, rows / columns))


MUON = Formula(
    "Muon",
    "Jordan, Jin, Boza, You, Cesista, Newhouse and Bernstein (2024), Muon: An optimizer for hidden "
    "layers in neural networks; decoupled weight decay and match_rms_adamw: Liu et al. (2025), "
    "Muon is Scalable for LLM Training; the average in the momentum as in torch.optim.Muon",
    _step,
    {"momentum_buffer": "b"},
    scalars=(),
    symbols={"b": "B_t", "b_ahead": r"\tilde B_t", "O": "O_t", "lr_adjusted": r"\tilde\gamma"},
    elementwise=False,
)
