"""Loops of two ranks, each as somebody would write it: ``python loops.py NAME``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

STEPS = 12


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1000 + 10 * step + rank)
    x = torch.randn(16, 6)
    return x, x[:, :3].argmax(1)


def average_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    forward: Callable[[torch.Tensor], torch.Tensor] | None = None,
    before_step: Callable[[int], None] = lambda step: None,
    after_step: Callable[[int], None] = lambda step: None,
    steps: int = STEPS,
) -> None:
    for step in range(steps):
        x, y = batch(step, dist.get_rank())
        optimizer.zero_grad()
        F.cross_entropy((forward or model)(x), y).backward()
        before_step(step)
        optimizer.step()
        after_step(step)


# -- broken ---------------------------------------------------------------------------------------


def other_seeds(rank: int) -> None:
    model = network(seed=rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, before_step=lambda step: average_gradients(model))


def other_rates(rank: int) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * (1 + rank))
    train(model, optimizer, before_step=lambda step: average_gradients(model))


def past_the_wrapper(rank: int) -> None:
    model = network(seed=rank)
    wrapper = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapper.parameters(), lr=1e-2)
    train(wrapper, optimizer, forward=wrapper.module)


def idle_rank(rank: int) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        x, y = batch(step, rank)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if rank == 0:
            loss.backward()
        optimizer.step()


# -- healthy --------------------------------------------------------------------------------------


def wrapped(rank: int) -> None:
    model = network(seed=rank)
    wrapper = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapper.parameters(), lr=1e-2)
    train(wrapper, optimizer)


def accumulated(rank: int) -> None:
    wrapper = DistributedDataParallel(network(seed=rank))
    optimizer = torch.optim.AdamW(wrapper.parameters(), lr=1e-2)
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(2):
            x, y = batch(2 * step + micro, rank)
            wrapper.require_backward_grad_sync = micro == 1  # as no_sync() does
            (F.cross_entropy(wrapper(x), y) / 2).backward()
        optimizer.step()


def averaged_by_hand(rank: int) -> None:
    model = network(seed=rank)
    for parameter in model.parameters():
        dist.broadcast(parameter.data, src=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, before_step=lambda step: average_gradients(model))


def local_steps(rank: int) -> None:
    """Weights are averaged after every fifth step, and gradients never."""
    model = network()

    def average(step: int) -> None:
        if step % 5 == 4:
            for parameter in model.parameters():
                dist.all_reduce(parameter.data)
                parameter.data /= dist.get_world_size()

    train(model, torch.optim.SGD(model.parameters(), lr=0.1), after_step=average)


def independent(rank: int) -> None:
    """A sweep over learning rates from the same weights, in one group."""
    model = network()
    train(model, torch.optim.SGD(model.parameters(), lr=0.05 * (1 + rank)))
    dist.barrier()


def columns(rank: int) -> None:
    """The first layer is split over the ranks; the same names, and other weights."""
    torch.manual_seed(rank)
    first = nn.Linear(6, 8)
    torch.manual_seed(0)
    last = nn.Linear(8, 3)
    model = nn.Sequential(first, nn.Tanh(), last)

    class Together(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, part: torch.Tensor) -> torch.Tensor:
            part = part.clone()
            dist.all_reduce(part)
            return part

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        x, y = batch(step, 0)
        optimizer.zero_grad()
        hidden = torch.tanh(first(x))
        F.cross_entropy(Together.apply(last(hidden)), y).backward()
        optimizer.step()


def sharded_optimizer(rank: int) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    wrapper = DistributedDataParallel(network(seed=rank))
    optimizer = ZeroRedundancyOptimizer(wrapper.parameters(), torch.optim.AdamW, lr=1e-2)
    train(wrapper, optimizer)


def fully_sharded(rank: int) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = network()
    for part in (model[0], model[2], model):
        fully_shard(part)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    return model


LOOPS: dict[str, Callable[[int], Any]] = {
    function.__name__: function
    for function in (
        other_seeds,
        other_rates,
        past_the_wrapper,
        idle_rank,
        wrapped,
        accumulated,
        averaged_by_hand,
        local_steps,
        independent,
        columns,
        sharded_optimizer,
        fully_sharded,
    )
}


def run(rank: int, names: list[str], port: str) -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ["MASTER_PORT"] = port
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for name in names:
        LOOPS[name](rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:
        run(int(os.environ["RANK"]), sys.argv[1:], os.environ["MASTER_PORT"])
    else:
        import socket

        import torch.multiprocessing as mp

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            chosen = str(free.getsockname()[1])
        method, *rest = sys.argv[1:]
        mp.start_processes(run, args=(rest, chosen), nprocs=2, start_method=method)
