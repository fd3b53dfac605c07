"""The page to explore a graph with: its data, against what the graph itself says."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from graph_makers import Forward, Value, random_dag, random_loops

from gradscope.errors import RenderError, UsageError
from gradscope.graphs import inside_layout
from gradscope.graphs.cards import ALARM
from gradscope.graphs.detail import MAX_NODES, Views
from gradscope.graphs.execution import Execution
from gradscope.graphs.explorer import as_json, explorer_page
from gradscope.graphs.explorer_data import explorer_data
from gradscope.graphs.fold import Folded
from gradscope.graphs.inside_layout import Arrow, Size, Sketch, laid_out
from gradscope.graphs.insides import Inside, Insides, insides_of, key_of
from gradscope.graphs.overlay import StepFacts
from gradscope.graphs.wording import bytes_text
from gradscope.run.captured_graph import CapturedGraph, Outputs, Registered, SavedTensors

HOSTILE = (
    "</script><script>window.hacked=1</script>",
    "<!--<script>",
    "<img src=x onerror=window.hacked=1>",
    "&lt;b&gt;",
    "nul\0 bell\7 line\nend",
    "\u2028\u2029\u202e",
    "emoji \N{SNAKE}\N{FAMILY}",
    "lone \ud800 surrogate",
    "'\"`${window.hacked=1}\\",
    "x" * 10_000,
)


def gpt(n_blocks: int = 3, *, block: str = "h") -> CapturedGraph:
    forward = Forward()
    with forward.module("", "GPT"):
        x = forward.op("Embedding", forward.leaf("wte.weight", "head.weight"))
        for i in range(n_blocks):
            with forward.module(f"{block}.{i}", "Layer"):
                with forward.module(f"{block}.{i}.ln", "LayerNorm"):
                    y = forward.op("NativeLayerNorm", x, forward.leaf(f"{block}.{i}.ln.weight"))
                with forward.module(f"{block}.{i}.mlp", "MLP"):
                    for name in ("up", "down"):
                        with forward.module(f"{block}.{i}.mlp.{name}", "Linear"):
                            weight = forward.leaf(f"{block}.{i}.mlp.{name}.weight", shape=(3, 3))
                            y = forward.op("Addmm", y, forward.op("T", weight, shape=(3, 3)))
                x = forward.op("Add", x, y)
        loss = forward.op("NllLoss", forward.op("Mm", x, Value(0)), shape=())
    return forward.captured(loss)


def data_of(captured: CapturedGraph, facts: StepFacts | None = None, **more: Any) -> dict[str, Any]:
    return explorer_data(captured, "", facts or StepFacts(), "shape", **more)


def titled(data: dict[str, Any], title: str) -> dict[str, Any]:
    return next(box for box in data["boxes"] if box["title"][0] == title)


def rows(box: dict[str, Any]) -> dict[str, Any]:
    return dict(map(tuple, box["rows"]))


class Page(HTMLParser):
    """What a browser makes of a page: its elements, and the text of those that hold plain text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._within = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._within = (dict(attrs).get("id") or tag) if tag in ("script", "style", "title") else ""

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within:
            self.texts[self._within] = self.texts.get(self._within, "") + data

    def n(self, tag: str) -> int:
        return sum(1 for each, _ in self.tags if each == tag)


# -- one file -----------------------------------------------------------------------------------


def test_the_page_refers_to_nothing_outside_of_itself() -> None:
    page = Page(explorer_page(gpt(), step=7))
    assert not {"link", "img", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not {"src", "href", "action", "srcset"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"https?:|@import|url\((?!#)", page.texts["style"])
    addresses = set(re.findall(r"https?://[\w./]+", page.texts["script"]))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert page.texts["title"] == "autograd graph of step 7: 21 operations, 10 parameters"


def test_the_policy_allows_this_script_and_this_style_alone() -> None:
    page = Page(explorer_page(gpt()))
    policy = next(a["content"] for _, a in page.tags if "http-equiv" in a)
    for name in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.texts[name].encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}';" in str(policy)
    assert str(policy).startswith("default-src 'none';")
    assert "unsafe" not in str(policy)


def test_twelve_layers_make_a_small_page() -> None:
    assert len(explorer_page(gpt(12)).encode()) < 100_000
    assert len(explorer_page(gpt(12))) - len(explorer_page(gpt(3))) < 10_000


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_begins_with_the_theme_that_is_asked_for(theme: Any) -> None:
    assert Page(explorer_page(gpt(), theme=theme)).tags[0][1]["data-theme"] == theme
    assert "data-theme" not in Page(explorer_page(gpt())).tags[0][1]


