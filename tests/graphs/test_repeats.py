"""The order of execution and the runs found in it, against loops that compare copy by copy."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from graph_makers import (
    Forward,
    Value,
    inputs_by_place,
    random_dag,
    random_loops,
    why_not_copies,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from gradscope.graphs.execution import execution_of
from gradscope.graphs.likeness import Likeness, likeness_of_leaves, likeness_of_operations
from gradscope.graphs.repeats import Run, Wiring, find_runs
from gradscope.run.captured_graph import CapturedGraph

LIKENESSES: tuple[Likeness, ...] = ("exact", "shape", "op")
SEEDS = st.integers(0, 2**32 - 1)


def runs_of(captured: CapturedGraph, likeness: Likeness = "shape") -> list[Run]:
    execution = execution_of(captured)
    return find_runs(
        likeness_of_operations(captured, execution, likeness),
        np.arange(len(execution) + 1),
        Wiring(execution, likeness_of_leaves(captured, likeness)),
    )


def triples(runs: list[Run]) -> list[tuple[int, int, int]]:
    return [(run.first, run.period, run.count) for run in runs]


# -- the order of execution ---------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(SEEDS, st.sampled_from(["kept", "shuffled", "equal", "of two threads"]))
def test_every_operation_has_one_place_and_data_only_flows_forwards(seed: int, how: str) -> None:
    captured = numbered(random_dag(seed, 40), how, Random(seed))
    execution = execution_of(captured)
    operations = [n for n in range(len(captured)) if captured.param[n] < 0]
    assert sorted(execution.node.tolist()) == operations
    assert [execution.place[n] for n in execution.node] == list(range(len(operations)))
    assert (execution.place[captured.param >= 0] == -1).all()
    assert (execution.source < execution.target).all()
    if how == "kept":
        numbers = captured.sequence_nr[execution.node]
        assert (np.diff(numbers) > 0).all()


def numbered(captured: CapturedGraph, how: str, random: Random) -> CapturedGraph:
    numbers = captured.sequence_nr
    is_operation = numbers >= 0
    if how == "shuffled":
        numbers[is_operation] = random.sample(numbers[is_operation].tolist(), is_operation.sum())
    elif how == "equal":
        numbers[is_operation] = 7
    elif how == "of two threads":
        for node in np.flatnonzero(is_operation):
            numbers[node] //= random.choice([1, 2])
    return captured


@settings(deadline=None, max_examples=50)
@given(SEEDS, st.booleans())
def test_the_inputs_of_each_operation_keep_the_order_of_its_arguments(
    seed: int, is_shuffled: bool
) -> None:
    captured = numbered(random_dag(seed, 30), "shuffled" if is_shuffled else "kept", Random(seed))
    execution = execution_of(captured)
    for place, inputs in enumerate(inputs_by_place(captured, execution.node.tolist())):
        edges = slice(*execution.first_input[place : place + 2].tolist())
        assert execution.target[edges].tolist() == [place] * len(inputs)
        assert execution.leaf[edges].tolist() == [each.leaf for each in inputs]
        assert execution.source[edges].tolist() == [each.place for each in inputs]
        inner = [each.output for each in inputs if each.leaf < 0]
        assert execution.source_output[edges][execution.leaf[edges] < 0].tolist() == inner


def test_a_graph_without_nodes_has_no_places_and_no_runs() -> None:
    captured = Forward().captured()
    assert len(execution_of(captured)) == 0
    assert runs_of(captured) == []


def test_a_root_that_is_a_leaf_has_no_place() -> None:
    forward = Forward()
    captured = forward.captured(forward.leaf("w"))
    assert execution_of(captured).place.tolist() == [-1]
    assert runs_of(captured) == []


# -- runs are made of copies --------------------------------------------------------------------


@settings(deadline=None, max_examples=250)
@given(
    SEEDS,
    st.sampled_from([random_loops, lambda seed: random_dag(seed, 60)]),
    st.sampled_from(LIKENESSES),
)
def test_the_copies_of_every_run_are_alike_and_wired_alike(
    seed: int, make: Callable[[int], CapturedGraph], likeness: Likeness
) -> None:
    captured = make(seed)
    order = execution_of(captured).node.tolist()
    at = 0
    for run in runs_of(captured, likeness):
        assert at <= run.first < run.stop <= len(order)
        assert run.count >= 2
        at = run.stop
        assert not why_not_copies(captured, order, *triples([run])[0], likeness)


# -- what is found ------------------------------------------------------------------------------


def test_a_chain_of_one_operation_is_one_run() -> None:
    forward = Forward()
    value = forward.leaf("w")
    for _ in range(100):
        value = forward.op("Tanh", value)
    assert triples(runs_of(forward.captured(value))) == [(0, 1, 100)]


@pytest.mark.parametrize("n_blocks", [2, 3, 12])
@pytest.mark.parametrize("likeness", LIKENESSES)
def test_blocks_with_weights_of_their_own_are_one_run(n_blocks: int, likeness: Likeness) -> None:
    forward = Forward()
    value = forward.op("Embedding", forward.leaf("wte", shape=(100, 8)))
    for number in range(n_blocks):
        value = residual_block(forward, value, number)
    loss = forward.op("Loss", value, shape=())
    assert triples(runs_of(forward.captured(loss), likeness)) == [(1, 5, n_blocks)]


def residual_block(
    forward: Forward, value: Value, number: int, shape: tuple[int, int] = (2, 3)
) -> Value:
    inner = forward.op("Norm", value, shape=shape)
    for name in ("up", "down"):
        inner = forward.op(
            "Mm", inner, forward.leaf(f"h.{number}.{name}", shape=shape), shape=shape
        )
    inner = forward.op("Gelu", inner, shape=shape)
    return forward.op("Add", value, inner, shape=shape)


def test_a_block_begins_where_the_fewest_values_are_handed_on() -> None:
    forward = Forward()
    tables = [forward.op("Embedding", forward.leaf(name)) for name in ("wte", "wpe")]
    value = forward.op("Add", *tables)  # as at the end of each block
    for number in range(6):
        value = residual_block(forward, value, number)
    value = forward.op("Head", forward.op("Norm", value))  # as at the beginning of each block
    assert triples(runs_of(forward.captured(value))) == [(3, 5, 6)]


def test_the_first_turn_of_a_loop_may_be_given_its_state_by_something_else() -> None:
    forward = Forward()
    weight = forward.leaf("w")
    for state in (forward.leaf("h0"), forward.op("Zeros", weight)):
        start = state
        for _ in range(6):
            state = forward.op("Tanh", forward.op("Mm", state, weight))
        runs = triples(runs_of(forward.captured(state)))
        assert [(period, count) for _, period, count in runs] == [(2, 6)], start


def test_a_turn_with_fewer_inputs_stands_apart() -> None:
    forward = Forward()
    weight = forward.leaf("w")
    state = forward.op("Tanh", forward.op("Mm", weight))  # its state requires no grad
    for _ in range(9):
        state = forward.op("Tanh", forward.op("Mm", state, weight))
    runs = runs_of(forward.captured(state))
    assert [run.count for run in runs] == [9]


def test_a_value_from_before_that_every_turn_uses_is_no_obstacle() -> None:
    forward = Forward()
    start = forward.op("Start", forward.leaf("w"))
    state = start
    for _ in range(7):
        state = forward.op("Tanh", forward.op("Cat", state, start))
    assert triples(runs_of(forward.captured(state))) == [(1, 2, 7)]


def test_a_loop_over_what_another_loop_has_collected_is_a_run() -> None:
    forward = Forward()
    state, weight = forward.leaf("h0"), forward.leaf("w")
    collected = []
    for _ in range(8):
        state = forward.op("Tanh", forward.op("Norm", forward.op("Mm", state, weight)))
        collected.append(state)
    total = forward.op("Sum", collected[0])
    for value in collected:
        total = forward.op("Plus", total, forward.op("Square", value))
    assert triples(runs_of(forward.captured(total))) == [(0, 3, 8), (25, 2, 8)]


def test_a_loop_that_goes_backwards_over_what_another_has_collected_is_a_run() -> None:
    forward = Forward()
    state = forward.leaf("h0")
    collected = []
    for _ in range(8):
        state = forward.op("Tanh", forward.op("Norm", forward.op("Sin", state)))
        collected.append(state)
    total = forward.op("Sum", state)
    for value in reversed(collected):
        total = forward.op("Plus", total, forward.op("Square", value))
    assert triples(runs_of(forward.captured(total))) == [(0, 3, 8), (25, 2, 8)]


@pytest.mark.parametrize("n_operations", [1, 4, 9])
@pytest.mark.parametrize("n_back", [2, 3])
def test_a_recurrence_over_several_turns_is_a_run_that_takes_from_one_copy_before(
    n_operations: int, n_back: int
) -> None:
    forward = Forward()
    values = [forward.leaf(f"x{i}") for i in range(n_back)]
    for _ in range(30):
        value = forward.op("Verlet", values[-n_back], values[-1])
        for number in range(1, n_operations):
            value = forward.op(f"Op{number}", value)
        values.append(value)
    captured = forward.captured(values[-1])
    order = execution_of(captured).node.tolist()
    runs = runs_of(captured)
    assert not any(why_not_copies(captured, order, *each, "shape") for each in triples(runs))
    assert sum(run.n_saved for run in runs) > len(order) * 2 / 3


def test_two_loops_with_the_same_body_and_different_starts_are_two_runs() -> None:
    forward = Forward()
    start = forward.op("Start", forward.leaf("h0"))
    ends = []
    for _ in range(2):
        state = start
        for _ in range(6):
            state = forward.op("Tanh", forward.op("Mm", state, forward.leaf()))
        ends.append(state)
    runs = runs_of(forward.captured(forward.op("Cat", *ends)))
    assert sum(run.count for run in runs) >= 11
    assert [run.period for run in runs] == [2, 2]


def test_outer_loops_come_before_the_loops_inside_of_them() -> None:
    forward = Forward()
    state = forward.leaf("h0")
    for _ in range(4):
        for _ in range(5):
            state = forward.op("Tanh", forward.op("Mm", state))
        state = forward.op("Double", state)
    assert triples(runs_of(forward.captured(state))) == [(0, 11, 4)]


def test_many_runs_of_different_lengths_are_all_found() -> None:
    forward = Forward()
    value = forward.leaf("w")
    wanted = []
    at = 0
    for period in range(2, 40):
        for _ in range(4):
            for number in range(period):
                value = forward.op(f"Op{period}.{number}", value)
        wanted.append((at, period, 4))
        at += 4 * period
    assert triples(runs_of(forward.captured(value))) == wanted


def test_a_run_of_thousands_of_blocks_is_one() -> None:
    forward = Forward()
    value = forward.leaf("x")
    for number in range(2000):
        value = residual_block(forward, value, number)
    assert triples(runs_of(forward.captured(value))) == [(0, 5, 2000)]


# -- what is no run -----------------------------------------------------------------------------


def is_left_apart(captured: CapturedGraph, likeness: Likeness = "shape") -> bool:
    return not runs_of(captured, likeness)


def test_twice_a_little_thing_is_told_in_two_boxes() -> None:
    forward = Forward()
    value = forward.op("Add", forward.op("Add", forward.leaf("w")))
    assert is_left_apart(forward.captured(value))


def test_dense_connections_are_no_run() -> None:
    forward = Forward()
    values = [forward.leaf("x")]
    for _ in range(8):
        values.append(forward.op("Conv", forward.op("Cat", *values)))
    assert is_left_apart(forward.captured(values[-1]))


def test_turns_that_use_two_values_by_turns_are_no_run_of_single_turns() -> None:
    forward = Forward()
    constants = [forward.op(f"Make{i}", forward.leaf("w")) for i in range(2)]
    state = forward.leaf("h0")
    for turn in range(10):
        state = forward.op("Mul", state, constants[turn % 2])
    assert triples(runs_of(forward.captured(state))) == [(2, 2, 5)]


def test_what_is_wired_in_the_other_order_is_no_copy() -> None:
    forward = Forward()
    start = forward.op("Start", forward.leaf("w"))
    value = start
    for _ in range(2):
        for turn in range(2):
            inner = forward.op("Exp", forward.op("Sin", value))
            operands = (inner, start) if turn else (start, inner)
            value = forward.op("Cos", forward.op("Sub", *operands))
        value = forward.op("End", value)
    runs = runs_of(forward.captured(value))
    assert triples(runs) == [(1, 9, 2)]  # not the halves of it


def test_another_output_of_the_same_operation_is_another_input() -> None:
    forward = Forward()
    split = forward.op("Split", forward.leaf("w"), n_outputs=2)
    value = forward.leaf("x")
    for turn in range(2):
        value = forward.op("Sin", forward.op("Mul", value, Value(split.node, turn)))
        value = forward.op("Exp", forward.op("Cos", value))
    assert is_left_apart(forward.captured(value))


def test_two_stretches_with_the_same_operations_wired_differently_are_no_run() -> None:
    forward = Forward()
    start = forward.op("Start", forward.leaf("w"))
    a = forward.op("A", start)
    b = forward.op("B", start)  # beside a
    c = forward.op("C", forward.op("Cat", a, b))
    a = forward.op("A", c)
    b = forward.op("B", a)  # behind a
    c = forward.op("C", forward.op("Cat", a, b))
    assert is_left_apart(forward.captured(c))


@pytest.mark.parametrize(
    ("taken", "is_run"),
    [((0, 3, 6, 9, 12, 15), True), ((0, 3, 6, 9, 14, 19, 24), False), ((3, 2, 1, 0), True)],
)
def test_a_loop_over_earlier_values_goes_on_by_the_same_step(
    taken: tuple[int, ...], is_run: bool
) -> None:
    forward = Forward()
    values = [forward.leaf("x")]
    for number in range(30):
        values.append(forward.op(f"Op{number}", values[-1]))
    total = values[-1]
    for number in taken:
        total = forward.op("Plus", total, values[1 + number])
    runs = triples(runs_of(forward.captured(total)))
    assert (runs == [(30, 1, len(taken))]) == is_run


def test_a_value_that_only_the_second_turn_takes_from_the_first_is_no_loop() -> None:
    forward = Forward()
    values = [forward.op("Start", forward.leaf("w"))]
    for turn in range(3):
        values.append(forward.op("Add", values[min(turn, 1)]))
    assert is_left_apart(forward.captured(*values))


@pytest.mark.parametrize(
    ("differs", "likenesses"),
    [("dtype", ("shape", "op")), ("shape", ("op",)), ("op", ())],
)
def test_a_likeness_tells_what_may_differ(differs: str, likenesses: tuple[str, ...]) -> None:
    forward = Forward()
    value = forward.leaf("x")
    for turn in range(6):
        other = {
            "dtype": {"dtype": "float16" if turn % 2 else "float32"},
            "shape": {"shape": (turn + 1,)},
            "op": {},
        }[differs]
        kind = f"Op{turn}" if differs == "op" else "Op"
        value = forward.op(kind, value, **other)  # type: ignore[arg-type]
    captured = forward.captured(value)
    found = {likeness for likeness in LIKENESSES if not is_left_apart(captured, likeness)}
    if differs == "dtype":  # two turns after one another are then a copy
        assert triples(runs_of(captured, "exact")) == [(0, 2, 3)]
        found.discard("exact")
    assert found == set(likenesses)


@pytest.mark.parametrize("likeness", LIKENESSES)
def test_weights_of_other_shapes_do_not_stand_for_each_other(likeness: Likeness) -> None:
    forward = Forward()
    value = forward.leaf("x")
    for turn in range(6):
        value = forward.op("Mm", value, forward.leaf(f"w{turn}", shape=(turn + 1,)))
    assert is_left_apart(forward.captured(value), likeness) == (likeness != "op")
