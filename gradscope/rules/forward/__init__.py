"""The line `logits, loss = model(xb, yb)`: the graph behind the loss."""

from gradscope.rules.forward.cached_activation import CachedActivation
from gradscope.rules.forward.checkpoint_drops_gradient import CheckpointDropsGradient
from gradscope.rules.forward.degenerate_batch_norm import DegenerateBatchNorm
from gradscope.rules.forward.detached_loss import DetachedLoss
from gradscope.rules.forward.detached_module import DetachedModule
from gradscope.rules.forward.discarded_loss import DiscardedLoss
from gradscope.rules.forward.loss_broadcast import LossBroadcast
from gradscope.rules.forward.nll_without_log_softmax import NllWithoutLogSoftmax
from gradscope.rules.forward.no_grad_forward import NoGradForward
from gradscope.rules.forward.non_differentiable_operation import NonDifferentiableOperation
from gradscope.rules.forward.retained_graph import RetainedGraph
from gradscope.rules.forward.sigmoid_before_bce_with_logits import SigmoidBeforeBceWithLogits
from gradscope.rules.forward.softmax_before_cross_entropy import SoftmaxBeforeCrossEntropy
from gradscope.rules.forward.softmax_over_batch import SoftmaxOverBatch
from gradscope.rules.forward.training_in_eval_mode import TrainingInEvalMode
from gradscope.rules.rule import Rule

RULES: tuple[type[Rule], ...] = (
    DetachedLoss,
    DetachedModule,
    NoGradForward,
    NonDifferentiableOperation,
    RetainedGraph,
    TrainingInEvalMode,
    SoftmaxBeforeCrossEntropy,
    NllWithoutLogSoftmax,
    SigmoidBeforeBceWithLogits,
    LossBroadcast,
    SoftmaxOverBatch,
    DiscardedLoss,
    CheckpointDropsGradient,
    CachedActivation,
    DegenerateBatchNorm,
)
