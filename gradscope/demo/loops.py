"""The two training loops of the demo: six lines, and the same without one of them.

They are written out rather than shared, because a finding names a file and a line, and that line
should be the one a reader has in front of them. Both yield where a script would print.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn, optim

GetBatch = Callable[[str], tuple[Tensor, Tensor]]


def train(
    model: nn.Module, optimizer: optim.Optimizer, get_batch: GetBatch, n_steps: int
) -> Iterator[float]:
    """Train, and yield the loss of each step in nats per character."""
    for _ in range(n_steps):
        xb, yb = get_batch("train")
        _, loss = model(xb, yb)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        yield loss.item()


def train_without_zero_grad(
    model: nn.Module, optimizer: optim.Optimizer, get_batch: GetBatch, n_steps: int
) -> Iterator[float]:
    """Do the same, except that nothing ever clears the gradients: they pile up from step to step.

    Nothing crashes, and at first the loss falls all the same; then it climbs back, which looks like
    a learning rate that is too high.
    """
    for _ in range(n_steps):
        xb, yb = get_batch("train")
        _, loss = model(xb, yb)
        loss.backward()
        optimizer.step()
        yield loss.item()
