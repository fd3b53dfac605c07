"""The line `optimizer.step()`: what becomes of the weights."""

from gradscope.rules.rule import Rule

RULES: tuple[type[Rule], ...] = ()
