from __future__ import annotations

import gc
import re
import subprocess
import sys
import warnings
import weakref
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from gradscope.errors import UsageError
from gradscope.graphs.torchviz_style import draw_statements
from gradscope.instruments.dot_statements import CommentStatement, NodeStatement, dot_statements

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import graphviz

    from gradscope.instruments.dot_statements import DotStatement

Case = tuple[Any, dict[str, torch.Tensor]]


def statements_of(
    var: Any,
    params: Any = None,
    show_attrs: bool = False,
    show_saved: bool = False,
    max_attr_chars: int = 50,
) -> list[DotStatement]:
    return dot_statements(
        var,
        params,
        show_attrs=show_attrs,
        show_saved=show_saved,
        max_attr_chars=max_attr_chars,
    )


def make_dot(var: Any, params: Any = None, **how: Any) -> graphviz.Digraph:
    return draw_statements(statements_of(var, params, **how))


def torchviz_make_dot(*arguments: Any, **how: Any) -> graphviz.Digraph:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it compares versions with the old distutils
        return pytest.importorskip("torchviz").make_dot(*arguments, **how)


def renumbered(picture: graphviz.Digraph) -> list[str]:
    """The picture's statements in their order, its boxes called after when they first appear."""
    numbers: dict[str, int] = {}

    def number(name: str) -> int:
        return numbers.setdefault(name, len(numbers))

    statements = []
    for line in picture.body:
        if edge := re.fullmatch(r"\t(\w+) -> (\w+)(.*)\n", line):
            statements.append(f"{number(edge[1])} -> {number(edge[2])}{edge[3]}")
        else:
            node = re.fullmatch(r"\t(\w+) (\[.*\])\n", line, re.DOTALL)
            assert node, line
            statements.append(f"{number(node[1])} {node[2]}")
    return statements


def boxes(var: Any, params: Any = None, **how: Any) -> list[tuple[str, str | None]]:
    """Label and colour of every box."""
    return [
        (each.label, each.fill)
        for each in statements_of(var, params, **how)
        if isinstance(each, NodeStatement)
    ]


def table_of(operation: str, var: Any) -> dict[str, str]:
    """What the first box of ``operation`` lists."""
    label = next(
        label for label, _ in boxes(var, show_attrs=True) if label.split("\n")[0] == operation
    )
    rows = [line.split(":", 1) for line in label.split("\n")[2:]]
    return {name.strip(): text.strip() for name, text in rows}


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        result = x * scale
        ctx.save_for_backward(x, scale, result)
        ctx._saved_by_hand = scale
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, scale, _ = ctx.saved_tensors
        return grad * scale, (grad * x).sum_to_size(scale.shape)


