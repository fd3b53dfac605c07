"""GS401 to GS406 and GS601 to GS609: broken loops, and healthy ones that look alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradscope
from gradscope.rules import Findings

RULES = {
    *("GS401", "GS402", "GS403", "GS404", "GS405", "GS406"),
    *("GS601", "GS603", "GS604", "GS605", "GS606", "GS607", "GS609"),
}


def train(
    model: nn.Module,
    steps: int = 12,
    *,
    make_x: Callable[[], torch.Tensor] = lambda: torch.randn(16, 6),
    make_y: Callable[[torch.Tensor], torch.Tensor] = lambda x: (x[:, 0] > 0).long(),
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = F.cross_entropy,
    backward: Callable[[torch.Tensor], object] = torch.Tensor.backward,
    lr: float = 0.1,
) -> Findings:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(steps):
            x = make_x()
            loss = loss_of(model(x), make_y(x))
            optimizer.zero_grad()
            backward(loss)
            optimizer.step()
    return scope.findings


def told(findings: Findings) -> list[str]:
    return [f.code for f in findings if f.severity > 0 and f.code in RULES]


def mlp(depth: int = 1, act: type[nn.Module] = nn.ReLU, n_out: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(6, 16), act()]
    for _ in range(depth - 1):
        layers += [nn.Linear(16, 16), act()]
    return nn.Sequential(*layers, nn.Linear(16, n_out))


def test_a_loop_without_backward() -> None:
    findings = train(mlp(), backward=lambda loss: None)
    assert told(findings) == ["GS401"]
    assert "loss.backward()" in findings[0].fix


def test_a_loop_that_goes_back_twice() -> None:
    def twice(loss: torch.Tensor) -> None:
        loss.backward(retain_graph=True)
        loss.backward()

    findings = train(mlp(), backward=twice)
    assert told(findings) == ["GS402"]
    assert findings[0].file == __file__


def test_two_losses_with_two_backwards_are_silent() -> None:
    def two(loss: torch.Tensor) -> None:
        (loss * 0.5).backward(retain_graph=True)
        (loss * 0.5).backward()

    assert not told(train(mlp(), backward=two))


def test_a_deep_sigmoid_network_and_a_deep_residual_one() -> None:
    findings = train(mlp(9, nn.Sigmoid), 8)
    assert told(findings) == ["GS403"]
    assert findings[0].params[0] == "0.weight"
    assert not told(train(mlp(9, nn.ReLU), 8))


def test_an_initialisation_that_explodes() -> None:
    model = mlp(5)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=2.0)
    assert set(told(train(model, lr=1e-9))) & {"GS404", "GS604"}


def test_a_regression_that_explodes_and_one_of_large_numbers() -> None:
    def squared(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(out, y)

    def residual(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(1e4 * out - out.detach(), y)

    def regression(
        scale: float,
        of_targets: float,
        loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = squared,
    ) -> list[str]:
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1)])
        with torch.no_grad():
            model[2].weight.mul_(scale)
        return told(
            train(
                model,
                make_y=lambda x: of_targets * x[:, :1],
                loss_of=loss_of,
                lr=1e-9,
            )
        )

    assert regression(1e4, 1.0) == ["GS404"]
    assert regression(1e4, 0.01) == ["GS404"]
    assert not regression(1.0, 1.0)
    assert not regression(1.0, 1e4)  # house prices
    assert not regression(1.0, 1e-4)  # targets far smaller than the first predictions
    assert not regression(1.0, 1.0, residual)  # of an equation with a large coefficient


def test_a_loss_scaled_by_hand_is_no_alarm() -> None:
    def scaled(loss: torch.Tensor) -> None:
        (1e4 * loss).backward()

    assert "GS404" not in told(train(mlp(), backward=scaled, lr=1e-6))


def test_a_logarithm_of_zero() -> None:
    def log_loss(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return -torch.log(torch.softmax(1000 * out, 1)[torch.arange(len(y)), y]).mean()

    findings = train(mlp(), loss_of=log_loss)
    assert told(findings)[0] == "GS405"
    assert "ogarithm" in findings[0].message


@pytest.mark.parametrize(
    ("pass_on", "not_from"),
    [
        (lambda out: out[:, :1], "Slice"),
        (lambda out: out.relu()[:, :1].reshape(-1), "Relu"),
        (lambda out: out.T[0], "Select"),
    ],
)
def test_an_operation_that_passes_a_value_on_has_not_made_it_infinite(
    pass_on: Callable[[torch.Tensor], torch.Tensor], not_from: str
) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[1].weight.fill_(3e38)
    findings = train(
        model,
        steps=2,
        make_x=lambda: torch.ones(8, 6),
        loss_of=lambda out, y: pass_on(out).square().mean(),
    )
    assert told(findings)[0] == "GS405"
    assert "Addmm gave infinity" in findings[0].message
    assert not_from not in findings[0].message


def test_a_norm_at_zero() -> None:
    def norm_loss(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((out - out.detach()) ** 2).sum(1).sqrt().mean() + F.cross_entropy(out, y)

    assert told(train(mlp(), loss_of=norm_loss))[0] == "GS405"


def test_scaler_that_looks_for_its_scale_is_silent() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(20):
            x = torch.randn(16, 6)
            optimizer.zero_grad()
            scaler.scale(16 * F.cross_entropy(model(x), (x[:, 0] > 0).long())).backward()
            scaler.step(optimizer)
            scaler.update()
    assert "GS405" not in told(scope.findings)


class PassesOver(torch.optim.Adam):
    """Does nothing where a gradient is not finite."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        params = [p for group in self.param_groups for p in group["params"]]
        if all(bool(p.grad.isfinite().all()) for p in params if p.grad is not None):
            super().step()


