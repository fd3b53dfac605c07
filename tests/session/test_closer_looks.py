"""What closer looks and the other facts behind the rules say, against numbers computed here."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradscope
from gradscope import Scope
from gradscope.config import WatchOptions
from gradscope.instruments.symmetry import read_symmetry
from gradscope.run.recording import Recording
from gradscope.session import looks
from gradscope.session.session import Session

LossOf = Callable[[nn.Module, int], torch.Tensor]


def train(
    model: nn.Module, loss_of: LossOf, steps: int = 20, lr: float = 0.1
) -> tuple[Scope, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for number in range(steps):
            optimizer.zero_grad()
            loss_of(model, number).backward()
            optimizer.step()
    return scope, optimizer


def discovered(program: Callable[[], None]) -> Recording:
    session = Session(WatchOptions(on_error="raise"), discovers=True)
    session.start()
    try:
        program()
    finally:
        session.stop()
    return session.recording


def line_of(function: Callable[..., object], text: str) -> int:
    source, first = inspect.getsourcelines(function)
    return first + next(i for i, line in enumerate(source) if text in line)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# -- when ------------------------------------------------------------------------------------


def steps_looked_at(n: int) -> list[int]:
    scope, _ = train(nn.Linear(3, 2), lambda m, i: m(torch.randn(4, 3)).square().mean(), n)
    return sorted(set(scope.calls["step"]))


def test_looks_come_at_the_first_two_steps_and_when_the_number_has_doubled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(looks, "_SHARE", 1e9)
    assert steps_looked_at(70) == [0, 1, 4, 8, 16, 32, 64]


def test_later_looks_wait_until_the_budget_pays_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looks, "_SHARE", 1e-9)
    assert steps_looked_at(70) == [0, 1, 4, 8, 16]


def one_after_the_other(n_steps: list[int], *, made_early: bool = False) -> list[int]:
    """Steps looked at where models are trained one after the other, all kept alive."""
    models = [nn.Linear(3, 2) for _ in n_steps]
    optimizers: list[torch.optim.Optimizer] = []

    def program() -> None:
        if made_early:
            optimizers.extend(torch.optim.SGD(m.parameters(), lr=0.1) for m in models)
        for number, (model, n) in enumerate(zip(models, n_steps, strict=True)):
            if not made_early:
                optimizers.append(torch.optim.SGD(model.parameters(), lr=0.1))
            for _ in range(n):
                optimizers[number].zero_grad()
                model(torch.randn(4, 3)).square().mean().backward()
                optimizers[number].step()

    return sorted(set(discovered(program).frame("calls")["step"].tolist()))


def test_looks_begin_anew_with_an_optimizer_that_comes_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(looks, "_SHARE", 1e-9)
    assert one_after_the_other([20, 30]) == [0, 1, 4, 8, 16, 20, 21, 24, 28, 36]


def test_looks_begin_anew_after_the_first_step_of_an_optimizer_that_was_made_early(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(looks, "_SHARE", 1e-9)
    seen = one_after_the_other([40, 20], made_early=True)
    assert [step for step in seen if step >= 40] == [41, 42, 45, 49, 57]


def test_of_many_trainings_only_the_first_are_looked_at_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(looks, "_SHARE", 1e-9)
    seen = one_after_the_other([6] * 12)
    assert seen == [6 * training + step for training in range(8) for step in (0, 1, 4)]


def test_there_is_an_end_to_looks_however_many_trainings_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(looks, "_SHARE", 1e9)
    assert len(one_after_the_other([5] * 60)) == 128


def test_a_loop_that_makes_an_optimizer_for_every_step_is_no_chain_of_trainings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(looks, "_SHARE", 1e-9)
    assert one_after_the_other([1] * 40) == [0, 1, 5]


def test_an_optimizer_whose_training_is_over_is_not_waited_for() -> None:
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)

    def program() -> None:
        optimizers = []
        for model in (first, second):
            optimizers.append(torch.optim.SGD(model.parameters(), lr=0.1))
            for _ in range(6):
                optimizers[-1].zero_grad()
                model(torch.randn(4, 3)).square().mean().backward()
                optimizers[-1].step()

    calls = discovered(program).frame("calls")
    assert calls["step"].tolist() == [0, 1, 4, 6, 7, 10]
    assert (calls["runs"] == 1).all()


def test_an_evaluation_begins_no_look() -> None:
    model = nn.Linear(3, 2)

    def loss_of(model: nn.Module, number: int) -> torch.Tensor:
        model.eval()
        with torch.no_grad():
            model(torch.randn(7, 3))
        model.train()
        return model(torch.randn(4, 3)).square().mean()

    scope, _ = train(model, loss_of, 1)
    assert scope.calls["batch_size"].tolist() == [4]
    assert scope.calls["runs"].tolist() == [1]


def test_a_look_goes_on_until_every_optimizer_has_stepped() -> None:
    first, second = nn.Linear(3, 2), nn.Linear(2, 1)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (first, second)]
    with gradscope.watch([first, second], optimizers, on_error="raise") as scope:
        for model, optimizer, width in zip((first, second), optimizers, (3, 2), strict=True):
            optimizer.zero_grad()
            model(torch.randn(4, width)).square().mean().backward()
            optimizer.step()
    assert scope.calls["module"].tolist() == ["first", "second"]
    assert scope.calls["step"].tolist() == [0, 0]


# -- modules ----------------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 5)
        self.frozen = nn.Linear(5, 5)
        self.norm = nn.BatchNorm1d(5, momentum=0.3)
        self.head = nn.Linear(5, 2)
        self.spare = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.body(x))
        with torch.no_grad():
            y = self.frozen(x)
        return self.head(self.norm(x + y))


def test_calls_tell_mode_gradients_and_batch() -> None:
    model = Mixed()
    model.norm.eval()
    scope, _ = train(model, lambda m, i: m(torch.randn(4, 3)).square().mean(), 1)
    calls = scope.calls.set_index("module")
    assert set(calls.index) == {"", "body", "frozen", "norm", "head"}
    assert calls["with_grad"].to_dict() == {name: name != "frozen" for name in calls.index}
    assert calls["training"].to_dict() == {name: name != "norm" for name in calls.index}
    assert calls["has_graph"].to_dict() == {name: name != "frozen" for name in calls.index}
    assert (calls["batch_size"] == 4).all()
    assert "momentum=0.3" in calls.loc["norm", "settings"]
    assert not calls["checkpointed"].any()


@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_a_reentrant_checkpoint_without_a_gradient_to_start_from() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))

    def loss_of(model: nn.Module, number: int) -> torch.Tensor:
        hidden = checkpoint(model[0], torch.randn(4, 3), use_reentrant=True)
        return model[1](hidden).square().mean()

    calls = train(model, loss_of, 1)[0].calls.set_index("module")
    assert calls.loc["0", "checkpointed"]
    assert not calls.loc["1", "checkpointed"]


def test_activations_are_those_of_the_module() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Sigmoid())
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([-100.0, 0.0, 0.0, 0.0]))  # its first unit is dead
        model[2].bias.copy_(torch.tensor([100.0, 0.0]))  # and so much for a sigmoid
    x = torch.randn(6, 3)
    hidden = torch.relu(model[0](x)).detach()
    scope, _ = train(model, lambda m, i: m(x).square().mean(), 1)
    row = scope.activations.set_index("module").loc["1"]
    assert row["mean"] == pytest.approx(hidden.double().mean().item(), rel=1e-6)
    assert row["std"] == pytest.approx(hidden.double().std(correction=0).item(), rel=1e-6)
    assert row["abs_max"] == hidden.abs().max().item()
    assert row["zero_fraction"] == pytest.approx((hidden == 0).double().mean().item())
    assert row["dead_fraction"] == (hidden == 0).all(0).double().mean().item() >= 0.25
    assert scope.activations.set_index("module").loc["3", "saturated_fraction"] == 0.5


def test_activation_functions_are_read_where_no_module_stands_for_them() -> None:
    scope, _ = train(Mixed(), lambda m, i: m(torch.randn(4, 3)).square().mean(), 1)
    relu = scope.activations.loc[scope.activations["module_type"] == "relu"]
    assert relu["module"].tolist() == [""]
    twice = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    rows = train(twice, lambda m, i: m(torch.randn(4, 3)).square().mean(), 1)[0].activations
    assert rows["module_type"].tolist() == ["Linear", "ReLU"]


# -- inputs, targets, losses -------------------------------------------------------------------


def test_batches_are_described() -> None:
    x = torch.randn(8, 3) * torch.tensor([1.0, 100.0, 1.0]) + 2
    y = torch.tensor([0, 1, 1, 0, 1, 1, 0, 1])
    scope, _ = train(nn.Linear(3, 2), lambda m, i: F.cross_entropy(m(x), y), 1)
    batches = scope.batches.set_index("role")
    given = batches.loc["input"]
    columns = x.double().std(dim=0, correction=0)
    assert given["scale_ratio"] == pytest.approx((columns.max() / columns.min()).item(), rel=1e-6)
    assert (given["min"], given["max"]) == (x.min().item(), x.max().item())
    assert given["mean"] == pytest.approx(x.double().mean().item(), rel=1e-6)
    assert batches.loc["target", "distinct"] == 2


def test_only_what_the_model_is_given_is_its_input() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Tanh(), nn.Linear(8, 3)))
    scope, _ = train(
        model, lambda m, _: F.cross_entropy(m(torch.randn(5, 6)), torch.ones(5).long())
    )
    inputs = scope.batches.loc[scope.batches["role"] == "input"]
    assert set(inputs["shape"]) == {"(5, 6)"}
    assert not inputs["step"].duplicated().any()


def test_a_loss_knows_what_it_was_given_and_who_made_that() -> None:
    def loss_of(model: nn.Module, number: int) -> torch.Tensor:
        p = model(torch.ones(6, 3)).softmax(-1)
        return F.cross_entropy(p.view(6, 4), torch.arange(6) % 4, reduction="sum")

    scope, _ = train(nn.Linear(3, 4), loss_of, 1)
    (loss,) = scope.losses.to_dict("records")
    assert (loss["function"], loss["reduction"]) == ("cross_entropy", "sum")
    assert (loss["input_made_by"], loss["input_dim"]) == ("Softmax", 1)
    assert (loss["n_classes"], loss["class_dim"]) == (4, 1)
    assert loss["input_row_sum"] == pytest.approx(1)
    assert loss["reached"]
    assert loss["line"] == line_of(loss_of, "F.cross_entropy")
    assert loss["made_at_line"] == line_of(loss_of, "softmax")
    assert loss["value"] == pytest.approx(scope.steps["loss"][0])


def test_a_loss_that_no_backward_came_past_tells_whom_it_would_have_trained() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.left(self.body(x)), self.right(self.body(x))

    def loss_of(model: nn.Module, number: int) -> torch.Tensor:
        left, right = model(torch.randn(4, 3))
        F.cross_entropy(left, torch.tensor([0, 1, 0, 1]))
        return F.mse_loss(right, torch.zeros(4, 2))

    losses = train(Two(), loss_of, 1)[0].losses.set_index("function")
    assert losses["reached"].to_dict() == {"cross_entropy": False, "mse_loss": True}
    assert losses.loc["cross_entropy", "left_out"] == "left.bias, left.weight"


# -- strangers ---------------------------------------------------------------------------------


def test_parameters_made_in_the_forward_are_strangers_that_do_not_recur() -> None:
    class Wrapping(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, nn.Parameter(self.weight * 2), self.bias)

    model = nn.Sequential(Wrapping(3, 2))
    strangers = train(model, lambda m, i: m(torch.randn(4, 3)).square().mean(), 5)[0].strangers
    assert strangers["is_parameter"].all()
    assert not strangers["recurs"].any()
    assert (strangers["module"] == "0").all()
    assert (strangers["line"] == line_of(Wrapping.forward, "F.linear")).all()


def test_a_leaf_outside_of_all_models_recurs() -> None:
    shift = torch.zeros(2, requires_grad=True)
    scope, _ = train(
        nn.Linear(3, 2), lambda m, i: (m(torch.randn(4, 3)) + shift).square().mean(), 5
    )
    assert scope.strangers["recurs"].tolist() == [False, True, True]
    assert not scope.strangers["is_parameter"].any()


def test_what_lies_in_a_plain_list_is_found_and_named() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = [nn.Linear(3, 3), {"last": nn.Linear(3, 3)}]
            self.out = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.hidden[1]["last"](self.hidden[0](x)))

    scope, _ = train(Listed(), lambda m, i: m(torch.randn(4, 3)).square().mean(), 3)
    params = scope.params.set_index("param")
    assert {"hidden[0].weight", "hidden[1]['last'].bias"} < set(params.index)
    assert not params.loc["hidden[0].weight", "registered"]
    assert (
        params.loc["hidden[0].weight", "norm_first"] == params.loc["hidden[0].weight", "norm_last"]
    )
    assert params.loc["out.weight", "norm_first"] != params.loc["out.weight", "norm_last"]


# -- backwards ---------------------------------------------------------------------------------


def test_graphs_that_are_held_are_counted_and_others_are_not() -> None:
    kept: list[torch.Tensor] = []

    def keeping(model: nn.Module, number: int) -> torch.Tensor:
        loss = model(torch.randn(4, 3)).square().mean()
        kept.append(loss)
        return loss / 2  # the root itself is not what is kept

    def healthy(model: nn.Module, number: int) -> torch.Tensor:
        return model(torch.randn(4, 3)).square().mean()

    assert train(nn.Linear(3, 2), keeping, 6)[0].backwards["n_alive"].tolist() == list(range(6))
    assert train(nn.Linear(3, 2), healthy, 6)[0].backwards["n_alive"].max() <= 1


def test_a_root_that_is_met_again_is_known() -> None:
    def twice(model: nn.Module, number: int) -> torch.Tensor:
        loss = model(torch.randn(4, 3)).square().mean()
        loss.backward(retain_graph=True)
        return loss

    repeats = train(nn.Linear(3, 2), twice, 2)[0].backwards["repeats"]
    assert repeats.isna().tolist() == [True, False, True, False]
    assert repeats.dropna().tolist() == [0, 2]


def test_a_loss_behind_another_loss_is_no_repetition() -> None:
    def behind(model: nn.Module, number: int) -> torch.Tensor:
        inner = model(torch.randn(4, 3)).square().mean()
        inner.exp().backward(retain_graph=True)
        return inner + model(torch.randn(4, 3)).square().mean()

    assert train(nn.Linear(3, 2), behind, 3)[0].backwards["repeats"].isna().all()


def test_discarded_backwards_and_shared_gradients() -> None:
    model = nn.Linear(3, 2)
    first = torch.optim.SGD(model.parameters(), lr=0.1)
    second = torch.optim.SGD([model.weight], lr=0.1)
    with gradscope.watch(model, [first, second], on_error="raise") as scope:
        for _ in range(2):
            for _ in range(2):
                first.zero_grad()
                model(torch.randn(4, 3)).square().mean().backward()
            first.step()
            second.step()
    steps = scope.steps
    assert steps["backwards"].tolist()[0] == "1"
    assert steps["discarded"].tolist()[0] == "0"
    shared = scope.grads.set_index(["step", "param"])["used_by_another"]
    assert not shared.loc[(0, "weight")]
    assert shared.loc[(1, "weight")]
    assert not shared.loc[(2, "bias")]


def test_scaled_losses_and_steps_of_a_scaler() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for number in range(2):
            optimizer.zero_grad()
            loss = model(torch.randn(4, 3)).square().mean()
            if number:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
    assert scope.backwards["scaled"].tolist() == [True, False]
    assert scope.steps["through_scaler"].tolist() == [True, False]


# -- values that are not finite -----------------------------------------------------------------


def root_of_zero(model: nn.Module, number: int) -> torch.Tensor:
    out = model(torch.ones(4, 3)) * (number != 5)
    return out.square().sum(1).sqrt().mean()


def log_of_zero(model: nn.Module, number: int) -> torch.Tensor:
    p = torch.softmax(model(torch.ones(4, 3)) * (1e6 if number == 5 else 1), 1)
    return -p.log().sum(1).mean()


def masked(model: nn.Module, number: int) -> torch.Tensor:
    scores = model(torch.ones(4, 3))
    if number == 5:
        scores = scores.masked_fill(torch.ones(4, 2, dtype=torch.bool), float("-inf"))
    return torch.softmax(scores, 1)[:, 0].mean()


@pytest.mark.parametrize(
    ("loss_of", "operation", "line"),
    [
        (root_of_zero, "Sqrt: the square root of 0 (4 values)", "sqrt()"),
        (log_of_zero, "Log: the logarithm of 0", "p.log()"),
        (masked, "Softmax: Softmax gave NaN", "torch.softmax"),
    ],
)
def test_the_operation_that_first_gave_no_finite_value_is_found(
    loss_of: LossOf, operation: str, line: str
) -> None:
    scope, _ = train(nn.Linear(3, 2), loss_of, 8)
    found = scope.events.loc[scope.events["event"] == "nonfinite"]
    assert found["detail"].iloc[0].startswith(operation)
    assert found["line"].iloc[0] == line_of(loss_of, line)


def test_of_several_operations_alike_the_guilty_one_is_found() -> None:
    def loss_of(model: nn.Module, number: int) -> torch.Tensor:
        out = model(torch.ones(4, 3))
        fine = out.square().sum(1).sqrt()
        bad = (out * (number != 3)).square().sum(1).sqrt()
        return (fine + bad).mean()

    scope, _ = train(nn.Linear(3, 2), loss_of, 6)
    found = scope.events.loc[scope.events["event"] == "nonfinite"]
    assert found["line"].iloc[0] == line_of(loss_of, "bad = ")


def test_finite_losses_are_not_traced() -> None:
    scope, _ = train(nn.Linear(3, 2), lambda m, i: m(torch.randn(4, 3)).norm().sqrt(), 8)
    assert "nonfinite" not in set(scope.events["event"])


# -- weights ------------------------------------------------------------------------------------


def test_units_that_stay_alike_are_counted_and_broken_symmetry_is_not() -> None:
    def constant() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        for parameter in model.parameters():
            nn.init.constant_(parameter, 0.3)
        return model

    x, y = torch.randn(16, 3), torch.arange(16) % 2
    params = train(constant(), lambda m, i: F.cross_entropy(m(x), y))[0].params
    first = params.set_index("param").loc["0.weight"]
    assert first["n_symmetric_looks"] == first["n_looks"] >= 4
    random = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    nn.init.zeros_(random[2].weight)  # a last layer of zeros is soon another one
    params = train(random, lambda m, i: F.cross_entropy(m(x), y))[0].params.set_index("param")
    # Its rows are equal at first, but their gradients are not.
    assert params.loc["2.weight", "n_symmetric_looks"] == 0 < params.loc["2.weight", "n_looks"]
    assert params.loc["0.weight", "n_symmetric_looks"] <= 1


def test_rows_of_a_gradient_are_equal_but_for_rounding() -> None:
    weight = nn.Parameter(torch.ones(4, 3))
    weight.grad = torch.ones(4, 3) + 1e-6 * torch.rand(4, 3)
    assert read_symmetry([weight]).flags.value().tolist() == [[1, 1]]
    weight.grad = torch.ones(4, 3) + 1e-2 * torch.rand(4, 3)
    assert read_symmetry([weight]).flags.value().tolist() == [[0, 0]]


def test_stacked_weights_have_units_of_their_own() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 5.0], [3.0, 5.0]]))
    weight.grad = weight.detach() ** 2
    assert read_symmetry([weight]).flags.value().tolist() == [[0, 0]]
    assert read_symmetry([weight], [2]).flags.value().tolist() == [[1, 0]]
    assert read_symmetry([weight], [4]).flags.value().tolist() == [[0, 0]]  # one unit each
    weight = nn.Parameter(weight.detach().T.contiguous())
    weight.grad = torch.ones(2, 4)
    assert read_symmetry([weight]).flags.value().tolist() == [[0, 0]]


def test_two_embeddings_that_began_alike_were_never_to_be_tied() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Embedding(5, 3)
            self.right = copy.deepcopy(self.left)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.left(x) * self.right(x)).sum(1)

    scope, _ = train(Towers(), lambda m, i: m(torch.arange(5)).mean(), 2)
    assert scope.params["copy_of"].tolist() == ["", ""]


def test_an_output_layer_that_began_as_a_copy_of_the_embedding() -> None:
    class Tied(nn.Module):
        def __init__(self, *, copies: bool) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            if copies:
                self.head.weight.data = self.embedding.weight.data.clone()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(x))

    for copies, expected in ((True, "embedding.weight"), (False, "")):
        scope, _ = train(
            Tied(copies=copies),
            lambda m, i: F.cross_entropy(m(torch.arange(5)), torch.arange(5)),
            2,
        )
        assert scope.params.set_index("param").loc["head.weight", "copy_of"] == expected


def test_attributes_that_freeze_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].requires_grad = False
    model[1].weight.require_grad = False
    scope, _ = train(model, lambda m, i: m(torch.randn(4, 3)).square().mean(), 2)
    assert scope.models["ineffective_freezes"].tolist() == [
        "0.requires_grad, 1.weight.require_grad"
    ]
    frozen = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 2))
    scope, _ = train(frozen, lambda m, i: m(torch.randn(4, 3)).square().mean(), 2)
    assert scope.models["ineffective_freezes"].tolist() == [""]


# -- programs that nobody edited ----------------------------------------------------------------


def test_weights_that_are_results_are_told_at_the_second_backward() -> None:
    def program() -> None:
        leaf = torch.randn(3, 2, requires_grad=True)
        weight = leaf * 0.1
        for _ in range(3):
            (torch.randn(4, 3) @ weight).square().mean().backward(retain_graph=True)

    events = discovered(program).frame("events")
    assert "non_leaf" in set(events["event"])


def image_through_a_view() -> None:
    pixels = torch.randn(12, requires_grad=True)
    image = pixels.view(3, 4)
    for _ in range(3):
        image.square().mean().backward()
        pixels.data.sub_(0.1 * pixels.grad)
        pixels.grad = None


def hidden_state_that_is_carried_over() -> None:
    weight, hidden = torch.randn(3, 3, requires_grad=True), torch.zeros(1, 3)
    for _ in range(3):
        hidden = torch.tanh((hidden + 1) @ weight)
        hidden.square().mean().backward(retain_graph=True)


@pytest.mark.parametrize("program", [image_through_a_view, hidden_state_that_is_carried_over])
def test_what_is_shared_for_other_reasons_is_no_such_weight(program: Callable[[], None]) -> None:
    assert "non_leaf" not in set(discovered(program).frame("events")["event"])


def test_modules_know_the_line_that_made_them() -> None:
    def program() -> None:
        model = nn.Sequential(
            nn.Linear(3, 2),
            nn.Softmax(dim=1),
        )
        criterion = nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            criterion(model(torch.randn(4, 3)), torch.tensor([0, 1, 0, 1])).backward()
            optimizer.step()

    run = discovered(program)
    calls = run.frame("calls").set_index("module_type")
    assert (calls.loc["Softmax", "line"] == line_of(program, "nn.Softmax")).all()
    loss = run.frame("losses").iloc[0]
    assert loss["owner"] == "CrossEntropyLoss"
    assert loss["owner_line"] == line_of(program, "nn.CrossEntropyLoss")
    assert loss["made_at_line"] == line_of(program, "nn.Softmax")


# -- names of modules ---------------------------------------------------------------------------


def test_modules_of_a_model_that_is_found_within_the_look_have_its_name() -> None:
    torch.manual_seed(0)
    first, second = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 2)
    scope = Scope(Session(WatchOptions(), discovers=True))
    with scope:
        optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            second(first(torch.randn(5, 3))).sum().backward()
            optimizer.step()
    at_first = scope.calls.loc[scope.calls["step"] == 0, "module"]
    assert list(at_first) == ["first", "first.0", "first.1", "second"]
    activations = scope.activations.loc[scope.activations["step"] == 0, "module"]
    assert list(activations) == ["first.0", "first.1", "second"]


def test_a_loss_within_a_sum_that_is_propagated_back_again() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(3):
            out = model(torch.randn(4, 3))
            part, other = out.square().mean(), out.abs().mean()
            optimizer.zero_grad()
            part.backward(retain_graph=True)
            (0.5 * (part + other)).backward()
            optimizer.step()
    repeats = scope.backwards["repeats"]
    assert list(repeats.isna()) == [True, False] * 3
    assert list(repeats.dropna()) == [0, 2, 4]
    assert "GS402" in {finding.code for finding in scope.findings}