def test_an_unknown_theme_is_refused() -> None:
    with pytest.raises(UsageError, match="'light' or 'dark'"):
        explorer_page(gpt(), theme="blue")  # type: ignore[arg-type]


# -- hostile names ------------------------------------------------------------------------------


def named(name: str) -> CapturedGraph:
    forward = Forward()
    with forward.module(name, name):
        value = forward.op(name, forward.leaf(name))
        loss = forward.op("Sum", value, shape=())
    captured = forward.captured(loss, registered=[Registered((name + "2",), (3,), True)])
    return replace(captured, line=np.zeros(len(captured), np.int32), lines=((name, 3),))


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_no_name_can_leave_the_data(name: str) -> None:
    facts = StepFacts(grad_status={name: name}, findings={name: name})
    text = explorer_page(named(name), facts=facts)
    text.encode()  # no lone surrogates
    assert not re.search("[\0\u2028\u2029\u202e]", text)
    page = Page(text)
    assert (page.n("script"), page.n("img"), page.n("b")) == (2, 0, 0)
    data = json.loads(page.texts["data"])
    shown = name[:20].encode("unicode_escape").decode() if not name.isprintable() else name[:20]
    assert any(shown[:4] in "".join(box["title"]) for box in data["boxes"])
    assert len(text) < 100_000


def test_what_json_says_is_what_it_was_given() -> None:
    data = {"<&>": ["</script>", "\u2028\u2029", "\\u003c", "\N{SNAKE}", "\ud800", None, 1.5]}
    written = as_json(data)
    assert json.loads(written) == data
    assert not set("<>&\u2028\u2029\ud800") & set(written)


# -- what is inside -----------------------------------------------------------------------------

GRAPHS = {
    "gpt": gpt(4),
    **{f"dag {seed}": random_dag(seed, 150) for seed in range(12)},
    **{f"loops {seed}": random_loops(seed, 150) for seed in range(12)},
}
each_graph = pytest.mark.parametrize("captured", GRAPHS.values(), ids=GRAPHS.keys())


@each_graph
def test_every_operation_can_be_reached_by_opening(captured: CapturedGraph) -> None:
    insides = insides_of(Folded(captured, "shape"))
    assert insides.n_left_out == 0
    found: Counter[int] = Counter()
    for inside in insides.each:
        for box in inside.boxes:
            if box.block is not None and not box.block.can_open:
                places = np.arange(box.block.start, box.block.stop) + inside.copies[:, None]
                found.update(places.ravel().tolist())
    assert found == Counter(range(len(insides.folded.execution)))


def descent(insides: Insides, place: int) -> list[tuple[Inside, int, int]]:
    """The insides in which a place lies, in which of their copies, and the number of its box."""
    of_box = {inside.box: inside for inside in insides.each}
    steps = []
    inside: Inside | None = insides.each[0]
    while inside is not None:
        block = inside.block
        copy, offset = divmod(place - block.start, block.period)
        place = block.start + offset
        box = next(
            at
            for at, each in enumerate(inside.boxes)
            if each.block is not None and each.block.start <= place < each.block.stop
        )
        steps.append((inside, copy, inside.first + box))
        inside = of_box.get(inside.first + box)
    return steps


def expected_ports(
    insides: Insides, edges: Execution
) -> dict[int, set[tuple[bool, int, bool, int]]]:
    """Of each inside: (is input, box outside, carried, box inside) of each edge, one by one."""
    paths = [descent(insides, place) for place in range(len(edges))]
    found: dict[int, set[tuple[bool, int, bool, int]]] = {each.box: set() for each in insides.each}
    for source, target in zip(edges.source.tolist(), edges.target.tolist(), strict=True):
        if source < 0:
            continue
        for is_input, inner, outer in (
            (True, paths[target], paths[source]),
            (False, paths[source], paths[target]),
        ):
            for depth in range(1, len(inner)):
                inside, _, inner_box = inner[depth]
                carried, outside = False, None
                for at in range(depth):
                    carried |= inner[at][1] != outer[at][1]
                    if outer[at][2] != inner[at][2]:
                        outside = outer[at][2]
                        break
                if outside is None and carried:
                    outside = inside.box
                if outside is not None:
                    end = inner_box - inside.first
                    found[inside.box].add((is_input, outside, carried, end))
    return found


