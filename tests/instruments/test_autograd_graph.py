from __future__ import annotations

import gc
import re
import subprocess
import sys
import warnings
import weakref
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from gradscope.instruments.autograd_graph import capture_graph
from gradscope.run.captured_graph import Outputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gradscope.run.captured_graph import CapturedGraph

Graph = tuple[dict[Any, str], list[tuple[Any, Any]]]


def unnamed(leaf: torch.Tensor) -> tuple[str, ...]:
    return ()


def names_in(model: nn.Module) -> Callable[[torch.Tensor], tuple[str, ...]]:
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return lambda leaf: tuple(names.get(id(leaf), ()))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 2


def mlp() -> torch.Tensor:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    return model(torch.randn(4, 8)).mean()


def lstm_cell() -> torch.Tensor:
    cell = nn.LSTMCell(4, 8)
    state = None
    for _ in range(3):
        state = cell(torch.randn(2, 4), state)
    return (state[0] * state[1]).sum()


def double_backward() -> torch.Tensor:
    weight = torch.randn(4, 3, requires_grad=True)
    x = torch.randn(2, 4, requires_grad=True)
    loss = torch.sigmoid(x @ weight).pow(2).sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    return (grad.norm() - 1) ** 2 + loss


def shared_and_split() -> torch.Tensor:
    x = torch.randn(6, requires_grad=True)
    first, _unused, third = x.exp().split(2)
    return (first * first + third).sum() + x.mean()


def graph_of(captured: CapturedGraph) -> Graph:
    ops = {node: captured.ops[op] for node, op in enumerate(captured.op.tolist())}
    return ops, list(zip(captured.source.tolist(), captured.target.tolist(), strict=True))


def graph_of_torchviz(root: torch.Tensor) -> Graph:
    """The part of torchviz's picture that consists of functions, leaving out its tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it compares versions with the old distutils
        picture = pytest.importorskip("torchviz").make_dot(root)
    ops, edges = {}, []
    for line in picture.body:
        if edge := re.match(r"\t(\d+) -> (\d+)", line):
            edges.append((edge[1], edge[2]))
        elif (node := re.match(r"\t(\d+) \[label=(\w+)", line)) and "fillcolor" not in line:
            ops[node[1]] = node[2]
    return ops, [edge for edge in edges if edge[0] in ops and edge[1] in ops]


def refined(graph: Graph) -> Counter[int]:
    """Colours every node by its op and, round after round, by its neighbours' colours."""
    ops, edges = graph
    colour = {node: hash(op) for node, op in ops.items()}
    for _ in range(len(ops)):
        above, below = defaultdict(list), defaultdict(list)
        for source, target in edges:
            above[target].append(colour[source])
            below[source].append(colour[target])
        colour = {
            node: hash((colour[node], *sorted(above[node]), "", *sorted(below[node])))
            for node in ops
        }
    return Counter(colour.values())


@pytest.mark.parametrize("root_of", [mlp, lstm_cell, double_backward, shared_and_split])
def test_is_the_graph_that_torchviz_draws(root_of: Callable[[], torch.Tensor]) -> None:
    root = root_of()
    ours, theirs = graph_of(capture_graph([root], unnamed)), graph_of_torchviz(root)
    assert Counter(ours[0].values()) == Counter(theirs[0].values())
    assert Counter((ours[0][s], ours[0][t]) for s, t in ours[1]) == Counter(
        (theirs[0][s], theirs[0][t]) for s, t in theirs[1]
    )
    assert refined(ours) == refined(theirs)


def test_every_field_of_a_small_graph() -> None:
    x = torch.randn(6, dtype=torch.float64, requires_grad=True)
    first, second = x.split([2, 4])
    root = second.sum()
    captured = capture_graph([root], lambda leaf: ("x",) if leaf is x else ())
    assert first.grad_fn is second.grad_fn
    assert [captured.op_of(node) for node in range(3)] == [
        "SumBackward0",
        "SplitWithSizesBackward0",
        "AccumulateGrad",
    ]
    assert captured.op.dtype == captured.param.dtype == captured.roots.dtype == np.int32
    assert captured.sequence_nr.dtype == np.int64
    assert captured.sequence_nr[0] > captured.sequence_nr[1] > captured.sequence_nr[2] == -1
    assert captured.source.tolist() == [1, 2]
    assert captured.target.tolist() == [0, 1]
    assert captured.source_output.tolist() == [1, 0]
    assert captured.source.dtype == captured.target.dtype == np.int32
    assert captured.source_output.dtype == np.int32
    assert captured.param.tolist() == [-1, -1, 0]
    assert captured.params == (("x",),)
    assert captured.param_shape == ((6,),)
    assert captured.outputs_of(0) == Outputs(((),), ("float64",))
    assert captured.outputs_of(1) == Outputs(((2,), (4,)), ("float64",) * 2)
    assert captured.outputs_of(2) == Outputs(((6,),), ("float64",))
    assert captured.roots.tolist() == [0]


