"""The line `optimizer.zero_grad()`: what is left in `.grad` from step to step."""

from gradscope.rules.rule import Rule
from gradscope.rules.zero_grad.accumulation import DroppedAccumulation, UnscaledAccumulation
from gradscope.rules.zero_grad.foreign_gradient import ForeignGradient
from gradscope.rules.zero_grad.missing_zero_grad import MissingZeroGrad
from gradscope.rules.zero_grad.partial_zero_grad import PartialZeroGrad
from gradscope.rules.zero_grad.zero_grad_before_step import ZeroGradBeforeStep

RULES: tuple[type[Rule], ...] = (
    MissingZeroGrad,
    ZeroGradBeforeStep,
    PartialZeroGrad,
    UnscaledAccumulation,
    DroppedAccumulation,
    ForeignGradient,
)