@each_graph
def test_ports_are_the_edges_that_lead_out_of_a_block(captured: CapturedGraph) -> None:
    insides = insides_of(Folded(captured, "shape"))
    expected = expected_ports(insides, insides.folded.execution)
    n_whole = 0
    for inside in insides.each:
        for is_input in (True, False):
            ports = [port for port in inside.ports if port.is_input is is_input]
            wanted = {each for each in expected[inside.box] if each[0] is is_input}
            rest = [port for port in ports if port.box < 0]
            if rest:
                assert rest == ports[-1:]
                n_ports = len({(box, carried) for _, box, carried, _ in wanted})
                assert len(ports) - 1 + rest[0].n_others == n_ports > 8
                continue
            n_whole += len(ports)
            got = {(is_input, p.box, p.carried, end) for p in ports for end in p.inner}
            assert got == wanted
    assert n_whole or len(insides.each) == 1


def test_ports_are_called_after_what_is_outside() -> None:
    data = data_of(gpt())

    def ports(title: str) -> set[str]:
        return {port[0] for port in data["insides"][titled(data, title)["inside"]]["ports"]}

    assert ports("h.0 … h.2 ×3") == {"from embedding", "to mm"}
    assert ports("mlp") == {"from ln", "to add"}
    assert ports("ln") == {"from embedding", "from add (copy before)", "to mlp"}


def test_what_the_picture_opens_is_open_at_first() -> None:
    captured = gpt()
    picture = next(Views(captured, "shape").shown(None, MAX_NODES)).diagram
    frames = {key_of(frame.block) for frame in picture.frames}
    insides = insides_of(Folded(captured, "shape"), frames)
    data = data_of(captured)
    expected = {each.box for each in insides.each if key_of(each.block) in frames} - {-1}
    assert set(data["open"]) == expected
    assert titled(data, "GPT")["inside"]


def test_no_more_than_some_thousand_boxes_are_looked_into() -> None:
    captured = random_dag(1, 3000)
    data = data_of(captured, most_boxes=300)
    assert 300 <= len(data["boxes"]) < 400
    closed = [box for box in data["boxes"] if box.get("full")]
    assert data["note"].startswith(f"{len(closed)} boxes stay closed")
    assert not any("inside" in box for box in closed)


def test_what_is_open_at_first_is_looked_into_first() -> None:
    captured = gpt(12)
    deep = {key_of(each.block) for each in insides_of(Folded(captured, "shape")).each}
    insides = insides_of(Folded(captured, "shape"), deep, most_boxes=12)
    assert insides.each[0].box == -1
    assert len(insides.each) > 2


def test_graphs_of_nothing_have_a_page() -> None:
    forward = Forward()
    assert "0 operations" in explorer_page(forward.captured())
    leaf = forward.leaf("w")
    data = data_of(forward.captured(leaf))
    assert [box["title"] for box in data["boxes"]] == [["w"]]
    assert data["boxes"][0]["root"]


# -- where it stands ----------------------------------------------------------------------------

BLOCKED = pytest.param(0.0, id="column")
LAID_OUT = pytest.param(20.0, id="graphviz")


@pytest.mark.parametrize("time_limit", [LAID_OUT, BLOCKED])
@each_graph
def test_boxes_do_not_overlap_and_arrows_touch_them(
    captured: CapturedGraph, time_limit: float
) -> None:
    data = data_of(captured, time_limit=time_limit)
    for inside in data["insides"]:
        n = len(inside["at"]) // 2
        places = [
            (*inside["at"][2 * at : 2 * at + 2], *data["boxes"][inside["first"] + at]["size"])
            for at in range(n)
        ]
        places += [(x, y, w, 18) for _, x, y, w, _ in inside["ports"]]
        width, height = inside["size"]
        for at, (x, y, w, h) in enumerate(places):
            assert -1 <= x <= x + w <= width + 2
            assert -1 <= y <= y + h <= height + 2
            for x2, y2, w2, h2 in places[:at]:
                assert x + w <= x2 + 1 or x2 + w2 <= x + 1 or y + h <= y2 + 1 or y2 + h2 <= y + 1
        for source, target, flags, points, *_ in inside["edges"]:
            assert touches(points[:2], places[source])
            assert touches(points[-2:], places[target])
            assert flags & 1 or places[source][1] <= places[target][1]


def touches(point: list[float], place: tuple[float, ...]) -> bool:
    (x, y), (left, top, width, height) = point, place
    inside = left - 2 <= x <= left + width + 2 and top - 2 <= y <= top + height + 2
    edge = min(abs(x - left), abs(x - left - width), abs(y - top), abs(y - top - height))
    return inside and edge <= 2


