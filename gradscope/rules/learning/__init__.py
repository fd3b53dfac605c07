"""What is learnt: the loss, the initial weights, the targets and the inputs."""

from gradscope.rules.learning.constant_target import ConstantTarget
from gradscope.rules.learning.non_finite_loss import NonFiniteLoss
from gradscope.rules.learning.rising_objective import RisingObjective
from gradscope.rules.learning.summed_loss import SummedLoss
from gradscope.rules.learning.symmetric_initialization import SymmetricInitialization
from gradscope.rules.learning.target_independent_of_input import TargetIndependentOfInput
from gradscope.rules.learning.uninformed_loss_mismatch import UninformedLossMismatch
from gradscope.rules.learning.unnormalized_input import UnnormalizedInput
from gradscope.rules.rule import Rule

RULES: tuple[type[Rule], ...] = (
    NonFiniteLoss,
    RisingObjective,
    UninformedLossMismatch,
    SymmetricInitialization,
    ConstantTarget,
    UnnormalizedInput,
    SummedLoss,
    TargetIndependentOfInput,
)
