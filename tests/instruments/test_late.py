"""Values that arrive late, and doing things in order all the same."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import gradscope
from gradscope.instruments import late
from gradscope.session.in_order import InOrder


class Arriving:
    """A value that is there when told."""

    def __init__(self) -> None:
        self.there = False

    def ready(self) -> bool:
        return self.there


def test_what_is_ready_is_done_in_order() -> None:
    done: list[str] = []
    first, second = Arriving(), Arriving()
    queue = InOrder(lambda error: done.append(str(error)))
    queue.do(lambda: done.append("a"))
    queue.do(lambda: done.append("b"), first)
    queue.do(lambda: done.append("c"))
    queue.do(lambda: done.append("d"), second)
    assert done == []
    queue.step_ended(is_urgent=False)
    assert done == ["a"]
    second.there = True
    queue.settle()
    assert done == ["a"]
    first.there = True
    queue.settle()
    assert done == ["a", "b", "c", "d"]


def test_several_steps_are_done_together_unless_one_is_urgent() -> None:
    done: list[int] = []
    queue = InOrder(lambda error: done.append(-1))
    queue.expect(100)
    for step in range(40):
        queue.do(lambda step=step: done.append(step))
        queue.step_ended(is_urgent=step == 19)
        if step < 15:
            assert done == []
    assert done == list(range(36))  # after 16, at 19, and after 16 more
    queue.settle()
    assert done == list(range(40))


def test_looks_at_many_parameters_do_not_wait() -> None:
    done: list[int] = []
    queue = InOrder(lambda error: done.append(-1))
    queue.expect(100_000)
    queue.do(lambda: done.append(1))
    queue.step_ended(is_urgent=False)
    assert done == [1]


def test_waiting_does_everything_until_something_fails() -> None:
    done: list[str] = []
    queue = InOrder(lambda error: done.append(f"failed: {error}"))
    queue.do(lambda: done.append("a"), Arriving())

    def fails() -> None:
        raise ValueError("no")

    queue.do(fails)
    queue.do(lambda: done.append("b"))
    queue.settle(wait=True)
    queue.do(lambda: done.append("c"))
    queue.settle(wait=True)
    assert done == ["a", "failed: no"]  # what builds on what failed would be wrong


def test_numbers_are_those_of_the_moment_they_were_asked_for() -> None:
    tensor = torch.tensor([1.0, 2.0])
    numbers = late.Numbers(tensor)
    tensor.zero_()
    assert numbers.value().tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(2), torch.zeros((), device="meta"), torch.tensor(1j)],
    ids=["two", "meta", "complex"],
)
def test_only_one_real_number_is_a_scalar(tensor: torch.Tensor) -> None:
    value = late.scalar_of(tensor).value()
    assert value != value


def test_a_run_whose_values_all_arrive_late_has_the_same_tables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An accelerator, acted out on the CPU: nothing is there before it is waited for."""

    def recorded(delayed: bool) -> dict[str, object]:
        with monkeypatch.context() as patch:
            if delayed:
                patch.setattr(late.Known, "ready", lambda self: False)
                patch.setattr(late.Numbers, "ready", lambda self: False)
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(4, 20_000), torch.nn.Linear(20_000, 2))
            optimizer = torch.optim.AdamW(model.parameters())
            with gradscope.watch(model, optimizer, every=2, on_error="raise") as scope:
                for i in range(7):
                    loss = F.cross_entropy(model(torch.randn(3, 4)), torch.tensor([0, 1, 0]))
                    if i not in (3, 4):
                        optimizer.zero_grad(set_to_none=bool(i % 2))
                    loss.backward()
                    optimizer.step()
        return scope.tables

    now, later = recorded(delayed=False), recorded(delayed=True)
    for name, table in now.items():
        same = [c for c in table.columns if not c.endswith("_ms") and c != "time"]
        assert table[same].equals(later[name][same]), name
    assert set(now["steps"]["n_compounded"]) == {0, 4}
