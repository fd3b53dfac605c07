from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradscope.instruments.autograd_graph import capture_graph
from gradscope.instruments.call_log import CallLog, paths_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradscope.run.captured_graph import CapturedGraph

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from architectures import ARCHITECTURES


def logged(model: nn.Module, loss_of: Callable[[], torch.Tensor]) -> CapturedGraph:
    log = CallLog(paths_of([("", model)]))
    log.start()
    try:
        loss = loss_of()
    finally:
        log.stop()
    return log.attribute(capture_graph([loss], lambda leaf: ()))


def modules_of(captured: CapturedGraph, op: str) -> list[str | None]:
    """Paths of the modules that made nodes of a kind, in the order in which they were made."""
    nodes = [n for n in range(len(captured)) if captured.op_of(n) == op]
    nodes.sort(key=lambda n: captured.sequence_nr[n])
    calls = [int(captured.call[n]) for n in nodes]
    return [captured.calls.path(call) if call >= 0 else None for call in calls]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.first(x)).exp()


def test_the_innermost_call_is_told() -> None:
    model = Net()
    captured = logged(model, lambda: model(torch.randn(2, 4)).sum())
    assert modules_of(captured, "AddmmBackward0") == ["first", "inner.0"]
    assert modules_of(captured, "TanhBackward0") == ["inner.1"]
    assert modules_of(captured, "ExpBackward0") == [""]
    assert modules_of(captured, "SumBackward0") == [None]
    assert (captured.call[captured.param >= 0] == -1).all()


def test_calls_nest_as_they_were_made() -> None:
    model = Net()
    calls = logged(model, lambda: model(torch.randn(2, 4)).sum()).calls
    assert [calls.path(call) for call in range(len(calls))] == [
        "",
        "first",
        "inner",
        "inner.0",
        "inner.1",
    ]
    assert calls.parent.tolist() == [-1, 0, 0, 2, 2]
    assert calls.kind(0) == "Net"
    # Linear makes a transposition and a product; the model one more of its own.
    assert (calls.last - calls.first).tolist() == [6, 2, 3, 2, 1]


def test_a_module_called_again_is_another_call() -> None:
    cell = nn.Linear(3, 3)
    x = torch.randn(2, 3)
    captured = logged(cell, lambda: cell(cell(cell(x))).sum())
    assert len(captured.calls) == 3
    assert len(set(captured.call[captured.call >= 0].tolist())) == 3


def test_a_module_outside_of_the_model_is_called_by_its_class() -> None:
    model, criterion = Net(), nn.Sequential(nn.Tanh(), nn.Softplus())
    captured = logged(model, lambda: criterion(model(torch.randn(2, 4))).sum())
    assert modules_of(captured, "SoftplusBackward0") == ["<Sequential>.1"]


