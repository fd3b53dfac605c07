"""The loops of the matrix: a plain one, and what each of the others does differently.

A feature is a subclass of :class:`Loop` that says in its docstring what it is and overrides the one
line of the loop that it is about. It knows no optimizer.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import numpy as np
import torch
from by_hand import ByHand
from optimizers import Kind
from residual import Residual
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.optim import Optimizer, lr_scheduler

Watch = Callable[[list[nn.Module], list[Optimizer]], AbstractContextManager[Any]]
"""``gradscope.watch``, or for the twin something that does nothing."""


def perceptron() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 12), nn.LayerNorm(12), nn.GELU(), nn.Dropout(0.1), nn.Linear(12, 3)
    )


class Loop:
    """`zero_grad`, forward, backward, `step`; an evaluation between the steps."""

    title: ClassVar[str] = "plain loop"
    n_steps: ClassVar[int] = 6
    n_ranks: ClassVar[int] = 1
    uses_closure: ClassVar[bool] = False
    unseen: ClassVar[str] = ""
    """What GS902 says cannot be seen; empty where everything can."""
    note: ClassVar[str] = ""
    """What else is said of the loop, which hides nothing."""
    sees_steps: ClassVar[bool] = True
    """Whether the steps are seen at all."""
    measures_updates: ClassVar[bool] = True
    """Whether updates are measured, and taken apart."""
    findings: ClassVar[tuple[str, ...]] = ()
    """What else is rightly found in this loop."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.others: list[Any] = []
        self.seen: list[torch.Tensor] = []
        self.by_hand: ByHand | None = None
        self.number = -1
        self.scope: Any = None
        self.build()

    def build(self) -> None:
        """Make models and optimizers."""
        self.model = self.make_model()
        self.models = [self.model]
        self.optimizers = self.kind.over(self.model.parameters())
        self.called: Callable[[torch.Tensor], torch.Tensor] = self.model

    def make_model(self) -> nn.Module:
        return SparseTable() if self.kind.needs_sparse_gradients else perceptron()

    def named_parameters(self) -> dict[int, str]:
        """Name of every parameter by id, as the tables have it."""
        several = len(self.models) > 1
        return {
            id(parameter): (f"model{place}." if several else "") + name.replace("_orig_mod.", "")
            for place, model in enumerate(self.models)
            for name, parameter in model.named_parameters()
        }

    @classmethod
    def can_run_here(cls) -> bool:
        """Whether this machine has what the loop needs."""
        return True

    @classmethod
    def forget_compiled(cls) -> None:
        """Let nothing that was compiled before be used again."""

    @classmethod
    def compiled_so_far(cls) -> dict[str, Any]:
        """How often the compiler was at work, and where it gave up."""
        return {}

    @property
    def torch_is_wrong(self) -> bool:
        """Whether torch's own update is not that of the formula, which the tables must show."""
        return False

    # -- one step -------------------------------------------------------------------------------

    def train(self, watch: Watch) -> Any:
        """Run the whole training under a watch; returns the scope."""
        with watch(self.models, self.optimizers) as scope:
            self.run()
        return scope

    def run(self) -> None:
        for number in range(self.n_steps):
            self.number = number
            self.batches = self.draw()
            self.step()
            self.evaluate()

    def draw(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of a step, from all three generators of random numbers."""
        x = torch.randn(8, 6) + float(np.random.uniform(-0.1, 0.1))
        return [(x, torch.tensor([random.randrange(3) for _ in range(8)]))]

    def step(self) -> None:
        if self.uses_closure or self.kind.needs_closure:
            for optimizer in self.optimizers:
                takes_closure = isinstance(optimizer, self.kind.cls)
                self.update(optimizer, self.closure_for(optimizer) if takes_closure else None)
        else:
            self.compute()
            for optimizer in self.optimizers:
                self.update(optimizer)

    def closure_for(self, optimizer: Optimizer) -> Callable[[], torch.Tensor]:
        def closure() -> torch.Tensor:
            loss = self.compute()
            self.reads(optimizer)
            return loss

        return closure

    def compute(self) -> torch.Tensor:
        """Compute the gradients."""
        self.clear()
        total = torch.zeros(())
        for x, y in self.batches:
            loss = self.loss(x, y) / len(self.batches)
            self.backward(loss)
            total = total + loss.detach()
        self.seen.append(total.clone())
        self.before_step()
        return total

    def clear(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        if self.by_hand is not None:
            self.by_hand.cleared()

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.forward(x), y)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(x)

    def backward(self, loss: torch.Tensor) -> None:
        if self.by_hand is not None:
            self.by_hand.backward(loss.detach())
        loss.backward()

    def before_step(self) -> None:
        """What is done with the gradients between backward and step."""

    def update(
        self, optimizer: Optimizer, closure: Callable[[], torch.Tensor] | None = None
    ) -> None:
        if self.by_hand is not None:
            self.by_hand.begins(optimizer)
        if closure is None:
            self.reads(optimizer)
            self.call_step(optimizer)
        else:
            self.seen.append(self.call_step(optimizer, closure).detach().clone())
        if self.by_hand is not None:
            self.by_hand.updated(optimizer)

    def call_step(self, optimizer: Optimizer, *arguments: Any) -> Any:
        return optimizer.step(*arguments)

    def reads(self, optimizer: Optimizer) -> None:
        if self.by_hand is not None:
            self.by_hand.reads(optimizer)

    def evaluate(self) -> None:
        x = torch.linspace(-1, 1, 24).reshape(4, 6)
        for model in self.models:
            model.eval()
        with torch.no_grad():
            self.seen.append(self.forward(x).clone())
        for model in self.models:
            model.train()


# -- the line of the step -----------------------------------------------------------------------


class Accumulation(Loop):
    """Three backwards before each step."""

    title = "accumulation"

    def draw(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [*super().draw(), *super().draw(), *super().draw()]


class ClipNorm(Loop):
    """`clip_grad_norm_` between backward and step."""

    title = "clip by norm"

    def before_step(self) -> None:
        for model in self.models:
            self.seen.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1).clone())


class ClipValue(Loop):
    """`clip_grad_value_` between backward and step."""

    title = "clip by value"

    def before_step(self) -> None:
        for model in self.models:
            nn.utils.clip_grad_value_(model.parameters(), 0.01)


class Scheduled(Loop):
    """A warm-up and a cosine, one after the other."""

    title = "scheduler"

    def build(self) -> None:
        super().build()
        for optimizer in self.optimizers:
            warmup = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=2)
            cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
            both = lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[2])
            self.others.append(both)

    def step(self) -> None:
        super().step()
        for scheduler in self.others:
            scheduler.step()


class Closure(Loop):
    """`optimizer.step(closure)`; LBFGS evaluates it several times a step, here and everywhere."""

    title = "closure"
    uses_closure = True


class OptimizerInBackward(Loop):
    """An optimizer for each parameter, that steps as soon as its gradient is there."""

    title = "optimizer in backward"

    def build(self) -> None:
        self.model = self.make_model()
        self.models = [self.model]
        self.called = self.model
        own = {parameter: self.kind.over([parameter])[0] for parameter in self.model.parameters()}
        self.optimizers = list(own.values())

        def step_at_once(parameter: torch.Tensor) -> None:
            self.update(own[parameter])
            own[parameter].zero_grad()

        for parameter in self.model.parameters():
            parameter.register_post_accumulate_grad_hook(step_at_once)

    def step(self) -> None:
        if self.by_hand is not None:
            self.by_hand.cleared()
        ((x, y),) = self.batches
        loss = self.loss(x, y)
        self.backward(loss)
        self.seen.append(loss.detach().clone())


# -- precision ----------------------------------------------------------------------------------


class Autocast(Loop):
    """`torch.autocast` to bfloat16."""

    title = "autocast"

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().loss(x, y)


class Scaled(Autocast):
    """`torch.autocast` and a `GradScaler`; a step that it skips, others after `unscale_`."""

    title = "autocast, GradScaler"
    overflows_at: ClassVar[int] = 2

    def build(self) -> None:
        super().build()
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        self.others.append(self.scaler)

    def backward(self, loss: torch.Tensor) -> None:
        if self.number == self.overflows_at:
            loss = loss * float("inf")
        if self.by_hand is not None:
            self.by_hand.backward(loss.detach())
        self.scaler.scale(loss).backward()

    def step(self) -> None:
        if self.kind.needs_closure:
            self.scaler.step(self.optimizers[0], self.closure_for(self.optimizers[0]))
        super().step()
        self.scaler.update()
        self.seen.append(torch.tensor(self.scaler.get_scale()))

    def before_step(self) -> None:
        if self.unscales:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    @property
    def unscales(self) -> bool:
        return self.number % 2 == 1

    def update(
        self, optimizer: Optimizer, closure: Callable[[], torch.Tensor] | None = None
    ) -> None:
        if self.by_hand is not None:
            self.by_hand.begins(optimizer)
            # A fused optimizer divides by the scale inside its step; others get it done before.
            inside = getattr(optimizer, "_step_supports_amp_scaling", False) and not self.unscales
            done = self.unscales or inside
            scale = 1.0 if done else self.scaler.get_scale()
            self.by_hand.reads(optimizer, scale, scaled=inside)
        self.scaler.step(optimizer)
        if self.by_hand is not None:
            self.by_hand.updated(optimizer, skipped=self.number == self.overflows_at)


class Bfloat16(Loop):
    """Parameters in bfloat16."""

    title = "bfloat16 parameters"

    @property
    def torch_is_wrong(self) -> bool:
        # Only the elements that fill no vector of 16 are updated, and the others of the momentum
        # are what memory held (torch 2.13 on the CPU).
        return str(self.kind) == "SGD-fused"

    def make_model(self) -> nn.Module:
        return super().make_model().to(torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(torch.bfloat16)).float()


# -- kinds of models ----------------------------------------------------------------------------


class SparseTable(nn.Module):
    """A table whose gradients are sparse, looked up by the sign and size of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 3, sparse=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table((x.float() * 3).long().abs() % 12).mean(dim=1)


class Sparse(Loop):
    """Sparse gradients of an embedding."""

    title = "sparse gradients"

    def make_model(self) -> nn.Module:
        return SparseTable()


class CheckpointReentrant(Loop):
    """Activation checkpoints that run a backward inside the backward."""

    title = "checkpoint, reentrant"

    def make_model(self) -> nn.Module:
        return Residual(use_reentrant=True)


class CheckpointNonReentrant(Loop):
    """Activation checkpoints through hooks on saved tensors."""

    title = "checkpoint, non-reentrant"

    def make_model(self) -> nn.Module:
        return Residual(use_reentrant=False)


class Tied(Loop):
    """One weight under two names."""

    title = "tied weights"

    def make_model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3))
        model[2].weight = model[0].weight
        return model


