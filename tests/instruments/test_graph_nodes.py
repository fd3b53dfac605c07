"""What can be asked of tensors about their graph, of those too that torch will not answer for."""

from __future__ import annotations

import pytest
import torch

from gradscope.instruments.graph_nodes import is_leaf_tensor, node_of


def test_the_node_of_a_result_and_of_a_leaf() -> None:
    leaf = torch.ones(2, requires_grad=True)
    result = leaf * 2
    assert node_of(result) is result.grad_fn
    assert node_of(leaf) is None
    assert is_leaf_tensor(leaf)
    assert not is_leaf_tensor(result)


def row_written_without_gradients() -> torch.Tensor:
    table = torch.nn.Parameter(torch.zeros(4, 3))
    with torch.no_grad():
        return table[0].lerp_(torch.ones(3), 0.1)


def one_of_several_views_whose_base_was_written() -> torch.Tensor:
    table = torch.zeros(4, 3)
    rows = table.unbind(0)
    table.mul_(torch.ones(3, requires_grad=True))
    return rows[0]


@pytest.mark.parametrize(
    "make", [row_written_without_gradients, one_of_several_views_whose_base_was_written]
)
def test_a_view_of_which_torch_will_not_say_where_it_came_from(make: object) -> None:
    view = make()  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="view"):
        _ = view.grad_fn
    assert node_of(view) is None
    assert not is_leaf_tensor(view)
