"""The line `optimizer = …`: which parameters are there, and who updates them."""

from gradscope.rules.parameters.decayed_norm_or_bias import DecayedNormOrBias
from gradscope.rules.parameters.duplicate_parameter import DuplicateParameter
from gradscope.rules.parameters.frozen_parameter import FrozenParameter, NothingToTrain
from gradscope.rules.parameters.non_leaf_parameter import NonLeafParameter
from gradscope.rules.parameters.parameter_created_in_forward import ParameterCreatedInForward
from gradscope.rules.parameters.parameter_not_in_optimizer import (
    ParameterNotInOptimizer,
    StaleOptimizerParameter,
)
from gradscope.rules.parameters.untied_weights import FreezeWithoutEffect, UntiedWeights
from gradscope.rules.parameters.unused_parameter import UnusedParameter
from gradscope.rules.rule import Rule

RULES: tuple[type[Rule], ...] = (
    ParameterNotInOptimizer,
    StaleOptimizerParameter,
    DuplicateParameter,
    FrozenParameter,
    UnusedParameter,
    ParameterCreatedInForward,
    UntiedWeights,
    NothingToTrain,
    FreezeWithoutEffect,
    NonLeafParameter,
    DecayedNormOrBias,
)
