"""Which parameters are trained, and by whom: broken set-ups and healthy ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradscope
from gradscope.config import WatchOptions
from gradscope.rules import diagnose
from gradscope.run.recording import Recording
from gradscope.session.session import Session
from gradscope.views.loop import summarize


def train(
    model: nn.Module,
    *optimizers: torch.optim.Optimizer,
    steps: int = 12,
    before: Callable[[int], None] = lambda step: None,
) -> dict[str, tuple[str, ...]]:
    """Train for some steps; returns the parameters that findings name, by code."""
    with gradscope.watch(model, list(optimizers), on_error="raise", every=1) as scope:
        for step in range(steps):
            before(step)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=False)
            x = torch.randn(8, 6)
            F.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
            for optimizer in optimizers:
                optimizer.step()
    assert not scope.findings.unchecked
    return {finding.code: finding.params for finding in scope.findings}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def sgd(params: Iterable[object], **options: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, **{"lr": 0.1, **options})  # type: ignore[arg-type]


def test_healthy() -> None:
    model = net()
    assert not train(model, sgd(model.parameters()))


def test_decay_of_norms_and_biases() -> None:
    model = net()
    found = train(model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1))
    assert found["GS111"] == ("1.weight", "1.bias", "0.bias", "3.bias")


def test_decay_of_matrices_only() -> None:
    model = net()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    assert "GS111" not in train(model, torch.optim.AdamW(groups, lr=1e-3))


def test_given_twice_to_one_optimizer() -> None:
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says so, too
        optimizer = sgd([*model.parameters(), *model[3].parameters()])
    assert train(model, optimizer)["GS103"] == ("3.weight", "3.bias")


def test_given_to_two_optimizers() -> None:
    model = net()
    found = train(model, sgd(model.parameters()), sgd(model[3].parameters()))
    assert found["GS103"] == ("3.weight", "3.bias")


def test_each_to_one_optimizer() -> None:
    model = net()
    assert "GS103" not in train(model, sgd(model[:3].parameters()), sgd(model[3].parameters()))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_frozen_while_training(decay: float) -> None:
    model = net()

    def freeze(step: int) -> None:
        if step == 5:
            model[0].requires_grad_(False)

    found = train(model, sgd(model.parameters(), weight_decay=decay), before=freeze)
    assert ("GS109" in found) is (decay > 0)


def test_attribute_that_freezes_nothing() -> None:
    model = net()
    model[0].requires_grad = False  # type: ignore[assignment]
    assert train(model, sgd(model.parameters()))["GS109"] == ("0.weight", "0.bias")


def test_attributes_of_several_modules_are_told_together() -> None:
    model = nn.ModuleDict({"a": net(), "b": net()})
    other = net()
    for layer in model["b"]:
        layer.requires_grad = False
    optimizer = sgd([*model.parameters(), *other.parameters()])
    with gradscope.watch([model, other], optimizer, on_error="raise") as scope:
        for _ in range(6):
            optimizer.zero_grad()
            x = torch.randn(8, 6)
            F.cross_entropy(model["a"](x) + model["b"](x) + other(x), x[:, :3].argmax(1)).backward()
            optimizer.step()
    (finding,) = (f for f in scope.findings if f.code == "GS109")
    assert finding.params == tuple(f"model.b.{name}" for name, _ in net().named_parameters())
    assert "call model.b.0.requires_grad_(False)" in finding.fix


def test_a_backward_that_raises_because_all_is_frozen() -> None:
    model = net()
    model.requires_grad_(False)
    optimizer = sgd(model.parameters())
    watching = gradscope.watch(model, optimizer, on_error="raise")
    with pytest.raises(RuntimeError, match="does not require grad"), watching:
        F.cross_entropy(model(torch.randn(8, 6)), torch.zeros(8).long()).backward()
    assert {f.code for f in watching.findings if f.severity > 0} == {"GS108"}


def test_nothing_to_train() -> None:
    model = net()
    model.requires_grad_(False)
    optimizer = sgd(model.parameters())
    with gradscope.watch(model, optimizer, on_error="raise", every=1) as scope:
        for _ in range(6):
            optimizer.zero_grad()
            extra = torch.zeros(3, requires_grad=True)
            F.cross_entropy(model(torch.randn(8, 6)) + extra, torch.zeros(8).long()).backward()
            optimizer.step()
    assert "GS108" in {finding.code for finding in scope.findings}


class MakesLayer(nn.Module):
    def __init__(self, *, anew: bool) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = None if anew else nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        head = nn.Linear(8, 3) if self.head is None else self.head
        result: torch.Tensor = head(torch.tanh(self.body(x)))
        return result


@pytest.mark.parametrize("anew", [True, False])
def test_layer_made_in_forward(anew: bool) -> None:
    model = MakesLayer(anew=anew)
    assert ("GS106" in train(model, sgd(model.parameters()))) is anew


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_were_to_be_tied(tied: bool) -> None:
    torch.manual_seed(0)
    table, head = nn.Embedding(9, 5), nn.Linear(5, 9, bias=False)
    if tied:
        head.weight = table.weight
    else:
        head.weight.data = table.weight.data.clone()
    model = nn.Sequential(table, head)
    optimizer = sgd(model.parameters())
    with gradscope.watch(model, optimizer, on_error="raise", every=1) as scope:
        for _ in range(12):
            optimizer.zero_grad()
            x = torch.randint(0, 9, (8,))
            F.cross_entropy(model(x), (x + 1) % 9).backward()
            optimizer.step()
    assert ("GS107" in {finding.code for finding in scope.findings}) is not tied


@pytest.mark.parametrize("undone", [True, False])
def test_frozen_for_the_other_network_and_never_freed(undone: bool) -> None:
    torch.manual_seed(0)
    made, judge = nn.Linear(4, 2), nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    opt_made, opt_judge = sgd(made.parameters()), sgd(judge.parameters())
    with gradscope.watch([made, judge], [opt_made, opt_judge], on_error="raise") as scope:
        for _ in range(12):
            judge.requires_grad_(undone or judge[0].weight.requires_grad)
            opt_judge.zero_grad()
            loss = F.softplus(judge(made(torch.randn(8, 4)).detach())).mean()
            if loss.requires_grad:
                loss.backward()
            opt_judge.step()
            judge.requires_grad_(False)
            opt_made.zero_grad()
            F.softplus(-judge(made(torch.randn(8, 4)))).mean().backward()
            opt_made.step()
    assert ("GS108" in {f.code for f in scope.findings if f.severity > 0}) is not undone


@pytest.mark.parametrize("container", ["list", "dict", "attribute of a tensor"])
def test_parameters_in_plain_containers_of_the_model_itself(container: str) -> None:
    class Prompted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
            made = torch.randn(8) * 0.1
            plain = made.requires_grad_()  # an input that wants a gradient looks like this
            self.kept = {
                "list": [nn.Parameter(made)],
                "dict": {"a": nn.Parameter(made)},
                "attribute of a tensor": plain,
            }[container]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept = self.kept
            own = kept[0] if isinstance(kept, list) else kept["a"] if type(kept) is dict else kept
            result: torch.Tensor = self.last(torch.tanh(self.first(x) + own))
            return result

    model = Prompted()
    named = "GS101" in train(model, sgd(model.parameters()))
    assert named is (container != "attribute of a tensor")


class Mixture(nn.Module):
    """Four experts; the last one, or the last layer, is used by nobody."""

    def __init__(self, *, chooses: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 3) for _ in range(4))
        self.chooses = chooses
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.chooses:
            result: torch.Tensor = self.experts[self.calls % 3](x)
            return result
        return sum(expert(x) for expert in list(self.experts)[:3])  # type: ignore[return-value]


@pytest.mark.parametrize("chooses", [True, False])
def test_an_expert_that_is_never_chosen_and_a_layer_that_is_never_called(chooses: bool) -> None:
    torch.manual_seed(0)
    model = Mixture(chooses=chooses)
    assert ("GS105" in train(model, sgd(model.parameters()))) is not chooses


def test_the_screen_says_of_unregistered_layers_what_the_finding_says() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Linear(6, 6)]
            self.head = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.head(torch.tanh(self.layers[0](x)))
            return result

    model = Listed()
    optimizer = sgd(model.parameters())
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(8):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(8, 6)), torch.zeros(8).long()).backward()
            optimizer.step()
    screen = repr(scope)
    assert "missed by every optimizer: 2 (layers[0].weight, layers[0].bias)" in screen
    assert "held, but in no watched model" not in screen


class Quantised(nn.Module):
    """A codebook that follows what is encoded, moved by hand or left as it was made."""

    def __init__(self, *, moves: bool) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(6, 4), nn.Linear(4, 3)
        self.codes = nn.Parameter(torch.randn(8, 4))
        self.moves = moves

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.encode(x)
        nearest = torch.cdist(z, self.codes).argmin(1)
        if self.moves:
            with torch.no_grad():
                for code in nearest.unique():
                    self.codes[code].lerp_(z[nearest == code].mean(0), 0.1)
        result: torch.Tensor = self.decode(z + (self.codes[nearest] - z).detach())
        return result


@pytest.mark.parametrize("moves", [True, False])
def test_a_codebook_that_the_program_moves_by_hand(moves: bool) -> None:
    torch.manual_seed(0)
    model = Quantised(moves=moves)
    found = train(model, sgd(model.parameters(), weight_decay=0.1))
    assert found.get("GS105") == (None if moves else ("codes",))
    assert "GS901" not in found


@pytest.mark.parametrize("numel", [0, 1])
def test_a_parameter_without_elements_which_tells_the_device(numel: int) -> None:
    model = net()
    model.register_parameter("dummy", nn.Parameter(torch.zeros(numel)))
    assert ("GS105" in train(model, sgd(model.parameters()))) is bool(numel)


def with_masters(*, held: str, lr: float) -> list[str]:
    """Train a model in bfloat16 whose optimizer has weights in float32; returns the codes found.

    Args:
        held: ``copied back``; ``never copied back``; or ``another model``, without gradients.
        lr: of Adam, that is, how far a weight moves in a step at most.
    """
    torch.manual_seed(0)
    model = net().bfloat16()
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    # In two groups, as is usual: not in the order of the model.
    matrices = [p for p in masters if p.ndim > 1]
    others = [p for p in masters if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": others}, {"params": matrices}], lr=lr, weight_decay=0.0
    )
    with gradscope.watch(model, optimizer, on_error="raise", every=1) as scope:
        for _ in range(20):
            x = torch.randn(8, 6)
            F.cross_entropy(model(x.bfloat16()).float(), x[:, :3].argmax(1)).backward()
            for weight, master in zip(model.parameters(), masters, strict=True):
                assert weight.grad is not None
                master.grad = None if held == "another model" else weight.grad.float()
                weight.grad = None
            optimizer.step()
            if held == "copied back":
                with torch.no_grad():
                    for weight, master in zip(model.parameters(), masters, strict=True):
                        weight.copy_(master)
    return [f.code for f in scope.findings if f.severity > 0]


@pytest.mark.parametrize("lr", [1e-6, 2e-5, 1e-3, 1e-1])
def test_master_weights_in_float32_are_in_use(lr: float) -> None:
    assert not {"GS101", "GS102"} & set(with_masters(held="copied back", lr=lr))


def test_master_weights_beside_norms_that_the_optimizer_holds_themselves() -> None:
    torch.manual_seed(0)
    first, norm, last = nn.Linear(6, 8).bfloat16(), nn.LayerNorm(8), nn.Linear(8, 3).bfloat16()
    model = nn.Sequential(first, norm, last)
    narrow = [*first.parameters(), *last.parameters()]
    masters = [p.detach().float().requires_grad_() for p in narrow]
    optimizer = torch.optim.Adam([*norm.parameters(), *masters], lr=1e-6)
    with gradscope.watch(model, optimizer, on_error="raise", every=1) as scope:
        for _ in range(20):
            x = torch.randn(8, 6)
            h = norm(first(x.bfloat16()).float())
            F.cross_entropy(last(h.bfloat16()).float(), x[:, :3].argmax(1)).backward()
            for weight, master in zip(narrow, masters, strict=True):
                assert weight.grad is not None
                master.grad, weight.grad = weight.grad.float(), None
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for weight, master in zip(narrow, masters, strict=True):
                    weight.copy_(master)
    assert not {"GS101", "GS102", "GS105"} & {f.code for f in scope.findings}


@pytest.mark.parametrize("held", ["another model", "never copied back"])
def test_wider_weights_that_are_in_use_nowhere(held: str) -> None:
    assert "GS102" in with_masters(held=held, lr=1e-2)


class TaskWeights(nn.Module):
    """A loss with parameters of its own, and a network inside of it if ``judge`` is given."""

    def __init__(self, judge: nn.Module | None = None) -> None:
        super().__init__()
        self.log_variances, self.judge = nn.Parameter(torch.zeros(2)), judge
        self.loss = nn.CrossEntropyLoss()

    def forward(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        losses = torch.stack([self.loss(out, x[:, :3].argmax(1)), out.square().mean()])
        if self.judge is not None:
            losses = losses + self.judge(out).square().mean()
        return (losses * torch.exp(-self.log_variances)).sum() + self.log_variances.sum()


@pytest.mark.parametrize("scale", [1, 4])
def test_the_parameters_of_a_loss_are_in_no_optimizer(scale: int) -> None:
    model, criterion = net(), TaskWeights(nn.Linear(3, 2))

    def trained(*held: nn.Module) -> dict[str, tuple[str, ...]]:
        optimizer = sgd([p for module in held for p in module.parameters()])
        with gradscope.watch([model, criterion], optimizer, on_error="raise") as scope:
            for _ in range(8):
                optimizer.zero_grad()
                x = torch.randn(8, 6)
                (criterion(model(x), x) / scale).backward()
                optimizer.step()
        return {f.code: f.params for f in scope.findings if f.severity > 0}

    # The network that judges may stay as it is on purpose; such weights may not.
    assert trained(model) == {"GS101": ("criterion.log_variances",)}
    assert not trained(model, criterion)


class Wrapper(torch.optim.Optimizer):
    """An optimizer that lets another one step, on what a closure computes if it has one."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__(params, {"lr": 0.1})
        self.base = torch.optim.SGD(self.param_groups, lr=0.1)

    def step(self, closure: Callable[[], object] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            with torch.enable_grad():
                closure()
        self.base.step()


@pytest.mark.parametrize("with_closure", [False, True])
def test_an_optimizer_that_steps_inside_of_another_uses_nothing_twice(with_closure: bool) -> None:
    model = net()
    optimizer = Wrapper(model.parameters())

    def closure() -> None:
        optimizer.zero_grad()
        x = torch.randn(8, 6)
        F.cross_entropy(model(x), x[:, :3].argmax(1)).backward()

    with gradscope.watch(model, [optimizer, optimizer.base], on_error="raise") as scope:
        for _ in range(12):
            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
    assert scope.steps["outcome"].tolist() == ["stepped"] * 24
    assert not [f.code for f in scope.findings if f.severity > 0]


@pytest.mark.parametrize("is_assigned", [True, False])
def test_gradients_that_the_program_assigns_to_a_part(is_assigned: bool) -> None:
    model = net()
    optimizer = sgd(model.parameters())
    trunk, head = list(model[0].parameters()), list(model[3].parameters())
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(12):
            optimizer.zero_grad()
            x = torch.randn(8, 6)
            loss = F.cross_entropy(model(x), x[:, :3].argmax(1))
            if is_assigned:
                gradients = torch.autograd.grad(loss, trunk, retain_graph=True)
                for weight, gradient in zip(trunk, gradients, strict=True):
                    weight.grad = gradient
            loss.backward(inputs=[*head, *model[1].parameters()])
            optimizer.step()
    assert ("GS105" in {f.code for f in scope.findings}) is not is_assigned


class Adapted(nn.Module):
    """A frozen layer and an adapter of two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 3).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.zeros(3, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


def test_a_frozen_base_is_not_why_nothing_is_learnt_if_its_adapter_is_in_no_optimizer() -> None:
    torch.manual_seed(0)
    model = Adapted()
    optimizer = sgd([model.a])
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(120):
            optimizer.zero_grad()
            x = torch.randn(64, 6)
            F.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
            optimizer.step()
    assert {f.code for f in scope.findings if f.severity > 0} == {"GS101"}


class Grows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 8)])
        self.out = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = x + torch.tanh(layer(x))
        return self.out(x)


def test_a_layer_that_is_added_between_two_looks_is_one_of_the_model() -> None:
    torch.manual_seed(0)
    model = Grows()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with gradscope.watch(model, optimizer, every=50, on_error="raise") as scope:
        for number in range(20):
            if number in (7, 13):
                layer = nn.Linear(8, 8)
                model.layers.append(layer)
                optimizer.add_param_group({"params": layer.parameters()})
            loss = model(torch.randn(16, 4)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert set(scope.params["param"]) == {name for name, _ in model.named_parameters()}
    assert not scope.steps["n_assigned"].any()


def trained_around(
    model: nn.Module, between: Callable[[], None], n_steps: int = 20, after: int = 20
) -> gradscope.Scope:
    """Train with one optimizer, do something, and go on with a new one for what is trainable."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scope = gradscope.watch(model, optimizer, on_error="raise")
    with scope:
        for number in range(n_steps + after):
            if number == n_steps:
                between()
            loss = model(torch.randn(16, 4)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return scope


def test_what_was_thawed_late_and_trained_is_not_told_to_be_frozen() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    model[0].requires_grad_(False)
    scope = trained_around(model, lambda: _thaw(model[0]), 37, 12)
    assert scope.params["requires_grad"].all()
    assert not [f for f in scope.findings if f.code == "GS104"]


def _thaw(module: nn.Module) -> None:
    module.requires_grad_(True)


def test_what_is_frozen_for_the_evaluation_after_the_last_step_was_trained() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(12):
            optimizer.zero_grad()
            model(torch.randn(16, 4)).square().mean().backward()
            optimizer.step()
        model.requires_grad_(False)
        model(torch.randn(16, 4))
    assert scope.params["requires_grad"].all()
    assert not [f for f in scope.findings if f.code in ("GS104", "GS109")]


def with_new_head(freezes_old: bool) -> Recording:
    torch.manual_seed(0)
    session = Session(WatchOptions(on_error="raise"), discovers=True)
    session.start()
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    kept = []
    for n_classes in (2, 3, 4):
        if n_classes > 2:
            kept.append(model[2])
            if freezes_old:
                model.requires_grad_(False)
            model[2] = nn.Linear(8, n_classes)
        held = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(held, lr=0.1, momentum=0.9)
        for _ in range(10):
            x = torch.randn(16, 4)
            optimizer.zero_grad()
            F.cross_entropy(model(x), x.argmax(1).clamp(max=n_classes - 1)).backward()
            optimizer.step()
    session.stop()
    return session.recording


def test_a_head_that_was_replaced_has_a_name_of_its_own() -> None:
    run = with_new_head(freezes_old=True)
    names = [entry.name for entry in run.parameters]
    assert len(set(names)) == len(names) == 8
    old = {entry.name for entry in run.parameters if entry.is_replaced}
    assert old == {"2#old.weight", "2#old.bias", "2#old#2.weight", "2#old#2.bias"}
    assert not any(entry.in_model for entry in run.parameters if entry.is_replaced)
    new = [entry for entry in run.parameters if entry.name.startswith("2.")]
    assert [entry.shape[0] for entry in new] == [4, 4]


def test_a_head_that_was_frozen_and_replaced_does_not_move_and_is_not_told() -> None:
    found = {f.code: f for f in diagnose(with_new_head(freezes_old=True))}
    assert "GS109" not in found
    assert set(found["GS104"].params) == {"0.weight", "0.bias"}


def test_a_head_that_was_replaced_is_not_missed_by_optimizers() -> None:
    run = with_new_head(freezes_old=False)
    for entry in run.parameters:
        if entry.is_replaced:
            entry.holders = []
    (parameters,) = (line for line in summarize(run).lines if line.name == "parameters")
    assert any("missed by every optimizer: none" in text for text in parameters.measured)
