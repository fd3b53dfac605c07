"""The line `logits, loss = model(xb, yb)`: the graph behind the loss."""

from gradscope.rules.forward.detached_loss import DetachedLoss
from gradscope.rules.rule import Rule

RULES: tuple[type[Rule], ...] = (DetachedLoss,)