class Parametrized(Loop):
    """`weight_norm` and `orthogonal` as parametrizations."""

    title = "parametrized"

    def make_model(self) -> nn.Module:
        return nn.Sequential(
            parametrizations.weight_norm(nn.Linear(6, 12)),
            nn.Tanh(),
            parametrizations.orthogonal(nn.Linear(12, 3)),
        )


class Lazy(Loop):
    """Lazy modules, which get their shapes in the first forward."""

    title = "lazy modules"

    def make_model(self) -> nn.Module:
        return nn.Sequential(nn.LazyLinear(12), nn.Tanh(), nn.LazyLinear(3))


class FunctionalCall(Loop):
    """`torch.func.functional_call` with the model's own parameters."""

    title = "functional_call"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional_call(self.model, dict(self.model.named_parameters()), (x,))


class Transformer(Loop):
    """A `TransformerEncoder`, evaluated by its fast path."""

    title = "TransformerEncoder"

    def make_model(self) -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        return Sequences(nn.TransformerEncoder(layer, 2))


class Sequences(nn.Module):
    """Three tokens of each input, through ``inside``."""

    def __init__(self, inside: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.tokens = nn.Linear(2, 8)
        self.inside = inside
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.inside(self.tokens(x.reshape(len(x), 3, 2)))
        return self.head((out[0] if isinstance(out, tuple) else out).mean(dim=1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class DotProductAttention(Loop):
    """`scaled_dot_product_attention`, by its fused kernel."""

    title = "dot-product attention"

    def make_model(self) -> nn.Module:
        return Sequences(Attention())


class Recurrent(Loop):
    """An `LSTM`, by its fused kernel."""

    title = "LSTM"

    def make_model(self) -> nn.Module:
        return Sequences(nn.LSTM(8, 8, batch_first=True))


# -- who watches --------------------------------------------------------------------------------


class TwoModels(Loop):
    """Two models, each with an optimizer of its own."""

    title = "two models"

    def build(self) -> None:
        body, head = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.1)), nn.Linear(12, 3)
        self.models = [body, head]
        self.optimizers = [o for model in self.models for o in self.kind.over(model.parameters())]
        self.called = lambda x: head(body(x))


class NestedWatch(Loop):
    """A watch inside of a watch, of the same loop."""

    title = "nested watch"

    def train(self, watch: Watch) -> Any:
        with watch(self.models, self.optimizers):
            return super().train(watch)


class InThread(Loop):
    """Watch and training in a thread."""

    title = "thread"

    def train(self, watch: Watch) -> Any:
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(super(InThread, self).train(watch)))
        with threads_that_raise(found):
            thread.start()
            thread.join()
        return found[0]


class threads_that_raise:  # noqa: N801
    """What a thread raises is raised here."""

    def __init__(self, found: list[Any]) -> None:
        self.found = found

    def __enter__(self) -> None:
        self.errors: list[Any] = []
        self.before, threading.excepthook = threading.excepthook, self.errors.append

    def __exit__(self, *_: object) -> None:
        threading.excepthook = self.before
        if self.errors:
            raise self.errors[0].exc_value


FEATURES: list[type[Loop]] = [
    Loop,
    Accumulation,
    ClipNorm,
    ClipValue,
    Scheduled,
    Closure,
    OptimizerInBackward,
    Autocast,
    Scaled,
    Bfloat16,
    Sparse,
    CheckpointReentrant,
    CheckpointNonReentrant,
    Tied,
    Parametrized,
    Lazy,
    FunctionalCall,
    Transformer,
    DotProductAttention,
    Recurrent,
    TwoModels,
    NestedWatch,
    InThread,
]
