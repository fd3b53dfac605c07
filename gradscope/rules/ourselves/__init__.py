"""gradscope itself: what failed, and what cannot be seen."""

from gradscope.rules.rule import Rule

RULES: tuple[type[Rule], ...] = ()
