"""What comes of it all: loss, initial weights, targets, inputs."""

from gradscope.rules.rule import Rule

RULES: tuple[type[Rule], ...] = ()
