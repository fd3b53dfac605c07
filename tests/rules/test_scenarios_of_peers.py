"""The defects that other tools were tried on, all named, and their healthy variants, all silent.

Two sets. A small GPT with dropout on text that can be learnt, 60 steps of AdamW; and a perceptron
of three layers, 120 steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradscope

# -- a character GPT of two layers ------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, dropout=0.1, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            nn.Dropout(0.1),
        )
        self.floor = 1.0  # under a logarithm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        h = self.ln1(x)
        x = x + self.attention(h, h, h, attn_mask=mask, need_weights=False)[0]
        h = self.mlp(self.ln2(x))
        return x + torch.sign(h) * torch.log(h.abs() * self.floor + self.floor)


class Gpt(nn.Module):
    def __init__(self, n_tokens: int = 24, width: int = 16, context: int = 8) -> None:
        super().__init__()
        self.token = nn.Embedding(n_tokens, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, n_tokens)
        self.detaches = self.softmaxes = False

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.token(ids) + self.position(torch.arange(ids.shape[1]))
        x = self.blocks[0](x)
        if self.detaches:
            x = x.detach()
        logits = self.head(self.norm(self.blocks[1](x)))
        return logits.softmax(-1) if self.softmaxes else logits


@dataclass
class Loop:
    """A training loop, with what a scenario changes in it."""

    model: Gpt = field(default_factory=Gpt)
    held: list[nn.Parameter] | None = None
    lr: float = 1e-3
    zero_grad: str = "before backward"
    accumulate: int = 1
    poisoned_from: int | None = None
    evaluates: bool = False
    before_loop: Callable[[Loop], None] = lambda loop: None
    schedule: Callable[[int], float] | None = None

    def run(self) -> gradscope.Findings:
        torch.manual_seed(1)
        model = self.model
        held = list(model.parameters()) if self.held is None else self.held
        optimizer = torch.optim.AdamW(held, lr=self.lr)
        scheduler = self.schedule and torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
        self.before_loop(self)
        model.train(not self.evaluates)
        with gradscope.watch(model, optimizer, on_error="raise") as scope:
            for i in range(60):
                if i == self.poisoned_from:
                    model.blocks[1].floor = 0.0
                if self.zero_grad == "before backward":
                    optimizer.zero_grad()
                for _ in range(self.accumulate):
                    ids = (torch.randint(24, (8, 1)) + torch.arange(9)) % 24
                    loss = F.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:])
                    (loss / self.accumulate).backward()
                if self.zero_grad == "after backward":
                    optimizer.zero_grad()
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
        return scope.findings


def without_head() -> Loop:
    model = Gpt()
    return Loop(model, [p for name, p in model.named_parameters() if "head" not in name])


def with_head_replaced() -> Loop:
    def replace(loop: Loop) -> None:
        loop.model.head = nn.Linear(16, 24)

    return Loop(before_loop=replace)


def with_attributes(**attributes: bool) -> Loop:
    loop = Loop()
    for name, value in attributes.items():
        setattr(loop.model, name, value)
    return loop


def with_frozen_layers() -> Loop:
    model = Gpt()
    for module in (model.token, model.position, model.blocks[0]):
        module.requires_grad_(False)
    return Loop(model, [p for p in model.parameters() if p.requires_grad])


def with_tied_weights() -> Loop:
    model = Gpt()
    model.head.weight = model.token.weight
    nn.init.normal_(model.head.weight, std=0.02)
    return Loop(model)


def with_zero_head() -> Loop:
    model = Gpt()
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    return Loop(model)


@pytest.mark.parametrize(
    ("make", "code", "about"),
    [
        pytest.param(lambda: Loop(zero_grad="never"), "GS201", "", id="no-zero-grad"),
        pytest.param(lambda: with_attributes(detaches=True), "GS302", "blocks.0", id="detach"),
        pytest.param(without_head, "GS101", "head", id="not-in-optimizer"),
        pytest.param(with_head_replaced, "GS102", "head", id="head-replaced"),
        pytest.param(lambda: Loop(zero_grad="after backward"), "GS202", "", id="zero-grad-late"),
        pytest.param(lambda: Loop(lr=0.0), "GS503", "", id="lr-zero"),
        pytest.param(lambda: Loop(poisoned_from=57), "GS405", "Log in blocks.1", id="nan-at-57"),
        pytest.param(lambda: with_attributes(softmaxes=True), "GS307", "", id="softmax-before-ce"),
        pytest.param(lambda: Loop(evaluates=True), "GS306", "", id="eval-left-on"),
    ],
)
def test_defects_of_a_small_gpt(make: Callable[[], Loop], code: str, about: str) -> None:
    found = [f for f in make().run() if f.severity > 0]
    assert [f.code for f in found][:1] == [code]
    assert len(found) == 1, "one cause, one finding"
    text = " ".join([found[0].message, *found[0].params, *found[0].modules, str(found[0].evidence)])
    assert about in text
    if code == "GS405":
        assert found[0].step_first == 57


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(Loop, id="healthy"),
        pytest.param(lambda: Loop(accumulate=4), id="accumulation"),
        pytest.param(with_frozen_layers, id="frozen-layers"),
        pytest.param(lambda: Loop(schedule=lambda i: min(1.0, i / 20)), id="warm-up-from-zero"),
        pytest.param(with_tied_weights, id="tied-weights"),
        pytest.param(with_zero_head, id="zero-head"),
    ],
)
def test_healthy_variants_of_a_small_gpt(make: Callable[[], Loop]) -> None:
    assert [f.message for f in make().run() if f.severity > 0] == []


# -- a perceptron of three layers -------------------------------------------------------------


def train_perceptron(defect: str) -> gradscope.Findings:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 3)
    )
    held = list(model.parameters())
    if defect == "param missing from optimizer":
        held = held[:2] + held[4:]
    optimizer = torch.optim.Adam(held, lr=0.0 if defect == "lr=0" else 1e-2)
    model.train(defect != "trained in eval() mode")
    inputs = torch.randn(256, 8)
    targets = inputs[:, :3].argmax(1)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for i, at in zip(range(120), itertools.cycle(inputs.split(32)), strict=False):
            wanted = targets.split(32)[i % 8]
            if defect != "no zero_grad":
                optimizer.zero_grad()
            if defect == "NaN weight at step 60" and i == 60:
                with torch.no_grad():
                    model[2].weight[0, 0] = float("nan")
            if defect == "optimizer state reset each step":
                optimizer.state.clear()
            hidden = model[:3](at)
            if defect == "detach in the middle":
                hidden = hidden.detach()
            loss = F.cross_entropy(model[3:](hidden), wanted)
            if defect == "loss detached+requires_grad_":
                loss = loss.detach().requires_grad_()
            if defect == "step before backward":
                optimizer.step()
                model.zero_grad()
                loss = F.cross_entropy(model(at), wanted)
            loss.backward(retain_graph=defect == "backward twice")
            if defect == "backward twice":
                loss.backward()
            if defect not in ("never calls step", "step before backward"):
                optimizer.step()
    return scope.findings


@pytest.mark.parametrize(
    ("defect", "codes"),
    [
        ("no zero_grad", {"GS201"}),
        ("loss detached+requires_grad_", {"GS301"}),
        ("detach in the middle", {"GS302"}),
        ("param missing from optimizer", {"GS101"}),
        ("lr=0", {"GS503"}),
        ("step before backward", {"GS502", "GS202"}),
        ("backward twice", {"GS402"}),
        ("optimizer state reset each step", {"GS507"}),
        ("never calls step", {"GS501"}),
        ("NaN weight at step 60", {"GS512", "GS601", "GS405"}),
        ("trained in eval() mode", {"GS306"}),
    ],
)
def test_defects_of_a_perceptron(defect: str, codes: set[str]) -> None:
    found = [f for f in train_perceptron(defect) if f.severity > 0]
    assert codes & {f.code for f in found[:1]}, [f.message for f in found]


def test_a_healthy_perceptron() -> None:
    assert [f.message for f in train_perceptron("none") if f.severity > 0] == []
