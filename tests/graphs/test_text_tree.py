"""A graph as a tree of text: what it says, against the model itself, and how long it gets."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graph_makers import Forward, random_loops
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradscope
from gradscope.errors import UsageError
from gradscope.graphs.fold import Folded
from gradscope.graphs.likeness import Likeness
from gradscope.graphs.text_tree import text_tree
from gradscope.graphs.unreached import unreached
from gradscope.run.captured_graph import CapturedGraph, Registered, SavedTensors

EXAMPLES = Path(__file__).parents[2] / "examples" / "architectures.py"
ARCHITECTURES = runpy.run_path(str(EXAMPLES))["ARCHITECTURES"]
SCISSORS = "\N{BLACK SCISSORS}"


def model_and_graph(name: str, edit: Any = None, **options: Any) -> tuple[nn.Module, CapturedGraph]:
    model, compute_loss = ARCHITECTURES[name](**options)
    if edit is not None:
        edit(model)
    with gradscope.capture(model) as seen:
        loss = compute_loss()
    return model, seen.graph(loss).captured


def tree(graph: CapturedGraph, fold: Likeness | None = "shape", **options: Any) -> str:
    return text_tree(Folded(graph, fold), **options)


def small() -> CapturedGraph:
    """Two blocks that are alike inside of a net, a head, and things that lead nowhere."""
    forward = Forward()
    x = forward.leaf(shape=(2, 3))
    with forward.module("", "Net"):
        value = forward.op("Embedding", x, forward.leaf("table", shape=(10, 3)))
        with forward.module("blocks", "Sequential"):
            for i in range(3):
                with forward.module(f"blocks.{i}", "Block"):
                    start = value
                    with forward.module(f"blocks.{i}.fc", "Linear"):
                        weight = forward.leaf(f"blocks.{i}.fc.weight", shape=(3, 3))
                        value = forward.op("Mm", value, forward.op("T", weight))
                    value = forward.op("Add", forward.op("Tanh", value), start)
        with forward.module("aux", "Linear"):
            forward.op("Mm", value)
        with forward.module("head", "Linear"):
            value = forward.op("Mm", value, forward.leaf("head.weight"), shape=(2, 4))
    loss = forward.op("Sum", value, shape=())
    frozen = [Registered((f"blocks.{i}.fc.bias",), (3,), requires_grad=False) for i in range(3)]
    return forward.captured(
        loss,
        registered=[
            Registered(("table",), (10, 3), requires_grad=True),
            Registered(("head.weight",), (2, 3), requires_grad=True),
            Registered(("aux.weight",), (2, 3), requires_grad=True),
            Registered(("spare.weight",), (2, 3), requires_grad=True),
            *(Registered((f"blocks.{i}.fc.weight",), (3, 3), requires_grad=True) for i in range(3)),
            *frozen,
        ],
    )


# -- what it says ---------------------------------------------------------------------------------


def test_everything_has_its_place() -> None:
    assert tree(small()).splitlines() == [
        "autograd graph · 15 operations · → scalar · 5 parameters (63) · 1 other leaf",
        "├── Net · 14 operations · → 2 × 4 · 5 parameters (63) · 1 other leaf",
        "│   ├── embedding · → 2 × 3 · 1 parameter (30) · 1 other leaf",
        "│   ├── blocks Sequential · 12 operations · → 2 × 3 · 3 parameters (27)",
        "│   │   └── 0 … 2 ×3 Block · 12 operations · → 2 × 3 · 3 parameters (27)",
        "│   │       ├── fc Linear: t (transpose) → mm · 2 operations · → 2 × 3 · 1 parameter (9)",
        f"│   │       │   └── {SCISSORS} bias ×3 · frozen",
        "│   │       └── tanh → add · 2 operations · → 2 × 3",
        f"│   ├── {SCISSORS} aux · Linear · 1 parameter · cut off: 1 operation made for nothing",
        "│   ├── head Linear: mm · → 2 × 4 · 1 parameter (6)",
        f"│   └── {SCISSORS} spare · 1 parameter · never called",
        "└── sum · → scalar",
    ]


def test_each_copy_has_its_own_lines_where_nothing_is_folded() -> None:
    lines = [line.strip("│├└─ ") for line in tree(small(), None).splitlines()]
    for i in range(3):
        assert f"{i} Block · 4 operations · → 2 × 3 · 1 parameter (9)" in lines
    assert lines.count(f"{SCISSORS} bias · frozen") == 3


def test_what_is_kept_is_told_once_for_shared_memory() -> None:
    forward = Forward()
    value = forward.leaf("w")
    for name in ("a", "b"):
        with forward.module(name, "Act"):
            value = forward.op("Tanh", forward.op("Exp", value))
    graph = forward.captured(value)
    node = [int(np.flatnonzero(graph.sequence_nr == at)[0]) for at in (0, 1, 2, 3)]
    saved = SavedTensors(
        names=("result",),
        node=np.array(node, np.int32),
        name=np.zeros(4, np.int32),
        shapes=((2, 3),) * 4,
        n_bytes=np.array([2048, 100, 2048, 999], np.int64),
        storage=np.array([0, 1, 0, -1], np.int32),
    )
    object.__setattr__(graph, "saved", saved)
    lines = tree(graph).splitlines()
    assert lines[0].endswith("· keeps 2.1 KiB")
    assert [line.rpartition(" · ")[2] for line in lines[1:]] == ["keeps 2.1 KiB", "→ 2 × 3"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_first_line_agrees_with_the_model(name: str) -> None:
    model, graph = model_and_graph(name)
    reached = {each for names in graph.params for each in names}
    numbers = [each.numel() for key, each in model.named_parameters() if key in reached]
    first = tree(graph).splitlines()[0]
    assert f"· {int((graph.param < 0).sum()):,} operations ·" in first
    assert f"· {len(numbers)} parameters ({sum(numbers):,}) ·" in first


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("fold", ["shape", None])
def test_operations_of_the_lines_below_a_line_add_up(name: str, fold: Likeness | None) -> None:
    _, graph = model_and_graph(name)
    lines = tree(graph, fold, max_lines=10_000, width=1_000).splitlines()
    at = [(re.match(r"[│├└─ ]*", line).end() // 4, line) for line in lines]  # type: ignore[union-attr]

    def operations(line: str) -> int:
        if SCISSORS in line:
            return 0
        found = re.search(r"· ([\d,]+) operations? ·", line)
        return int(found[1].replace(",", "")) if found else 1

    def copies(line: str) -> int:
        found = re.search(r"(?:^| … \S+ |─ |[^(→] )×([\d,]+)(?: |$)", line.split(" · ")[0])
        return int(found[1].replace(",", "")) if found and " → " not in line.split(" · ")[0] else 1

    for i, (level, line) in enumerate(at):
        inner = []
        for deeper, below in at[i + 1 :]:
            if deeper <= level:
                break
            if deeper == level + 1 and SCISSORS not in below:
                inner.append(operations(below))
        if inner:
            assert operations(line) == copies(line) * sum(inner), line


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_everything_that_is_not_reached_is_there(name: str) -> None:
    _, graph = model_and_graph(name)
    lines = [line for line in tree(graph, None, max_lines=1_000).splitlines() if SCISSORS in line]
    found = unreached(graph)
    n_told = sum(int(n[1]) if (n := re.search(r" ×(\d+) ", line)) else 1 for line in lines)
    assert n_told == len(found)
    for each in found:
        assert any(each.path.rpartition(".")[2] in line for line in lines)


def test_what_takes_the_result_of_a_module_that_is_cut_off_is_named() -> None:
    _, graph = model_and_graph("detached_encoder")
    (line,) = [line for line in tree(graph, width=200).splitlines() if "encoder ·" in line]
    assert line.endswith("its result goes to decoder, …")


def test_what_is_missing_in_each_copy_is_told_below_the_first() -> None:
    def edit(model: Any) -> None:
        for block in model.transformer.h:
            block.mlp.c_fc.bias.requires_grad_(False)
            block.spare = nn.Linear(2, 2)

    _, graph = model_and_graph("gpt2", edit)
    lines = [line.strip("│├└─ ") for line in tree(graph).splitlines()]
    below = lines.index(next(line for line in lines if line.startswith("c_fc")))
    assert lines[below + 1] == f"{SCISSORS} bias ×12 · frozen"
    assert f"{SCISSORS} spare ×12 · 2 parameters · never called" in lines


def test_long_rows_of_operations_are_shortened() -> None:
    forward = Forward()
    value = forward.leaf("w")
    for i in range(9):
        value = forward.op(f"Op{i}", value)
    line = tree(forward.captured(value)).splitlines()[1]
    assert line.startswith("└── op0 → op1 → op2 → op3 → … → op8 · 9 operations · → 2 × 3 · 1 param")


# -- how long it gets -----------------------------------------------------------------------------


def test_deeper_levels_are_closed_first() -> None:
    _, graph = model_and_graph("gpt2", n_layers=2)
    depths = []
    for max_lines in range(5, 40):
        lines = tree(graph, max_lines=max_lines).splitlines()
        assert len(lines) <= max_lines
        closed = re.fullmatch(r"\(modules(?: below level (\d))? are closed.*\)", lines[-1])
        depths.append(9 if closed is None else int(closed[1] or 0))
        if closed is not None:
            assert f"max_lines={max_lines}" in lines[-1]
    assert depths == sorted(depths)
    assert set(depths) >= {1, 2, 9}


def test_depth_says_how_many_levels_are_opened() -> None:
    _, graph = model_and_graph("gpt2")
    n_lines = []
    for depth in range(6):
        text = tree(graph, depth=depth)
        assert "closed" not in text
        assert max(line.find("── ") for line in text.splitlines()) // 4 <= depth
        n_lines.append(len(text.splitlines()))
    assert n_lines[0] == 2
    assert n_lines == sorted(n_lines)
    assert n_lines[3] < n_lines[4] == n_lines[5]
    assert tree(graph, depth=5) == tree(graph)


def test_long_lists_are_cut_in_the_middle() -> None:
    forward = Forward()
    value = forward.leaf("w")
    for i in range(500):
        with forward.module(f"layer{chr(97 + i % 26)}{i}", f"Kind{i}"):
            value = forward.op("Mul", value)
    lines = tree(forward.captured(value), max_lines=20).splitlines()
    assert len(lines) <= 20
    assert "layera0" in lines[1]
    (cut,) = [line for line in lines if "more" in line]
    n_shown = sum("Kind" in line for line in lines)
    assert f"… {500 - n_shown} more · {500 - n_shown} operations" in cut
    assert "Kind499" in lines[-2]
    assert lines[-1] == "(long lists are cut: max_lines=20, width=100)"


@settings(deadline=None, max_examples=100)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 150),
    st.sampled_from(["shape", "op", None]),
    st.none() | st.integers(0, 4),
    st.integers(5, 80),
    st.integers(40, 120),
)
def test_it_is_never_longer_or_wider(
    seed: int, n: int, fold: Likeness | None, depth: int | None, max_lines: int, width: int
) -> None:
    graph = random_loops(seed, n)
    for chains in (True, False):
        folded = Folded(graph, fold)
        if chains:
            folded = folded.with_chains()
        lines = text_tree(folded, depth=depth, max_lines=max_lines, width=width).splitlines()
        assert 1 <= len(lines) <= max_lines
        assert max(map(len, lines)) <= width
        assert not any(line != line.rstrip() for line in lines)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_fit_into_any_room(name: str) -> None:
    _, graph = model_and_graph(name)
    for max_lines in (5, 9, 30, 60):
        for width in (40, 100):
            lines = tree(graph, max_lines=max_lines, width=width).splitlines()
            assert 2 <= len(lines) <= max_lines
            assert max(map(len, lines)) <= width


def test_modules_deeper_than_the_text_is_wide_are_closed() -> None:
    forward = Forward()

    def work(depth: int) -> Any:
        path = ".".join("m" * depth)
        with forward.module(path, "Deep"):
            if depth == 60:
                return forward.op("Mul", forward.leaf("w"))
            return forward.op("Add", work(depth + 1))

    lines = tree(forward.captured(work(1)), max_lines=1_000, width=80).splitlines()
    assert max(map(len, lines)) <= 80
    assert "closed" in lines[-1]
    assert all("Deep" in line or "add" in line for line in lines[1:-1])


def test_a_graph_without_nodes_has_a_line() -> None:
    assert tree(Forward().captured()) == "autograd graph · 0 operations"


def test_a_hundred_thousand_operations_are_told_in_sixty_lines() -> None:
    forward = Forward()
    value = forward.leaf("w")
    for i in range(3_300):
        with forward.module(f"m{i}"):
            for _ in range(30):
                value = forward.op(f"Op{i % 5}", value)
    graph = forward.captured(value)
    for fold in ("shape", None):
        assert len(tree(graph, fold).splitlines()) <= 60  # type: ignore[arg-type]


# -- where it is printed --------------------------------------------------------------------------


def test_neither_the_terminal_nor_names_get_into_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tree(small())
    for key, value in (("FORCE_COLOR", "1"), ("COLUMNS", "30"), ("TERM", "xterm-256color")):
        monkeypatch.setenv(key, value)
    assert tree(small()) == plain
    forward = Forward()
    with forward.module("[red]net:smile:\n\x1b[31m\udc80", "Net[/red]"):
        loss = forward.op("Mul", forward.leaf("w"))
    lines = tree(forward.captured(loss)).splitlines()
    assert lines[1].startswith("└── [red]net:smile:\\n\\x1b[31m\\udc80 Net[/red]: mul")
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("depth", -1),
        ("depth", "all"),
        ("depth", 1.0),
        ("depth", True),
        ("max_lines", 4),
        ("max_lines", None),
        ("width", 39),
        ("width", "wide"),
    ],
)
def test_what_is_no_sensible_number_is_refused(option: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{option}={value!r}: pass"):
        tree(small(), **{option: value})


def test_it_is_the_same_before_and_after_the_backward() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    with gradscope.capture(model) as seen:
        loss = model(torch.ones(2, 3)).sum()
    before = tree(seen.graph(loss).captured)
    loss.backward()
    after = tree(seen.graph(loss).captured)
    assert re.sub(r" · keeps [\d.]+ \w+", "", before) == re.sub(r" · keeps [\d.]+ \w+", "", after)
