"""What a loop does, noted by the loop itself with nothing but torch: what the tables must say."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch.optim import Optimizer


def norm(values: torch.Tensor) -> float:
    """The L2 norm in double precision."""
    values = values.detach()
    if hasattr(values, "to_local"):  # of a sharded one, what this process holds
        values = values.to_local()
    if values.is_sparse:
        values = values.coalesce().values()
    return float(torch.linalg.vector_norm(values.to(torch.float64)))


@dataclass
class Step:
    """One attempt of an optimizer to update.

    Attributes:
        optimizer: its place in the loop's list.
        weights: the parameters before the update.
        gradients: the norm of each parameter's gradient as the update reads it; None without one.
        n_backward: backwards since the gradients were cleared, and those of all calls of a closure.
        n_summed: backwards since the gradients were cleared.
        loss: the sum of their roots.
        update_norms: how far each was moved.
        outcome: ``stepped`` or ``skipped``.
        scaled: whether the gradients are still multiplied by a scaler's scale.
    """

    optimizer: int
    weights: dict[str, torch.Tensor]
    gradients: dict[str, float | None] = field(default_factory=dict)
    n_backward: int = 0
    n_summed: int = 0
    loss: float = math.nan
    update_norms: dict[str, float] = field(default_factory=dict)
    outcome: str = "stepped"
    scaled: bool = False


class ByHand:
    """Notes every step of a loop.

    Args:
        names: of the parameters, by id.
        optimizers: in the order in which they are watched.
    """

    def __init__(self, names: dict[int, str], optimizers: list[Optimizer]) -> None:
        self._names = names
        self._optimizers = optimizers
        self.steps: list[Step] = []
        self._n_since_begin = 0
        self.cleared()

    def cleared(self) -> None:
        """The gradients have been cleared."""
        self._roots: list[float] = []

    def backward(self, root: torch.Tensor) -> None:
        """A backward begins."""
        self._roots.append(float(root))
        self._n_since_begin += 1

    def begins(self, optimizer: Optimizer) -> None:
        """A step begins."""
        place = next(i for i, each in enumerate(self._optimizers) if each is optimizer)
        weights = {name: p.detach().clone() for name, p in self._held(optimizer)}
        self._now = Step(place, weights)
        self._n_since_begin = 0

    def reads(self, optimizer: Optimizer, scale: float = 1.0, *, scaled: bool = False) -> None:
        """An update is about to read the gradients, divided by ``scale``."""
        self._now.gradients = {
            name: None if p.grad is None else norm(p.grad) / scale
            for name, p in self._held(optimizer)
        }
        self._now.n_summed = len(self._roots)
        self._now.n_backward = max(len(self._roots), self._n_since_begin)
        self._now.loss = math.fsum(self._roots)
        self._now.scaled = scaled

    def updated(self, optimizer: Optimizer, *, skipped: bool = False) -> None:
        """The update is over."""
        for name, p in self._held(optimizer):
            self._now.update_norms[name] = norm(
                p.detach().double() - self._now.weights[name].double()
            )
        self._now.outcome = "skipped" if skipped else "stepped"
        self.steps.append(self._now)

    def _held(self, optimizer: Optimizer) -> Iterable[tuple[str, torch.Tensor]]:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield self._names[id(parameter)], parameter