def test_a_call_that_raises_ends_too() -> None:
    class Refuses(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.exp()
            raise ValueError("no")

    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.refuses = Refuses()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with pytest.raises(ValueError, match="no"):
                self.refuses(x)
            return self.linear(x).tanh()

    model = Tries()
    captured = logged(model, lambda: model(torch.randn(2, 3)).sum())
    assert modules_of(captured, "TanhBackward0") == [""]
    assert captured.calls.parent.tolist() == [-1, 0, 0]


def test_a_loss_is_walked_inside_of_the_forward() -> None:
    class Walks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.captured: Any = None

        def forward(self, x: torch.Tensor, log: CallLog) -> torch.Tensor:
            loss = self.linear(x).sum()
            self.captured = log.attribute(capture_graph([loss], lambda leaf: ()))
            return loss

    model = Walks()
    log = CallLog(paths_of([("", model)]))
    log.start()
    model(torch.randn(2, 3), log)
    log.stop()
    assert modules_of(model.captured, "AddmmBackward0") == ["linear"]
    assert modules_of(model.captured, "SumBackward0") == [""]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_what_a_checkpoint_computes_again_is_not_noted(use_reentrant: bool) -> None:
    model = Net()
    log = CallLog(paths_of([("", model)]))
    log.start()
    x = torch.randn(2, 4, requires_grad=True)
    loss = checkpoint(model, x, use_reentrant=use_reentrant).sum()
    n_calls = len(log)
    loss.backward()
    log.stop()
    assert len(log) == n_calls == 5


def test_another_thread_is_not_noted() -> None:
    model = Net()
    log = CallLog(paths_of([("", model)]))
    log.start()
    thread = threading.Thread(target=lambda: model(torch.randn(2, 4)))
    thread.start()
    thread.join()
    log.stop()
    assert len(log) == 0


def test_nodes_made_by_a_backward_are_told_apart() -> None:
    model = Net()
    x = torch.randn(2, 4, requires_grad=True)

    def penalty() -> torch.Tensor:
        (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return grad.norm()

    captured = logged(model, penalty)
    assert modules_of(captured, "LinalgVectorNormBackward0") == [None]
    assert set(modules_of(captured, "MmBackward0")) == {"<autograd.grad>"}


class TestWhatIsTakenAfterACut:
    def feeds(self, model: nn.Module, loss_of: Callable[[], torch.Tensor]) -> set[tuple[str, str]]:
        calls = logged(model, loss_of).calls
        return {(calls.path(giver), calls.path(taker)) for giver, taker in calls.feeds}

    @pytest.mark.parametrize(
        "cut",
        [
            lambda z: z.detach(),
            lambda z: z.data,
            lambda z: z.detach().view(4, 2),
            lambda z: z.detach().requires_grad_(False),
        ],
    )
    def test_is_known_by_the_memory(self, cut: Callable[[torch.Tensor], torch.Tensor]) -> None:
        model = nn.ModuleDict({"enc": nn.Linear(4, 4), "dec": nn.Linear(4, 4)})
        x = torch.randn(2, 4)

        def loss() -> torch.Tensor:
            z = cut(model["enc"](x))
            return model["dec"](z.reshape(2, 4)).sum()

        assert ("enc", "dec") in self.feeds(model, loss)

    def test_is_known_after_no_grad(self) -> None:
        model = nn.ModuleDict({"enc": nn.Linear(4, 4), "dec": nn.Linear(4, 4)})
        x = torch.randn(2, 4)

        def loss() -> torch.Tensor:
            with torch.no_grad():
                z = model["enc"](x)
            return model["dec"](z).sum()

        assert self.feeds(model, loss) == {("enc", "dec")}

    def test_is_not_guessed_from_an_address(self) -> None:
        model = nn.ModuleDict({"enc": nn.Linear(4, 4), "dec": nn.Linear(4, 4)})
        x = torch.randn(2, 4)

        def loss() -> torch.Tensor:
            for _ in range(50):
                model["enc"](x)  # its memory is free again, and will be taken by what follows
                other = torch.randn(2, 4)
                out = model["dec"](other)
            return out.sum()

        assert self.feeds(model, loss) == set()

    def test_an_uncut_edge_is_none(self) -> None:
        model = nn.ModuleDict({"enc": nn.Linear(4, 4), "dec": nn.Linear(4, 4)})
        x = torch.randn(2, 4)
        assert self.feeds(model, lambda: model["dec"](model["enc"](x)).sum()) == set()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_operation_of_real_models_is_attributed(name: str) -> None:
    model, loss_of = ARCHITECTURES[name]()
    captured = logged(model, loss_of)
    calls, inside = captured.calls, captured.call >= 0
    outside = [
        captured.sequence_nr[n]
        for n in range(len(captured))
        if captured.param[n] < 0 and not inside[n]
    ]
    # What no module made was made outside of all calls: by the program itself.
    assert not any(
        first <= nr < last
        for nr in outside
        for first, last in zip(calls.first, calls.last, strict=True)
    )
    assert inside.sum() > 0.5 * (captured.param < 0).sum()
    for node in range(len(captured)):
        if inside[node]:
            call = captured.call[node]
            assert calls.first[call] <= captured.sequence_nr[node] < calls.last[call]


def test_sparse_and_odd_results_are_passed_over() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return {"out": x}, None, torch.eye(3).to_sparse()

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd, self.takes = Odd(), nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out, _, sparse = self.odd(x)
            self.takes(sparse)
            return out["out"].exp()

    model = Around()
    captured = logged(model, lambda: model(torch.randn(3, requires_grad=True)).sum())
    assert len(captured.calls) == 3


def test_where_two_threads_make_nodes_nobody_is_named() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.here, self.there = Net(), Net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made: list[torch.Tensor] = []
            thread = threading.Thread(target=lambda: made.append(self.there(x)))
            thread.start()
            thread.join()
            return self.here(x) + made[0]

    model = Parallel()
    captured = logged(model, lambda: model(torch.randn(2, 4)).sum())
    assert (captured.call == -1).all()
    assert len(captured.calls) == 0


def test_a_thread_that_makes_no_nodes_takes_no_names_away() -> None:
    model, other = Net(), Net()

    def loss() -> torch.Tensor:
        def evaluate() -> None:
            with torch.no_grad():
                other(torch.randn(2, 4))

        thread = threading.Thread(target=evaluate)
        thread.start()
        thread.join()
        return model(torch.randn(2, 4)).sum()

    captured = logged(model, loss)
    assert modules_of(captured, "AddmmBackward0") == ["first", "inner.0"]
    assert len(captured.calls) == 5


def test_calls_of_an_earlier_micro_batch_belong_to_its_own_graph() -> None:
    model, teacher = Net(), nn.Linear(4, 4)
    log = CallLog(paths_of([("", model)]))
    log.start()
    model(torch.randn(2, 4)).sum().backward()
    teacher(torch.randn(2, 4))  # leads to no loss at all, and is no part of another's
    loss = model(torch.randn(2, 4)).sum()
    log.stop()
    captured = log.attribute(capture_graph([loss], lambda leaf: ()))
    calls = captured.calls
    assert [calls.path(call) for call in range(len(calls))] == [
        "<Linear>",
        "",
        "first",
        "inner",
        "inner.0",
        "inner.1",
    ]
    assert calls.parent.tolist() == [-1, -1, 1, 1, 3, 3]
    assert modules_of(captured, "AddmmBackward0") == ["first", "inner.0"]


def test_a_compiled_function_around_a_model_is_one_operation() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    @torch.compile(backend="aot_eager")
    def loss_of(x: torch.Tensor) -> torch.Tensor:
        return model(x).square().mean()

    for _ in range(2):
        captured = logged(model, lambda: loss_of(torch.randn(2, 4)))
        assert "CompiledFunctionBackward" in captured.ops
        # What the compiler makes of it may be a module, too; the model's own are not seen.
        assert all(path.startswith("<") for path, _ in captured.calls.modules)


def test_a_checkpoint_inside_of_a_backward_that_makes_nodes_ends_nobody_elses_call() -> None:
    model = Net()
    x = torch.randn(2, 4, requires_grad=True)

    def penalty() -> torch.Tensor:
        y = checkpoint(model, x, use_reentrant=False).sum()
        (grad,) = torch.autograd.grad(y, x, create_graph=True)
        return grad.norm()

    captured = logged(model, penalty)
    calls = captured.calls
    assert [calls.path(call) for call in range(len(calls))][-1] == "<autograd.grad>"
    assert len(calls) == 6
    # All that the backward has made, up to its last node, and nothing of what came after.
    assert set(modules_of(captured, "MmBackward0")) == {"<autograd.grad>"}
    assert modules_of(captured, "LinalgVectorNormBackward0") == [None]