class NumbersInstead(torch.optim.SGD):
    """Takes zeros for what is not finite."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        kept = [(p, p.grad) for group in self.param_groups for p in group["params"]]
        for p, gradient in kept:
            p.grad = None if gradient is None else gradient.nan_to_num(0.0, 0.0, 0.0)
        super().step()
        for p, gradient in kept:
            p.grad = gradient


@pytest.mark.parametrize("kind", [PassesOver, NumbersInstead, torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("puts_back", [False, True])
def test_gradients_that_an_optimizer_passes_over(
    kind: type[torch.optim.Optimizer], puts_back: bool
) -> None:
    """One row of an embedding gets a NaN, which no later batch comes past."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12, 6), nn.Linear(6, 3))
    optimizer = kind(model.parameters(), lr=1e-2)  # type: ignore[call-arg]
    with gradscope.watch(model[0], optimizer, on_error="raise") as scope:
        for step in range(40):
            kept = {name: value.clone() for name, value in model.state_dict().items()}
            at = torch.randint(0, 11, (16,)) if step != 11 else torch.full((16,), 11)
            loss = F.cross_entropy(model(at), at % 3)
            optimizer.zero_grad()
            loss.backward()
            if step == 11:
                model[0].weight.grad[11] = float("nan")
            optimizer.step()
            if puts_back and step == 11:
                model.load_state_dict(kept)
    passes_over = kind in (PassesOver, NumbersInstead) and not puts_back
    assert ("GS405" in told(scope.findings)) is not passes_over


