"""The state of optimizers as read, against the tensors themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gradscope.instruments.optimizer_state import StateReader, StateReading


class Holder(torch.optim.Optimizer):
    """An optimizer whose state the test fills."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        super().__init__(parameters, {})


def entries(reading: StateReading) -> dict[tuple[int, str], dict[str, float]]:
    """Every entry by place and key; the statistics of a tensor, the value of a number."""
    layout = reading.layout
    found: dict[tuple[int, str], dict[str, float]] = {}
    for name in ("norm", "mean", "abs_max", "n_nonfinite"):
        for at, value in zip(
            layout.tensors, getattr(reading.statistics.value(), name), strict=True
        ):
            found.setdefault((int(layout.places[at]), layout.keys[layout.key[at]]), {})[name] = (
                value
            )
    for at, value in zip(layout.numbers, reading.values.value(), strict=True):
        found[int(layout.places[at]), layout.keys[layout.key[at]]] = {"value": value}
    return found


def parameters_of(n: int = 3) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(i + 2, 3)) for i in range(n)]


def test_every_kind_of_entry() -> None:
    first, second, third = parameters = parameters_of()
    optimizer = Holder(parameters)
    big = torch.randn(20_000)
    broken = torch.tensor([1.0, float("nan"), float("inf")])
    optimizer.state[first] = {"step": torch.tensor(3.0), "m": first.detach().clone(), "big": big}
    optimizer.state[second] = {
        "count": 7,
        "rate": 0.25,
        "on": True,
        "what": "text",
        "none": None,
        "list": [1],
        "double": torch.tensor(1e300, dtype=torch.float64),
        "whole": torch.tensor(2**40),
        "one": torch.tensor([5.0]),
        "flags": torch.tensor([True, False, True]),
        "broken": broken,
    }
    found = entries(StateReader().read(optimizer, parameters))
    assert set(found) == {
        *((0, key) for key in ("step", "m", "big")),
        *((1, key) for key in ("count", "rate", "on", "double", "whole", "one", "flags", "broken")),
    }
    for (place, key), expected in {
        (0, "step"): 3,
        (1, "count"): 7,
        (1, "rate"): 0.25,
        (1, "on"): 1,
        (1, "double"): 1e300,
        (1, "whole"): 2**40,
    }.items():
        assert found[place, key] == {"value": expected}
    for (place, key), tensor in {(0, "m"): first, (0, "big"): big}.items():
        values = tensor.detach().double()
        assert found[place, key]["norm"] == pytest.approx(float(values.norm()), rel=1e-6)
        assert found[place, key]["mean"] == pytest.approx(float(values.mean()), abs=1e-6)
        assert found[place, key]["abs_max"] == float(values.abs().max())
        assert found[place, key]["n_nonfinite"] == 0
    assert found[1, "broken"]["n_nonfinite"] == 2
    assert found[1, "flags"]["norm"] == pytest.approx(2**0.5)
    assert third not in optimizer.state, "the state is a defaultdict"


def test_complex_numbers_have_norms() -> None:
    parameters = [nn.Parameter(torch.zeros(s, dtype=torch.complex64)) for s in ((), (2,))]
    optimizer = Holder(parameters)
    numbers = [torch.tensor(3 + 4j), torch.tensor([3 + 4j, 5 - 12j])]
    for parameter, number in zip(parameters, numbers, strict=True):
        optimizer.state[parameter] = {"m": number, "step": torch.tensor(2.0)}
    reading = StateReader().read(optimizer, parameters)
    found = entries(reading)
    assert found[0, "m"]["norm"] == pytest.approx(5)
    assert found[1, "m"]["norm"] == pytest.approx(194**0.5)
    assert np.isnan(found[0, "m"]["mean"])
    assert reading.by_parameter("m", "norm", 2) == pytest.approx([5, 194**0.5])


def test_by_parameter_puts_every_entry_in_its_place() -> None:
    parameters = parameters_of(4)
    optimizer = Holder(parameters)
    optimizer.state[parameters[1]] = {"m": torch.tensor([3.0, 4.0]), "step": -2}
    optimizer.state[parameters[3]] = {"step": torch.tensor(5), "m": torch.tensor(-7.0)}
    reading = StateReader().read(optimizer, parameters)
    nan = float("nan")
    np.testing.assert_array_equal(reading.by_parameter("m", "norm", 4), [nan, 5, nan, 7])
    np.testing.assert_array_equal(reading.by_parameter("m", "mean", 4), [nan, 3.5, nan, -7])
    np.testing.assert_array_equal(reading.by_parameter("step", "mean", 4), [nan, -2, nan, 5])
    np.testing.assert_array_equal(reading.by_parameter("other", "norm", 4), [nan] * 4)


