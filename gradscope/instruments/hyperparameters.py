"""The hyper-parameters of an optimizer's groups, as they are at this step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gradscope.instruments.late import Known, Late, scalar_of


@dataclass(slots=True)
class GroupReading:
    """One parameter group.

    Attributes:
        n_params: how many parameters it holds.
        values: each number among its hyper-parameters; ``betas`` as ``beta1`` and ``beta2``.
        options: every other setting that differs from False and None.
    """

    n_params: int
    values: dict[str, Late[Any]]
    options: dict[str, Any]


def read_groups(optimizer: torch.optim.Optimizer) -> list[GroupReading]:
    """Read every group; a learning rate that is a tensor is read like any other tensor."""
    return [_read(group) for group in optimizer.param_groups]


def _read(group: dict[str, Any]) -> GroupReading:
    values: dict[str, Late[Any]] = {}
    options: dict[str, Any] = {}
    for name, value in group.items():
        if name == "params" or value is None or value is False:
            continue
        if isinstance(value, torch.Tensor):
            values[name] = scalar_of(value)
        elif value is True or isinstance(value, str):
            options[name] = value
        elif isinstance(value, int | float):
            values[name] = Known(float(value))
        elif isinstance(value, tuple | list) and name == "betas":
            for number, beta in enumerate(value, start=1):
                values[f"beta{number}"] = (
                    scalar_of(beta) if isinstance(beta, torch.Tensor) else Known(float(beta))
                )
        else:
            options[name] = value
    return GroupReading(len(group["params"]), values, options)
