"""check_setup: what can be told before any step, and what must not be told."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

import gradscope
from gradscope.checking import _NAMES, Setup
from gradscope.errors import UsageError
from gradscope.rules import RULES, Severity


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.aux = nn.Sequential(nn.Linear(4, 2))
        self.head = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, *, with_aux: bool = True) -> torch.Tensor:
        h = self.norm(self.body(x))
        out: torch.Tensor = self.head(h).sum()
        return out + self.aux(h).sum() if with_aux else out


X = torch.ones(2, 3)


def serious(setup: Setup) -> list[tuple[str, str]]:
    return [(f.code, str(f.severity)) for f in setup if f.severity > Severity.INFO]


def notes(setup: Setup) -> list[str]:
    return [f.code for f in setup.infos]


def test_a_healthy_setup_has_nothing_in_its_way() -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    setup = gradscope.check_setup(model, optimizer, model(X))
    assert len(setup) == 0
    text = repr(setup)
    assert "model (Net): 8 tensors of 39 numbers, all 8 trainable; in training mode" in text
    assert "optimizer (SGD): holds all 8 trainable in 1 group, lr 0.1" in text
    assert "reaches all 8 trainable" in text
    assert "✓ nothing is in the way of training" in text
    assert "nothing is in the way" in setup._repr_html_()


def test_nothing_is_changed_and_the_loss_can_still_be_used() -> None:
    def trained(check: bool) -> list[torch.Tensor]:
        model = Net()
        optimizer = AdamW(model.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            loss = model(X)
            if check:
                before = copy.deepcopy(model.state_dict())
                state = torch.get_rng_state()
                gradscope.check_setup(model, optimizer, loss)
                assert torch.equal(state, torch.get_rng_state())
                assert all(p.grad is None for p in model.parameters())
                assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
            loss.backward()
            optimizer.step()
        return list(model.parameters())

    assert all(torch.equal(a, b) for a, b in zip(trained(True), trained(False), strict=True))


def test_a_parameter_in_no_optimizer() -> None:
    model = Net()
    optimizer = SGD([*model.body.parameters(), *model.head.parameters()], lr=0.1)
    setup = gradscope.check_setup(model, optimizer)
    assert serious(setup) == [("GS101", "warning")]
    assert "aux.0.weight" in setup[0].params
    assert "pass them to optimizer" in setup[0].fix
    model.norm.requires_grad_(False)
    model.aux.requires_grad_(False)
    assert serious(gradscope.check_setup(model, optimizer)) == []


def test_an_optimizer_made_before_a_layer_was_replaced() -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    model.head = nn.Linear(4, 1)
    setup = gradscope.check_setup(model, optimizer, model(X))
    assert serious(setup) == [("GS102", "error")]  # the new layer is told with it
    assert setup[0].params == ("head.weight", "head.bias")
    assert "no optimizer holds head.weight and head.bias" in setup[0].message


def test_an_optimizer_of_another_model() -> None:
    model, other = Net(), Net()
    setup = gradscope.check_setup(model, SGD(other.parameters(), lr=0.1))
    assert ("GS102", "error") in serious(setup)
    assert "SGD" in repr(setup)


def test_a_tensor_of_its_own_that_the_loss_needs_is_no_leftover() -> None:
    model = Net()
    temperature = nn.Parameter(torch.ones(()))
    optimizer = SGD([*model.parameters(), temperature], lr=0.1)
    assert len(gradscope.check_setup(model, optimizer, model(X) * temperature)) == 0
    without = gradscope.check_setup(model, optimizer)
    assert serious(without) == []
    assert notes(without) == ["GS102"]


def test_master_weights_of_a_model_in_bfloat16_are_no_leftover() -> None:
    model = Net().bfloat16()
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    setup = gradscope.check_setup(model, AdamW(masters))
    assert serious(setup) == []
    assert "in bfloat16: they look like its weights in full precision" in setup[0].message
    # Those of another model, and an old copy of the same precision, are.
    assert ("GS102", "error") in serious(
        gradscope.check_setup(model, AdamW(nn.Linear(3, 4).parameters()))
    )
    same = [p.detach().requires_grad_() for p in model.parameters()]
    assert ("GS102", "error") in serious(gradscope.check_setup(model, AdamW(same)))


def test_a_parameter_without_elements_is_not_missed_by_a_loss() -> None:
    model = Net()
    model.register_parameter("dummy", nn.Parameter(torch.empty(0)))
    assert serious(gradscope.check_setup(model, SGD(model.parameters(), lr=0.1), model(X))) == []


def test_a_parameter_twice_in_one_optimizer_and_in_two() -> None:
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = SGD([*model.parameters(), model.head.weight], lr=0.1)
    setup = gradscope.check_setup(model, optimizer)
    assert serious(setup) == [("GS103", "error")]
    assert setup[0].params == ("head.weight",)
    two = gradscope.check_setup(
        model, [SGD(model.parameters(), lr=0.1), SGD(model.aux.parameters(), lr=0.1)]
    )
    assert serious(two) == [("GS103", "warning")]
    assert two[0].params == ("aux.0.weight", "aux.0.bias")


def test_tied_weights_are_held_once() -> None:
    model = nn.ModuleDict({"emb": nn.Embedding(5, 3), "out": nn.Linear(3, 5, bias=False)})
    model["out"].weight = model["emb"].weight
    optimizer = SGD(model.parameters(), lr=0.1)
    loss = model["out"](model["emb"](torch.arange(5))).sum()
    assert len(gradscope.check_setup(model, optimizer, loss)) == 0


def test_frozen_parameters_are_a_note_and_all_of_them_an_error() -> None:
    model = Net()
    model.body.requires_grad_(False)
    setup = gradscope.check_setup(model, SGD(model.parameters(), lr=0.1), model(X))
    assert serious(setup) == []
    assert notes(setup) == ["GS104"]
    assert setup[0].params == ("body.weight", "body.bias")
    model.requires_grad_(False)
    assert serious(gradscope.check_setup(model, SGD(model.parameters(), lr=0.1))) == [
        ("GS108", "error")
    ]


def test_a_learning_rate_of_zero_and_a_warm_up_from_zero() -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.0)
    assert serious(gradscope.check_setup(model, optimizer)) == [("GS503", "warning")]
    warmed = SGD(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(warmed, lambda step: min(1.0, step / 10))
    assert warmed.param_groups[0]["lr"] == 0
    assert len(gradscope.check_setup(model, warmed)) == 0


def test_decayed_norms_and_biases_are_a_note() -> None:
    model = Net()
    setup = gradscope.check_setup(model, AdamW(model.parameters(), weight_decay=0.1))
    assert serious(setup) == []
    assert notes(setup) == ["GS111"]
    assert {"norm.weight", "head.bias"} <= set(setup[0].params)
    assert "head.weight" not in setup[0].params
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    assert len(gradscope.check_setup(model, AdamW(groups))) == 0


def test_what_a_loss_does_not_reach() -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    setup = gradscope.check_setup(model, optimizer, model(X, with_aux=False))
    assert serious(setup) == [("GS105", "warning")]
    assert setup[0].params == ("aux.0.weight", "aux.0.bias")
    assert setup[0].modules == ("aux",)
    assert "the result of aux does not come into it" in setup[0].message
    cut = model.head(model.norm(model.body(X)).detach()).sum()
    assert gradscope.check_setup(model, optimizer, cut)[0].modules == ("body", "norm", "aux")


def test_a_loss_of_a_copy_of_the_model() -> None:
    model = Net()
    setup = gradscope.check_setup(model, SGD(model.parameters(), lr=0.1), copy.deepcopy(model)(X))
    assert serious(setup) == [("GS301", "error")]
    assert "belong to no model passed" in setup[0].message


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (lambda loss: loss.detach(), "does not require grad"),
        (lambda loss: torch.tensor(loss.item(), requires_grad=True), "a new tensor without"),
        (lambda loss: loss.detach().requires_grad_() * 2, "grad_fn MulBackward0"),
    ],
)
def test_a_loss_without_a_path(cut: Any, words: str) -> None:
    model = Net()
    setup = gradscope.check_setup(model, SGD(model.parameters(), lr=0.1), cut(model(X)))
    assert serious(setup) == [("GS301", "error")]
    assert words in setup[0].message


def test_several_models_and_an_accumulated_loss() -> None:
    generator, critic = Net(), Net()
    opt_g, opt_c = SGD(generator.parameters(), lr=0.1), SGD(critic.parameters(), lr=0.1)
    loss = generator(X) + critic(X)
    setup = gradscope.check_setup([generator, critic], [opt_g, opt_c], loss)
    assert len(setup) == 0
    assert "generator (Net), critic (Net)" in repr(setup)
    assert "opt_c (SGD)" in repr(setup)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((None, None), "model=None"),
        ((Net(), None), "optimizer=None"),
        ((Net(), SGD(Net().parameters(), lr=1.0), 0.5), "loss is a float"),
    ],
)
def test_what_cannot_be_looked_at_is_named(arguments: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        gradscope.check_setup(*arguments)


def test_codes_and_names_are_those_of_the_rules() -> None:
    for rule in RULES:
        assert _NAMES.get(rule.code, rule.name) == rule.name
