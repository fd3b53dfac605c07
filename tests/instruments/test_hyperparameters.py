"""Hyper-parameters of groups: read anew whenever something about them has changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gradscope.instruments.hyperparameters import GroupReader


def values(reader: GroupReader, optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    return [
        {name: float(late.value()) for name, late in group.values.items()}
        for group in reader.read(optimizer)
    ]


def adamw(**options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], **options)


def set_option(name: str, value: Any) -> Any:
    return lambda optimizer: optimizer.param_groups[0].__setitem__(name, value)


@pytest.mark.parametrize(
    ("change", "name", "expected"),
    [
        (set_option("lr", 0.5), "lr", 0.5),
        (set_option("lr", 1), "lr", 1.0),
        (set_option("lr", torch.tensor(0.5)), "lr", 0.5),
        (set_option("betas", (0.5, 0.75)), "beta2", 0.75),
        (set_option("betas", [0.5, 0.75]), "beta2", 0.75),
        (set_option("of_mine", 7), "of_mine", 7.0),
    ],
)
def test_what_has_changed_is_read_anew(change: Any, name: str, expected: float) -> None:
    optimizer, reader = adamw(), GroupReader()
    assert values(reader, optimizer)[0].get(name) != expected
    change(optimizer)
    assert values(reader, optimizer)[0][name] == expected


@pytest.mark.parametrize("name", ["lr", "betas"])
def test_what_can_change_in_place_is_read_every_time(name: str) -> None:
    optimizer, reader = adamw(), GroupReader()
    group = optimizer.param_groups[0]
    group[name] = torch.tensor(0.25) if name == "lr" else [0.25, 0.5]
    assert 0.25 in values(reader, optimizer)[0].values()
    if name == "lr":
        group[name].fill_(0.125)
    else:
        group[name][0] = 0.125
    assert 0.125 in values(reader, optimizer)[0].values()


def test_an_option_that_is_changed_in_place_is_read_anew() -> None:
    optimizer, reader = adamw(), GroupReader()
    schedule = optimizer.param_groups[0]["schedule"] = {"warm": 1}
    assert reader.read(optimizer)[0].options["schedule"] == {"warm": 1}
    optimizer.param_groups[0]["schedule"] = (schedule,)
    assert reader.read(optimizer)[0].options["schedule"] == ({"warm": 1},)
    first = reader.read(optimizer)[0]
    schedule["warm"] = 2
    assert reader.read(optimizer)[0] is not first


def test_groups_that_come_and_grow_are_seen() -> None:
    optimizer, reader = adamw(), GroupReader()
    assert [group.n_params for group in reader.read(optimizer)] == [1]
    optimizer.param_groups[0]["params"].append(torch.nn.Parameter(torch.ones(1)))
    assert [group.n_params for group in reader.read(optimizer)] == [2]
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.5})
    assert [group["lr"] for group in values(reader, optimizer)] == [1e-3, 0.5]


def test_what_has_not_changed_is_not_read_again() -> None:
    optimizer, reader = adamw(), GroupReader()
    first = reader.read(optimizer)
    optimizer.param_groups[0]["lr"] = float("1e-3")  # another object of the same value
    assert reader.read(optimizer)[0] is first[0]
