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


def _is_unchanged(group: dict[str, Any], last: tuple[dict[str, Any], GroupReading]) -> bool:
    """Whether a group is as it was, as far as that can be told.

    No tensor is compared, which might have to be waited for, and nothing that may be the same
    object and hold something else.
    """
    before, reading = last
    if len(group) != len(before) + 1 or len(group["params"]) != reading.n_params:
        return False
    for name, value in before.items():
        now = group.get(name, _read)  # which is no setting
        if type(now) is not type(value) or not _is_plain(now) or now != value:
            return False
    return True


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


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