def test_without_graphviz_there_are_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> list[bytes]:
        raise RenderError("no Graphviz")

    monkeypatch.setattr(inside_layout, "lay_out_all", refuses)
    sketch = Sketch((Size(50, 20), Size(90, 20), Size(10, 20)), (Arrow(1, 0), Arrow(2, 0)))
    (layout,) = laid_out([sketch], 5.0)
    middles = {x + s.width / 2 for (x, _), s in zip(layout.corners, sketch.sizes, strict=True)}
    assert middles == {45.0}
    assert layout.corners[0][1] > max(layout.corners[1][1], layout.corners[2][1])
    assert "<html" in explorer_page(gpt())


def test_one_graph_that_graphviz_refuses_spoils_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    real = inside_layout.lay_out_all

    def picky(dots: list[str], *more: Any) -> list[bytes]:
        if any('width="1.806"' in dot for dot in dots):
            raise RenderError("not this one")
        return real(dots, *more)

    monkeypatch.setattr(inside_layout, "lay_out_all", picky)
    good, bad = Sketch((Size(50, 20),) * 2, (Arrow(0, 1),)), Sketch((Size(130, 20),) * 2, ())
    layouts = laid_out([good, good, bad, good], 20.0)
    assert layouts[0] == layouts[1] == layouts[3]
    assert layouts[2] == inside_layout.in_column(bad)


# -- cards --------------------------------------------------------------------------------------


def with_saved(captured: CapturedGraph) -> CapturedGraph:
    """Every operation keeps a tensor, of a size of its own; the first one keeps more."""
    nodes = np.flatnonzero(captured.param < 0)
    n = len(nodes)
    order = nodes[np.argsort(captured.sequence_nr[nodes])]
    return replace(
        captured,
        saved=SavedTensors(
            names=("result", "self"),
            node=np.array([*nodes, order[0], order[0]], np.int32),
            name=np.array([0] * n + [1, 1], np.int32),
            shapes=(*((2, 3) for _ in nodes), None, (4,)),
            n_bytes=np.array([*(100 + nodes), 0, 1 << 20], np.int64),
            storage=np.array([*range(n), -1, -1], np.int32),
        ),
    )


def test_a_card_of_an_operation() -> None:
    captured = with_saved(gpt())
    captured = replace(captured, line=np.zeros(len(captured), np.int32), lines=(("model.py", 12),))
    box = titled(data_of(captured), "embedding")
    assert box["path"] == "GPT"
    assert rows(box) == {
        "autograd node": "EmbeddingBackward0",
        "made in": "model.py:12",
        "outputs": ["2 × 3  float32"],
        "saved for the backward": [
            f"result: 2 × 3, {100 + int(np.flatnonzero(captured.sequence_nr == 0)[0])} B",
            "self: packed by a hook",
            "self: 4, 1 MiB (a parameter or other leaf)",
        ],
        "sequence number": "0",
    }


def test_a_card_of_a_repeated_operation_says_so() -> None:
    data = data_of(gpt())
    assert rows(titled(data, "native_layer_norm"))["stands for"].startswith("3 operations")


def test_a_card_of_a_module_adds_up_what_is_inside() -> None:
    captured = with_saved(gpt())
    data = data_of(captured)
    box = titled(data, "mlp")
    inner = [
        node
        for node in np.flatnonzero(captured.call >= 0)
        if ".mlp." in captured.calls.path(captured.call[node])
    ]
    assert box["path"] == "h.0.mlp · MLP"
    told = rows(box)
    assert told["inside"] == "4 operations (12 in all 3 copies)"
    assert told["gives"] == ["2 × 3  float32"]
    assert told["mostly"] == "t (transpose) ×2, addmm ×2"
    assert told["keeps for the backward"] == bytes_text(sum(100 + int(node) for node in inner))
    names = {data["params"][at][0][0] for at in box["params"]}
    assert names == {f"h.{i}.mlp.{part}.weight" for i in range(3) for part in ("up", "down")}
    assert "repeated" not in told
    assert rows(titled(data, "h.0 … h.2 ×3"))["repeated"] == "×3; the first is shown"


def test_a_module_that_is_called_again_says_which_call_it_is() -> None:
    forward = Forward()
    x = forward.leaf("x")
    for kind in ("Tanh", "Exp"):
        with forward.module("m", "M"):
            x = forward.op(kind, forward.op("Sin", x))
    boxes = data_of(forward.captured(x))["boxes"]
    calls = [rows(box).get("module call") for box in boxes if box["title"] == ["m"]]
    assert calls == ["1 of 2", "2 of 2"]