@pytest.mark.parametrize(("kind", "is_healthy"), [(PassesOver, True), (torch.optim.Adam, False)])
def test_losses_that_an_optimizer_passes_over(
    kind: type[torch.optim.Adam], is_healthy: bool
) -> None:
    torch.manual_seed(0)
    model = mlp()
    optimizer = kind(model.parameters(), lr=1e-2)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for step in range(40):
            x = torch.randn(16, 6)
            target = x[:, :3].abs() if step not in (11, 39) else torch.full((16, 3), torch.nan)
            loss = F.mse_loss(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert told(scope.findings) == ([] if is_healthy else ["GS405"])


def test_dead_units() -> None:
    model = mlp()
    nn.init.constant_(model[0].bias, -50.0)
    findings = train(model)
    assert told(findings) == ["GS406"]
    assert "1" in findings[0].modules
    assert "0.weight" in findings[0].params


def test_an_output_that_dies_soon() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1), nn.ReLU())

    def below_zero(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (out[:, 0] + y + 1).square().mean()

    (finding,) = train(model, 60, loss_of=below_zero, lr=0.1)
    assert (finding.code, finding.modules) == ("GS406", ("3",))
    assert finding.params == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert 0 < finding.step_first < 30


def test_functional_relu_that_is_dead() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
            nn.init.constant_(self.a.bias, -50.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(x)))

    torch.manual_seed(0)
    assert told(train(Net())) == ["GS406"]


def test_zeros_that_move_on_are_silent() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.a = nn.Linear(6, 3), nn.Linear(6, 2, bias=False)
            self.b = nn.Linear(2, 3, bias=False)
            nn.init.zeros_(self.b.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.b(torch.relu(self.a(x)))

    torch.manual_seed(0)
    assert not told(train(Adapted()))


class LowRank(nn.Module):
    """A linear layer with an adapter of two matrices; ``second`` may be without use."""

    def __init__(self, first: torch.Tensor, second: torch.Tensor, scale: float = 1.0) -> None:
        super().__init__()
        self.base, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        self.a, self.b, self.scale = nn.Parameter(first), nn.Parameter(second), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.base(x) + self.scale * (x @ self.a.T @ self.b.T)))


def test_an_adapter_of_which_both_matrices_are_zero_stays_zero() -> None:
    torch.manual_seed(0)
    (finding,) = train(LowRank(torch.zeros(2, 6), torch.zeros(8, 2)))
    assert (finding.code, finding.params) == ("GS605", ("a", "b"))
    assert not told(train(LowRank(torch.randn(2, 6), torch.zeros(8, 2))))
    assert not told(train(LowRank(torch.zeros(2, 6), torch.randn(8, 2))))
    # Here the zeros are not why nothing is learnt.
    assert "GS605" not in told(train(LowRank(torch.randn(2, 6), torch.zeros(8, 2), scale=0.0)))


def test_all_weights_zero() -> None:
    model = mlp()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert told(train(model))[0] == "GS605"


