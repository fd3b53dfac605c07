"""The line `optimizer.step()`: what it did to the weights."""

from gradscope.rules.rule import Rule
from gradscope.rules.step.decayed_learning_rate import DecayedLearningRate
from gradscope.rules.step.dominant_weight_decay import DominantWeightDecay
from gradscope.rules.step.formula_mismatch import FormulaMismatch
from gradscope.rules.step.learning_rate_too_high import LearningRateTooHigh
from gradscope.rules.step.learning_rate_too_low import LearningRateTooLow
from gradscope.rules.step.lost_to_rounding import LostToRounding
from gradscope.rules.step.missing_step import MissingStep
from gradscope.rules.step.optimizer_recreated import OptimizerRecreated
from gradscope.rules.step.scaled_gradient_step import ScaledGradientStep
from gradscope.rules.step.scaler_not_updated import ScalerNotUpdated
from gradscope.rules.step.scheduler_before_step import SchedulerBeforeStep
from gradscope.rules.step.scheduler_of_idle_optimizer import SchedulerOfIdleOptimizer
from gradscope.rules.step.step_before_backward import StepBeforeBackward
from gradscope.rules.step.step_without_effect import StepWithoutEffect
from gradscope.rules.step.unusual_adam_hyperparameters import UnusualAdamHyperparameters
from gradscope.rules.step.weights_changed_outside_step import WeightsChangedOutsideStep
from gradscope.rules.step.zero_learning_rate import ZeroLearningRate

RULES: tuple[type[Rule], ...] = (
    MissingStep,
    StepBeforeBackward,
    ZeroLearningRate,
    DecayedLearningRate,
    LearningRateTooHigh,
    LearningRateTooLow,
    OptimizerRecreated,
    SchedulerBeforeStep,
    SchedulerOfIdleOptimizer,
    UnusualAdamHyperparameters,
    DominantWeightDecay,
    WeightsChangedOutsideStep,
    StepWithoutEffect,
    ScaledGradientStep,
    ScalerNotUpdated,
    FormulaMismatch,
    LostToRounding,
)