def test_a_parameter_stands_for_those_of_all_copies() -> None:
    facts = StepFacts(
        grad_norm={f"h.{i}.ln.weight": 10.0**-i for i in range(3)} | {"head.weight": math.inf},
        grad_status={"h.1.ln.weight": "stale"},
    )
    data = data_of(gpt(), facts)
    inside = data["insides"][titled(data, "ln")["inside"]]
    weight = data["boxes"][inside["first"] + 1]
    assert weight["title"] == ["weight"]
    listed = [data["params"][at] for at in weight["params"]]
    assert listed == [
        [["h.0.ln.weight"], "2 × 3", "1"],
        [["h.1.ln.weight"], "2 × 3", "0.1", "stale"],
        [["h.2.ln.weight"], "2 × 3", "0.01"],
    ]
    assert titled(data, "wte.weight")["title"] == ["wte.weight", "= head.weight"]


def test_a_card_of_something_unreached() -> None:
    forward = Forward()
    with forward.module("", "Net"):
        with forward.module("enc", "Linear") as giver:
            forward.op("Addmm", forward.leaf("enc.weight"))
        with forward.module("dec", "Linear") as taker:
            loss = forward.op("Addmm", forward.leaf("dec.weight"))
    captured = forward.captured(
        loss,
        registered=[Registered((f"{m}.weight",), (2, 3), True) for m in ("enc", "dec")],
        feeds=[(giver, taker)],
    )
    data = data_of(captured)
    box = titled(data, "enc")
    assert box["look"] == "missing"
    assert rows(box) == {
        "class": "Linear",
        "why": "cut off: it made 1 operation and none of them leads to the loss",
        "its result went to": ["dec"],
        "parameters": ["enc.weight  2 × 3"],
    }
    cut = [edge for inside in data["insides"] for edge in inside["edges"] if edge[2] & 2]
    assert [edge[4] for edge in cut] == ["✂"]


# -- overlays -----------------------------------------------------------------------------------


def test_only_overlays_with_facts_are_offered() -> None:
    assert data_of(gpt())["overlays"] == []
    facts = StepFacts(nonfinite={"wte.weight": 0}, findings={})
    names = [name for name, *_ in data_of(with_saved(gpt()), facts)["overlays"]]
    assert names == ["nonfinite", "saved_bytes", "findings"]


def test_numbers_are_coloured_on_one_scale_for_all_boxes() -> None:
    norms = {f"h.{i}.{m}.weight": 10.0**-i for i in range(3) for m in ("ln", "mlp.up")}
    norms |= {"h.0.mlp.down.weight": math.nan, "head.weight": 0.0, "h.1.mlp.down.weight": 0.01}
    data = data_of(gpt(), StepFacts(grad_norm=norms))
    assert titled(data, "ln")["marks"]["grad_norm"] == [1.0, "0.01 … 1"]
    assert titled(data, "down")["marks"]["grad_norm"] == [ALARM, "nan"]
    assert titled(data, "wte.weight")["marks"]["grad_norm"] == [0.0, "0"]
    assert "marks" not in titled(data, "embedding")


def test_words_are_marked_unless_they_are_usual() -> None:
    status = {"h.0.ln.weight": "fresh", "h.1.mlp.up.weight": "stale", "h.0.mlp.up.weight": "fresh"}
    facts = StepFacts(
        grad_status=status, nonfinite={"h.2.ln.weight": 4.0}, findings={"wte.weight": "GS101"}
    )
    data = data_of(gpt(), facts)
    assert titled(data, "ln")["marks"] == {
        "grad_status": [0.0, "fresh"],
        "nonfinite": [ALARM, "4 not finite"],
    }
    assert titled(data, "up")["marks"] == {"grad_status": [ALARM, "fresh, stale"]}
    assert titled(data, "wte.weight")["marks"] == {"findings": [ALARM, "GS101"]}


def test_what_is_kept_is_counted_once() -> None:
    captured = with_saved(gpt())
    one_memory = replace(captured.saved, storage=np.zeros(len(captured.saved), np.int32))
    data = data_of(replace(captured, saved=one_memory))
    marks = [box["marks"]["saved_bytes"][1] for box in data["boxes"] if "marks" in box]
    first = int(
        captured.saved.n_bytes[captured.saved.node == np.flatnonzero(captured.sequence_nr == 0)][0]
    )
    assert set(marks) == {f"{first} B"}


def test_outputs_that_torch_does_not_tell_of() -> None:
    captured = gpt()
    data = data_of(replace(captured, outputs=(Outputs(),) * len(captured.outputs)))
    assert rows(titled(data, "embedding"))["outputs"] == "torch does not tell"
