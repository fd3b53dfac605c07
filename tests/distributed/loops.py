"""Loops of two ranks, each as somebody would write it: ``python loops.py fork NAME``."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

STEPS = 12

Watch = Callable[..., Any]
Loop = Callable[[int, Watch], nn.Module]


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
    watch: Watch,
    forward: Callable[[torch.Tensor], torch.Tensor] | None = None,
    before_step: Callable[[int], None] = lambda step: None,
    after_step: Callable[[int], None] = lambda step: None,
    is_idle: bool = False,
) -> nn.Module:
    with watch(model, optimizer):
        for step in range(STEPS):
            x, y = batch(step, dist.get_rank())
            optimizer.zero_grad()
            loss = F.cross_entropy((forward or model)(x), y)
            if not is_idle:
                loss.backward()
            before_step(step)
            optimizer.step()
            after_step(step)
    return model


# -- broken ---------------------------------------------------------------------------------------


def other_seeds(rank: int, watch: Watch) -> nn.Module:
    model = network(seed=rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return train(model, optimizer, watch, before_step=lambda step: average_gradients(model))


def other_rates(rank: int, watch: Watch) -> nn.Module:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * (1 + rank))
    return train(model, optimizer, watch, before_step=lambda step: average_gradients(model))


def overwritten(rank: int, watch: Watch) -> nn.Module:
    """Rank 1 loads what rank 0 does not, in the middle of the training."""
    wrapper = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1)

    def load(step: int) -> None:
        if rank == 1 and step == 5:
            wrapper.module.load_state_dict(network(seed=7).state_dict())

    return train(wrapper, optimizer, watch, after_step=load)


def past_the_wrapper(rank: int, watch: Watch) -> nn.Module:
    wrapper = DistributedDataParallel(network(seed=rank))
    optimizer = torch.optim.AdamW(wrapper.parameters(), lr=1e-2)
    return train(wrapper.module, optimizer, watch)


def idle_rank(rank: int, watch: Watch) -> nn.Module:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return train(model, optimizer, watch, is_idle=rank == 1)


# -- healthy --------------------------------------------------------------------------------------


def wrapped(rank: int, watch: Watch) -> nn.Module:
    wrapper = DistributedDataParallel(network(seed=rank))
    optimizer = torch.optim.AdamW(wrapper.parameters(), lr=1e-2)
    return train(wrapper, optimizer, watch)


def accumulated(rank: int, watch: Watch) -> nn.Module:
    wrapper = DistributedDataParallel(network(seed=rank))
    optimizer = torch.optim.AdamW(wrapper.parameters(), lr=1e-2)
    with watch(wrapper, optimizer):
        for step in range(STEPS):
            optimizer.zero_grad()
            for micro in range(2):
                x, y = batch(2 * step + micro, rank)
                with wrapper.no_sync() if micro == 0 else contextlib.nullcontext():
                    (F.cross_entropy(wrapper(x), y) / 2).backward()
            optimizer.step()
    return wrapper


def averaged_by_hand(rank: int, watch: Watch) -> nn.Module:
    model = network(seed=rank)
    for parameter in model.parameters():
        dist.broadcast(parameter.data, src=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return train(model, optimizer, watch, before_step=lambda step: average_gradients(model))


def local_steps(rank: int, watch: Watch) -> nn.Module:
    """Weights are averaged after every fifth step, and gradients never."""
    model = network()

    def average(step: int) -> None:
        if step % 5 == 4:
            for parameter in model.parameters():
                dist.all_reduce(parameter.data)
                parameter.data /= dist.get_world_size()

    return train(model, torch.optim.SGD(model.parameters(), lr=0.1), watch, after_step=average)


def local_steps_with_a_hook(rank: int, watch: Watch) -> nn.Module:
    """The same as torch offers it."""
    from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook as local
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

    wrapper = DistributedDataParallel(network())
    alone, _ = dist.new_subgroups(group_size=1)
    state = local.PostLocalSGDState(None, alone, start_localSGD_iter=2)
    wrapper.register_comm_hook(state, local.post_localSGD_hook)
    averager = PeriodicModelAverager(period=5, warmup_steps=2)
    return train(
        wrapper,
        torch.optim.SGD(wrapper.parameters(), lr=0.1),
        watch,
        after_step=lambda step: averager.average_parameters(wrapper.parameters()),
    )


def independent(rank: int, watch: Watch) -> nn.Module:
    """A sweep over learning rates from the same weights, in one group."""
    model = network()
    return train(model, torch.optim.SGD(model.parameters(), lr=0.05 * (1 + rank)), watch)


class _Together(torch.autograd.Function):
    """The sum over ranks; its gradient belongs to each of them."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor) -> torch.Tensor:
        part = part.clone()
        dist.all_reduce(part)
        return part

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class _Columns(nn.Module):
    """Each rank has half of the hidden layer, under the same names."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(rank)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3, bias=False)
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Together.apply(self.last(torch.tanh(self.first(x)))) + self.bias


def columns(rank: int, watch: Watch) -> nn.Module:
    model = _Columns(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer):
        for step in range(STEPS):
            x, y = batch(step, 0)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model


def stages(rank: int, watch: Watch) -> nn.Module:
    """A pipeline: each rank has one layer, under the same name and of the same shape."""
    torch.manual_seed(rank)
    layer = nn.Sequential(nn.Linear(6, 6))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with watch(layer, optimizer):
        for step in range(STEPS):
            x, y = batch(step, 0)
            optimizer.zero_grad()
            hidden = torch.empty(16, 6)
            if rank == 0:
                given = layer(x)
                dist.send(given.detach(), 1)
                dist.recv(hidden, 1)
                given.backward(hidden)
            else:
                dist.recv(hidden, 0)
                hidden.requires_grad_()
                F.cross_entropy(layer(torch.tanh(hidden))[:, :3], y).backward()
                dist.send(hidden.grad, 0)
            optimizer.step()
    return layer


def one_part_of_its_own(rank: int, watch: Watch) -> nn.Module:
    """A trunk that is averaged, and on each rank a head for its own task."""
    trunk = DistributedDataParallel(network()[:2])
    torch.manual_seed(rank)
    head = nn.Linear(16, 3)
    model = nn.ModuleList([trunk, head])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return train(model, optimizer, watch, forward=lambda x: head(trunk(x)))


def sharded_optimizer(rank: int, watch: Watch) -> nn.Module:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    wrapper = DistributedDataParallel(network(seed=rank))
    optimizer = ZeroRedundancyOptimizer(wrapper.parameters(), torch.optim.AdamW, lr=1e-2)
    return train(wrapper, optimizer, watch)


def fully_sharded(rank: int, watch: Watch) -> nn.Module:
    """Rank 1 has the lesser part of the last layer's three rows, and nothing of the scale."""
    from torch.distributed.fsdp import fully_shard

    model = network()
    model.append(nn.LayerNorm(3, bias=False))
    for part in (model[0], model[2], model[3]):
        fully_shard(part)
    fully_shard(model)
    return train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), watch)


