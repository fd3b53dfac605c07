"""The line `optimizer.zero_grad()`: what is left in `.grad` from step to step."""

from gradscope.rules.rule import Rule
from gradscope.rules.zero_grad.missing_zero_grad import MissingZeroGrad

RULES: tuple[type[Rule], ...] = (MissingZeroGrad,)
