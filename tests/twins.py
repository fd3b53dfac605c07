"""A training and its twin: what of them must not differ by a bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

Step = Callable[[int], list[torch.Tensor]]
"""One step of a loop, by its number; returns what the program sees: losses, outputs."""


@dataclass
class Training:
    """A training that has not begun.

    Attributes:
        models, optimizers: those to be watched.
        step: runs one step.
        others: schedulers, scalers, further models: whatever else has a ``state_dict``.
        expected_steps: attempts of watched optimizers per step of the loop.
    """

    models: list[nn.Module]
    optimizers: list[Optimizer]
    step: Step
    others: list[Any] = field(default_factory=list)
    expected_steps: int = 1


def seed_everything(seed: int = 0) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def everything_of(training: Training, seen: list[torch.Tensor]) -> dict[str, bytes]:
    """All that a training leaves behind, as bytes."""
    parts: dict[str, Any] = {
        "models": [model.state_dict() for model in training.models],
        "gradients": [[p.grad for p in model.parameters()] for model in training.models],
        "optimizers": [optimizer.state_dict() for optimizer in training.optimizers],
        "others": [other.state_dict() for other in training.others],
        "seen": seen,
        "torch rng": torch.get_rng_state(),
        "numpy rng": np.random.get_state(),
        "python rng": random.getstate(),
    }
    return dict(_flat("", parts))


def _flat(name: str, thing: Any) -> Iterator[tuple[str, bytes]]:
    if isinstance(thing, dict | list | tuple) and not thing:
        yield name, b"empty"
    elif isinstance(thing, dict):
        for key, value in thing.items():
            yield from _flat(f"{name}.{key}", value)
    elif isinstance(thing, list | tuple):
        for number, value in enumerate(thing):
            yield from _flat(f"{name}[{number}]", value)
    elif isinstance(thing, torch.Tensor):
        if hasattr(thing, "to_local"):
            thing = thing.to_local()
        if thing.is_sparse:
            thing = thing.coalesce().values()
        raw = thing.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        yield name, f"{thing.dtype} {tuple(thing.shape)} ".encode() + raw.numpy().tobytes()
    elif isinstance(thing, np.ndarray):
        yield name, thing.tobytes()
    else:
        yield name, repr(thing).encode()


def differing(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    """Names of what is not the same in both."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
