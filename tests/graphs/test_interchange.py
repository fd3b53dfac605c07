"""Graphs as JSON and for networkx, against walks over their fields that know nothing of either."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections import Counter
from random import Random
from typing import Any

import networkx as nx
import numpy as np
import pytest
from graph_makers import Forward, random_dag
from hypothesis import given, settings
from hypothesis import strategies as st

from gradscope.errors import UsageError
from gradscope.run.captured_graph import CapturedGraph, Registered, SavedTensors
from gradscope.run.interchange import FORMAT, VERSION, from_json, to_json, to_networkx

SEEDS = st.integers(0, 2**32 - 1)
NAMES = st.text(st.characters(exclude_categories=()))
"""Lone surrogates, NUL and line ends included."""


def furnished(captured: CapturedGraph, seed: int, names: list[str]) -> CapturedGraph:
    """Fill in what a made-up forward does not have, so that no field is left empty."""
    random, n = Random(seed), len(captured)
    n_saved = random.randrange(6)

    def name() -> str:
        return random.choice(names)

    def shape() -> tuple[int, ...]:
        return tuple(random.randrange(2**40) for _ in range(random.randrange(4)))

    return dataclasses.replace(
        captured,
        params=tuple(tuple(name() for _ in range(random.randrange(3))) for _ in captured.params),
        registered=tuple(
            Registered((name(), name()), shape(), random.random() < 0.5) for _ in range(3)
        ),
        saved=SavedTensors(
            names=(name(), name()),
            node=np.array([random.randrange(n) for _ in range(n_saved)], np.int32),
            name=np.array([random.randrange(2) for _ in range(n_saved)], np.int32),
            shapes=tuple(random.choice([None, shape()]) for _ in range(n_saved)),
            n_bytes=np.array([random.randrange(2**62) for _ in range(n_saved)], np.int64),
            storage=np.array([random.randrange(-1, 3) for _ in range(n_saved)], np.int32),
        ),
        began=random.choice([None, 0, 2**62]),
        lines=((name(), 3), (name(), 2**31)),
        line=np.array([random.randrange(-1, 2) for _ in range(n)], np.int32),
        calls=dataclasses.replace(captured.calls, feeds=((0, 0),) if captured.calls else ()),
    )


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Name every place at which two values are not of the same type and equal."""
    if type(one) is not type(other):
        return [f"{where}: {type(one)} {type(other)}"]
    if isinstance(one, np.ndarray):
        same = one.dtype == other.dtype and np.array_equal(one, other)
        return [] if same else [f"{where}: {one!r} {other!r}"]
    if dataclasses.is_dataclass(one):
        return [
            each
            for field in dataclasses.fields(one)
            for each in differences(
                getattr(one, field.name), getattr(other, field.name), f"{where}.{field.name}"
            )
        ]
    if isinstance(one, tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [each for i, (a, b) in pairs for each in differences(a, b, f"{where}[{i}]")]
    return [] if one == other else [f"{where}: {one!r} {other!r}"]


def small() -> CapturedGraph:
    forward = Forward()
    x, w = forward.leaf(), forward.leaf("net.w", "tied.w")
    with forward.module("net", "Net"):
        split = forward.op("Split", forward.op("Mul", x, w), n_outputs=2)
        loss = forward.op("Sub", dataclasses.replace(split, output=1), split, shape=())
    return furnished(forward.captured(loss), seed=3, names=["a", "b"])


def document() -> Any:
    return json.loads(to_json(small(), 7))


# -- there and back -------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(SEEDS, st.integers(0, 40), st.lists(NAMES, min_size=1), st.none() | st.integers())
def test_what_is_read_back_is_what_was_written(
    seed: int, n: int, names: list[str], step: int | None
) -> None:
    captured = furnished(random_dag(seed, n + 1), seed, names)
    text = to_json(captured, step)
    read, read_step = from_json(text)
    assert differences(captured, read) == []
    assert read_step == step
    assert to_json(read, step) == text


@pytest.mark.parametrize(
    "name", ["\ud83d\ude00", "\U0001f600", "\udc80", "\0", 'a"\n\\', "", "\u2028"]
)
def test_two_names_that_json_would_take_for_one_stay_apart(name: str) -> None:
    captured = dataclasses.replace(small(), params=((name,), ()))
    assert from_json(to_json(captured, None))[0].params == ((name,), ())


def test_a_graph_without_nodes_is_read_back() -> None:
    captured = Forward().captured()
    assert differences(captured, from_json(to_json(captured, 0))[0]) == []


def test_every_field_is_written_as_plain_json_in_one_line_of_ascii() -> None:
    text = to_json(small(), 7)
    assert text.isascii()
    assert "\n" not in text
    assert ", " not in text
    written = json.loads(text, parse_float=lambda number: pytest.fail(f"a float: {number}"))
    assert written.keys() == {"format", "version", "step", "graph"}
    assert (written["format"], written["version"], written["step"]) == (FORMAT, VERSION, 7)
    graph = small()
    for where, value in (
        (written["graph"], graph),
        (written["graph"]["calls"], graph.calls),
        (written["graph"]["saved"], graph.saved),
        (written["graph"]["outputs"][0], graph.outputs[0]),
        (written["graph"]["registered"][0], graph.registered[0]),
    ):
        assert where.keys() == {field.name for field in dataclasses.fields(value)}
    assert written["graph"]["sequence_nr"] == graph.sequence_nr.tolist()


# -- what is refused ------------------------------------------------------------------------------


def test_a_text_that_is_cut_off_anywhere_is_refused() -> None:
    text = to_json(small(), 7)
    for length in range(len(text)):
        with pytest.raises(UsageError, match="only a part of it"):
            from_json(text[:length])


@pytest.mark.parametrize(
    "text",
    ["null", "[]", "{}", "3", '"graph"', '{"format":"other","version":1}', '{"nodes":[]}'],
)
def test_something_else_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=FORMAT):
        from_json(text)


