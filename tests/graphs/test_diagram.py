"""Diagrams with blocks opened at random, against loops that follow every edge by itself."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest
from graph_makers import Forward, Value, architecture, random_dag, random_loops
from hypothesis import given, settings
from hypothesis import strategies as st

from gradscope.errors import UsageError
from gradscope.graphs.arrange import diagram_of
from gradscope.graphs.detail import Views, checked_depth, checked_max_nodes
from gradscope.graphs.diagram import NO_FRAME, Box, Diagram
from gradscope.graphs.fold import Block, Folded
from gradscope.graphs.likeness import Likeness
from gradscope.run.captured_graph import CapturedGraph, Registered, Shape

LIKENESSES: tuple[Likeness | None, ...] = ("exact", "shape", "op", None)
SEEDS = st.integers(0, 2**32 - 1)
MAKERS = st.sampled_from([random_loops, lambda seed: random_dag(seed, 50)])


def opened_at_random(seed: int, share: float) -> Callable[[Block, int], bool]:
    """Open blocks as if by chance, the same ones whenever it is asked."""

    def is_open(block: Block, depth: int) -> bool:
        what = f"{seed} {block.kind} {block.start} {block.stop} {block.count}"
        return zlib.crc32(what.encode()) % 1000 < 1000 * share

    return is_open


# -- a naive picture ----------------------------------------------------------------------------


@dataclass
class Seen:
    """Where an operation is shown.

    Attributes:
        box: the block of its box.
        copies: for each opened repetition around it, from the outside in, which copy it is in.
        shown: the place in the first copies that stands for it.
    """

    box: Block
    copies: list[tuple[Block, int]] = field(default_factory=list)
    shown: int = -1


class Naive:
    """What a diagram should show, one operation and one edge at a time."""

    def __init__(self, diagram: Diagram, is_open: Callable[[Block, int], bool]) -> None:
        self.diagram = diagram
        self.captured = diagram.folded.captured
        self.execution = diagram.folded.execution
        shown = {(box.block.start, box.block.stop): box for box in diagram.boxes if box.block}
        self.boxes = list(shown.values())
        self.number = {id(box.block): at for at, box in enumerate(diagram.boxes) if box.block}
        self.seen = [self.look_for(place) for place in range(len(self.execution))]

    def look_for(self, place: int) -> Seen:
        copies = []
        for frame in self.frames_around(place):
            copies.append((frame, (place - frame.start) // frame.period))
            place = frame.start + (place - frame.start) % frame.period
        (box,) = [
            box.block
            for box in self.boxes
            if box.block is not None and box.block.start <= place < box.block.stop
        ]
        return Seen(box, copies, box.start + (place - box.start) % box.period)

    def frames_around(self, place: int) -> list[Block]:
        """Opened repetitions around a place, outer ones first."""
        found: list[Block] = []
        for frame in self.diagram.frames:  # outer ones first
            block = frame.block
            if block.start <= place < block.stop and block.count > 1:
                found.append(block)
                place = block.start + (place - block.start) % block.period
        return found

    def carried_in(self, source: int, target: int) -> Block | None:
        """The outermost repetition in different copies of which two operations lie."""
        pairs = zip(self.seen[source].copies, self.seen[target].copies, strict=False)
        for (frame, copy), (other, other_copy) in pairs:
            if frame is not other:
                return None
            if copy != other_copy:
                return frame
        return None

    def box_of(self, place: int) -> int:
        return self.number[id(self.seen[place].box)]

    def links(self) -> list[tuple[int, int, int, set[tuple[int, int]]]]:
        """Of each link the boxes, copies, and the tensors it stands for: shown place and output."""
        links: dict[tuple[int, int, Block | None], set[tuple[int, int]]] = {}
        edges = self.execution
        for source, output, target in zip(
            edges.source.tolist(), edges.source_output.tolist(), edges.target.tolist(), strict=True
        ):
            if source < 0:
                continue
            carried_in = self.carried_in(source, target)
            boxes = self.box_of(source), self.box_of(target)
            if carried_in is not None or boxes[0] != boxes[1]:
                tensor = self.seen[source].shown, output
                links.setdefault((*boxes, carried_in), set()).add(tensor)
        return [
            (source, target, frame.count if frame is not None else 1, tensors)
            for (source, target, frame), tensors in links.items()
        ]


def check(diagram: Diagram, is_open: Callable[[Block, int], bool]) -> None:
    naive = Naive(diagram, is_open)
    folded, boxes = diagram.folded, diagram.boxes
    # Every operation belongs to one box, the one that a reader would look for it in.
    assert diagram.box_of_place.tolist() == [
        naive.box_of(place) for place in range(folded.n_operations)
    ]
    assert diagram.shown_place.tolist() == [seen.shown for seen in naive.seen]
    check_frames(diagram)
    # Links between operations.
    of_operations = [
        link for link in diagram.links if boxes[link.source].block and boxes[link.target].block
    ]
    wanted = [
        (source, target, turns, len(tensors), sorted({shape_of(folded, *each) for each in tensors}))
        for source, target, turns, tensors in naive.links()
    ]
    assert sorted(wanted) == sorted(
        (link.source, link.target, link.turns, link.n_tensors, sorted(link.shapes))
        for link in of_operations
    )
    for link in of_operations:
        assert link.carried == (link.turns > 1)
        assert not link.is_cut
    assert has_no_circle(diagram)
    check_leaves(diagram, naive)
    check_roots(diagram)


def shape_of(folded: Folded, place: int, output: int) -> Shape:
    return folded.captured.outputs_of(int(folded.execution.node[place])).shapes[output]


def check_frames(diagram: Diagram) -> None:
    for number, frame in enumerate(diagram.frames):
        assert NO_FRAME <= frame.parent < number
    for thing in (*diagram.frames, *(box for box in diagram.boxes if box.block)):
        around = thing.parent if not isinstance(thing, Box) else thing.frame
        if around != NO_FRAME:
            block, outer = thing.block, diagram.frames[around].block
            assert block is not None
            assert outer.start <= block.start < block.stop <= outer.start + outer.period


def has_no_circle(diagram: Diagram) -> bool:
    users: dict[int, list[int]] = {}
    unmet = Counter(dict.fromkeys(range(len(diagram.boxes)), 0))
    for link in diagram.links:
        if not link.carried:
            users.setdefault(link.source, []).append(link.target)
            unmet[link.target] += 1
    ready = [number for number in unmet if not unmet[number]]
    n_done = 0
    while ready:
        n_done += 1
        for user in users.get(ready.pop(), ()):
            unmet[user] -= 1
            if not unmet[user]:
                ready.append(user)
    return n_done == len(diagram.boxes)


def check_leaves(diagram: Diagram, naive: Naive) -> None:
    edges, captured = diagram.folded.execution, diagram.folded.captured
    boxes = diagram.boxes
    listed = {leaf: at for at, box in enumerate(boxes) for leaf in leaves_of(box)}
    n_listed = sum(len(leaves_of(box)) for box in boxes)
    assert n_listed == len(listed)  # each in one box only
    links = {(link.source, link.target): link for link in diagram.links}
    for link in diagram.links:
        if not boxes[link.source].block and boxes[link.source].missing is None:
            leaves = leaves_of(boxes[link.source])
            assert link.n_tensors == len(leaves)
            assert set(link.shapes) == {captured.param_shape[leaf] for leaf in leaves}
            assert not link.carried
    used_links = set()
    users: dict[int, set[int]] = {}
    counterparts: dict[int, set[int]] = {}
    first_input = edges.first_input.tolist()

    def shown_for(target: int, edge: int) -> int:
        argument = edge - first_input[target]
        return int(edges.leaf[first_input[naive.seen[target].shown] + argument])

    uses = [
        (target, leaf, edge)
        for edge, (target, leaf) in enumerate(
            zip(edges.target.tolist(), edges.leaf.tolist(), strict=True)
        )
        if leaf >= 0
    ]
    shown_as: dict[int, set[int]] = {}
    for target, leaf, edge in uses:
        shown_as.setdefault(leaf, set()).add(shown_for(target, edge))
    for target, leaf, edge in uses:
        box = naive.box_of(target)
        shown = shown_for(target, edge)
        assert shown >= 0
        # One that is also used elsewhere is no counterpart of a single one.
        if shown != leaf and len(shown_as[leaf]) == 1:
            counterparts.setdefault(shown, set()).add(leaf)
            continue
        users.setdefault(leaf, set()).add(box)
        assert leaf in listed
        if listed[leaf] != box:
            assert (listed[leaf], box) in links
            used_links.add((listed[leaf], box))
    assert {leaf: set(others) for leaf, others in diagram.alike.items()} == counterparts
    assert all(len(others) == len(set(others)) for others in diagram.alike.values())
    leaf_links = {
        (link.source, link.target)
        for link in diagram.links
        if not boxes[link.source].block and boxes[link.source].missing is None
    }
    assert leaf_links == used_links
    for at, box in enumerate(boxes):
        if box.block is not None:
            for leaf in box.leaves:
                assert users[leaf] == {at}
                assert box.block.can_open

    # A leaf stands in the innermost frame around all boxes that use it.
    for leaf, of_leaf in users.items():
        if boxes[listed[leaf]].leaf == leaf:
            common = set.intersection(*(frames_around(diagram, user) for user in of_leaf))
            assert boxes[listed[leaf]].frame == max(common)  # inner frames come later


def frames_around(diagram: Diagram, box: int) -> set[int]:
    frame = diagram.boxes[box].frame
    around = {NO_FRAME, frame}
    while frame != NO_FRAME:
        frame = diagram.frames[frame].parent
        around.add(frame)
    return around


def leaves_of(box: Box) -> list[int]:
    return [box.leaf] if box.leaf >= 0 else box.leaves


def check_roots(diagram: Diagram) -> None:
    captured, place = diagram.folded.captured, diagram.folded.execution.place
    wanted = set()
    for root in captured.roots.tolist():
        if place[root] >= 0:
            wanted.add(int(diagram.box_of_place[place[root]]))
        else:
            leaf = int(captured.param[root])
            wanted |= {at for at, box in enumerate(diagram.boxes) if leaf in leaves_of(box)}
            assert wanted
    assert {at for at, box in enumerate(diagram.boxes) if box.is_root} == wanted


@settings(deadline=None, max_examples=250)
@given(
    SEEDS,
    MAKERS,
    st.sampled_from(LIKENESSES),
    st.booleans(),
    st.sampled_from([0.0, 0.5, 0.8, 1.0]),
    st.sampled_from([2, 3, 7, 10**9]),
    st.sampled_from([0, 3, 10**9]),
)
def test_every_operation_and_every_edge_is_shown_whatever_is_open(
    seed: int,
    make: Callable[[int], CapturedGraph],
    likeness: Likeness | None,
    chains: bool,
    share: float,
    most_parts: int,
    most_leaves: int,
) -> None:
    folded = Folded(make(seed), likeness)
    if chains:
        folded = folded.with_chains()
    is_open = opened_at_random(seed, share)
    check(diagram_of(folded, is_open, most_parts=most_parts, most_leaves=most_leaves), is_open)


@pytest.mark.parametrize(
    "name", ["gpt2", "unrolled_rnn", "recursive_tree", "mixture_of_experts", "lstm_classifier"]
)
def test_every_operation_and_edge_of_real_graphs_is_shown(name: str) -> None:
    captured = architecture(name)
    for likeness in LIKENESSES:
        folded = Folded(captured, likeness)
        for seed, share in enumerate((0.0, 0.5, 0.9, 1.0)):
            is_open = opened_at_random(seed, share)
            check(diagram_of(folded, is_open), is_open)


@settings(deadline=None, max_examples=60)
@given(SEEDS, MAKERS, st.sampled_from([0.0, 0.5, 1.0]))
def test_the_inside_of_one_block_is_shown_by_itself(
    seed: int, make: Callable[[int], CapturedGraph], share: float
) -> None:
    folded = Folded(make(seed))
    blocks = [part for part in folded.parts(folded.root) if part.can_open]
    for top in blocks:
        diagram = diagram_of(folded, opened_at_random(seed, share), top=top)
        shown = diagram.box_of_place >= 0
        assert shown.nonzero()[0].tolist() == list(range(top.start, top.stop))
        assert has_no_circle(diagram)
        for box in diagram.boxes:
            assert box.block is None or top.start <= box.block.start
            assert box.block is None or box.block.stop <= top.start + top.period


def test_what_a_copy_uses_twice_is_one_counterpart() -> None:
    forward = Forward()
    value = forward.leaf("x")
    for turn in range(3):
        weight = forward.leaf(f"w{turn}")
        value = forward.op("Mm", forward.op("Mm", value, weight), weight)
    diagram = diagram_of(Folded(forward.captured(value)), lambda block, depth: True)
    names = {
        diagram.folded.captured.params[leaf][0]: [
            diagram.folded.captured.params[other][0] for other in others
        ]
        for leaf, others in diagram.alike.items()
    }
    assert names == {"w0": ["w1", "w2"]}


def test_a_loop_inside_of_a_loop_carries_downwards_in_no_copy() -> None:
    forward = Forward()
    value = forward.leaf("x")
    for _ in range(3):
        for _ in range(3):
            value = forward.op("Cos", forward.op("Sin", value))
        value = forward.op("Exp", value)
    diagram = diagram_of(Folded(forward.captured(value)), lambda block, depth: True)
    sin, cos, exp = range(3)
    assert {(link.source, link.target, link.carried) for link in diagram.links} == {
        (sin, cos, False),
        (cos, exp, False),
        (cos, sin, True),
        (exp, sin, True),
        (3, sin, False),  # x
    }


@pytest.mark.parametrize("most_leaves", [0, 10])
def test_roots_are_marked_where_they_are_leaves(most_leaves: int) -> None:
    forward = Forward()
    w, x, y = (forward.leaf(name) for name in "wxy")
    with forward.module("m"):
        loss = forward.op("Mm", w, x)
    captured = forward.captured(w, loss, y)
    diagram = diagram_of(Folded(captured), lambda block, depth: False, most_leaves=most_leaves)
    roots = [box for box in diagram.boxes if box.is_root]
    assert {captured.params[leaf][0] for box in roots for leaf in leaves_of(box)} >= {"w", "y"}
    assert any(box.block is not None for box in roots)


# -- how much is shown --------------------------------------------------------------------------


def pictures(
    captured: CapturedGraph, likeness: Likeness | None, depth: object, max_nodes: int
) -> list[Diagram]:
    """All diagrams that are offered, none of which may be too large."""
    shown = list(Views(captured, likeness).shown(checked_depth(depth), max_nodes))
    assert shown
    assert all(len(each.diagram.boxes) <= max_nodes for each in shown)
    for each in shown:
        assert has_no_circle(each.diagram)
        assert (each.diagram.box_of_place >= 0).all()
        check_roots(each.diagram)
    return [each.diagram for each in shown]


DEPTHS = st.sampled_from([None, "all", 0, 1, 3])


@settings(deadline=None, max_examples=60)
@given(SEEDS, MAKERS, st.sampled_from(LIKENESSES), DEPTHS, st.integers(5, 60))
def test_no_picture_has_too_many_boxes_and_there_always_is_one(
    seed: int,
    make: Callable[[int], CapturedGraph],
    likeness: Likeness | None,
    depth: object,
    max_nodes: int,
) -> None:
    pictures(make(seed), likeness, depth, max_nodes)


def a_thousand_shared_leaves() -> CapturedGraph:
    forward = Forward()
    leaves = [forward.leaf(f"w{i}") for i in range(1000)]
    return forward.captured(forward.op("Cat", forward.op("Cat", *leaves), *leaves))


def leaves_in_every_module() -> CapturedGraph:
    forward = Forward()
    value = forward.leaf("x")
    for number in range(20):
        with forward.module(f"m{number}", f"M{number}"):
            shared = [forward.leaf(f"w{number}.{i}") for i in range(20)]
            for kind in "ABC":
                value = forward.op(kind * (number + 1), value, *shared)
    return forward.captured(value)


def no_nodes() -> CapturedGraph:
    return Forward().captured()


def a_root_that_is_a_leaf() -> CapturedGraph:
    forward = Forward()
    return forward.captured(forward.leaf("w"))


def hundreds_of_roots() -> CapturedGraph:
    forward = Forward()
    value = forward.leaf("x")
    roots = [forward.op(f"Op{i % 7}", value) for i in range(300)]
    return forward.captured(*roots, *(forward.leaf(f"w{i}") for i in range(300)))


def thousands_of_unreached_parameters() -> CapturedGraph:
    forward = Forward()
    with forward.module("", "Model"):
        loss = forward.op("Loss", forward.leaf("w"))
    registered = [
        Registered((f"p{i}" if i % 3 else f"never{i}.w",), (2,), bool(i % 2)) for i in range(3000)
    ]
    return forward.captured(loss, registered=registered)


def hundreds_of_modules_cut_off() -> CapturedGraph:
    forward = Forward()
    registered = []
    with forward.module("", "Model"):
        value = forward.op("Start", forward.leaf("w"))
        for number in range(20):
            with forward.module(f"m{number}", f"M{number}"):
                value = forward.op(f"Op{number}", value)
                value = forward.op("Mul", value)
                for inner in range(20):
                    path = f"m{number}.cut{inner}"
                    with forward.module(path, "Cut"):
                        forward.op("Waste", forward.leaf(f"{path}.weight"))
                    registered.append(Registered((f"{path}.weight",), (2,), True))
    return forward.captured(value, registered=registered)


def modules_outside_of_any_model_unreached_for_every_reason() -> CapturedGraph:
    forward = Forward()
    loss = forward.op("Loss", forward.leaf("w"))
    registered = []
    for number in range(60):
        for kind in ("cut", "frozen", "nograd", "never"):
            path = f"{kind}{number}"
            registered.append(Registered((f"{path}.w",), (2,), kind != "frozen"))
            registered.append(Registered((f"{kind}_param{number}",), (2,), kind != "frozen"))
            if kind != "never":
                with forward.module(path, "M", grad=kind != "nograd"):
                    if kind == "cut":
                        forward.op("Waste", forward.leaf(f"{path}.w"))
    return forward.captured(loss, registered=registered)


def loops_inside_of_loops() -> CapturedGraph:
    forward = Forward()
    value = forward.leaf("x")

    def loops(value: Value, depth: int, name: str) -> Value:
        for side in "lr":
            for _ in range(3):
                if depth:
                    value = loops(value, depth - 1, name + side)
                else:
                    value = forward.op(name + side + "0", value, forward.leaf("w" + name))
                    value = forward.op(name + side + "1", value)
        return value

    return forward.captured(loops(value, 3, "Op"))


def modules_deep_inside_of_each_other() -> CapturedGraph:
    forward = Forward()

    def call(value: Value, depth: int) -> Value:
        with forward.module("m" + ".m" * depth, "M"):
            value = forward.op("Sin", value)
            return forward.op("Cos", call(value, depth - 1) if depth else value)

    return forward.captured(call(forward.leaf("x"), 100))


def many_edges() -> CapturedGraph:
    random = Random(0)
    forward = Forward()
    values = [forward.leaf("x")]
    for _ in range(300):
        kind = f"Op{random.randrange(20)}"
        values.append(forward.op(kind, *(random.choice(values) for _ in range(6))))
    return forward.captured(*forward.sinks())


@pytest.mark.parametrize("max_nodes", [5, 8, 40, 100])
@pytest.mark.parametrize(
    "make",
    [
        a_thousand_shared_leaves,
        leaves_in_every_module,
        no_nodes,
        a_root_that_is_a_leaf,
        hundreds_of_roots,
        thousands_of_unreached_parameters,
        hundreds_of_modules_cut_off,
        modules_outside_of_any_model_unreached_for_every_reason,
        loops_inside_of_loops,
        modules_deep_inside_of_each_other,
        many_edges,
    ],
    ids=lambda make: make.__name__,
)
def test_graphs_of_unusual_proportions_have_a_picture(
    make: Callable[[], CapturedGraph], max_nodes: int
) -> None:
    captured = make()
    for depth in (None, "all", 0, 2):
        for likeness in ("shape", None):
            pictures(captured, likeness, depth, max_nodes)  # type: ignore[arg-type]


def test_what_is_missing_is_told_together_only_where_it_is_too_much() -> None:
    captured = modules_outside_of_any_model_unreached_for_every_reason()
    folded = Folded(captured)
    missing = {
        most: [
            box.missing
            for box in diagram_of(folded, opened_at_random(0, 1), most_missing=most).boxes
            if box.missing is not None
        ]
        for most in (10**9, 7, 2)
    }
    assert len(missing[10**9]) > 200
    together = missing[7]
    assert {(each.path, each.why) for each in together} == {
        ("60 modules", "cut off"),
        ("60 modules", "frozen"),
        ("60 modules", "no grad"),
        ("60 modules", "not called"),
        ("60 parameters", "frozen"),
        ("180 parameters", "unused"),
    }
    assert sum(len(each.params) for each in together) == len(captured.registered)
    assert [len(each.params) for each in missing[2]] == [180, 60]


def test_the_first_copy_tells_of_what_is_missing_in_any() -> None:
    forward = Forward()
    value = forward.leaf("x")
    registered = []
    with forward.module("", "Model"):
        for number in range(6):
            path = f"h.{number}"
            with forward.module(path, "Layer"):
                value = forward.op("Norm", forward.op("Mm", value, forward.leaf(f"{path}.w")))
                for name in ("aux", "probe") if number == 3 else ("aux",):
                    with forward.module(f"{path}.{name}", "Linear"):
                        forward.op("Waste", forward.leaf(f"{path}.{name}.w"))
                    registered.append(Registered((f"{path}.{name}.w",), (2,), True))
                with forward.module(f"{path}.inner", "Inner"):
                    value = forward.op("Mm", value)
    registered += [Registered((f"{path}",), (2,), True) for path in ("h.4.b", "h.5.inner.c")]
    folded = Folded(forward.captured(value, registered=registered))

    def missing(*opened: str) -> dict[str, str]:
        def is_open(block: Block, depth: int) -> bool:
            return folded.captured.calls.path(block.call) in opened

        diagram = diagram_of(folded, is_open)
        frames = [folded.captured.calls.path(frame.block.call) for frame in diagram.frames]
        return {box.missing.path: frames[box.frame] for box in diagram.boxes if box.missing}

    assert missing() == {}
    assert missing("") == {}
    shown = {"h.0.aux": "h.0", "h.3.probe": "h.0", "h.4.b": "h.0"}
    assert missing("", "h.0") == shown
    assert missing("", "h.0", "h.0.inner") == {**shown, "h.5.inner.c": "h.0.inner"}


def test_what_was_cut_off_is_linked_to_those_who_took_it() -> None:
    forward = Forward()
    registered = []
    calls: dict[str, int] = {}
    made: list[Value] = []
    with forward.module("", "Model"):
        for name in ("encoder", "other", "frozen", "decoder", "head"):
            is_frozen = name == "frozen"
            with forward.module(name, "Layer") as call, forward.module(f"{name}.0", "Linear"):
                if not is_frozen:
                    made.append(forward.op("Mm", forward.leaf(f"{name}.0.w")))
            calls[name], calls[f"{name}.0"] = call, call + 1
            registered.append(Registered((f"{name}.0.w",), (2,), not is_frozen))
    feeds = [
        (calls[giver], calls[taker])
        for giver, taker in [
            ("encoder.0", "decoder"),
            ("encoder", "other"),
            ("other", "head"),
            ("frozen", "head"),
        ]
    ]
    loss = forward.op("Loss", *made[2:])
    folded = Folded(forward.captured(loss, feeds=feeds, registered=registered))
    diagram = diagram_of(folded, lambda block, depth: folded.captured.calls.path(block.call) == "")
    names = [
        box.missing.path
        if box.missing
        else folded.captured.calls.path(box.block.call)
        if box.block and box.block.kind == "module"
        else ""
        for box in diagram.boxes
    ]
    found = {
        (names[link.source], names[link.target]): link.is_cut
        for link in diagram.links
        if diagram.boxes[link.source].missing
    }
    assert found == {
        ("encoder", "decoder"): True,
        ("encoder", "other"): True,
        ("other", "head"): True,
        ("frozen", "head"): False,
    }


def test_a_small_graph_is_shown_in_full() -> None:
    forward = Forward()
    value = forward.leaf("x")
    with forward.module("m"):
        for kind in "ABC":
            value = forward.op(kind, value)
    first = pictures(forward.captured(value), "shape", None, 100)[0]
    assert [frame.block.kind for frame in first.frames] == ["module"]
    kinds = [box.block.kind for box in first.boxes if box.block]
    assert kinds == ["operation"] * 3


def test_later_pictures_are_coarser() -> None:
    shown = pictures(architecture("gpt2"), "shape", None, 100)
    sizes = [len(diagram.boxes) for diagram in shown]
    assert sizes[0] > sizes[-1]


@pytest.mark.parametrize("depth", [-1, 1.5, True, "some", [2]])
def test_a_depth_that_makes_no_sense_is_refused(depth: object) -> None:
    with pytest.raises(UsageError, match="pass how many levels"):
        checked_depth(depth)


@pytest.mark.parametrize("max_nodes", [4, 5.0, None, True])
def test_a_number_of_boxes_that_makes_no_sense_is_refused(max_nodes: object) -> None:
    with pytest.raises(UsageError, match="pass how many boxes"):
        checked_max_nodes(max_nodes)