def replace(state: dict[str, Any]) -> None:
    state["m"] = state["m"] + 1


def write(state: dict[str, Any]) -> None:
    state["m"].mul_(2)


def count(state: dict[str, Any]) -> None:
    state["step"] += 1


def replace_count(state: dict[str, Any]) -> None:
    state["step"] = torch.tensor(100.0)


def add(state: dict[str, Any]) -> None:
    state["more"] = torch.ones(3)


def remove(state: dict[str, Any]) -> None:
    del state["m"]


def reorder(state: dict[str, Any]) -> None:
    state["m"] = state.pop("m")
    state["step"] = state.pop("step")


def reshape(state: dict[str, Any]) -> None:
    state["m"] = torch.full((2, 2), 9.0)


EDITS = [replace, write, count, replace_count, add, remove, reorder, reshape]


@pytest.mark.parametrize("counter", [torch.tensor(4.0), 4])
@pytest.mark.parametrize("edit", EDITS)
def test_a_reading_is_used_again_only_while_it_holds(edit: Any, counter: Any) -> None:
    parameters = parameters_of()
    optimizer = Holder(parameters)
    for parameter in parameters:
        own = counter.clone() if isinstance(counter, torch.Tensor) else counter
        optimizer.state[parameter] = {"step": own, "m": torch.randn_like(parameter).detach()}
    reader = StateReader()
    first = entries(reader.read(optimizer, parameters))
    again = reader.read(optimizer, parameters, no_step_since=True)
    assert entries(again) == first
    edit(optimizer.state[parameters[1]])
    after = entries(reader.read(optimizer, parameters, no_step_since=True))
    fresh = entries(StateReader().read(optimizer, parameters))
    assert after.keys() == fresh.keys()
    for at, numbers in fresh.items():
        assert after[at] == pytest.approx(numbers, nan_ok=True)
    if edit is not reorder:
        assert after != first


def test_an_earlier_reading_is_not_changed_by_a_later_one() -> None:
    parameters = parameters_of()
    optimizer = Holder(parameters)
    for parameter in parameters:
        optimizer.state[parameter] = {"step": torch.tensor(1.0), "m": torch.ones_like(parameter)}
    reader = StateReader()
    early = reader.read(optimizer, parameters)
    before = {at: dict(numbers) for at, numbers in entries(early).items()}
    for parameter in parameters:
        optimizer.state[parameter]["m"].zero_()
        optimizer.state[parameter]["step"] += 1
    reader.read(optimizer, parameters)
    assert entries(early) == before


def test_parameters_that_are_gone_or_take_another_one_s_place() -> None:
    parameters: list[Any] = parameters_of()
    optimizer = Holder(parameters)
    for number, parameter in enumerate(parameters):
        optimizer.state[parameter] = {"step": torch.tensor(float(number))}
    reader = StateReader()
    reader.read(optimizer, parameters)
    one, two, three = parameters
    for order in ([None, two, three], [three, one, two], [two], [one, two, three]):
        found = entries(reader.read(optimizer, order, no_step_since=True))
        assert found == {
            (place, "step"): {"value": float(optimizer.state[p]["step"])}
            for place, p in enumerate(order)
            if p is not None
        }


def test_state_without_version_counters() -> None:
    """Tensors made in inference mode count no versions, so nothing may be used again."""
    (parameter,) = parameters_of(1)
    optimizer = Holder([parameter])
    with torch.inference_mode():
        held = torch.ones(3)
    optimizer.state[parameter] = {"m": held}
    reader = StateReader()
    reader.read(optimizer, [parameter])
    with torch.inference_mode():
        held.mul_(2)
    found = entries(reader.read(optimizer, [parameter], no_step_since=True))
    assert found[0, "m"]["norm"] == pytest.approx(12**0.5)


def test_sparse_and_meta_state() -> None:
    first, second = parameters = parameters_of(2)
    optimizer = Holder(parameters)
    sparse = torch.sparse_coo_tensor(
        [[0, 0, 1]], torch.tensor([[3.0] * 3, [1.0] * 3, [2.0] * 3]), (2, 3), check_invariants=True
    )
    optimizer.state[first] = {"m": sparse, "count": torch.zeros((), device="meta")}
    optimizer.state[second] = {"m": torch.zeros(3, 3, device="meta")}
    found = entries(StateReader().read(optimizer, parameters))
    assert found[0, "m"]["norm"] == pytest.approx(float(sparse.to_dense().norm()))
    assert np.isnan(found[1, "m"]["norm"])
    assert np.isnan(found[0, "count"]["value"])