class SavesNone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(None, x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad * 2


def mlp() -> Case:
    model = nn.Sequential()
    model.add_module("W0", nn.Linear(8, 16))
    model.add_module("tanh", nn.Tanh())
    model.add_module("W1", nn.Linear(16, 1))
    x = torch.randn(1, 8)
    return model(x).mean(), dict(model.named_parameters()) | {"x": x}


def lstm_cell() -> Case:
    cell = nn.LSTMCell(128, 128)
    x = torch.randn(3, 128)
    return cell(x), dict(cell.named_parameters()) | {"x": x}


def double_backward() -> Case:
    x = torch.randn(1, requires_grad=True)

    def double(value: torch.Tensor) -> torch.Tensor:
        loss = (value**3).sum()
        (grad,) = torch.autograd.grad(loss, value, create_graph=True)
        return grad.pow(2).sum() + loss

    return double(x), {"x": x}


def gradient_penalty() -> Case:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(5, 4, requires_grad=True)
    loss = F.softplus(model(x)).mean()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + (grad.norm(2, dim=1) - 1).pow(2).mean(), dict(model.named_parameters())


def views() -> Case:
    w = torch.randn(4, 6, requires_grad=True)
    x = w.exp()
    first, second = x[:2], x.t()[0]
    return (first, second, x, w.view(-1), torch.ones(3)[1]), {"w": w}


def view_written_to() -> Case:
    w = torch.randn(4, 6, requires_grad=True)
    x = w * 2
    row = x[1]
    row.mul_(3)
    return (row, x.sum()), {"w": w}


def several_outputs() -> Case:
    w, b = (torch.randn(3, requires_grad=True) for _ in range(2))
    x = w.exp()
    y = x * b
    # One is saved by another, one is behind another, one is a leaf, one comes twice, one has no
    # graph.
    return (y, x, w, b.detach(), y, x.split([1, 2])[1]), {"w": w, "b": b}


def custom_functions() -> Case:
    w, scale = torch.randn(2, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    constant = torch.ones(3)
    loss = Scaled.apply(Scaled.apply(w, scale).sigmoid(), constant).sum() + w.sum()
    return (loss, constant), {"w": w, "s": scale}


def tensors_in_tuples() -> Case:
    w, rows = torch.randn(5, 3, requires_grad=True), torch.tensor([0, 1])
    x = w[rows, rows] * w[rows, None, rows].sum()
    # The index is itself an output, though an operation has saved it.
    return (x.unbind()[1], rows), {"": w}


def attention() -> Case:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    named = dict(layer.named_parameters())
    return layer(torch.randn(2, 3, 8)).pow(2).mean(), named


def convolution() -> Case:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    return model(torch.randn(2, 3, 8, 8)).logsumexp((1, 2, 3)), dict(model.named_parameters())


def odd_tensors() -> Case:
    w = torch.randn(2, 0, dtype=torch.complex64, device="meta", requires_grad=True)
    return torch.view_as_real(w @ w.mT).sum(), {"w": w}


def large() -> Case:
    w = torch.randn(2, requires_grad=True)
    x = w
    for _ in range(50):
        x = x * w  # the page grows with the number of statements
    return x, {"w": w}


CASES = [
    mlp,
    lstm_cell,
    double_backward,
    gradient_penalty,
    views,
    view_written_to,
    several_outputs,
    custom_functions,
    tensors_in_tuples,
    attention,
    convolution,
    odd_tensors,
    large,
]


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("show_saved", [True, False])
@pytest.mark.parametrize("show_attrs", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_is_torchviz_s_picture_statement_for_statement(
    case: Callable[[], Case], show_attrs: bool, show_saved: bool, named: bool
) -> None:
    var, params = case()
    how = {"show_attrs": show_attrs, "show_saved": show_saved}
    ours = make_dot(var, params if named else None, **how)
    theirs = torchviz_make_dot(var, params if named else None, **how)
    assert renumbered(ours) == renumbered(theirs)
    assert ours.graph_attr == theirs.graph_attr
    assert ours.node_attr == theirs.node_attr
    assert ours.edge_attr == theirs.edge_attr
    assert (type(ours), ours.name, ours.comment) == (type(theirs), theirs.name, theirs.comment)


def test_the_comparison_sees_all_there_is() -> None:
    w = torch.ones(2, requires_grad=True)
    assert renumbered(torchviz_make_dot(w.view(1, 2), {"w": w})) == [
        '0 [label="\n (1, 2)" fillcolor=darkolivegreen1]',
        "1 [label=ViewBackward0]",
        "2 -> 1",
        '3 [label="w\n (2)" fillcolor=lightblue]',
        "3 -> 2",
        "2 [label=AccumulateGrad]",
        "1 -> 0",
        "3 -> 0 [style=dotted]",
    ]
    assert torchviz_make_dot(*large()).graph_attr != torchviz_make_dot(w).graph_attr


@pytest.mark.parametrize("max_attr_chars", [-1, 3, 4, 11, 12, 13, 1000])
def test_long_values_are_cut_as_torchviz_cuts_them(max_attr_chars: int) -> None:
    x = torch.randn(1, 1, 1, 1, 1, 2, requires_grad=True).sum((0, 1, 2)).expand(7, 1, 2)
    how: dict[str, Any] = {"show_attrs": True, "max_attr_chars": max_attr_chars}
    assert renumbered(make_dot(x, **how)) == renumbered(torchviz_make_dot(x, **how))


@pytest.mark.parametrize("var", [torch.ones(2, 3), torch.ones(2, requires_grad=True)])
def test_a_tensor_without_a_graph_is_one_box(var: torch.Tensor) -> None:
    ours = make_dot(var, {"x": var})
    assert renumbered(ours) == renumbered(torchviz_make_dot(var, {"x": var}))
    assert len(ours.body) == 1


def test_says_in_a_comment_that_nothing_requires_grad() -> None:
    text = "nothing that was given requires grad: there is no autograd graph"
    alone = make_dot((torch.ones(2), torch.ones(3)[0]))
    assert alone.comment == text
    assert alone.source.startswith(f"// {text}\ndigraph")
    w = torch.ones(2, requires_grad=True)
    for var in (w, w * 2, (torch.ones(2), w)):
        assert make_dot(var).comment is None
        assert not any(isinstance(each, CommentStatement) for each in statements_of(var))


@pytest.mark.parametrize("n", [20_000, pytest.param(200_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("saved", [False, True])
def test_a_deep_graph_is_drawn_and_freed(n: int, saved: bool) -> None:
    # In a process of its own: a stack that overflows ends the process.
    program = f"""
import sys, threading, torch
from gradscope.graphs.torchviz_style import draw_statements
from gradscope.instruments.dot_statements import dot_statements

def draw():
    w = torch.ones(2, requires_grad=True)
    x = w
    for _ in range({n}):
        x = x * w
    statements = dot_statements(
        x, {{"w": w}}, show_attrs={saved}, show_saved={saved}, max_attr_chars=50
    )
    del x
    assert len(statements) == {7 if saved else 3} * {n} + 5, len(statements)
    if {n} < 100_000:
        assert len(draw_statements(statements).body) == len(statements)
    print("drawn and freed")

threading.stack_size(2**20)
thread = threading.Thread(target=draw)
thread.start()
thread.join()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "drawn and freed\n", "")


def test_after_the_backward_what_it_freed_is_said_to_be_freed() -> None:
    w = torch.randn(3, requires_grad=True)
    loss = (F.pad(w, (1, 1)).exp()[torch.tensor([0, 1])] * 3).pow(2).sum()
    plain = renumbered(make_dot(loss))
    before = table_of("PowBackward0", loss), table_of("IndexBackward0", loss)
    loss.backward()
    after = table_of("PowBackward0", loss), table_of("IndexBackward0", loss)
    assert before[0] == {"exponent": "2", "self": "[saved tensor]"}
    assert after[0] == {"exponent": "2", "self": "[freed]"}
    assert before[1] == {"indices": "[saved tensors]", "self_sym_sizes": "(5,)"}
    assert after[1] == {"indices": "[freed]", "self_sym_sizes": "(5,)"}
    # An optional tensor that was never given is not freed; nor is a number.
    assert table_of("MulBackward0", loss) == {"other": "[freed]", "self": "None"}
    assert renumbered(make_dot(loss)) == plain == renumbered(make_dot(loss, show_saved=True))


def test_after_the_backward_a_custom_function_has_no_saved_tensors() -> None:
    w, scale = torch.randn(3, requires_grad=True), torch.randn(3)
    loss = Scaled.apply(w, scale).sum()
    drawn = [label for label, fill in boxes(loss, {"w": w, "s": scale}) if fill == "orange"]
    assert drawn == ["w\n (3)", "s\n (3)", "\n (3)"]
    loss.backward()
    assert [fill for _, fill in boxes(loss)].count("orange") == 0
    assert table_of("ScaledBackward", loss) == {"by_hand": "[saved tensor]"}


def test_a_retained_graph_has_its_saved_tensors() -> None:
    var, params = custom_functions()
    var[0].backward(retain_graph=True)
    ours = make_dot(var, params, show_attrs=True, show_saved=True)
    theirs = torchviz_make_dot(var, params, show_attrs=True, show_saved=True)
    assert renumbered(ours) == renumbered(theirs)


def test_what_was_changed_in_place_is_drawn_all_the_same() -> None:
    y = torch.randn(3, requires_grad=True).exp()
    z = y.pow(2)
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torchviz_make_dot(z, show_saved=True)
    saved = [label for label, fill in boxes(z, show_saved=True) if fill == "orange"]
    assert saved == ["self\n (3)", "result\n (3)"]


def test_a_checkpointed_forward_does_not_run_again() -> None:
    w = torch.randn(3, requires_grad=True)
    runs = []

    def block(x: torch.Tensor) -> torch.Tensor:
        runs.append(x)
        return Scaled.apply(x.exp(), torch.ones(3)).sin()

    loss = checkpoint(block, w, use_reentrant=False).pow(2).sum()
    assert len(runs) == 1
    state = torch.get_rng_state()
    labels = boxes(loss, {"w": w}, show_attrs=True, show_saved=True)
    assert len(runs) == 1
    assert torch.equal(torch.get_rng_state(), state)
    # The power lies outside of the checkpoint; `by_hand` is no saved tensor that torch knows of.
    assert [label for label, fill in labels if fill == "orange"] == ["self\n (3)", "by_hand\n (3)"]
    assert table_of("SinBackward0", loss) == {"self": "[packed by a hook]"}
    assert table_of("ExpBackward0", loss) == {"result": "[packed by a hook]"}
    loss.backward()
    assert len(runs) == 2
    assert table_of("SinBackward0", loss) == {"self": "[freed]"}
    assert len(runs) == 2


PACKERS: list[Callable[[torch.Tensor], Any]] = [
    lambda tensor: tensor.detach().numpy(),
    lambda tensor: tensor.half(),  # a tensor, but not the one that was saved
    lambda tensor: None,
]


@pytest.mark.parametrize("pack", PACKERS, ids=["object", "tensor", "none"])
def test_what_a_hook_packed_is_not_unpacked(pack: Callable[[torch.Tensor], Any]) -> None:
    def unpack(packed: Any) -> torch.Tensor:
        raise AssertionError("unpacked")

    w = torch.randn(3, requires_grad=True)
    with saved_tensors_hooks(pack, unpack):
        x = Scaled.apply(w.exp()[torch.tensor([0, 2])], torch.ones(2))
        del x.grad_fn._saved_by_hand
    how = {"show_attrs": True, "show_saved": True}
    assert not any(fill == "orange" for _, fill in boxes(x, **how))
    assert table_of("ExpBackward0", x) == {"result": "[packed by a hook]"}
    assert table_of("IndexBackward0", x)["indices"] == "[packed by a hook]"


def test_of_several_saved_tensors_those_that_no_hook_packed_are_drawn() -> None:
    w = torch.randn(3, 3, requires_grad=True)
    x = w[torch.tensor([0, 1]), torch.tensor([1, 2])]
    x.grad_fn._raw_saved_indices[0].register_hooks(lambda t: t, lambda t: 1 / 0)
    y = Scaled.apply(x, torch.ones(1))
    del y.grad_fn._saved_by_hand
    y.grad_fn._raw_saved_tensors[0].register_hooks(lambda t: t, lambda t: 1 / 0)
    saved = [label for label, fill in boxes(y, show_saved=True) if fill == "orange"]
    assert saved == ["indices[1]\n (2)", "\n (1)", "\n (2)"]
    assert table_of("IndexBackward0", y)["indices"] == "[packed by a hook]"


def test_a_custom_function_may_have_saved_none() -> None:
    drawn = boxes(SavesNone.apply(torch.randn(3, requires_grad=True)))
    assert [label for label, fill in drawn if fill == "orange"] == ["\n (3)"]


class Raising:
    def __str__(self) -> str:
        raise OSError("no text")


def test_whatever_a_custom_function_keeps_is_listed() -> None:
    x = Scaled.apply(torch.randn(3, requires_grad=True), torch.ones(3))
    x.grad_fn._saved_by_hand = Raising()
    x.grad_fn._saved_note = "a note"
    x.grad_fn._saved_some = (None, torch.ones(2))
    x.grad_fn.variable = "not a leaf"
    assert table_of("ScaledBackward", x) == {
        "by_hand": "[unreadable]",
        "note": "a note",
        "some": "[saved tensors]",
    }
    assert ("some[1]\n (2)", "orange") in boxes(x, show_saved=True)


class MadeWhenRead(tuple):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return (torch.ones(n) for n in range(20))


def test_tensors_that_live_for_a_moment_only_have_boxes_of_their_own() -> None:
    x = Scaled.apply(torch.randn(3, requires_grad=True), torch.ones(3))
    x.grad_fn._saved_some, x.grad_fn._saved_others = MadeWhenRead(), MadeWhenRead()
    named = [
        each.name
        for each in statements_of(x, show_saved=True)
        if isinstance(each, NodeStatement) and each.label.startswith(("some[", "others["))
    ]
    assert len(named) == len(set(named)) == 40


@dataclass
class Output:
    loss: torch.Tensor
    parts: Any = None
    late: torch.Tensor = field(init=False)


Pair = namedtuple("Pair", "first second")


def contained(loss: torch.Tensor, aux: torch.Tensor) -> list[Any]:
    inside_itself: list[Any] = [loss, aux]
    inside_itself.append(inside_itself)
    return [
        [loss, aux],
        {"loss": loss, "aux": aux},
        OrderedDict(loss=loss, nothing=None, aux=aux),
        Output(loss, {"aux": [3.5, (aux,)], "name": "a name", "type": Output}),
        Pair(None, [[[loss]], {"aux": aux, "again": loss}]),
        ((), [loss], {}, aux, object(), nn.ReLU()),
        inside_itself,
    ]


@pytest.mark.parametrize("at", range(7))
def test_finds_the_tensors_in_whatever_a_model_returns(at: int) -> None:
    w = torch.randn(3, requires_grad=True)
    loss, aux = w.exp().sum(), w.sin()
    ours = make_dot(contained(loss, aux)[at], {"w": w})
    assert renumbered(ours) == renumbered(torchviz_make_dot((loss, aux), {"w": w}))


def test_deeply_nested_outputs_need_no_recursion() -> None:
    var: Any = torch.ones(2, requires_grad=True).exp()
    for _ in range(100_000):
        var = [var]
    assert len(boxes(var)) == 4
    while isinstance(var, list):  # it would be freed recursively, too
        (var,) = var


@pytest.mark.parametrize(
    ("var", "said"),
    [
        (None, "this is None"),
        ([], "this is empty list"),
        ({}, "this is empty dict"),
        (("loss", None), "this is tuple of str, NoneType"),
        (list(range(9)), "this is list of int, int, int, int, int, …"),
        ("loss", "this is str 'loss'"),
        (0.25, "this is float 0.25"),
        (Output, "this is of type type"),
        (nn.Linear(2, 2), r"this is of type Linear \(call the model and pass what it returns\)"),
        (
            torch.ones(2, requires_grad=True).exp().grad_fn,
            r"this is of type ExpBackward0 \(pass the tensor whose grad_fn it is\)",
        ),
    ],
)
def test_names_what_it_was_given_instead_of_a_tensor(var: Any, said: str) -> None:
    with pytest.raises(UsageError, match=f"^var must be a tensor, or .*; {said}$"):
        statements_of(var)


def test_takes_names_in_every_form() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    loss = model(torch.ones(4, 2)).sum()
    expected = renumbered(torchviz_make_dot(loss, dict(model.named_parameters())))
    assert '"0.weight' in "".join(expected)
    for params in (
        model,
        dict(model.named_parameters()),
        list(model.named_parameters()),
        model.named_parameters(),
        [list(pair) for pair in model.named_parameters()],
        OrderedDict(model.named_parameters()).items(),
    ):
        assert renumbered(make_dot(loss, params)) == expected


def tied() -> tuple[nn.Module, torch.Tensor]:
    model = nn.ModuleDict({"wte": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["wte"].weight
    return model, model["head"](model["wte"](torch.tensor([1, 2]))).sum()


def test_tied_weights_bear_all_their_names() -> None:
    model, loss = tied()
    both = dict(model.named_parameters(remove_duplicate=False))
    assert len(both) == 2
    for params in (model, both, list(both.items()), [*both.items(), *both.items()]):
        named = [label for label, fill in boxes(loss, params) if fill == "lightblue"]
        assert named == ["wte.weight\nhead.weight\n (5, 3)"]


@pytest.mark.parametrize(
    ("params_of", "said"),
    [
        (lambda model: model.parameters(), "item 0 of the generator is of type Parameter"),
        (lambda model: model.weight, "this is of type Parameter"),
        (lambda model: "weight", "this is str 'weight'"),
        (lambda model: 3, "this is int 3"),
        (lambda model: {"weight": 3}, "'weight' is the name of int 3"),
        (lambda model: {"weight": None}, "'weight' is the name of None"),
        (lambda model: [(model.weight, "weight")], "is the name of str 'weight'"),
        (
            lambda model: [("w", model.weight), ("w", model.weight, 3)],
            "item 1 of the list is tuple of str, Parameter, int",
        ),
        (lambda model: [model, 3], "item 0 of the list is of type Linear"),
    ],
)
def test_names_what_it_was_given_instead_of_names(
    params_of: Callable[[nn.Module], Any], said: str
) -> None:
    model = nn.Linear(2, 2)
    loss = model(torch.ones(1, 2)).sum()
    with pytest.raises(UsageError, match=rf"^params must be (?s:.*), or a model; .*{said}$"):
        statements_of(loss, params_of(model))


class Sizeless(torch.Tensor):
    def size(self, *_: Any) -> Any:
        raise OSError("no size")


def nested(layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, says torch
        parts = [torch.ones(2, 3), torch.ones(4, 3)]
        return torch.nested.nested_tensor(parts, layout=layout, requires_grad=True) * 2


def compressed() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in beta state, says torch
        return torch.eye(3).to_sparse_csr()


@pytest.mark.parametrize(
    ("tensor_of", "text"),
    [
        (lambda: nested(torch.strided), "(nested)"),
        (lambda: nested(torch.jagged), r"(2, j\d+, 3)"),
        (lambda: torch.eye(3).to_sparse().requires_grad_() * 2, "(3, 3)"),
        (lambda: compressed().requires_grad_() * 2, "(3, 3)"),
        (lambda: torch.ones(3, 0, requires_grad=True).exp(), "(3, 0)"),
        (lambda: torch.ones(4, dtype=torch.complex64, requires_grad=True).exp(), "(4)"),
        (lambda: torch.ones(4, device="meta", requires_grad=True).exp(), "(4)"),
        (lambda: torch.ones(4, requires_grad=True).as_subclass(Sizeless).exp(), "(size unknown)"),
    ],
)
def test_every_kind_of_tensor_is_drawn(tensor_of: Callable[[], torch.Tensor], text: str) -> None:
    tensor = tensor_of()
    drawn = boxes(tensor, {"w": tensor}, show_attrs=True, show_saved=True)
    assert re.fullmatch("w\n " + text.replace("(", r"\(").replace(")", r"\)"), drawn[0][0])
    assert drawn[0][1] == "darkolivegreen1"
    assert "AccumulateGrad" in [label for label, _ in drawn]


def test_a_view_made_in_inference_mode_is_drawn() -> None:
    with torch.inference_mode():
        tensor = torch.ones(3, 2)[0]
    assert boxes(tensor) == [("\n (2)", "darkolivegreen1")]


def test_names_are_no_markup() -> None:
    w = torch.ones(2, requires_grad=True)
    picture = make_dot(w.exp(), {r"C:\new <w> " "& co": w})
    assert r'[label="C:\\new <w> & co' in picture.source


def test_the_program_s_own_modes_see_nothing_of_it() -> None:
    seen = []

    class Counting(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    var, params = views()
    with Counting():
        statements_of(var, params, show_attrs=True, show_saved=True)
    assert seen == []


@pytest.mark.parametrize("case", CASES)
def test_is_the_same_twice(case: Callable[[], Case]) -> None:
    var, params = case()
    how = {"show_attrs": True, "show_saved": True}
    first = statements_of(var, params, **how)
    assert statements_of(var, params, **how) == first
    assert make_dot(var, params, **how).source == draw_statements(first).source


def test_keeps_nothing_alive() -> None:
    class Held(torch.Tensor):
        pass

    gc.disable()
    try:
        w = torch.ones(2, requires_grad=True)
        # An operation's input, its output, and what a custom Function has saved.
        hidden = w.exp()
        scale = torch.ones(2).as_subclass(Held)
        loss = Scaled.apply(hidden.pow(2), scale).sum()
        gone = [weakref.ref(each) for each in (w, hidden, scale, loss)]
        statements = statements_of([loss], {"w": w, "h": hidden}, True, True)
        del hidden, scale
        assert all(ref() is not None for ref in gone)  # the graph has them
        del loss, w
        assert [ref() for ref in gone] == [None] * 4
    finally:
        gc.enable()
    assert {type(part) for each in statements for part in each} <= {str, tuple, type(None)}


def test_changes_no_gradient() -> None:
    def train(draw: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        var, params = gradient_penalty()
        if draw:
            make_dot(var, params, show_attrs=True, show_saved=True)
        var.backward()
        return [param.grad for param in params.values() if param.grad is not None]

    plain, drawn = train(draw=False), train(draw=True)
    assert len(plain) == len(drawn) > 0
    assert all(map(torch.equal, plain, drawn))
