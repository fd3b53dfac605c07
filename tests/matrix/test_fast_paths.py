"""The fused kernels that torch takes by itself stay in use: the same operations, one by one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import features
import pytest
import torch
from optimizers import Kind
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from twins import seed_everything

import gradscope

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


class Recurrent(features.Recurrent):
    """A recurrent layer of any kind."""

    layer: type[nn.RNNBase]

    def make_model(self) -> nn.Module:
        return features.Sequences(self.layer(8, 8, batch_first=True))


def with_layer(layer: type[nn.RNNBase]) -> type[features.Loop]:
    return type(layer.__name__, (Recurrent,), {"layer": layer})


class Operations(TorchDispatchMode):
    """Notes every operation that reaches a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def operations(feature: type[features.Loop], watch: Callable[..., Any]) -> list[str]:
    seed_everything()
    loop = feature(Kind(torch.optim.AdamW, "fused"))
    with watch(loop.models, loop.optimizers), Operations() as noted:
        loop.run()
    return noted.seen


@pytest.mark.parametrize(
    ("feature", "kernel"),
    [
        (features.Transformer, "aten._transformer_encoder_layer_fwd"),
        (features.DotProductAttention, "aten._scaled_dot_product_flash_attention_for_cpu"),
        (with_layer(nn.LSTM), "aten.mkldnn_rnn_layer"),
        (with_layer(nn.GRU), "aten."),  # these two have no kernel of their own on the CPU
        (with_layer(nn.RNN), "aten."),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("every", [1, None])
def test_the_same_kernels_run(feature: type[features.Loop], kernel: str, every: int | None) -> None:
    without = operations(feature, lambda models, optimizers: nullcontext())
    assert any(operation.startswith(kernel) for operation in without), sorted(set(without))
    graph: Any = "every" if every else "first"

    def watch(models: Any, optimizers: Any) -> gradscope.Scope:
        return gradscope.watch(models, optimizers, every=every, graph=graph, on_error="raise")

    assert operations(feature, watch) == without
