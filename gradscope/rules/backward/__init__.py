"""The line `loss.backward()`: what it writes into `.grad`, and what becomes of it."""

from gradscope.rules.backward.clip_after_step import ClipAfterStep
from gradscope.rules.backward.clip_before_backward import ClipBeforeBackward
from gradscope.rules.backward.clip_without_unscale import ClipWithoutUnscale
from gradscope.rules.backward.clipped_to_nothing import ClippedToNothing
from gradscope.rules.backward.dead_units import DeadUnits
from gradscope.rules.backward.exploding_gradient import ExplodingGradient
from gradscope.rules.backward.missing_backward import MissingBackward
from gradscope.rules.backward.non_finite_gradient import NonFiniteGradient
from gradscope.rules.backward.repeated_backward import RepeatedBackward
from gradscope.rules.backward.vanishing_gradient import VanishingGradient
from gradscope.rules.rule import Rule

RULES: tuple[type[Rule], ...] = (
    MissingBackward,
    RepeatedBackward,
    VanishingGradient,
    ExplodingGradient,
    NonFiniteGradient,
    DeadUnits,
    ClipWithoutUnscale,
    ClipAfterStep,
    ClipBeforeBackward,
    ClippedToNothing,
)
