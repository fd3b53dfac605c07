"""Where a dimension goes in views: a softmax shows it, for along it the values sum to one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from gradscope.instruments.dimensions import dimension_after
from gradscope.instruments.graph_nodes import node_of

View = Callable[[torch.Tensor], torch.Tensor]

VIEWS: dict[str, View] = {
    "transposed": lambda x: x.transpose(1, 3),
    "transposed from behind": lambda x: x.transpose(-1, -3),
    "permuted": lambda x: x.permute(2, 0, 3, 1),
    "permuted from behind": lambda x: x.permute(-1, 0, -3, 2),
    "flattened in front": lambda x: x.flatten(0, 1),
    "flattened behind": lambda x: x.flatten(2),
    "with a dimension more": lambda x: x[:, None],
    "with a dimension less": lambda x: x[:, :1].squeeze(1),
    "spread in front": lambda x: x.expand(2, 4, 4, 3, 4),
    "in other groups": lambda x: x.reshape(4, 2, 2, 3, 4),
    "one after the other": lambda x: x.flatten(0, 1).transpose(0, 2).unsqueeze(0),
}


@pytest.mark.parametrize("dim", range(4))
@pytest.mark.parametrize("view", VIEWS)
def test_a_dimension_is_followed_through_views(view: str, dim: int) -> None:
    torch.manual_seed(0)
    made = torch.randn(4, 4, 3, 4, requires_grad=True).double().softmax(dim)
    result = VIEWS[view](made)
    nodes = []
    node = node_of(result)
    while node is not node_of(made):
        nodes.append(node)
        node = node.next_functions[0][0]
    ones = [
        d
        for d in range(result.dim())
        if result.shape[d] > 1 and torch.allclose(result.sum(d), torch.ones(()).double())
    ]
    assert len(ones) <= 1
    found = dimension_after(reversed(nodes), dim)
    if ones:
        assert found == ones[0]
    else:  # it has become a part of another one, or only some of it is left
        assert found is None or view == "with a dimension less"
