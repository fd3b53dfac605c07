"""Differences that were made on purpose, and laws that hold for any two graphs."""

from __future__ import annotations

import dataclasses
import runpy
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from graph_makers import Forward, Value, random_dag, random_loops
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradscope
from gradscope.graphs.comparison import difference
from gradscope.graphs.difference import GraphDifference
from gradscope.graphs.fingerprint import fingerprint
from gradscope.run.captured_graph import CapturedGraph, ModuleCalls, Registered

EXAMPLES = Path(__file__).parents[2] / "examples" / "architectures.py"
ARCHITECTURES = runpy.run_path(str(EXAMPLES))["ARCHITECTURES"]
SEEDS = st.integers(0, 2**32 - 1)

Edit = Callable[[Any], None]


def captured(name: str, edit: Edit | None = None, **options: Any) -> CapturedGraph:
    model, compute_loss = ARCHITECTURES[name](**options)
    if edit is not None:
        edit(model)
    with gradscope.capture(model) as seen:
        loss = compute_loss()
    graph: CapturedGraph = seen.graph(loss).captured
    return graph


def seen(model: nn.Module, *inputs: torch.Tensor) -> CapturedGraph:
    with gradscope.capture(model) as capture:
        loss = model(*inputs).sum()
    graph: CapturedGraph = capture.graph(loss).captured
    return graph


def rows(table: pd.DataFrame) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in table.itertuples(index=False)]


def everything(found: GraphDifference) -> list[tuple[Any, ...]]:
    return sorted(rows(found.to_pandas()))