def checkpointed_and_sharded(rank: int, watch: Watch) -> nn.Module:
    from torch.distributed.fsdp import fully_shard
    from torch.utils.checkpoint import checkpoint

    model = network()
    for part in (model[0], model[2]):
        fully_shard(part)
    fully_shard(model)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(model, x.requires_grad_(), use_reentrant=False)

    return train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), watch, forward=forward)


BROKEN = (other_seeds, other_rates, overwritten, past_the_wrapper, idle_rank)
HEALTHY = (
    wrapped,
    accumulated,
    averaged_by_hand,
    local_steps,
    local_steps_with_a_hook,
    independent,
    columns,
    stages,
    one_part_of_its_own,
    sharded_optimizer,
    fully_sharded,
    checkpointed_and_sharded,
)
LOOPS: dict[str, Loop] = {loop.__name__: loop for loop in (*BROKEN, *HEALTHY)}


def unwatched(*_: Any, **__: Any) -> Any:
    return contextlib.nullcontext()


def run(rank: int, names: list[str], port: str) -> None:
    begin(rank, port)
    for name in names:
        LOOPS[name](rank, unwatched)
    dist.destroy_process_group()


def begin(rank: int, port: str) -> None:
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", port
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


if __name__ == "__main__":
    method, *wanted = sys.argv[1:]
    if method == "env":
        run(int(os.environ["RANK"]), wanted, os.environ["MASTER_PORT"])
    else:
        mp.start_processes(run, args=(wanted, free_port()), nprocs=2, start_method=method)