class Raw(nn.Module):
    """Matrices of its own, on the right of products."""

    def __init__(self, first: torch.Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(first), nn.Parameter(torch.zeros(12, 3))
        self.bias = nn.Parameter(torch.zeros(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.a + self.bias) @ self.b


class Recurrent(nn.Module):
    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer, self.out = layer, nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.layer(x[:, None].expand(-1, 8, -1))[0][:, -1])


def test_raw_matrices_of_equal_columns_and_recurrent_layers_of_equal_units() -> None:
    torch.manual_seed(0)
    assert "GS605" in told(train(Raw(torch.zeros(6, 12))))
    # A last layer of zeros is well, as is a low-rank pair of which one is zero.
    assert not told(train(Raw(torch.randn(6, 12))))
    for kind in (nn.GRU, nn.LSTM, nn.RNN):
        model = Recurrent(kind(6, 8, batch_first=True))
        assert not told(train(model))
        for number, weight in enumerate(model.layer.parameters()):
            nn.init.constant_(weight, 0.1 * (number + 1))
        nn.init.constant_(model.out.weight, 0.1)
        assert told(train(model)) == ["GS605"]
        nn.init.orthogonal_(model.layer.weight_hh_l0)
        with torch.no_grad():  # gates that begin alike, of units that do not
            model.layer.weight_ih_l0.copy_(torch.randn(8, 6).repeat(len(weight) // 8, 1))
        assert not told(train(model))


def test_one_unit_alone_is_like_itself() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.out = nn.GRU(6, 1, batch_first=True), nn.Linear(1, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.layer(x[:, None].expand(-1, 3, -1))[0][:, -1])

    torch.manual_seed(0)
    assert not told(train(Single()))


def test_equal_columns_that_are_used_alike_on_purpose_are_silent() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.place = nn.Linear(6, 3), nn.Parameter(torch.zeros(16, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) + self.place.mean(1, keepdim=True)

    torch.manual_seed(0)
    assert not told(train(Positions()))


def test_a_bias_of_zeros_that_is_averaged_is_silent() -> None:
    class Tagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.extra = nn.Linear(6, 3), nn.Parameter(torch.zeros(4, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.fc(x)[:, None] + self.extra).mean(1)

    torch.manual_seed(0)
    assert not told(train(Tagged()))


def test_a_flipped_sign() -> None:
    findings = train(mlp(), 30, loss_of=lambda out, y: -F.cross_entropy(out, y))
    assert "GS603" in told(findings)


def test_constant_targets_and_sorted_ones() -> None:
    constant = train(mlp(), make_y=lambda x: torch.ones(16, dtype=torch.long))
    assert told(constant) == ["GS606"]
    calls = iter(range(100))
    by_class = train(mlp(), make_y=lambda x: torch.full((16,), next(calls) // 4))
    assert "GS606" not in told(by_class)


@pytest.mark.parametrize("n_candidates", [4, 5])
def test_candidates_of_which_the_first_is_right_are_silent(n_candidates: int) -> None:
    """As many outputs as candidates are classes."""

    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores: torch.Tensor = self.body(x[:, None] + torch.randn(16, n_candidates, 6))
            return scores.squeeze(-1)

    def first(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(16, dtype=torch.long)

    torch.manual_seed(0)
    assert "GS606" not in told(train(Scores(), make_y=first))
    assert told(train(mlp(n_out=n_candidates), make_y=first)) == ["GS606"]


@pytest.mark.parametrize("bias", [False, True])
def test_pairs_whose_first_is_preferred_are_silent(bias: bool) -> None:
    torch.manual_seed(0)
    findings = train(
        nn.Linear(6, 1, bias=bias),
        make_y=lambda x: torch.ones(16, 1),
        loss_of=F.binary_cross_entropy_with_logits,
    )
    assert ("GS606" in told(findings)) is bias


@pytest.mark.parametrize("is_rare", [True, False])
@pytest.mark.parametrize("n_out", [1, 2])
def test_a_class_that_is_rare_is_silent(is_rare: bool, n_out: int) -> None:
    """It is there at step 21 and 35 only, between closer looks."""
    steps = iter(range(40))

    def rare(x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros(16, dtype=torch.long)
        y[:2] = next(steps) in (21, 35) and is_rare
        return y if n_out == 2 else y[:, None].float()

    findings = train(
        mlp(n_out=n_out),
        steps=40,
        make_y=rare,
        loss_of=F.cross_entropy if n_out == 2 else F.binary_cross_entropy_with_logits,
        lr=1.0,
    )
    assert ("GS606" in told(findings)) is not is_rare


def test_one_class_whose_loss_leaps_under_a_dropout_is_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 3))
    findings = train(
        model,
        steps=150,
        make_x=lambda: torch.randn(8, 6),
        make_y=lambda x: torch.zeros(8, dtype=torch.long),
        lr=1.0,
    )
    assert told(findings) == ["GS606"]


def test_contrastive_targets_are_silent() -> None:
    def contrastive(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        similar = torch.cat([out.pow(2).sum(1, keepdim=True), out @ out.T], 1) / 0.5
        return F.cross_entropy(similar, torch.zeros(16, dtype=torch.long))

    assert "GS606" not in told(train(mlp(), loss_of=contrastive))


def test_inputs_of_hundreds_and_the_same_behind_a_normalisation() -> None:
    def large() -> torch.Tensor:
        return 500 * torch.rand(16, 6)

    def target(x: torch.Tensor) -> torch.Tensor:
        return (x[:, 0] > 250).long()

    findings = train(mlp(), make_x=large, make_y=target, lr=1e-6)
    assert "GS607" in told(findings)
    normalised = nn.Sequential(nn.BatchNorm1d(6), *mlp())
    assert not told(train(normalised, make_x=large, make_y=target))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_prices_into_a_recurrent_layer(kind: type[nn.RNNBase]) -> None:
    class Scaled(Recurrent):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward((x - 4000) / 40)

    def prices() -> torch.Tensor:
        return 4000 + 40 * torch.randn(16, 6)

    def target(x: torch.Tensor) -> torch.Tensor:
        return (x[:, 0] > 4000).long()

    torch.manual_seed(2)  # with which some unit has all gates of an LSTM open
    layer = kind(6, 8, batch_first=True)
    assert told(train(Recurrent(layer), make_x=prices, make_y=target)) == ["GS607"]
    torch.manual_seed(0)  # with which all have one that is closed
    assert "GS607" in told(train(Recurrent(kind(6, 8)), make_x=prices, make_y=target))
    layer = kind(6, 8, batch_first=True)
    assert not told(train(Scaled(layer), make_x=prices, make_y=target))


def test_labels_without_a_relation_to_inputs() -> None:
    def chance(x: torch.Tensor) -> torch.Tensor:
        return torch.randint(0, 3, (len(x),))

    def batch() -> torch.Tensor:
        return torch.randn(64, 6)

    assert told(train(mlp(), 120, make_x=batch, make_y=chance)) == ["GS609"]
    assert not told(train(mlp(), 120, make_x=batch, lr=0.5))


def test_labels_that_are_memorised_and_labels_that_are_mostly_noise() -> None:
    torch.manual_seed(1)
    x, y = torch.randn(1920, 6), torch.randint(0, 3, (1920,))
    passes = [batch for _ in range(5) for batch in torch.arange(1920).split(64)]

    def run(target: Callable[[torch.Tensor], torch.Tensor], lr: float) -> list[str]:
        batches = iter(passes)
        chosen: list[torch.Tensor] = []

        def batch() -> torch.Tensor:
            chosen[:] = [next(batches)]
            return x[chosen[0]]

        found = train(
            mlp(), len(passes), make_x=batch, make_y=lambda _: target(x)[chosen[0]], lr=lr
        )
        return told(found)

    def noisy(inputs: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.rand(len(inputs)) < 0.8, y, inputs[:, :3].argmax(1))

    assert run(lambda inputs: y, 0.5) == ["GS609"]
    assert not run(noisy, 0.5)
    # A learning rate with which there is little to be seen of learning yet.
    assert not run(lambda inputs: inputs[:, :3].argmax(1), 0.002)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_an_ordinary_first_loss_is_silent(scale: float) -> None:
    assert not told(train(mlp(), loss_of=lambda out, y: F.cross_entropy(scale * out, y)))


@pytest.mark.parametrize("how", ["functions", "one module"])
def test_one_of_two_activations_is_dead(how: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.act = nn.ReLU()
            nn.init.constant_(self.b.bias, -50.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            act = torch.relu if how == "functions" else self.act
            result: torch.Tensor = self.c(act(self.b(act(self.a(x)))))
            return result

    torch.manual_seed(0)
    assert told(train(Net())) == ["GS406"]


def test_inputs_that_are_not_numbers() -> None:
    def with_gaps() -> torch.Tensor:
        x = torch.randn(16, 6)
        x[0, 0] = float("nan")
        return x

    torch.manual_seed(0)
    findings = train(mlp(), make_x=with_gaps)
    assert told(findings)[0] == "GS405"
    assert "input" in findings[0].message
    assert "data" in findings[0].fix


def test_the_root_of_a_negative_number() -> None:
    torch.manual_seed(0)
    findings = train(
        mlp(), loss_of=lambda out, y: F.cross_entropy(torch.sqrt(out - out.max() - 1), y)
    )
    assert "square root of a negative number" in findings[0].message
