"""The line `loss.backward()`: what gets into the gradients."""

from gradscope.rules.rule import Rule

RULES: tuple[type[Rule], ...] = ()
