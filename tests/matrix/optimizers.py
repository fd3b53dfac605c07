"""The optimizers of the matrix: every class of ``torch.optim``, in each of its implementations."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import AdamW, Optimizer

MODES = ("plain", "foreach", "fused")
"""How an update is computed: parameter by parameter, over lists of them, in one kernel."""

_OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    "AdamW": {"lr": 1e-2, "weight_decay": 0.01},
    "RMSprop": {"lr": 1e-2, "momentum": 0.5},
    "LBFGS": {"lr": 0.1, "max_iter": 3, "history_size": 4},
}
"""What is not left as torch has it; a class that is not named here gets a learning rate."""


def classes() -> list[type[Optimizer]]:
    """Every optimizer of this version of torch."""
    return [
        kind
        for _, kind in sorted(vars(torch.optim).items())
        if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer
    ]


@dataclass(frozen=True)
class Kind:
    """An optimizer in one of its implementations."""

    cls: type[Optimizer]
    mode: str

    @property
    def name(self) -> str:
        return self.cls.__name__

    def __str__(self) -> str:
        return f"{self.name}-{self.mode}"

    @property
    def needs_closure(self) -> bool:
        return self.name == "LBFGS"

    @property
    def needs_sparse_gradients(self) -> bool:
        return self.name == "SparseAdam"

    def over(self, parameters: Iterable[torch.Tensor]) -> list[Optimizer]:
        """Optimizers of these parameters; what Muon cannot take is AdamW's, as torch advises."""
        held = list(parameters)
        if self.name != "Muon":
            return [self._make(held)]
        matrices = [p for p in held if p.dim() == 2]
        rest = [p for p in held if p.dim() != 2]
        made = [self._make(matrices)] if matrices else []
        return [*made, AdamW(rest, lr=1e-2, foreach=False)] if rest else made

    def _make(self, parameters: list[torch.Tensor]) -> Optimizer:
        options = dict(_OPTIONS.get(self.name, {"lr": 1e-2}))
        if self.mode != "plain":
            options[self.mode] = True  # a TypeError where there is no such implementation
        elif "foreach" in inspect.signature(self.cls).parameters:
            options["foreach"] = False
        return self.cls(parameters, **options)  # type: ignore[call-arg]


KINDS = [Kind(cls, mode) for cls in classes() for mode in MODES]
