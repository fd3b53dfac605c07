"""Loops with something compiled in them. Their twins are compiled just as often as they are."""

from __future__ import annotations

import shutil
from typing import Any, ClassVar

import torch
import torch._dynamo
import torch._dynamo.utils
from features import Loop, SparseTable, Watch, perceptron
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer

BACKENDS = ("eager", "aot_eager", "inductor")


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = perceptron()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class WithCompiler(Loop):
    """A loop with something compiled in it."""

    backend: ClassVar[str] = "aot_eager"

    def make_model(self) -> nn.Module:
        """A model whose forward is the program's own: the compiler passes over those of torch."""
        return SparseTable() if self.kind.needs_sparse_gradients else Perceptron()

    @classmethod
    def can_run_here(cls) -> bool:
        return cls.backend != "inductor" or any(map(shutil.which, ("g++", "clang++", "c++")))

    @classmethod
    def forget_compiled(cls) -> None:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()

    @classmethod
    def compiled_so_far(cls) -> dict[str, Any]:
        counters = torch._dynamo.utils.counters
        return {
            "frames": counters["frames"]["total"],
            "graph breaks": sum(counters["graph_break"].values()),
            "graphs": counters["stats"]["unique_graphs"],
            "calls captured": counters["stats"]["calls_captured"],
            "recompilations": sum(counters["recompiles"].values()),
        }


class CompiledBefore(WithCompiler):
    """`torch.compile(model)` before the watch."""

    title = "compiled before"
    unseen = "is compiled: its inside is not seen"

    def build(self) -> None:
        super().build()
        self.called = torch.compile(self.model, backend=self.backend)
        self.models = [self.called]


class CompiledLongBefore(CompiledBefore):
    """`torch.compile(model)`, and some steps, before the watch: nothing is compiled again."""

    title = "compiled and trained before"

    def train(self, watch: Watch) -> Any:
        by_hand, self.by_hand = self.by_hand, None
        self.run()
        self.by_hand = by_hand
        return super().train(watch)


class CompiledWhileWatched(WithCompiler):
    """`torch.compile(model)` after the watch has begun."""

    title = "compiled while watched"
    unseen = "is compiled: its inside is not seen"

    def run(self) -> None:
        self.called = torch.compile(self.model, backend=self.backend)
        super().run()


class CompiledInPlace(WithCompiler):
    """`model.compile()`."""

    title = "compiled in place"
    unseen = "is compiled: its inside is not seen"

    def build(self) -> None:
        super().build()
        self.model.compile(backend=self.backend)


class CompiledPart(WithCompiler):
    """One part of the model compiled."""

    title = "one part compiled"
    unseen = "is compiled: its inside is not seen"

    def make_model(self) -> nn.Module:
        part = torch.compile(Perceptron(), backend=self.backend)
        return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), part, nn.Linear(3, 3))


class CompiledLoss(WithCompiler):
    """A compiled function in the loop, with a graph break in it."""

    title = "compiled function"
    unseen = "smooth_loss is compiled: its inside is not seen"

    def build(self) -> None:
        super().build()
        self.compiled_loss = torch.compile(smooth_loss, backend=self.backend)

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.compiled_loss(self.forward(x), y)


def smooth_loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss = F.cross_entropy(logits, y, label_smoothing=0.1)
    torch._dynamo.graph_break()
    return loss + 1e-3 * torch.logsumexp(logits, dim=1).square().mean()


class CompiledStep(WithCompiler):
    """`torch.compile(optimizer.step)`."""

    title = "compiled step"
    unseen = ""

    def build(self) -> None:
        super().build()
        self.steps = {o: torch.compile(o.step, backend=self.backend) for o in self.optimizers}

    def call_step(self, optimizer: Optimizer, *arguments: Any) -> Any:
        return self.steps[optimizer](*arguments)


class CompiledLoop(WithCompiler):
    """A compiled function that does all of a step: clears, forward, backward, clips, steps."""

    title = "compiled training step"
    unseen = "compiled"
    sees_steps = False

    def build(self) -> None:
        super().build()

        def whole_step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            loss = F.cross_entropy(self.model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
            return loss.detach()

        self.whole_step = torch.compile(whole_step, backend=self.backend)

    def step(self) -> None:
        self.seen.extend(self.whole_step(x, y).clone() for x, y in self.batches)


class CompiledTogether(WithCompiler):
    """A compiled function that calls `optimizer.step()`."""

    title = "compiled around step"
    unseen = "compiled"
    sees_steps = False

    def build(self) -> None:
        super().build()

        def update(optimizer: Optimizer) -> None:
            optimizer.step()

        self.compiled_update = torch.compile(update, backend=self.backend)

    def call_step(self, optimizer: Optimizer, *arguments: Any) -> Any:
        if arguments:
            raise NotImplementedError("a function that takes no closure")
        return self.compiled_update(optimizer)


def _with(feature: type[WithCompiler], backend: str) -> type[WithCompiler]:
    names = {"title": f"{feature.title}, {backend}", "backend": backend, "__doc__": feature.__doc__}
    return type(f"{feature.__name__}_{backend}", (feature,), names)


COMPILED: list[type[Loop]] = [
    *(_with(feature, b) for feature in (CompiledBefore, CompiledWhileWatched) for b in BACKENDS),
    CompiledLongBefore,
    CompiledInPlace,
    CompiledPart,
    _with(CompiledLoss, "aot_eager"),
    _with(CompiledLoss, "inductor"),
    CompiledStep,
    CompiledTogether,
    CompiledLoop,
]