def test_an_operand_used_twice_has_two_edges() -> None:
    w = torch.randn(3, requires_grad=True)
    captured = capture_graph([w * w], unnamed)
    assert list(zip(captured.source, captured.target, strict=True)) == [(1, 0), (1, 0)]


def test_a_tied_weight_is_one_leaf_with_all_its_names() -> None:
    model = nn.ModuleDict({"wte": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["wte"].weight
    loss = model["head"](model["wte"](torch.tensor([1, 2]))).sum()
    captured = capture_graph([loss], names_in(model))
    assert captured.params == (("wte.weight", "head.weight"),)
    assert captured.n_params == 1
    assert np.count_nonzero(captured.source == captured.param.argmax()) == 2


def test_frozen_parameters_are_not_in_the_graph_and_other_leaves_have_no_name() -> None:
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    x = torch.randn(4, 3, requires_grad=True)
    captured = capture_graph([model(x).sum()], names_in(model))
    assert sorted(captured.params) == [(), ("bias",)]
    assert sorted(captured.param_shape) == [(2,), (4, 3)]
    assert captured.n_params == 1


@pytest.mark.parametrize("root_of", [mlp, lstm_cell, double_backward])
def test_is_the_same_after_the_backward(root_of: Callable[[], torch.Tensor]) -> None:
    root = root_of()
    before = capture_graph([root], unnamed)
    root.backward()
    after = capture_graph([root], unnamed)
    assert graph_of(after) == graph_of(before)
    assert after.outputs == before.outputs
    np.testing.assert_array_equal(after.output, before.output)
    np.testing.assert_array_equal(after.sequence_nr, before.sequence_nr)


def test_a_custom_function_after_its_backward() -> None:
    x = torch.randn(3, requires_grad=True)
    loss = Doubled.apply(x).sum()
    loss.backward()
    captured = capture_graph([loss], unnamed)
    assert [captured.op_of(node) for node in range(3)] == [
        "SumBackward0",
        "DoubledBackward",
        "AccumulateGrad",
    ]
    assert captured.outputs_of(1).shapes == ((3,),)


def test_a_node_without_a_python_class_has_its_own_name() -> None:
    x = torch.randn(3, requires_grad=True).clone()
    x[0] = 1.0
    assert "CopySlices" in capture_graph([x], unnamed).ops


def test_nested_tensors_have_no_shape() -> None:
    x = torch.nested.nested_tensor(
        [torch.randn(2, 3), torch.randn(4, 3)], layout=torch.jagged, requires_grad=True
    )
    captured = capture_graph([(x * 2).values().sum()], unnamed)
    assert len(captured.output) == len(captured) > 3


def test_no_saved_tensor_is_unpacked() -> None:
    def unpack(packed: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a saved tensor was read")

    with torch.autograd.graph.saved_tensors_hooks(torch.detach, unpack):
        root = lstm_cell()
    assert len(capture_graph([root], unnamed, saved=True)) > 20


class TestRoots:
    def test_several_share_their_graph(self) -> None:
        x = torch.randn(3, requires_grad=True)
        shared = x.exp()
        first, second = shared.sum(), shared.mean()
        captured = capture_graph([first, second, first], unnamed)
        assert [captured.ops[captured.op[root]] for root in captured.roots] == [
            "SumBackward0",
            "MeanBackward0",
        ]
        assert len(captured) == 4

    def test_one_above_another(self) -> None:
        x = torch.randn(3, requires_grad=True)
        hidden = x.exp()
        captured = capture_graph([hidden, hidden.sum()], unnamed)
        assert (len(captured), captured.roots.tolist()) == (3, [0, 1])

    def test_tensor_node_and_edge_are_the_same(self) -> None:
        root = mlp()
        edge = torch.autograd.graph.get_gradient_edge(root)
        captured = capture_graph([root, root.grad_fn, edge], unnamed)
        assert captured.roots.tolist() == [0]

    def test_a_leaf(self) -> None:
        x = torch.randn(3, requires_grad=True)
        with torch.no_grad():
            captured = capture_graph([x], lambda leaf: ("x",))
        assert (captured.ops, captured.params, captured.n_edges) == (
            ("AccumulateGrad",),
            (("x",),),
            0,
        )

    @pytest.mark.parametrize("roots", [[], [None], [torch.zeros(())], [torch.zeros(()), None]])
    def test_without_a_graph(self, roots: list[Any]) -> None:
        captured = capture_graph(roots, unnamed)
        assert len(captured) == captured.n_edges == len(captured.roots) == 0
        assert captured.params == captured.outputs == ()

    def test_something_else(self) -> None:
        with pytest.raises(TypeError, match="a root must be a tensor or a grad_fn, not float"):
            capture_graph([1.0], unnamed)


def alive(references: Iterable[weakref.ref[Any]]) -> int:
    return sum(reference() is not None for reference in references)


def test_nothing_of_the_graph_is_kept_alive() -> None:
    gc.collect()
    gc.disable()  # freeing must not have to wait for a collection
    try:
        x = torch.randn(3, requires_grad=True)
        hidden = x.exp()  # saved by ExpBackward0, and by nothing else
        weight = nn.Parameter(torch.randn(3))
        root = (Doubled.apply(hidden) * weight).sum()
        references = [weakref.ref(hidden), weakref.ref(weight), weakref.ref(x)]
        captured = capture_graph([root], unnamed)
        del x, hidden, weight
        assert alive(references) == 3
        del root
        assert alive(references) == 0
        assert len(captured) == 6
    finally:
        gc.enable()


def nodes_alive() -> int:
    gc.collect()
    return sum(type(seen).__name__ == "MulBackward0" for seen in gc.get_objects())


CHAINS = {
    "chain": "y = y * 1.001",
    "residual": "y = y + torch.tanh(y) * x",
    "custom": "y = Doubled.apply(y)",
    "branches": "a, b = torch.cat([y, x]).split(2); y = a + b",
}

IN_A_SMALL_STACK = """
import threading, torch
from gradscope.instruments.autograd_graph import capture_graph

class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x * 2
    @staticmethod
    def backward(ctx, grad): return grad * 2

def lengthen(y, x, n):
    for _ in range(n):
        {operation}
    return y

def work():
    for free in ("y halfway", "halfway y", "backward y halfway"):
        x = torch.randn(2, requires_grad=True)
        kept = dict(halfway=lengthen(x, x, {n} // 2))
        kept["y"] = lengthen(kept["halfway"], x, {n} // 2).sum()
        captured = capture_graph([kept["y"], kept["halfway"].sum()], lambda leaf: ())
        assert len(captured) > {n}, len(captured)
        capture_graph([kept["halfway"]], lambda leaf: ())
        for name in free.split():
            if name == "backward":
                kept["y"].backward()
            else:
                del kept[name]
    finished.append(True)

finished = []
threading.stack_size(512 * 1024)
thread = threading.Thread(target=work)
thread.start()
thread.join()
assert finished
"""


@pytest.mark.parametrize("operation", CHAINS)
def test_a_deep_graph_can_be_freed_in_a_small_stack(operation: str) -> None:
    code = IN_A_SMALL_STACK.format(operation=CHAINS[operation], n=8_000)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr  # -11 is a segmentation fault


def test_a_chain_of_200_000_operations() -> None:
    y = x = torch.randn(2, requires_grad=True)
    for _ in range(200_000):
        y = y * 1.00001
    captured = capture_graph([y], unnamed)
    assert len(captured) == 200_001
    assert captured.n_edges == 200_000
    before = nodes_alive()
    assert before >= 200_000
    del y  # would overflow the stack if its nodes were freed one inside the other
    assert nodes_alive() <= before - 200_000
    assert x.grad is None


def test_a_held_part_of_a_deep_graph_outlives_its_root_and_no_more() -> None:
    x = torch.randn(2, requires_grad=True)
    y = x
    for at in range(6_000):
        y = y * 1.00001
        if at == 2_000:
            halfway = y
    before = nodes_alive()
    capture_graph([y], unnamed)
    seen = nodes_alive()
    assert seen == before + 6_000
    del y
    assert nodes_alive() == seen - 3_999
    halfway.sum().backward()
    assert x.grad is not None
    del halfway
    assert nodes_alive() == before