@pytest.mark.parametrize("text", [b"{}", None, 3])
def test_what_is_no_text_is_refused(text: Any) -> None:
    with pytest.raises(UsageError, match=type(text).__name__):
        from_json(text)


def test_a_newer_version_is_told_by_its_number() -> None:
    with pytest.raises(UsageError, match=r"newer gradscope.*version 2.*update"):
        from_json(json.dumps(document() | {"version": 2, "graph": {"what": "comes then"}}))


@pytest.mark.parametrize("version", [None, "1", 0, -1, 1.0, True])
def test_a_version_that_is_none_is_refused(version: object) -> None:
    with pytest.raises(UsageError, match="version"):
        from_json(json.dumps(document() | {"version": version}))


def test_deep_nesting_and_endless_numbers_are_refused() -> None:
    for text in ("[" * 200_000, '{"format":' * 50_000, "1" * 10_000):
        with pytest.raises(UsageError):
            from_json(text)
    nested = json.dumps(document() | {"step": 0}).replace(
        '"step": 0', f'"step": {"[" * 400}{"]" * 400}'
    )
    with pytest.raises(UsageError, match="step"):
        from_json(nested)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a document but for the whole of it."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, each in inner:
        found.append((*path, key))
        if isinstance(each, dict | list):
            found += places(each, (*path, key))
    return found


def put(whole: Any, path: tuple[Any, ...], value: Any) -> Any:
    changed = copy.deepcopy(whole)
    at = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return changed


@pytest.mark.parametrize("wrong", [1.5, {"a": 1}, [[[None]]]], ids=str)
def test_a_value_of_the_wrong_type_is_refused_wherever_it_stands(wrong: Any) -> None:
    whole = document()
    for path in places(whole):
        if path[0] in ("format", "version"):
            continue
        with pytest.raises(UsageError) as error:
            from_json(json.dumps(put(whole, path, wrong)))
        assert str([key for key in path if isinstance(key, str)][-1]) in str(error.value)


def test_truth_and_numbers_are_not_taken_for_each_other() -> None:
    for path, wrong in (
        (("graph", "registered", 0, "requires_grad"), 1),
        (("graph", "calls", "without_grad", 0), 0),
        (("graph", "op", 0), True),
        (("graph", "began"), False),
        (("step",), True),
    ):
        with pytest.raises(UsageError, match=str([key for key in path if key != 0][-1])):
            from_json(json.dumps(put(document(), path, wrong)))


@pytest.mark.parametrize("key", ["graph", "step"])
def test_what_is_missing_is_named(key: str) -> None:
    whole = document()
    del whole[key]
    with pytest.raises(UsageError, match=f"{key} is missing"):
        from_json(json.dumps(whole))


def test_fields_that_are_missing_or_unknown_are_named() -> None:
    whole = document()
    for path in places(whole):
        if path[0] != "graph" or not isinstance(path[-1], str):
            continue
        at = changed = copy.deepcopy(whole)
        for key in path[:-1]:
            at = at[key]
        at["surplus"] = at.pop(path[-1])
        with pytest.raises(UsageError, match=f"{path[-1]} is missing"):
            from_json(json.dumps(changed))
        at[path[-1]] = None
        with pytest.raises(UsageError, match="surplus' is unknown"):
            from_json(json.dumps(changed))


