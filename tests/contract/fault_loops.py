"""The loops in which gradscope is made to fail."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, lr_scheduler
from training_loops import a_loss_cut_from_the_model, batch, perceptron
from twins import Training, seed_everything


def everything_at_once() -> Training:
    """A loop in which every tap has something to tell."""
    seed_everything()
    model, other = perceptron(dropout=0.2), nn.Linear(6, 3)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    closing = SGD(other.parameters(), lr=0.1, momentum=0.9)
    scheduler = lr_scheduler.StepLR(optimizer, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    optimizer._opt_called = False  # what the scheduler would add with the first step

    def step(number: int) -> list[torch.Tensor]:
        x, y = batch()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if number == 3:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        nn.utils.clip_grad_value_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()

        def closure() -> torch.Tensor:
            closing.zero_grad()
            loss = F.cross_entropy(other(x), y)
            loss.backward()
            return loss

        other_loss = closing.step(closure)
        model.eval()
        with torch.no_grad():
            held_out = model(x)
        model.train()
        return [loss.detach().clone(), other_loss.detach().clone(), held_out]

    return Training([model, other], [optimizer, closing], step, [scaler, scheduler])


def plain() -> Training:
    """A healthy loop, of which nothing may be said."""
    seed_everything()
    model = perceptron()
    optimizer = AdamW(model.parameters(), lr=1e-2)

    def step(number: int) -> list[torch.Tensor]:
        x, y = batch()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return [loss.detach().clone()]

    return Training([model], [optimizer], step)


def cut_loss() -> Training:
    """A loop whose backward reaches no parameter, so that the cut is looked for."""
    seed_everything()
    return a_loss_cut_from_the_model()


class Odd(nn.Module):
    """Parameters of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 4, sparse=True)
        self.wave = nn.Parameter(torch.randn(4, dtype=torch.complex64))
        self.small = nn.Linear(4, 4).to(torch.bfloat16)
        self.matrix = nn.Linear(4, 3, bias=False)
        self.empty = nn.Parameter(torch.zeros(0))
        self.root = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.words(x) * (self.wave * self.wave.conj()).real
        h = h + self.small(h.to(torch.bfloat16)).float()
        return self.matrix(h) + self.empty.sum() + self.root.abs().sqrt()


def odd_kinds() -> Training:
    """Several optimizers, and parameters of kinds that each need a way of their own."""
    seed_everything()
    model = Odd()
    optimizers = [
        torch.optim.SparseAdam(model.words.parameters(), lr=0.1),
        torch.optim.RMSprop([model.wave, model.empty], lr=0.01, momentum=0.9, centered=True),
        torch.optim.NAdam(model.small.parameters(), lr=0.01),
        torch.optim.Muon([model.matrix.weight], lr=0.01),
        torch.optim.Adafactor([model.root], lr=0.01),
    ]

    def step(number: int) -> list[torch.Tensor]:
        x, y = torch.randint(0, 5, (8,)), torch.randint(0, 3, (8,))
        loss = F.cross_entropy(model(x), y)
        (slope,) = torch.autograd.grad(loss, [model.matrix.weight], create_graph=True)
        loss = loss + 0.1 * slope.square().sum()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=number % 2 == 0)
        return [loss.detach().clone()]

    return Training([model], optimizers, step)
