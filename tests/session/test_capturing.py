"""``gradscope.graph`` and ``gradscope.capture``: a graph without a watch."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import gradscope
from gradscope.errors import ScopeStateError, UsageError
from gradscope.taps.module_calls import module_calls


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
        self.decoder = nn.Linear(3, 4)
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.spare = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, cut: bool = False) -> torch.Tensor:
        z = self.encoder(x)
        return self.frozen(self.decoder(z.detach() if cut else z))


@dataclasses.dataclass
class Output:
    loss: Any
    logits: Any
    note: str = "text"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda a, b: (a, b),
        lambda a, b: [a, [b, None]],
        lambda a, b: {"first": a, "rest": {"second": b}},
        lambda a, b: Output(a, (b, 3.0)),
        lambda a, b: (a, b, a),
    ],
)
def test_any_nesting_of_tensors_is_a_loss(wrap: Any) -> None:
    x = torch.randn(3, requires_grad=True)
    graph = gradscope.graph(wrap(x.exp().sum(), x.mean()))
    roots = graph.nodes[graph.nodes["is_root"]]["op"].tolist()
    assert roots == ["SumBackward0", "MeanBackward0"]


@pytest.mark.parametrize("wrong", [None, 3.0, [], {}, "loss", nn.Linear(1, 1)])
def test_something_without_a_tensor_is_named(wrong: Any) -> None:
    with pytest.raises(UsageError, match=r"^loss must be a tensor"):
        gradscope.graph(wrong)


def test_a_loss_without_a_graph_says_so() -> None:
    graph = gradscope.graph(torch.ones(()))
    assert len(graph) == 0
    assert "it has no graph" in (graph._repr_svg_() or "")


@pytest.mark.parametrize(
    "names_of",
    [
        lambda model: model,
        lambda model: model.named_parameters(),
        lambda model: dict(model.named_parameters()),
        lambda model: [model],
    ],
)
def test_parameters_have_names_before_and_after_the_backward(names_of: Any) -> None:
    model = Net()
    loss = model(torch.randn(2, 4)).sum()
    expected = {"encoder.0.weight", "encoder.0.bias", "decoder.weight", "decoder.bias"}
    before = gradscope.graph(loss, names_of(model))
    loss.backward()
    after = gradscope.graph(loss, names_of(model))
    assert set(before.nodes["param"].dropna()) == set(after.nodes["param"].dropna()) == expected
    assert before.nodes["module"].isna().all()


def test_gradients_that_are_there_can_be_laid_over() -> None:
    model = Net()
    loss = model(torch.randn(2, 4)).sum()
    loss.backward()
    picture = gradscope.graph(loss, model).to_graphviz(overlay="grad_norm").source
    norm = model.decoder.weight.grad.double().norm().item()  # type: ignore[union-attr]
    assert f"|grad| {norm:.3g}" in picture


def test_a_wrong_model_is_named() -> None:
    loss = torch.ones(1, requires_grad=True).sum()
    with pytest.raises(UsageError, match=r"^model must be a dict.*int 3"):
        gradscope.graph(loss, 3)
    with pytest.raises(UsageError, match=r"^model must be a torch\.nn\.Module.*str"):
        gradscope.capture("model")


class TestCapture:
    def test_tells_which_module_made_what(self) -> None:
        model = Net()
        with gradscope.capture(model) as c:
            loss = model(torch.randn(2, 4)).sum()
            inside = c.graph(loss)
        outside = c.graph(loss)
        for graph in (inside, outside):
            made = graph.nodes.dropna(subset=["module"]).groupby("module")["op"].first()
            assert set(made.index) == {"encoder.0", "encoder.1", "decoder", "frozen"}
            assert made["encoder.1"] == "TanhBackward0"

    def test_tells_what_does_not_lead_to_the_loss(self) -> None:
        model = Net()
        with gradscope.capture(model) as c:
            loss = model(torch.randn(2, 4), cut=True).sum()
        missing = c.graph(loss).unreached.set_index("path")
        assert missing["why"].to_dict() == {
            "encoder": "cut off",
            "spare": "not called",
            "frozen.weight": "frozen",
            "frozen.bias": "frozen",
        }
        assert missing.loc["encoder", "taken_by"] == ("decoder",)
        assert missing.loc["encoder", "nodes_made"] == 3
        assert missing.loc["encoder", "params"] == ("encoder.0.weight", "encoder.0.bias")

    def test_a_reentrant_checkpoint_is_not_called_cut_off(self) -> None:
        class Checkpointed(Net):
            def forward(self, x: torch.Tensor, cut: bool = False) -> torch.Tensor:
                z = torch.utils.checkpoint.checkpoint(self.encoder, x, use_reentrant=True)
                return self.decoder(z)

        model = Checkpointed()
        with gradscope.capture(model) as c:
            loss = model(torch.randn(2, 4, requires_grad=True)).sum()
        missing = c.graph(loss).unreached.set_index("path")["why"].to_dict()
        assert "encoder" not in missing
        assert not any(path.startswith("encoder.") for path in missing)

    def test_leaves_no_trace_and_changes_no_bit(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        x = torch.randn(8, 4)
        torch.manual_seed(1)
        bare = model(x)
        torch.manual_seed(1)
        with gradscope.capture(model, lines=True) as c:
            seen = model(x)
            twin = copy.deepcopy(model)
            pickle.dumps(model)
        assert torch.equal(bare, seen)
        assert module_calls.listeners == ()
        assert not torch.overrides._get_current_function_mode_stack()
        twin(x)
        assert len(c.graph(seen.sum()).modules) == 4

    def test_keeps_no_graph_alive(self) -> None:
        model = nn.Linear(4, 4)
        gc.collect()
        gc.disable()
        try:
            with gradscope.capture(model) as c:
                hidden = model(torch.randn(2, 4)).exp()
                reference = weakref.ref(hidden)
                graph = c.graph(hidden.sum())
                del hidden
                assert reference() is None
            assert len(graph) > 3
        finally:
            gc.enable()

    def test_ends_with_an_exception(self) -> None:
        model = nn.Linear(4, 4)
        with pytest.raises(RuntimeError), gradscope.capture(model, lines=True):
            model(torch.randn(2, 3))
        assert module_calls.listeners == ()
        assert not torch.overrides._get_current_function_mode_stack()

    def test_is_entered_once(self) -> None:
        model = nn.Linear(4, 4)
        with gradscope.capture(model) as c, pytest.raises(ScopeStateError), c:
            pass

    def test_knows_lines_if_asked(self) -> None:
        model = nn.Linear(4, 4)
        with gradscope.capture(model, lines=True) as c:
            loss = model(torch.randn(2, 4)).exp().sum()
        nodes = c.graph(loss).nodes.dropna(subset=["line"])
        assert set(nodes["file"]) == {__file__}
        assert "ExpBackward0" in set(nodes["op"])

    def test_knows_no_line_of_what_was_made_after_it(self) -> None:
        model = nn.Linear(4, 4)
        with gradscope.capture(model, lines=True) as c:
            hidden = model(torch.randn(2, 4)).exp()
        nodes = c.graph(hidden.sin()).nodes.set_index("op")
        assert nodes.loc["ExpBackward0", "file"] == __file__
        assert nodes.loc["SinBackward0"].isna()["line"]

    def test_several_models_have_names_of_their_own(self) -> None:
        first, second = nn.Linear(4, 4), nn.Linear(4, 4)
        with gradscope.capture([first, second]) as c:
            loss = second(first(torch.randn(2, 4))).sum()
        nodes = c.graph(loss).nodes
        assert set(nodes["module"].dropna()) == {"model0", "model1"}
        assert "model1.weight" in set(nodes["param"].dropna())

    def test_a_compiled_model_is_one_operation(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        compiled = torch.compile(model, backend="aot_eager")
        compiled(torch.randn(2, 4)).sum().backward()
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        with gradscope.capture(compiled) as c:
            loss = compiled(torch.randn(2, 4)).sum()
        graph = c.graph(loss)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
        assert "CompiledFunctionBackward" in set(graph.nodes["op"])
        assert len(graph.modules) == 0


def test_make_dot_by_keyword() -> None:
    model = Net()
    with gradscope.capture(model) as c:
        loss = model(torch.randn(2, 4)).sum()
    plain = gradscope.make_dot(loss, params=model)
    assert "lightblue" in plain.source
    folded = gradscope.make_dot(loss, params=dict(model.named_parameters()), fold="op")
    assert "decoder.weight" in folded.source
    assert "lightblue" not in folded.source
    assert "subgraph cluster" in gradscope.make_dot(loss, capture=c).source
    assert gradscope.make_dot(loss, max_nodes=5).source.count("label=<") <= 7
    with pytest.raises(UsageError, match="either these, or show_attrs"):
        gradscope.make_dot(loss, fold="op", show_attrs=True)
    with pytest.raises(UsageError, match="engine='dot'"):
        gradscope.make_dot(loss, engine="dot")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_make_dot_hands_over_to_torchviz() -> None:
    torchviz = pytest.importorskip("torchviz")
    loss = nn.Linear(2, 1)(torch.ones(1, 2)).sum()
    theirs = torchviz.make_dot(loss).source
    assert gradscope.make_dot(loss, engine="torchviz").source == theirs
    deep = torch.ones(2, requires_grad=True)
    for _ in range(3_000):
        deep = deep + 1
    with pytest.raises(gradscope.GradscopeError, match="engine='gradscope'"):
        gradscope.make_dot(deep, engine="torchviz")


def test_a_repetition_of_modules_and_operations_is_called_by_its_first_and_last() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([layer(x).tanh() for layer in (self.q, self.k, self.v)])

    model = Heads()
    with gradscope.capture(model) as c:
        loss = model(torch.randn(2, 4)).sum()
    assert "<B>q … v ×3</B>" in c.graph(loss).to_graphviz(fold="op").source


class Chained(nn.Module):
    """Six layers in a row; the fourth may take the input of all, or share a weight."""

    def __init__(self, shares: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
        if shares:
            self.layers[3].weight = self.layers[1].weight
            self.layers[5] = self.layers[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x


def test_layers_that_share_weights_now_and_then_are_not_drawn_as_those_that_do_not() -> None:
    sources = []
    for shares in (False, True):
        model = Chained(shares)
        with gradscope.capture(model) as c:
            loss = model(torch.randn(2, 4, requires_grad=True)).sum()
        graph = c.graph(loss)
        sources.append(graph.to_graphviz(depth=3).source)
    assert "×6" in sources[0]
    assert "×6" not in sources[1]
    assert "×5" not in sources[1]


def test_a_turn_that_begins_anew_is_drawn_otherwise_than_one_that_goes_on() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.linear(x) + y

    class Turns(nn.Module):
        def __init__(self, anew: bool) -> None:
            super().__init__()
            self.stem, self.anew = nn.Linear(4, 4), anew
            self.blocks = nn.ModuleList(Block() for _ in range(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            start = h = self.stem(x)
            seen = []
            for number, block in enumerate(self.blocks):
                is_third = number == 3
                h = block(start if is_third and self.anew else h, start if is_third else h)
                seen.append(h)
            return seen[5] + seen[2]

    sources = []
    for anew in (False, True):
        torch.manual_seed(0)
        model = Turns(anew)
        with gradscope.capture(model) as c:
            loss = model(torch.randn(2, 4, requires_grad=True)).sum()
        sources.append(c.graph(loss).to_graphviz().source)
    assert sources[0] != sources[1]


def test_a_module_whose_owner_uses_its_weight_is_not_called_unused() -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.part.weight)

    model = Owner()
    with gradscope.capture(model) as c:
        loss = model(torch.randn(2, 4)).sum()
    missing = c.graph(loss).unreached
    assert missing[["path", "why"]].to_numpy().tolist() == [["part.bias", "unused"]]


def test_a_graph_is_compared_with_a_graph() -> None:
    graph = gradscope.graph(torch.ones(1, requires_grad=True).sum())
    with pytest.raises(UsageError, match="other is int"):
        graph.diff(3)  # type: ignore[arg-type]
