from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradscope.graphs.fold import Folded
from gradscope.graphs.overlay import saved_bytes_of_nodes
from gradscope.instruments.autograd_graph import capture_graph


def saved_of(root: torch.Tensor) -> dict[tuple[str, str], tuple[Any, int]]:
    captured = capture_graph([root], lambda leaf: (), saved=True)
    saved = captured.saved
    return {
        (captured.op_of(int(saved.node[at])), saved.names[saved.name[at]]): (
            saved.shapes[at],
            int(saved.n_bytes[at]),
        )
        for at in range(len(saved))
    }


def test_shapes_and_sizes_are_those_that_torch_gives() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    y = x.exp() * torch.randn(3, 4, dtype=torch.float64)
    root = y.sum()
    found = saved_of(root)
    assert found["ExpBackward0", "result"] == ((3, 4), 48)
    product = root.grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    other = product._saved_other  # type: ignore[union-attr]
    assert found["MulBackward0", "other"] == (tuple(other.shape), other.nbytes)


def test_after_the_backward_nothing_is_kept() -> None:
    x = torch.randn(3, requires_grad=True)
    root = (x.exp() * x).sum()
    assert saved_of(root)
    root.backward()
    assert saved_of(root) == {}


def test_a_custom_function_is_read_before_and_after() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, None)
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * 2

    root = Doubled.apply(torch.randn(3, requires_grad=True).exp()).sum()
    assert saved_of(root)["DoubledBackward", "tensors"] == ((3,), 12)
    root.backward()
    assert saved_of(root) == {}


def test_a_checkpoint_is_not_unpacked() -> None:
    runs = []

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            runs.append(1)
            return self.linear(x).tanh()

    x = torch.randn(2, 4, requires_grad=True)
    root = checkpoint(Block(), x, use_reentrant=False).sum()
    found = saved_of(root)
    assert len(runs) == 1
    assert found["TanhBackward0", "result"] == (None, 0)
    root.backward()
    assert len(runs) == 2


def bytes_kept(root: torch.Tensor) -> int:
    captured = capture_graph([root], lambda leaf: (), saved=True)
    return int(saved_bytes_of_nodes(Folded(captured)).sum())


def test_memory_that_several_keep_is_counted_once_and_parameters_not_at_all() -> None:
    w = nn.Parameter(torch.randn(10))
    x = torch.randn(10)
    hidden = w * x  # keeps x, and not w, which does not need what x would give
    assert bytes_kept(hidden) == 40
    both = hidden.exp()  # keeps its result
    root = both * both.sin()  # keeps both factors: that result again, and the sine; sin its input
    assert bytes_kept(root) == 40 + 40 + 40


def test_memory_agrees_with_the_hooks_of_torch() -> None:
    seen: dict[int, int] = {}
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        if not (tensor.is_leaf and tensor.requires_grad):
            seen[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))
    x = torch.randn(5, 8)
    torch.manual_seed(0)
    root = nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 3, 0]))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        again = nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 3, 0]))
    assert again.item() == root.item()
    assert bytes_kept(root) == sum(seen.values())
