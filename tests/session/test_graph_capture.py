"""Which graphs a watch captures, and what they know."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import gradscope
from gradscope.errors import ScopeStateError, UsageError
from gradscope.graphs.theme import THEMES
from gradscope.taps.module_calls import module_calls

if TYPE_CHECKING:
    from pathlib import Path


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.head = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, rounds: int = 1) -> torch.Tensor:
        for _ in range(rounds):
            x = self.body(x)
        return self.head(x)


def train(rounds: list[int], **options: Any) -> gradscope.Scope:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gradscope.watch(model, optimizer, on_error="raise", **options) as scope:
        for n in rounds:
            loss = model(torch.randn(3, 4), n).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return scope


def captured_steps(scope: gradscope.Scope, n_steps: int) -> list[int]:
    steps = []
    for step in range(n_steps):
        try:
            scope.graph(step)
        except ScopeStateError:
            continue
        steps.append(step)
    return steps


@pytest.mark.parametrize(
    ("graph", "steps"),
    [
        ("first", [0]),
        ("changed", [0, 2, 4]),
        ("every", [0, 1, 2, 3, 4]),
        ([1, 3], [1, 3]),
        (range(2), [0, 1]),
        (3, [3]),
        (None, []),
    ],
)
def test_the_graphs_that_are_asked_for(graph: Any, steps: list[int]) -> None:
    scope = train([1, 1, 2, 2, 1], graph=graph)
    assert captured_steps(scope, 5) == steps
    for step in steps:
        nodes = scope.graph(step).nodes
        made = nodes[(nodes["op"] == "AddmmBackward0")]["module"]
        assert made.value_counts().to_dict() == {
            "body.0": 2 if step in (2, 3) else 1,
            "head": 1,
        }
    assert module_calls.listeners == ()


def test_a_word_or_number_that_is_none_is_refused() -> None:
    for wrong in ("sometimes", [-1], [0.5], 1.5):
        with pytest.raises(UsageError, match="graph="):
            train([1], graph=wrong)


def test_a_missing_graph_says_how_to_ask_for_it() -> None:
    with pytest.raises(ScopeStateError, match=r"watch\(graph=\[4\]\)"):
        train([1] * 5).graph(4)
    with pytest.raises(ScopeStateError, match="no graph was captured"):
        train([1], graph=None).graph()


def test_steps_looked_at_closely_know_the_lines_of_the_program() -> None:
    scope = train([1, 1, 1], graph=[0, 2])
    source, first = inspect.getsourcelines(train)
    line = first + next(i for i, text in enumerate(source) if ".square().mean()" in text)
    nodes = scope.graph(0).nodes.set_index("op")
    assert nodes.loc["PowBackward0", "line"] == line
    assert nodes.loc["PowBackward0", "file"] == __file__
    # In others nobody follows the calls of torch.
    assert scope.graph(2).nodes["line"].isna().all()


def test_the_graph_knows_what_is_kept_for_the_backward() -> None:
    graph = train([1]).graph()
    assert graph.nodes["saved_bytes"].sum() > 0
    of_modules = graph.modules.set_index("module")["saved_bytes"]
    # tanh keeps its result; three rows of four numbers, and so do the products their inputs.
    assert of_modules["body.1"] == 3 * 4 * 4
    assert of_modules[""] == of_modules["body"] + of_modules["head"]


def test_a_growing_graph_is_seen_to_reach_into_earlier_steps() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    total: Any = 0.0
    with gradscope.watch(model, optimizer, graph="every") as scope:
        for _ in range(3):
            total = total + model(torch.randn(3, 4)).mean()
            optimizer.zero_grad()
            torch.autograd.backward(total, retain_graph=True)
            with torch.no_grad():  # the versions of the weights must not move
                optimizer.param_groups[0]["lr"] = 0.0
            optimizer.zero_grad()
            optimizer.step()
    n_crossing = [len(scope.graph(step).crossing) for step in range(3)]
    n_own = (scope.graph(0).nodes["sequence_nr"] >= 0).sum()
    assert n_crossing[0] == 0
    assert n_own <= n_crossing[1] < n_crossing[2]


def test_nothing_crosses_in_a_healthy_loop() -> None:
    scope = train([1, 1, 1], graph="every")
    assert [len(scope.graph(step).crossing) for step in range(3)] == [0, 0, 0]


def test_a_generator_step_owns_what_was_made_before_the_discriminator_stepped() -> None:
    torch.manual_seed(0)
    g, d = nn.Linear(2, 2), nn.Linear(2, 1)
    opt_g, opt_d = torch.optim.Adam(g.parameters()), torch.optim.Adam(d.parameters())
    with gradscope.watch([g, d], [opt_g, opt_d], graph="every", on_error="raise") as scope:
        for _ in range(2):
            fake = g(torch.randn(4, 2))
            opt_d.zero_grad()
            d(fake.detach()).mean().backward()
            opt_d.step()
            opt_g.zero_grad()
            (-d(fake).mean()).backward()
            opt_g.step()
    steps = scope.steps.set_index("step")["optimizer"]
    for step in steps.index[steps == "opt_g"]:
        graph = scope.graph(step)
        assert len(graph.crossing) == 0
        assert {"g", "d"} <= set(graph.nodes["module"].dropna())


class TestOverlays:
    def svg(self, graph: gradscope.AutogradGraph, overlay: Any, folder: Path) -> str:
        return graph.render(folder / "graph.svg", overlay=overlay).read_text()

    def test_show_the_numbers_of_the_tables(self, tmp_path: Path) -> None:
        scope = train([1, 1], graph="every", every=1)
        grads = scope.grads.query("step == 1").set_index("param")["norm"]
        updates = scope.updates.query("step == 1").set_index("param")["update_ratio"]
        graph = scope.graph(1)
        norms = self.svg(graph, "grad_norm", tmp_path)
        ratios = self.svg(graph, "update_ratio", tmp_path)
        for param in grads.index:
            assert f"|grad| {grads[param]:.3g}" in norms
            assert f"update / weight {updates[param]:.3g}" in ratios

    def test_show_statuses_findings_and_bytes(self, tmp_path: Path) -> None:
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        with gradscope.watch(model, optimizer, graph="every") as scope:
            for _ in range(3):
                model(torch.randn(3, 4)).mean().backward()
                optimizer.step()
        graph = scope.graph(2)
        assert "compounded" in self.svg(graph, "grad_status", tmp_path)
        assert "GS201" in self.svg(graph, "findings", tmp_path)
        assert "keeps 48 B" in self.svg(graph, "saved_bytes", tmp_path)

    def test_alarm_only_where_a_status_or_a_finding_asks_for_it(self, tmp_path: Path) -> None:
        alarm = THEMES["light"].alarm
        healthy = train([1, 1], graph="every").graph(1)
        assert alarm not in self.svg(healthy, "grad_status", tmp_path)
        assert alarm not in self.svg(healthy, "findings", tmp_path)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        with gradscope.watch(model, optimizer, graph="every") as scope:
            for _ in range(2):
                model(torch.randn(3, 4)).mean().backward()
                optimizer.step()
        assert alarm in self.svg(scope.graph(1), "grad_status", tmp_path)
        assert alarm in self.svg(scope.graph(1), "findings", tmp_path)

    def test_mark_what_is_not_finite(self, tmp_path: Path) -> None:
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        with gradscope.watch(model, optimizer, every=1) as scope:
            (model(torch.full((1, 2), float("inf"))) * 0).sum().backward()
            optimizer.step()
        assert "2 not finite" in self.svg(scope.graph(), "nonfinite", tmp_path)

    def test_say_what_is_missing(self, tmp_path: Path) -> None:
        loss = nn.Linear(2, 1)(torch.ones(1, 2)).sum()
        graph = gradscope.graph(loss)
        for overlay in ("grad_status", "update_ratio", "grad_norm", "findings"):
            with pytest.raises(ScopeStateError, match=overlay):
                self.svg(graph, overlay, tmp_path)


def test_hooks_of_the_log_leave_with_a_watch_that_ends_in_the_middle() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = gradscope.watch(model, optimizer, graph="every", on_error="raise")
    with pytest.raises(RuntimeError), watch:
        model(torch.randn(3, 5))
    assert module_calls.listeners == ()


@pytest.mark.parametrize("graph", ["changed", "every"])
def test_training_is_the_same_to_the_last_bit(graph: str) -> None:
    def weights(watched: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        outputs = []
        scope = gradscope.watch(
            model, optimizer, graph=graph if watched else None, on_error="raise"
        )
        if watched:
            scope.start()
        for _ in range(4):
            model.train()
            loss = model(torch.randn(2, 5, 8)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                outputs.append(model(torch.randn(2, 5, 8)))
        scope.stop()
        return [*outputs, *(p.detach() for p in model.parameters()), torch.get_rng_state()]

    for ours, theirs in zip(weights(True), weights(False), strict=True):
        assert torch.equal(ours, theirs)


def test_a_loop_around_a_compiled_function_is_watched() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    @torch.compile(backend="aot_eager")
    def loss_of(x: torch.Tensor) -> torch.Tensor:
        return model(x).square().mean()

    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(torch.randn(3, 4)).backward()
            optimizer.step()
    assert list(scope.steps["outcome"]) == ["stepped"] * 3
    assert "CompiledFunctionBackward" in set(scope.graph().nodes["op"])


def test_two_optimizers_that_share_a_backward_share_its_graph(tmp_path: Path) -> None:
    model = Net()
    first = torch.optim.SGD(model.body.parameters(), lr=0.1)
    second = torch.optim.SGD(model.head.parameters(), lr=0.1)
    norms = []
    with gradscope.watch(model, [first, second], graph="every") as scope:
        for _ in range(2):
            first.zero_grad()
            second.zero_grad()
            model(torch.randn(3, 4)).square().mean().backward()
            norms.append({n: p.grad.norm().item() for n, p in model.named_parameters()})  # type: ignore[union-attr]
            first.step()
            second.step()
    picture = scope.graph(2).render(tmp_path / "graph.svg", overlay="grad_norm").read_text()
    for norm in norms[1].values():
        assert f"|grad| {norm:.3g}" in picture
    with pytest.raises(ScopeStateError, match=r"no backward of its own.*step 2"):
        scope.graph(3)


def test_micro_batches_of_another_length_are_no_difference_but_in_length() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradscope.watch(model, optimizer, graph="every", on_error="raise") as scope:
        for rounds in (2, 4):
            optimizer.zero_grad()
            for _ in range(2):
                model(torch.randn(3, 4), rounds).sum().backward()
            optimizer.step()
    difference = scope.graph(0).diff(scope.graph(1))
    assert difference
    assert "cut off" not in repr(difference)
    assert len(difference.vanished) == 0
    modules = scope.graph(1).modules
    assert (modules["nodes_reached"] == modules["nodes_made"]).all()


def test_lines_and_calls_are_forgotten_with_the_step_that_they_are_of() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        graphs = scope._session._graphs  # type: ignore[union-attr]
        for noted_before in (True, True, False):  # closer looks come at the first two steps
            loss = model(torch.randn(3, 4)).sum()
            optimizer.zero_grad()
            loss.backward()
            assert graphs.has_notes == noted_before
            optimizer.step()
            assert not graphs.has_notes
