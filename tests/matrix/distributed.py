"""Loops on two processes, joined by gloo. Each is a cell like the others, in both processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from features import Loop
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


class OnTwoRanks(Loop):
    """A loop on two processes, with other data in each."""

    n_ranks = 2

    def build(self) -> None:
        self.model = self.spread(self.make_model())
        self.models = [self.model]
        self.optimizers = self.kind.over(self.model.parameters())
        self.called = self.model
        torch.manual_seed(1 + dist.get_rank())

    def spread(self, model: nn.Module) -> nn.Module:
        """Make of a model one that the processes train together."""
        raise NotImplementedError


class Replicated(OnTwoRanks):
    """`DistributedDataParallel`: the gradients in the tables are the averaged ones."""

    title = "DDP"

    def spread(self, model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model)


class Sharded(OnTwoRanks):
    """`fully_shard` (FSDP2), of layers and of the whole; tables are about the shards of a rank."""

    title = "FSDP2"
    note = "spread over ranks"

    def spread(self, model: nn.Module) -> nn.Module:
        for layer in model.children():
            if next(layer.parameters(), None) is not None:
                fully_shard(layer)
        fully_shard(model)
        return model


DISTRIBUTED: list[type[Loop]] = [Replicated, Sharded]
