"""The tree of blocks loses nothing, its copies are alike, and it has what a reader expects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
from graph_makers import (
    Forward,
    Input,
    Value,
    architecture,
    inputs_by_place,
    random_dag,
    random_loops,
    rule_of,
    why_not_copies,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from gradscope.graphs.fold import Block, Folded
from gradscope.graphs.likeness import Likeness, likeness_of_module
from gradscope.run.captured_graph import CapturedGraph

LIKENESSES: tuple[Likeness, ...] = ("exact", "shape", "op")
SEEDS = st.integers(0, 2**32 - 1)
MAKERS = st.sampled_from([random_loops, lambda seed: random_dag(seed, 50)])
REAL = ("gpt2", "resnet", "unet", "lstm_classifier", "mixture_of_experts", "gradient_penalty")

real_graph = cache(architecture)


def blocks_of(folded: Folded) -> Iterator[Block]:
    """All blocks, outer ones first; of a repetition those in its first copy."""
    left = [folded.root]
    while left:
        block = left.pop()
        yield block
        left += folded.parts(block)


def outline(folded: Folded, block: Block | None = None) -> list[object]:
    """The repetitions as nested lists, with operations and modules by their names."""
    captured = folded.captured
    found: list[object] = []
    for part in folded.parts(block or folded.root):
        if part.kind == "operation":
            name = captured.op_of(int(folded.execution.node[part.start])).removesuffix("Backward0")
        elif part.kind == "module":
            name = captured.calls.path(part.call)
        else:
            name = part.kind
        if part.kind == "sequence":
            found.append((part.count, outline(folded, part)))
        else:
            found.append((part.count, name) if part.count > 1 else name)
    return found


# -- nothing is lost ----------------------------------------------------------------------------


def check(captured: CapturedGraph, likeness: Likeness | None, chains: bool) -> None:
    folded = Folded(captured, likeness)
    if chains:
        folded = folded.with_chains()
    order = folded.execution.node.tolist()
    assert (folded.root.start, folded.root.stop) == (0, len(order))
    for block in blocks_of(folded):
        assert block.count == 1 or likeness is not None
        assert block.start + block.period * block.count == block.stop
        assert block.n_operations == len(folded.nodes(block)) > 0 or block is folded.root
        tile(folded, block)
        if block.count > 1:
            assert likeness is not None
            copies = (block.start, block.period, block.count)
            assert not why_not_copies(captured, order, *copies, likeness), block
            assert same_modules(captured, order, block, likeness), block
    truth = inputs_by_place(captured, order)
    assert unfolded(folded, folded.root, truth) == truth


def tile(folded: Folded, block: Block) -> None:
    at = block.start
    for part in folded.parts(block):
        assert part.start == at
        assert part.stop > at
        at = part.stop
    if block.can_open:
        assert at == block.start + block.period
    else:
        assert block.period == 1


def same_modules(
    captured: CapturedGraph, order: list[int], block: Block, likeness: Likeness
) -> bool:
    """Whether corresponding operations were made in corresponding calls of like modules."""

    def calls_around(place: int) -> list[int]:
        calls = []
        call = int(captured.call[order[place]])
        while call >= 0:
            calls.append(call)
            call = int(captured.calls.parent[call])
        return calls[::-1]

    def described(copy: int) -> list[object]:
        start = block.start + copy * block.period
        found: list[object] = []
        number: dict[int, int] = {}
        around = [calls_around(place) for place in range(start, start + block.period)]
        # Calls around all of it are the same for all copies, or are the copies themselves.
        n_common = sum(len({calls[i] for calls in all_around}) == 1 for i in range(depth))
        for calls in around:
            inner = calls[n_common:]
            found.append(
                [
                    (
                        number.setdefault(call, len(number)),
                        likeness_of_module(
                            captured.calls.path(call), captured.calls.kind(call), likeness
                        ),
                    )
                    for call in inner
                ]
            )
        return found

    all_around = [calls_around(place) for place in range(block.start, block.stop)]
    depth = min(map(len, all_around))
    return all(described(copy) == described(0) for copy in range(1, block.count))


def unfolded(folded: Folded, block: Block, truth: list[list[Input]]) -> list[list[Input]]:
    """What every operation of a block takes, worked out from its first copy.

    Of the other copies only this is looked at: the second, to see by which rule an input moves on,
    and the leaves that each has of its own.
    """
    if not block.can_open:
        first_copy = [truth[block.start]]
    else:
        first_copy = [
            inputs for part in folded.parts(block) for inputs in unfolded(folded, part, truth)
        ]
    found = list(first_copy)
    for copy in range(1, block.count):
        for offset, inputs in enumerate(first_copy):
            here = block.start + copy * block.period + offset
            found.append(
                [
                    moved(folded, block, each, truth[block.start + block.period + offset][k], copy)
                    if each.leaf < 0 or truth[here][k].leaf < 0
                    else truth[here][k]
                    for k, each in enumerate(inputs)
                ]
            )
    return found


def moved(folded: Folded, block: Block, first: Input, second: Input, copy: int) -> Input:
    rule = rule_of(folded.captured, [first, second], block.start, block.period, "op")
    if rule == "enters":  # from the second copy on each takes from its predecessor
        return Input(place=second.place + (copy - 1) * block.period, output=second.output)
    return Input(place=first.place + copy * (second.place - first.place), output=first.output)


@settings(deadline=None, max_examples=150)
@given(SEEDS, MAKERS, st.sampled_from([*LIKENESSES, None]), st.booleans())
def test_the_tree_covers_everything_and_the_first_copies_tell_all(
    seed: int, make: Callable[[int], CapturedGraph], likeness: Likeness | None, chains: bool
) -> None:
    check(make(seed), likeness, chains)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("likeness", [*LIKENESSES, None])
def test_real_graphs_are_covered_and_told_by_their_first_copies(
    name: str, likeness: Likeness | None
) -> None:
    check(real_graph(name), likeness, chains=True)


def test_a_graph_without_nodes_is_one_empty_block() -> None:
    folded = Folded(Forward().captured())
    assert folded.n_operations == 0
    assert folded.parts(folded.root) == []


def test_chains_hand_on_one_value() -> None:
    forward = Forward()
    a = forward.op("C", forward.op("B", forward.op("A", forward.leaf("x"))))
    b = forward.op("D", a)
    loss = forward.op("F", forward.op("E", b, forward.leaf("w")), b)
    folded = Folded(forward.captured(loss)).with_chains()
    parts = folded.parts(folded.root)
    assert [(part.kind, part.n_operations) for part in parts] == [
        ("chain", 4),
        ("operation", 1),
        ("operation", 1),
    ]


@settings(deadline=None, max_examples=60)
@given(SEEDS, MAKERS)
def test_in_a_chain_each_operation_is_the_only_user_of_the_one_before(
    seed: int, make: Callable[[int], CapturedGraph]
) -> None:
    captured = make(seed)
    folded = Folded(captured).with_chains()
    inputs = inputs_by_place(captured, folded.execution.node.tolist())
    users = [each.place for taken in inputs for each in taken]
    for block in blocks_of(folded):
        if block.kind == "chain":
            assert block.period > 1
            for place in range(block.start + 1, block.start + block.period):
                inner = [each for each in inputs[place] if each.leaf < 0]
                assert [each.place for each in inner] == [place - 1]
                assert users.count(place - 1) == 1


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.integers(1, 30), st.integers(2, 9))
def test_parts_put_together_are_few_and_cover_the_same(
    seed: int, n_operations: int, at_most: int
) -> None:
    folded = Folded(random_dag(seed, n_operations))
    parts = folded.parts(folded.root)
    fewer = folded.stretched(parts, at_most)
    assert len(fewer) <= at_most
    assert fewer[0].start == parts[0].start
    assert [part.stop for part in fewer[:-1]] == [part.start for part in fewer[1:]]
    assert fewer[-1].stop == parts[-1].stop
    for part in fewer:
        if part.kind == "stretch":
            inside = folded.parts(part)
            assert (inside[0].start, inside[-1].stop) == (part.start, part.stop)


# -- what is found ------------------------------------------------------------------------------


def transformer(n_blocks: int, *, modules: bool) -> Folded:
    forward = Forward()

    def attention(value: Value, path: str) -> Value:
        with forward.module(path, "Attention"):
            q, k, v = (
                forward.op("View", forward.op("Mm", value, forward.leaf(f"{path}.{name}")))
                for name in "qkv"
            )
            return forward.op("Mm", forward.op("Attend", q, k, v), forward.leaf(f"{path}.o"))

    def layer(value: Value, path: str) -> Value:
        with forward.module(path, "Layer"):
            normed = forward.op("Norm", value, forward.leaf(f"{path}.norm"))
            value = forward.op("Add", value, attention(normed, f"{path}.attn"))
            normed = forward.op("Norm", value, forward.leaf(f"{path}.norm2"))
            inner = forward.op("Gelu", forward.op("Mm", normed, forward.leaf(f"{path}.up")))
            return forward.op("Add", value, forward.op("Mm", inner, forward.leaf(f"{path}.down")))

    table = forward.leaf("wte")
    with forward.module("", "Model"):
        value = forward.op("Embedding", table)
        for number in range(n_blocks):
            value = layer(value, f"h.{number}")
        value = forward.op("Mm", forward.op("Norm", value, forward.leaf("norm")), table)
    captured = forward.captured(forward.op("Loss", value, shape=()))
    if not modules:
        captured.call[:] = -1
    return Folded(captured)


@pytest.mark.parametrize("n_blocks", [2, 3, 12, 300])
def test_the_blocks_of_a_transformer_are_one_module(n_blocks: int) -> None:
    folded = transformer(n_blocks, modules=True)
    model, loss = folded.parts(folded.root)
    assert (model.kind, loss.kind) == ("module", "operation")
    assert outline(folded, model) == ["Embedding", (n_blocks, "h.0"), "Norm", "Mm"]


@pytest.mark.parametrize("n_blocks", [2, 3, 12, 300])
def test_the_blocks_of_a_transformer_are_found_without_modules(n_blocks: int) -> None:
    folded = transformer(n_blocks, modules=False)
    sequences = [part for part in folded.parts(folded.root) if part.kind == "sequence"]
    assert [(part.period, part.count) for part in sequences] == [(15, n_blocks)]
    assert len(folded.parts(folded.root)) == 5
    # A block begins where there is one value only: at its first normalisation.
    assert sequences[0].start == 1


def test_an_rnn_in_a_plain_loop_is_one_repetition_but_for_its_first_step() -> None:
    forward = Forward()
    weights = [forward.leaf(name) for name in ("ih", "hh")]

    def cell(*state: Value) -> Value:
        taken = [forward.op("Mm", each, weights[1]) for each in state]
        return forward.op("Tanh", forward.op("Add", forward.op("Mm", weights[0]), *taken))

    state = cell()
    for _ in range(49):
        state = cell(state)
    folded = Folded(forward.captured(forward.op("Loss", state)))
    (found,) = [part for part in folded.parts(folded.root) if part.kind == "sequence"]
    assert found.period == 4
    assert found.count >= 48


def test_loops_inside_of_loops_are_repetitions_inside_of_repetitions() -> None:
    forward = Forward()
    value = forward.leaf("x")
    for _ in range(4):
        for _ in range(5):
            for _ in range(3):
                value = forward.op("Sin", value)
            value = forward.op("Cos", value)
        value = forward.op("Exp", value)
    folded = Folded(forward.captured(value))
    assert outline(folded) == [(4, [(5, [(3, "Sin"), "Cos"]), "Exp"])]


def test_inner_loops_of_other_lengths_are_repetitions_side_by_side() -> None:
    forward = Forward()
    value = forward.leaf("x")
    for turns in (3, 9, 5, 17):
        for _ in range(turns):
            value = forward.op("Sin", value)
        value = forward.op("Exp", value)
    found = outline(Folded(forward.captured(value)))
    assert found == [part for turns in (3, 9, 5, 17) for part in ((turns, "Sin"), "Exp")]


def test_a_loop_that_collects_and_a_loop_that_consumes() -> None:
    forward = Forward()
    state, collected = forward.leaf("x"), []
    with forward.module("", "Model"):
        for turn in range(6):
            with forward.module("cell", "Cell"):
                state = forward.op("Tanh", forward.op("Mm", state, forward.leaf(f"w{turn}")))
            with forward.module("head", "Head"):
                collected.append(forward.op("Linear", state))
    total = forward.op("Start", collected[0])
    for value in collected:
        total = forward.op("Add", total, forward.op("Mse", value))
    folded = Folded(forward.captured(total))
    model, *rest = folded.parts(folded.root)
    assert outline(folded, model) == [(6, ["cell", "head"])]
    assert len(rest) == 2
    assert (rest[1].kind, rest[1].period, rest[1].count) == ("sequence", 2, 6)


def test_copies_begin_where_modules_begin() -> None:
    forward = Forward()
    value = forward.leaf("x")
    for number in range(8):
        value = forward.op("Before", value)
        with forward.module(f"layer.{number}", "Layer"):
            value = forward.op("Mm", forward.op("Norm", value), value)
        value = forward.op("After", value)
    folded = Folded(forward.captured(value))
    assert outline(folded) == [(8, ["Before", "layer.0", "After"])]


@pytest.mark.parametrize(
    ("likeness", "is_folded"), [("op", True), ("shape", False), ("exact", False)]
)
def test_modules_of_other_names_are_alike_only_by_their_operations(
    likeness: Likeness, is_folded: bool
) -> None:
    forward = Forward()
    value = forward.leaf("x")
    for name in ("encoder.0", "encoder.1", "decoder.0", "decoder.1"):
        with forward.module(name, "Layer"):
            for kind in ("Norm", "Mm", "Gelu", "Mm"):
                value = forward.op(kind, value)
    folded = Folded(forward.captured(value), likeness)
    expected = [(4, "encoder.0")] if is_folded else [(2, "encoder.0"), (2, "decoder.0")]
    assert outline(folded) == expected


def test_modules_of_other_classes_are_never_alike() -> None:
    forward = Forward()
    value = forward.leaf("x")
    for number in range(4):
        with forward.module(f"layer.{number}", f"Kind{number // 2}"):
            for kind in ("Norm", "Mm", "Gelu", "Mm"):
                value = forward.op(kind, value)
    assert outline(Folded(forward.captured(value), "op")) == [(2, "layer.0"), (2, "layer.2")]


def test_what_does_the_same_inside_is_kin_whatever_the_shapes() -> None:
    forward = Forward()
    value = forward.leaf("x")
    for width, n_operations in ((3, 2), (4, 2), (4, 3)):
        with forward.module(f"layer{width}", "Layer"):
            for _ in range(n_operations):
                value = forward.op("Mm", value, shape=(width,))
    folded = Folded(forward.captured(value))
    first, second, third = folded.parts(folded.root)
    assert first.kin == second.kin != third.kin
    assert folded.root.kin is None


def test_a_call_that_is_left_and_entered_again_has_a_block_for_each_time() -> None:
    forward = Forward()
    value = forward.leaf("x")
    with forward.module("a", "A"):
        value = forward.op("First", value)
        value = forward.op("Second", value)
    value = forward.op("Third", value)
    captured = forward.captured(value)
    # As if another thread had made it: the numbers say Second, Third, First; the edges do not.
    captured.call[captured.op == captured.ops.index("SecondBackward0")] = -1
    captured.call[captured.op == captured.ops.index("ThirdBackward0")] = 0
    folded = Folded(captured)
    assert outline(folded) == ["a", "Second", "a"]


def test_nothing_is_repeated_if_nothing_shall_be_folded() -> None:
    forward = Forward()
    value = forward.leaf("x")
    for _ in range(9):
        value = forward.op("Sin", value)
    assert outline(Folded(forward.captured(value), None)) == ["Sin"] * 9


def test_the_architectures_are_folded_as_their_authors_wrote_them() -> None:
    def repetitions(name: str) -> list[tuple[str, int]]:
        folded = Folded(real_graph(name))
        return [(block.kind, block.count) for block in blocks_of(folded) if block.count > 1]

    assert repetitions("gpt2") == [("module", 12)]
    assert sorted(repetitions("recursive_tree")) == [("sequence", 3), ("sequence", 5)]
    assert repetitions("unrolled_rnn") == [("sequence", 49), ("sequence", 49)]
    assert ("module", 12) in repetitions("checkpointed_gpt2")