@pytest.mark.parametrize(
    "path",
    [
        *(("graph", key) for key in ("op", "source", "target", "param", "output", "roots")),
        *(("graph", key) for key in ("call", "line")),
        *(("graph", "calls", key) for key in ("module", "parent")),
        *(("graph", "saved", key) for key in ("node", "name")),
    ],
    ids=".".join,
)
@pytest.mark.parametrize("number", [-2, 10**6])
def test_a_number_that_refers_to_nothing_is_told(path: tuple[str, ...], number: int) -> None:
    with pytest.raises(UsageError, match=rf"{path[-1]}\[0\] is {number}"):
        from_json(json.dumps(put(document(), (*path, 0), number)))


@pytest.mark.parametrize(
    "key", ["op", "sequence_nr", "param", "output", "call", "line", "source_output", "param_shape"]
)
def test_lists_that_are_not_equally_long_are_refused(key: str) -> None:
    whole = document()
    with pytest.raises(UsageError, match="elements"):
        from_json(json.dumps(put(whole, ("graph", key), whole["graph"][key][:-1])))


def test_numbers_beyond_their_type_are_refused() -> None:
    for key, number in (("sequence_nr", 2**63), ("source_output", 2**31), ("source_output", -1)):
        with pytest.raises(UsageError, match=key):
            from_json(json.dumps(put(document(), ("graph", key, 0), number)))


def test_what_no_forward_could_have_made_is_refused() -> None:
    forward = Forward()
    x = forward.leaf("x")
    first = forward.op("Mul", x)
    captured = forward.captured(forward.op("Add", first, first))
    for change, message in (
        ({"source": captured.target, "target": captured.source}, "ascending|leaf has an input"),
        ({"target": captured.target[::-1].copy()}, "ascending"),
        ({"source": np.array([1, 1, 1], np.int32)}, "circle"),
        ({"source": np.array([1, 1, 0], np.int32)}, "circle"),
    ):
        with pytest.raises(UsageError, match=message):
            from_json(to_json(dataclasses.replace(captured, **change), None))


def test_sequence_numbers_that_do_not_grow_are_no_circle() -> None:
    forward = Forward()
    value = forward.leaf("x")
    for _ in range(5):
        value = forward.op("Mul", value)
    captured = forward.captured(value, sequence_nr=lambda number: -number % 3)
    assert differences(captured, from_json(to_json(captured, 1))[0]) == []


# -- networkx -------------------------------------------------------------------------------------


@settings(deadline=None)
@given(SEEDS, st.integers(1, 60))
def test_networkx_gets_every_node_and_every_use(seed: int, n: int) -> None:
    captured = furnished(random_dag(seed, n), seed, ["a", "b.c"])
    graph = to_networkx(captured)
    assert sorted(graph) == list(range(len(captured)))
    assert nx.is_directed_acyclic_graph(graph)
    assert Counter(
        (source, target, data["source_output"]) for source, target, data in graph.edges(data=True)
    ) == Counter(
        zip(
            captured.source.tolist(),
            captured.target.tolist(),
            captured.source_output.tolist(),
            strict=True,
        )
    )
    for node, data in graph.nodes(data=True):
        leaf, call, line = captured.param[node], captured.call[node], captured.line[node]
        names = captured.params[leaf] if leaf >= 0 else ()
        assert data == {
            "op": captured.op_of(node),
            "sequence_nr": captured.sequence_nr[node],
            "module": captured.calls.path(call) if call >= 0 else None,
            "module_type": captured.calls.kind(call) if call >= 0 else None,
            "call": call,
            "param": names[0] if names else None,
            "aliases": names,
            "shapes": captured.outputs_of(node).shapes,
            "dtypes": captured.outputs_of(node).dtypes,
            "is_root": node in captured.roots.tolist(),
            "file": captured.lines[line][0] if line >= 0 else None,
            "line": captured.lines[line][1] if line >= 0 else None,
        }
        inputs = sorted(
            (data["position"], source) for source, _, data in graph.in_edges(node, data=True)
        )
        assert inputs == list(enumerate(captured.source[captured.target == node].tolist()))


def test_edges_carry_the_shape_that_flows_in_the_order_of_the_arguments() -> None:
    graph = to_networkx(small())
    op = nx.get_node_attributes(graph, "op")
    flows = [
        (op[a], op[b], data["position"], data["source_output"], data["shape"])
        for a, b, data in graph.edges(data=True)
    ]
    assert sorted(flows) == [
        ("AccumulateGrad", "MulBackward0", 0, 0, (2, 3)),
        ("AccumulateGrad", "MulBackward0", 1, 0, (2, 3)),
        ("MulBackward0", "SplitBackward0", 0, 0, (2, 3)),
        ("SplitBackward0", "SubBackward0", 0, 1, (2, 3)),
        ("SplitBackward0", "SubBackward0", 1, 0, (2, 3)),
    ]


def test_plain_values_of_networkx_can_be_written_by_it() -> None:
    graph = to_networkx(small())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = json.dumps(nx.node_link_data(graph))
    assert nx.node_link_graph(json.loads(written)).number_of_edges() == 5