class Residual(nn.Module):
    """Two layers whose order, inputs and kinds can be changed from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.extra: nn.Module | None = None
        self.combine = lambda x, first, second: first - second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.first(x)
        second = self.second(first)
        if self.extra is not None:
            second = self.extra(second)
        return self.combine(x, first, second)


def residual(edit: Edit | None = None, batch: int = 2) -> CapturedGraph:
    model = Residual()
    if edit is not None:
        edit(model)
    return seen(model, torch.randn(batch, 4))


# -- nothing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_two_steps_of_a_loop_do_not_differ(name: str) -> None:
    model, compute_loss = ARCHITECTURES[name]()
    steps = []
    for _ in range(2):
        with gradscope.capture(model) as capture:
            loss = compute_loss()
        steps.append(capture.graph(loss).captured)
        loss.backward()
    found = difference(*steps)
    assert not found
    assert repr(found) == "no difference between the two graphs"
    for table, columns in (
        (found.appeared, ["module", "kind", "what", "n"]),
        (found.vanished, ["module", "kind", "what", "n"]),
        (found.changed, ["module", "kind", "what", "n", "before", "after"]),
        (
            found.to_pandas(),
            ["difference", "module", "kind", "what", "n", "before", "after"],
        ),
    ):
        assert list(table.columns) == columns
        assert len(table) == 0
        assert table["n"].dtype == np.int64


# -- operations -----------------------------------------------------------------------------------


def test_an_operation_in_the_place_of_another_is_told_without_what_follows_from_it() -> None:
    def edit(model: Residual) -> None:
        model.combine = lambda x, first, second: first * second

    assert everything(difference(residual(), residual(edit))) == [
        ("appeared", "", "operation", "mul 2 × 4", 1, "", ""),
        ("vanished", "", "operation", "sub 2 × 4", 1, "", ""),
    ]


def test_exchanged_inputs_are_told_one_by_one() -> None:
    def edit(model: Residual) -> None:
        model.combine = lambda x, first, second: second - first

    first, second = "from addmm in first", "from addmm in second"
    assert everything(difference(residual(), residual(edit))) == [
        ("changed", "", "operation", "sub: input 1", 1, first, second),
        ("changed", "", "operation", "sub: input 2", 1, second, first),
    ]


def test_an_input_from_another_operation_of_the_same_name_is_told_by_its_number() -> None:
    def graph(which: int) -> CapturedGraph:
        forward = Forward()
        x = forward.leaf("x")
        values = [forward.op("Mul", x), forward.op("Mul", x)]
        total = forward.op("Add", *values)
        return forward.captured(forward.op("Sub", total, values[which]))

    assert everything(difference(graph(0), graph(1))) == [
        ("changed", "", "operation", "sub: input 2", 1, "from mul #1", "from mul #2")
    ]


def test_another_output_of_the_same_operation_is_told() -> None:
    def edit(output: int) -> Edit:
        def change(model: Residual) -> None:
            model.combine = lambda x, first, second: second.split(2, dim=1)[output]

        return change

    assert everything(difference(residual(edit(0)), residual(edit(1)))) == [
        (
            "changed",
            "",
            "operation",
            "sum: input 1",
            1,
            "from output 1 of split in Residual",
            "from output 2 of split in Residual",
        )
    ]


def test_another_number_of_inputs_is_told() -> None:
    def edit(model: Residual) -> None:
        model.combine = lambda x, first, second: torch.stack([first, second, second])

    def fewer(model: Residual) -> None:
        model.combine = lambda x, first, second: torch.stack([first, second])

    found = rows(difference(residual(fewer), residual(edit)).changed)
    assert ("", "operation", "stack: number of inputs", 1, "2", "3") in found
    assert ("", "operation", "stack: output", 1, "2 × 2 × 4", "3 × 2 × 4") in found
    assert len(found) == 2


def test_other_shapes_and_dtypes_are_told_where_they_are() -> None:
    found = difference(residual(batch=2), residual(batch=3))
    shape = ("2 × 4", "3 × 4")
    assert everything(found) == [
        ("changed", "", "operation", "sub: output", 1, *shape),
        ("changed", "first", "operation", "addmm: output", 1, *shape),
        ("changed", "second", "operation", "addmm: output", 1, *shape),
    ]
    model = Residual().double()
    found = difference(residual(), seen(model, torch.randn(2, 4, dtype=torch.float64)))
    assert len(found.appeared) == len(found.vanished) == 0
    assert Counter(zip(found.changed["kind"], found.changed["what"], strict=True)) == {
        ("operation", "addmm: dtype"): 2,
        ("operation", "t (transpose): dtype"): 2,
        ("operation", "sub: dtype"): 1,
        ("operation", "sum: dtype"): 1,
        ("parameter", "weight: dtype"): 2,
        ("parameter", "bias: dtype"): 2,
    }
    assert set(found.changed["before"]) == {"float32"}
    assert set(found.changed["after"]) == {"float64"}


def test_what_is_done_outside_of_modules_belongs_to_the_program() -> None:
    model = Residual()
    with gradscope.capture(model) as capture:
        loss = model(torch.randn(2, 4)).sum().exp()
    found = difference(residual(), capture.graph(loss).captured)
    assert everything(found) == [
        ("appeared", "", "operation", "exp scalar", 1, "", ""),
        ("changed", "", "operation", "sum: backward starts here", 1, "yes", "no"),
    ]
    assert "the program" in repr(found)
    assert "Residual" not in repr(found)


def test_operations_that_have_one_name_keep_that_of_torch() -> None:
    def graph(number: int) -> CapturedGraph:
        forward = Forward()
        graph = forward.captured(forward.op("Add", forward.leaf("x")))
        return dataclasses.replace(
            graph, ops=tuple(op.replace("d0", f"d{number}") for op in graph.ops)
        )

    found = difference(graph(0), graph(1))
    assert rows(found.vanished) == [("", "operation", "AddBackward0 2 × 3", 1)]
    assert rows(found.appeared) == [("", "operation", "AddBackward1 2 × 3", 1)]


# -- modules --------------------------------------------------------------------------------------


def test_a_module_that_is_new_as_a_whole_is_told_once() -> None:
    def edit(model: Residual) -> None:
        model.extra = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    found = difference(residual(), residual(edit))
    assert everything(found) == [
        ("appeared", "extra", "module", "Sequential, 3 operations, 2 parameters", 1, "", ""),
        (
            "changed",
            "",
            "operation",
            "sub: input 2",
            1,
            "from addmm in second",
            "from tanh in extra.1",
        ),
    ]
    back = difference(residual(edit), residual())
    assert rows(back.vanished) == rows(found.appeared)


def test_more_calls_of_a_module_are_told_once_with_their_numbers() -> None:
    found = difference(captured("unrolled_rnn", steps=6), captured("unrolled_rnn", steps=9))
    assert rows(found.appeared) == [
        ("cell", "module", "GRUCell, 16 operations, call 7 … 9", 3),
        ("head", "module", "Linear, 2 operations, call 7 … 9", 3),
        ("", "operation", "mse_loss scalar", 3),
        ("", "operation", "add scalar", 3),
    ]
    assert len(found.vanished) == 0
    assert rows(found.changed) == [("", "operation", "add: backward starts here", 1, "yes", "no")]


def test_what_detach_cuts_off_is_told_as_a_module() -> None:
    model, _ = ARCHITECTURES["detached_encoder"]()
    x = torch.randn(2, 64)

    def graph(detaches: bool) -> CapturedGraph:
        with gradscope.capture(model) as capture:
            z = model.encoder(x)
            loss = model.decoder(z.detach() if detaches else z).sum()
        captured: CapturedGraph = capture.graph(loss).captured
        return captured

    found = difference(graph(detaches=False), graph(detaches=True))
    what = "Sequential, 5 operations, 4 parameters"
    assert everything(found) == [
        ("changed", "decoder.0", "operation", "addmm: number of inputs", 1, "3", "2"),
        ("changed", "encoder", "module", what, 1, "leads to the loss", "is cut off"),
    ]
    found = difference(graph(detaches=True), graph(detaches=False))
    assert ("encoder", "module", what, 1, "is cut off", "leads to the loss") in rows(found.changed)


def test_a_module_that_runs_without_gradients_is_told() -> None:
    model = Residual()

    def graph(with_grad: bool) -> CapturedGraph:
        with gradscope.capture(model) as capture:
            with torch.set_grad_enabled(with_grad):
                first = model.first(torch.ones(2, 4))
            loss = model.second(first).sum()
        captured: CapturedGraph = capture.graph(loss).captured
        return captured

    found = rows(difference(graph(with_grad=True), graph(with_grad=False)).changed)
    assert (
        "first",
        "module",
        "Linear, 2 operations, 2 parameters",
        1,
        "leads to the loss",
        "runs without gradients",
    ) in found


def test_another_class_is_told_even_if_it_does_the_same() -> None:
    class Affine(nn.Linear):
        pass

    def edit(model: Residual) -> None:
        model.first = Affine(4, 4)

    assert everything(difference(residual(), residual(edit))) == [
        ("changed", "first", "module", "class", 1, "Linear", "Affine")
    ]


def test_graphs_are_compared_as_programs_where_calls_of_one_are_unknown() -> None:
    graph = captured("gpt2", n_layers=2)
    bare = dataclasses.replace(graph, calls=ModuleCalls(), call=np.full(len(graph), -1, np.int32))
    other = captured("gpt2", n_layers=2, edit=with_relu)
    for found in (difference(bare, other), difference(other, bare)):
        counts = Counter(found.to_pandas()["kind"])
        assert counts == {"operation": 2}
        assert found.to_pandas()["n"].tolist() == [2, 2]


# -- parameters -----------------------------------------------------------------------------------


def test_a_frozen_parameter_is_told_and_not_the_input_it_was() -> None:
    def edit(model: Residual) -> None:
        model.second.bias.requires_grad_(False)

    change = ("second", "parameter", "bias", 1)
    found = difference(residual(), residual(edit))
    assert rows(found.changed) == [(*change, "leads to the loss", "frozen")]
    assert len(found.to_pandas()) == 1
    back = difference(residual(edit), residual())
    assert rows(back.changed) == [(*change, "frozen", "leads to the loss")]


def test_a_parameter_that_nothing_uses_is_told_when_it_is_registered_or_frozen() -> None:
    def registered(model: Residual) -> None:
        model.spare = nn.Parameter(torch.zeros(3))

    def frozen(model: Residual) -> None:
        model.spare = nn.Parameter(torch.zeros(3), requires_grad=False)

    graphs = residual(), residual(registered), residual(frozen)
    assert len({fingerprint(graph) for graph in graphs}) == 1
    assert everything(difference(*graphs[:2])) == [
        ("appeared", "", "parameter", "spare 3, does not lead to the loss", 1, "", "")
    ]
    assert everything(difference(*graphs[1:])) == [
        ("changed", "", "parameter", "spare", 1, "does not lead to the loss", "frozen")
    ]
    assert everything(difference(graphs[2], graphs[0])) == [
        ("vanished", "", "parameter", "spare 3, frozen", 1, "", "")
    ]


def test_a_parameter_that_is_not_used_any_more_is_told() -> None:
    def edit(model: Residual) -> None:
        model.first.forward = lambda x: nn.functional.linear(x, model.first.weight)

    found = difference(residual(), residual(edit))
    assert (
        "first",
        "parameter",
        "bias",
        1,
        "leads to the loss",
        "does not lead to the loss",
    ) in rows(found.changed)


def test_tying_and_untying_are_told_by_the_names() -> None:
    def untie(model: Any) -> None:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())

    tied, untied = captured("gpt2", n_layers=1), captured("gpt2", untie, n_layers=1)
    both, one = "lm_head.weight = transformer.wte.weight", "transformer.wte.weight"
    giver = ("lm_head", "operation", "t (transpose): input 1", 1)
    found = difference(tied, untied)
    assert rows(found.appeared) == [("lm_head", "parameter", "weight 100 × 64", 1)]
    assert sorted(rows(found.changed)) == [
        (*giver, "from transformer.wte.weight", "from lm_head.weight"),
        ("transformer.wte", "parameter", "weight: names", 1, both, one),
    ]
    found = difference(untied, tied)
    assert rows(found.vanished) == [("lm_head", "parameter", "weight 100 × 64", 1)]
    assert ("transformer.wte", "parameter", "weight: names", 1, one, both) in rows(found.changed)


def test_another_shape_of_a_parameter_is_told() -> None:
    found = difference(captured("lstm_classifier"), captured("lstm_classifier", n_classes=5))
    assert ("fc", "parameter", "weight: shape", 1, "4 × 32", "5 × 32") in rows(found.changed)
    assert ("fc", "parameter", "bias: shape", 1, "4", "5") in rows(found.changed)


def test_leaves_without_names_are_matched_by_their_use() -> None:
    def graph(n_leaves: int, shape: tuple[int, ...] = (2,)) -> CapturedGraph:
        forward = Forward()
        leaves = [forward.leaf(shape=shape) for _ in range(n_leaves)]
        first = forward.op("Mul", leaves[0], leaves[0])
        return forward.captured(forward.op("Add", first, leaves[-1]))

    assert everything(difference(graph(1), graph(2))) == [
        ("appeared", "", "operation", "leaf tensor 2", 1, "", ""),
        (
            "changed",
            "",
            "operation",
            "add: input 2",
            1,
            "from leaf tensor #1",
            "from leaf tensor #1 (another one)",
        ),
    ]
    assert everything(difference(graph(2), graph(2, (3,)))) == [
        ("changed", "", "operation", "leaf tensor: output", 2, "2", "3")
    ]


def test_without_a_model_only_what_is_reached_is_known() -> None:
    graph = residual()
    bare = dataclasses.replace(graph, registered=())
    extra = (*graph.registered, Registered(("spare",), (3,), requires_grad=False))
    assert not difference(bare, dataclasses.replace(graph, registered=extra))


# -- many at once ---------------------------------------------------------------------------------


def with_relu(model: Any) -> None:
    for block in model.transformer.h:
        block.mlp.act = nn.ReLU()


def test_what_is_the_same_in_many_modules_is_told_once() -> None:
    found = difference(captured("gpt2"), captured("gpt2", with_relu))
    modules = [f"transformer.h.{i}.mlp.act" for i in range(12)]
    assert found.appeared["module"].tolist() == modules
    assert set(found.appeared["what"]) == {"relu 4 × 32 × 256"}
    assert found.vanished["module"].tolist() == modules
    assert repr(found) == (
        "12 appeared, 12 vanished, 12 changed\n"
        "×12 modules transformer.h.0.mlp.act … transformer.h.11.mlp.act\n"
        "  ~ module class  GELU → ReLU\n"
        "  - gelu 4 × 32 × 256\n"
        "  + relu 4 × 32 × 256"
    )


def test_inputs_from_the_modules_around_are_told_once_too() -> None:
    found = difference(captured("gpt2", dropout=0.0), captured("gpt2", dropout=0.1))
    text = repr(found)
    assert "×12 modules transformer.h.0.mlp.dropout … transformer.h.11.mlp.dropout\n" in text
    assert "×12 modules transformer.h.0 … transformer.h.11\n" in text
    assert "h.1." not in text


def test_the_biggest_difference_comes_first() -> None:
    def graph(kinds: list[str], n: int) -> CapturedGraph:
        forward = Forward()
        value = forward.leaf("w")
        for name, kind in zip("abc", kinds, strict=True):
            with forward.module(name):
                for _ in range(n if name == "b" else 1):
                    value = forward.op(kind, value)
        return forward.captured(value)

    found = difference(graph(["Mul"] * 3, n=3), graph(["Add", "Sub", "Sub"], n=3))
    assert repr(found) == (
        "5 appeared, 5 vanished\n"
        "b\n  - mul 2 × 3  ×3\n  + sub 2 × 3  ×3\n"
        "a\n  - mul 2 × 3\n  + add 2 × 3\n"
        "c\n  - mul 2 × 3\n  + sub 2 × 3"
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [(("resnet", {}), ("unet", {})), (("gpt2", {"width": 32}), ("gpt2", {"width": 64}))],
)
def test_what_is_shown_is_bounded(before: Any, after: Any) -> None:
    (name, options), (other_name, other_options) = before, after
    found = difference(captured(name, **options), captured(other_name, **other_options))
    lines = repr(found).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 110
    assert sum(line.startswith("  ") for line in lines) > 15
    assert ".to_pandas()" in lines[-1]


def test_the_length_is_bounded_for_many_modules_with_one_difference_each() -> None:
    def graph(kind: str, n: int) -> CapturedGraph:
        forward = Forward()
        value = forward.leaf("w")
        for i in range(n):
            with forward.module(chr(97 + i // 26) + chr(97 + i % 26)):
                value = forward.op(kind, value)
        return forward.captured(value)

    for n in range(1, 60):
        lines = repr(difference(graph("Mul", n), graph("Add", n))).splitlines()
        assert len(lines) <= 40
        n_shown = sum(line.startswith("  ") for line in lines)
        n_left = int(lines[-1].split()[2]) if lines[-1].startswith("…") else 0
        assert n_shown + n_left == 2 * n


def test_names_of_any_kind_are_shown_on_one_line() -> None:
    def graph(name: str) -> CapturedGraph:
        forward = Forward()
        with forward.module("net\n\x1b[31m"):
            return forward.captured(forward.op("Mul", forward.leaf(name)))

    text = repr(difference(graph("a\nb"), graph("net.\udc80")))
    text.encode()
    assert all(line.isprintable() for line in text.splitlines())
    assert "\\udc80" in text


# -- for any two graphs ---------------------------------------------------------------------------


def without_modules(graph: CapturedGraph) -> CapturedGraph:
    return dataclasses.replace(graph, calls=ModuleCalls(), call=np.full(len(graph), -1, np.int32))


@settings(deadline=None, max_examples=150)
@given(SEEDS, SEEDS, st.sampled_from([random_dag, random_loops]), st.integers(1, 80))
def test_what_is_left_and_what_has_come_make_up_the_second_graph(
    seed: int, other_seed: int, make: Callable[[int, int], CapturedGraph], n: int
) -> None:
    before, after = make(seed, n), make(other_seed, n)

    def operations(graph: CapturedGraph) -> Counter[str]:
        nodes = np.flatnonzero(graph.param < 0).tolist()
        return Counter(graph.op_of(node).removesuffix("Backward0").lower() for node in nodes)

    found = difference(without_modules(before), without_modules(after))
    count = operations(before)
    for table, sign in ((found.vanished, -1), (found.appeared, 1)):
        for row in table.itertuples():
            if row.kind == "operation" and not row.what.startswith("leaf tensor"):
                count[row.what.split()[0]] += sign * row.n
    assert +count == operations(after)


@settings(deadline=None, max_examples=150)
@given(SEEDS, SEEDS, st.sampled_from([random_dag, random_loops]), st.integers(1, 60))
def test_there_is_a_difference_where_fingerprints_differ_and_back_it_is_the_reverse(
    seed: int, other_seed: int, make: Callable[[int, int], CapturedGraph], n: int
) -> None:
    before, after = make(seed, n), make(other_seed, n)
    assert not difference(before, make(seed, n))
    there, back = difference(before, after), difference(after, before)
    assert bool(there) == bool(back) == (fingerprint(before) != fingerprint(after))
    modules = there.appeared[there.appeared["kind"] != "operation"]
    modules_back = back.vanished[back.vanished["kind"] != "operation"]
    assert sorted(rows(modules)) == sorted(rows(modules_back))
    assert len(repr(there).splitlines()) <= 40


def has_name(graph: CapturedGraph, node: int) -> bool:
    """Whether a node can be found again in another graph: not so a leaf without names."""
    leaf = int(graph.param[node])
    return leaf < 0 or bool(graph.params[leaf])


@settings(deadline=None, max_examples=200)
@given(SEEDS, st.integers(2, 60))
def test_one_changed_edge_is_told_at_its_operation(seed: int, n: int) -> None:
    graph, random = random_dag(seed, n), Random(seed)
    edge = random.randrange(graph.n_edges)
    target = int(graph.target[edge])
    earlier = np.flatnonzero(graph.sequence_nr < graph.sequence_nr[target])
    sources = graph.source.copy()
    sources[edge] = random.choice(earlier.tolist())
    other = dataclasses.replace(graph, source=sources)
    found = difference(graph, other)
    if sources[edge] == graph.source[edge]:
        assert not found
    elif not has_name(graph, graph.source[edge]) or not has_name(graph, sources[edge]):
        assert bool(found) == (fingerprint(graph) != fingerprint(other))
    elif fingerprint(graph) != fingerprint(other):
        name = graph.op_of(target).removesuffix("Backward0").lower()
        call = int(graph.call[target])
        path = graph.calls.path(call) if call >= 0 else ""
        assert any(
            row[0] == path and row[2].startswith(f"{name}: input") for row in rows(found.changed)
        )


# -- large ones -----------------------------------------------------------------------------------


def large(n_blocks: int, *, with_modules: bool, extra_at: int = -1) -> CapturedGraph:
    """Blocks of thirty operations in a row, one of which may have an operation more."""
    forward = Forward()
    value = forward.leaf("start")

    def block(number: int, value: Value) -> Value:
        start, weight = value, forward.leaf(f"h.{number}.w")
        for i in range(29):
            value = forward.op(f"Op{i % 7}", value, *([weight] if i % 5 == 0 else []))
            if i == 14 and number == extra_at:
                value = forward.op("Clamp", value)
        return forward.op("Add", value, start)

    for number in range(n_blocks):
        if with_modules:
            with forward.module(f"h.{number}"):
                value = block(number, value)
        else:
            value = block(number, value)
    return forward.captured(value)


@pytest.mark.parametrize("with_modules", [True, False])
def test_one_operation_more_among_thirty_thousand_is_found_in_two_seconds(
    with_modules: bool,
) -> None:
    graphs = [large(1_000, with_modules=with_modules, extra_at=at) for at in (-1, 500)]
    seconds = []
    for _ in range(3):
        began = time.process_time()
        found = difference(*graphs)
        repr(found)
        seconds.append(time.process_time() - began)
    path = "h.500" if with_modules else ""
    assert everything(found) == [
        ("appeared", path, "operation", "clamp 2 × 3", 1, "", ""),
        ("changed", path, "operation", "op1: input 1", 1, "from op0", "from clamp"),
    ]
    assert min(seconds) < 2


def test_thousands_of_operations_that_differ_everywhere_are_counted() -> None:
    def graph(extra: bool) -> CapturedGraph:
        forward = Forward()
        value = forward.leaf("w")
        for _ in range(1_500):
            value = forward.op("Mul", value)
            value = forward.op("Add", value, shape=(5 if extra else 4,))
            if extra:
                value = forward.op("Tanh", value)
        return forward.captured(forward.op("Sum", value))

    assert everything(difference(graph(extra=False), graph(extra=True))) == [
        ("appeared", "", "operation", "tanh 2 × 3", 1_500, "", ""),
        ("changed", "", "operation", "add: output", 1_500, "4", "5"),
    ]


def test_another_wiring_among_operations_that_are_only_counted_is_told() -> None:
    def graph(order: list[str]) -> CapturedGraph:
        forward = Forward()
        value = forward.leaf("w")
        for kind in order:
            value = forward.op(kind, value)
        return forward.captured(value)

    before = ["Mul", "Add"] * 1_500
    assert everything(difference(graph(before), graph(before[::-1]))) == [
        ("changed", "", "operation", "inputs", 1, "some wiring", "another")
    ]


@pytest.mark.slow
def test_aligning_gives_up_before_it_takes_minutes() -> None:
    def graph(order: list[str]) -> CapturedGraph:
        forward = Forward()
        value = forward.leaf("w")
        for kind in order:
            value = forward.op(kind, value)
        return forward.captured(value)

    before, after = graph(["Mul", "Add"] * 1_000), graph(["Add", "Mul", "Mul"] * 666)
    began = time.perf_counter()
    found = difference(before, after)
    assert time.perf_counter() - began < 15
    assert found
