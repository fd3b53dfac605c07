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


class GroupReader:
    """Reads every group; a learning rate that is a tensor is read like any other tensor.

    Groups seldom change from step to step: one that has not is read once.
    """

    def __init__(self) -> None:
        self._last: list[tuple[dict[str, Any], GroupReading]] = []

    def read(self, optimizer: torch.optim.Optimizer) -> list[GroupReading]:
        """Return the readings of all groups, as they are now."""
        groups, last = optimizer.param_groups, self._last
        if len(groups) == len(last) and all(map(_is_unchanged, groups, last)):
            return [reading for _, reading in last]
        readings = [_read(group) for group in groups]
        self._last = [
            ({name: value for name, value in group.items() if name != "params"}, reading)
            for group, reading in zip(groups, readings, strict=True)
        ]
        return readings


_PLAIN = (float, int, str)


def _is_unchanged(group: dict[str, Any], last: tuple[dict[str, Any], GroupReading]) -> bool:
    """Whether a group is as it was; no tensor is compared, which might have to be waited for."""
    before, reading = last
    if len(group) != len(before) + 1 or len(group["params"]) != reading.n_params:
        return False
    for name, value in before.items():
        now = group.get(name, _read)  # which is no setting
        if isinstance(now, torch.Tensor | list):  # may be the same one, and hold something else
            return False
        if now is not value and not (
            type(now) is type(value) and isinstance(now, _PLAIN) and now == value
        ):
            return False
    return not any(isinstance(beta, torch.Tensor) for beta in before.get("betas") or ())


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
