"""The line `optimizer = AdamW(m.parameters())`: which parameters will be updated."""

from gradscope.rules.rule import Rule

RULES: tuple[type[Rule], ...] = ()
