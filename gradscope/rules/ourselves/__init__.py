"""What gradscope says of itself: what failed, and what cannot be observed."""

from gradscope.rules.ourselves.instrument_failed import InstrumentFailed
from gradscope.rules.ourselves.unobserved import Unobserved
from gradscope.rules.rule import Rule

RULES: tuple[type[Rule], ...] = (InstrumentFailed, Unobserved)
