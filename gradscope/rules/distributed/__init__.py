"""What goes wrong between processes that train together."""

from gradscope.rules.distributed.rank_without_gradient import RankWithoutGradient
from gradscope.rules.distributed.ranks_out_of_sync import RanksOutOfSync
from gradscope.rules.distributed.unreduced_gradients import UnreducedGradients
from gradscope.rules.rule import Rule

RULES: tuple[type[Rule], ...] = (RanksOutOfSync, UnreducedGradients, RankWithoutGradient)
