from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from gradscope.errors import RenderError, UsageError
from gradscope.graphs import autograd_graph, layout
from gradscope.graphs.autograd_graph import AutogradGraph
from gradscope.graphs.wording import operation_name, shape_text, shapes_text
from gradscope.run.captured_graph import CapturedGraph, Outputs

if TYPE_CHECKING:
    from pathlib import Path

SVG = "{http://www.w3.org/2000/svg}"
XLINK_TITLE = "{http://www.w3.org/1999/xlink}title"


def captured(
    ops: list[str],
    edges: list[tuple[int, int]],
    params: dict[int, tuple[str, ...]] | None = None,
    roots: tuple[int, ...] = (0,),
) -> CapturedGraph:
    """A graph whose every tensor is float32 of shape (2, 3), with the given names on its leaves."""
    params = params or {}
    n = len(ops)
    unique = tuple(dict.fromkeys(ops))
    at = {node: position for position, node in enumerate(params)}
    leaf = np.array([at.get(node, -1) for node in range(n)], dtype=np.int32)
    return CapturedGraph(
        ops=unique,
        op=np.array([unique.index(op) for op in ops], dtype=np.int32),
        sequence_nr=np.where(leaf < 0, n - np.arange(n), -1).astype(np.int64),
        source=np.array([source for source, _ in edges], dtype=np.int32),
        target=np.array([target for _, target in edges], dtype=np.int32),
        source_output=np.zeros(len(edges), dtype=np.int32),
        param=leaf,
        params=tuple(params.values()),
        param_shape=((2, 3),) * len(params),
        outputs=(Outputs(((2, 3),), ("float32",)),) if n else (),
        output=np.zeros(n, dtype=np.int32),
        roots=np.array(roots, dtype=np.int32),
    )


def square_of(*names: str) -> CapturedGraph:
    return captured(
        ["SumBackward0", "MulBackward0", "AccumulateGrad"],
        [(1, 0), (2, 1), (2, 1)],
        {2: names},
    )


def chain(n: int) -> CapturedGraph:
    return captured(["TanhBackward0"] * n, [(node + 1, node) for node in range(n - 1)])


def unrolled(n_steps: int) -> CapturedGraph:
    """One weight that every step of a recurrence uses again."""
    edges = [(node + 1, node) for node in range(n_steps - 1)]
    edges += [(n_steps, node) for node in range(n_steps)]
    return captured(["MulBackward0"] * n_steps + ["AccumulateGrad"], edges, {n_steps: ("w",)})


def texts(svg: bytes | str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def titles(svg: bytes | str) -> list[str]:
    return [link.get(XLINK_TITLE, "") for link in ElementTree.fromstring(svg).iter(f"{SVG}a")]


class TestTables:
    def test_nodes(self) -> None:
        nodes = AutogradGraph(square_of("wte", "head")).nodes
        expected = pd.DataFrame(
            {
                "op": ["SumBackward0", "MulBackward0", "AccumulateGrad"],
                "sequence_nr": [3, 2, -1],
                "module": pd.Series([None] * 3, dtype=object),
                "module_type": pd.Series([None] * 3, dtype=object),
                "call": np.array([-1] * 3, dtype=np.int32),
                "param": pd.Series([None, None, "wte"], dtype=object),
                "aliases": [(), (), ("wte", "head")],
                "output_shape": [((2, 3),)] * 3,
                "output_dtype": [("float32",)] * 3,
                "saved_bytes": [0, 0, 0],
                "is_root": [True, False, False],
                "is_crossing": [False] * 3,
                "file": pd.Series([None] * 3, dtype=object),
                "line": pd.Series([None] * 3, dtype="Int64"),
            },
            index=pd.RangeIndex(3, name="node"),
        ).astype({"op": object})
        pd.testing.assert_frame_equal(nodes, expected)

    def test_edges(self) -> None:
        edges = AutogradGraph(square_of("w")).edges
        assert edges.to_dict("list") == {
            "source": [1, 2, 2],
            "target": [0, 1, 1],
            "source_output": [0, 0, 0],
            "shape": [(2, 3)] * 3,
        }
        assert set(map(str, edges.dtypes)) == {"int32", "object"}

    def test_of_an_empty_graph_have_all_columns(self) -> None:
        empty, full = AutogradGraph(captured([], [], roots=())), AutogradGraph(square_of("w"))
        assert len(empty) == len(empty.nodes) == len(empty.edges) == 0
        pd.testing.assert_series_equal(empty.nodes.dtypes, full.nodes.dtypes)
        pd.testing.assert_series_equal(empty.edges.dtypes, full.edges.dtypes)


def test_repr_is_one_line_of_counts() -> None:
    assert (
        repr(AutogradGraph(square_of("w"), step=7))
        == "<autograd graph of step 7: 2 operations, 1 parameter, 3 edges>"
    )
    assert (
        repr(AutogradGraph(square_of()))
        == "<autograd graph: 2 operations, 0 parameters, 1 other leaf, 3 edges>"
    )
    assert len(AutogradGraph(square_of("w"))) == 3


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("AddmmBackward0", "addmm"),
        ("NllLossBackward0", "nll_loss"),
        ("NllLossBackwardBackward0", "nll_loss_backward"),
        ("MaxPool2DWithIndicesBackward0", "max_pool2d_with_indices"),
        ("UpsampleBilinear2DBackward1", "upsample_bilinear2d"),
        ("FftR2CBackward0", "fft_r2c"),
        ("TBackward0", "t (transpose)"),
        ("MyClipBackward", "MyClip"),
        ("Backward", "Backward"),
        ("CopySlices", "CopySlices"),
    ],
)
def test_operations_are_called_as_in_torch(op: str, name: str) -> None:
    assert operation_name(op) == name


def test_shapes() -> None:
    assert (shape_text((32, 10)), shape_text((7,)), shape_text(())) == ("32 × 10", "7", "scalar")
    assert shapes_text(((5, 8),), 1) == "5 × 8"
    assert shapes_text(((5, 8),), 4) == "4 tensors: 5 × 8"
    assert shapes_text(tuple((n,) for n in range(5)), 5) == "5 tensors: 0, 1 …"
    assert shapes_text((), 1) == ""


def test_a_picture_says_what_it_shows() -> None:
    svg = AutogradGraph(square_of("wte.weight", "head.weight"), step=3)._repr_svg_()
    assert svg is not None
    shown = texts(svg)
    assert "autograd graph of step 3: 2 operations, 1 parameter" in shown
    assert {"wte.weight", "= head.weight", "mul", "sum"} <= set(shown)
    # In the box of the parameter, and on the edge between the operations.
    assert sum("2 × 3" in text for text in shown) == 2
    assert sum("backward starts here" in text for text in shown) == 1
    assert {"parameter", "operation", "loss (root)"} <= {text.strip(" \xa0") for text in shown}
    assert "MulBackward0 float32" in titles(svg)
    assert "wte.weight, head.weight" in titles(svg)


def test_the_legend_explains_only_what_is_there() -> None:
    def legend(graph: CapturedGraph) -> set[str]:
        return {text.strip(" \xa0") for text in texts(AutogradGraph(graph)._repr_svg_() or "")}

    assert "parameter" in legend(square_of("w"))
    assert "other leaf that requires grad" not in legend(square_of("w"))
    assert "parameter" not in legend(square_of())
    assert "other leaf that requires grad" in legend(square_of())
    empty = AutogradGraph(captured([], [], roots=()), step=0)
    assert "Nothing that requires grad leads to the root: it has no graph." in texts(
        empty._repr_svg_() or ""
    )


def test_every_edge_is_drawn_and_data_flows_down() -> None:
    graph = AutogradGraph(square_of("w"))
    source = graph.to_graphviz().source
    # An operand used twice is one arrow; both operations have a box of their own.
    assert sorted(re.findall(r"(b\d+) -> (b\d+)", source)) == [("b0", "b1"), ("b2", "b0")]
    svg = ElementTree.fromstring(graph._repr_svg_() or "")
    assert [g.get("class") for g in svg.iter(f"{SVG}g")].count("edge") == 2
    height = {
        group.findtext(f"{SVG}title"): float(group.find(f".//{SVG}text").get("y"))  # type: ignore[union-attr,arg-type]
        for group in svg.iter(f"{SVG}g")
        if group.get("class") == "node"
    }
    assert height["b2"] < height["b0"] < height["b1"]


def test_a_dark_page_does_not_show_through() -> None:
    root = ElementTree.fromstring(AutogradGraph(square_of("w"))._repr_svg_() or "")
    background = root.find(f".//{SVG}polygon")
    assert background is not None
    assert background.get("fill") in {"#ffffff", "white"}
    assert all((text.get("fill") or "").startswith("#") for text in root.iter(f"{SVG}text"))


HOSTILE = {
    'say "hi"': 'say "hi"',
    "it's": "it's",
    "back\\slash": "back\\slash",
    "ends with \\": "ends with \\",
    "\\N \\G \\l": "\\N \\G \\l",
    "<b>bold</b>": "<b>bold</b>",
    "<": "<",
    "<>": "<>",
    "a&lt;b &amp; c & d": "a&lt;b &amp; c & d",
    "two\nlines\r\ttab": "two\\nlines\\r\\ttab",
    "nul\0end": "nul\\x00end",
    "port:name:c": "port:name:c",
    "node n0 -> n1; }": "node n0 -> n1; }",
    "]]>": "]]>",
    "<!-- -->": "<!-- -->",
    "größe.重み.🙂": "größe.重み.🙂",
    "lone\ud800surrogate": "lone\\ud800surrogate",
    "\u202eright to left": "\\u202eright to left",
    "<script>alert(1)</script>": "<script>alert(1)</script>",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_may_hold_anything(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = AutogradGraph(square_of(name)).render(tmp_path / "graph.svg")
    svg = path.read_bytes()
    ElementTree.fromstring(svg)
    shown = [text.replace("\xa0", " ") for text in texts(svg)]
    assert HOSTILE[name] in shown
    assert HOSTILE[name] in [title.replace("\xa0", " ") for title in titles(svg)]
    assert ElementTree.fromstring(svg).find(f".//{SVG}script") is None
    assert "yntax" not in capfd.readouterr().err  # of Graphviz, which then draws without the label


def test_an_operation_may_be_called_anything_too() -> None:
    hostile = captured(['<&"\\NBackward', "AccumulateGrad"], [(1, 0)], {1: ("w",)})
    svg = AutogradGraph(hostile)._repr_svg_() or ""
    assert '<&"\\N' in texts(svg)
    assert '<&"\\NBackward float32' in titles(svg)


def test_a_long_name_is_broken_and_a_very_long_one_cut() -> None:
    long = "transformer.h.0.attn.c_attn.parametrizations.weight.original0"
    shown = texts(AutogradGraph(square_of(long))._repr_svg_() or "")
    assert long not in shown
    assert "transformer.h.0.attn.c_attn." in shown
    assert "parametrizations.weight." in shown
    endless = "x" * 5_000
    shown = texts(AutogradGraph(square_of(endless))._repr_svg_() or "")
    assert max(map(len, shown)) <= 120
    many = AutogradGraph(square_of(*(f"name{n}" for n in range(40))))._repr_svg_() or ""
    assert "… 40 names" in texts(many)


class TestRender:
    @pytest.mark.parametrize(
        ("suffix", "magic"),
        [
            (".svg", b"<?xml"),
            (".png", b"\x89PNG\r\n\x1a\n"),
            (".pdf", b"%PDF-"),
            (".dot", b"digraph"),
            (".gv", b"digraph"),
            (".SVG", b"<?xml"),
        ],
    )
    def test_the_suffix_decides(self, suffix: str, magic: bytes, tmp_path: Path) -> None:
        path = tmp_path / f"step 0{suffix}"
        path.write_text("an older picture")
        assert AutogradGraph(square_of("w")).render(str(path)) == path
        assert path.read_bytes().startswith(magic)

    @pytest.mark.parametrize("name", ["graph.jpeg", "graph", "graph."])
    def test_another_suffix_is_refused_by_name(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"\.svg, \.png, \.pdf, \.html, \.dot, \.gv"):
            AutogradGraph(square_of("w")).render(tmp_path / name)
        assert not list(tmp_path.iterdir())

    def test_dot_needs_no_graphviz(self, no_graphviz: None, tmp_path: Path) -> None:
        path = AutogradGraph(square_of("größe")).render(tmp_path / "graph.dot")
        assert "größe" in path.read_text(encoding="utf-8")

    def test_without_graphviz_it_says_what_to_install(
        self, no_graphviz: None, tmp_path: Path
    ) -> None:
        graph = AutogradGraph(square_of("w"))
        with pytest.raises(RenderError, match="pip install pygraphviz"):
            graph.render(tmp_path / "graph.svg")
        assert not list(tmp_path.iterdir())
        assert graph._repr_svg_() is None

    def test_a_deep_graph_of_dot_text(self, tmp_path: Path) -> None:
        path = AutogradGraph(chain(20_000)).render(tmp_path / "graph.dot", fold=None)
        assert "20,000 operations" in path.read_text(encoding="utf-8")


def boxes(svg: bytes) -> int:
    root = ElementTree.fromstring(svg)
    return [group.get("class") for group in root.iter(f"{SVG}g")].count("node")


class TestSize:
    @pytest.mark.parametrize("large", [chain(2_001), chain(200_000), unrolled(400)])
    @pytest.mark.parametrize("fold", ["shape", None])
    def test_whatever_the_size_a_picture_has_few_boxes(
        self,
        large: CapturedGraph,
        fold: Any,
        tmp_path: Path,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        path = AutogradGraph(large).render(tmp_path / "graph.svg", fold=fold)
        assert boxes(path.read_bytes()) <= 100
        assert f"{len(large) - len(large.params):,} operations" in texts(path.read_bytes())[0]
        assert "long time" not in capfd.readouterr().err

    def test_as_many_boxes_as_one_likes(self, tmp_path: Path) -> None:
        graph = AutogradGraph(chain(250))
        every = graph.render(tmp_path / "all.svg", fold=None, depth="all", max_nodes=300)
        few = graph.render(tmp_path / "few.svg", fold=None, depth="all", max_nodes=20)
        assert boxes(every.read_bytes()) == 250
        assert boxes(few.read_bytes()) <= 20
        assert not any(
            "readable" in text or "too many" in text for text in texts(every.read_bytes())
        )
        assert any("readable" in text or "too many" in text for text in texts(few.read_bytes()))

    def test_a_repetition_is_drawn_once(self) -> None:
        svg = AutogradGraph(unrolled(400))._repr_svg_() or ""
        assert any("×400" in text or "×399" in text for text in texts(svg))

    def test_shapes_that_may_differ_between_repetitions_are_not_told_as_everyones(self) -> None:
        graph = AutogradGraph(unrolled(400))
        assert "those of the first repetition" in graph.to_graphviz(fold="op").source
        assert "those of the first repetition" not in graph.to_graphviz(fold="shape").source
        assert "first repetition" not in AutogradGraph(square_of("w")).to_graphviz(fold="op").source

    @pytest.mark.parametrize(
        ("option", "said"),
        [
            ({"fold": "same"}, "fold='same'.*'exact', 'shape', 'op'"),
            ({"depth": -1}, "depth=-1.*'all'"),
            ({"depth": "some"}, "depth='some'"),
            ({"max_nodes": 0}, "max_nodes=0.*from 5 on"),
            ({"theme": "blue"}, "theme='blue'.*'light' or 'dark'"),
            ({"overlay": "norm"}, "overlay='norm'.*grad_norm"),
        ],
    )
    def test_wrong_options_are_named(
        self, option: dict[str, Any], said: str, tmp_path: Path
    ) -> None:
        with pytest.raises(UsageError, match=said):
            AutogradGraph(square_of("w")).render(tmp_path / "graph.svg", **option)
        assert not list(tmp_path.iterdir())


class TestTime:
    @pytest.mark.skipif(os.name == "nt", reason="the stand-in for dot is a script")
    def test_a_layout_that_takes_too_long_is_given_up_for_a_coarser_one(
        self, no_pygraphviz: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        script = (
            "import time\n"
            "dot = sys.stdin.read()\n"
            "time.sleep(60 * (dot.count('->') > 30))\n"
            "print('took too long' in dot)"
        )
        put_on_path(monkeypatch, tmp_path / "bin", script)
        path = AutogradGraph(chain(90)).render(
            tmp_path / "graph.svg", fold=None, depth="all", time_limit=3
        )
        assert path.read_text() == "True\n"

    @pytest.mark.skipif(os.name == "nt", reason="the stand-in for dot is a script")
    def test_a_layout_that_never_ends_is_an_error(
        self, no_pygraphviz: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        put_on_path(monkeypatch, tmp_path / "bin", "import time; time.sleep(60)")
        with pytest.raises(RenderError, match=r"even the coarsest.*\.dot"):
            AutogradGraph(square_of("w")).render(tmp_path / "graph.svg", time_limit=0.2)
        assert not (tmp_path / "graph.svg").exists()


@pytest.fixture
def no_pygraphviz(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pygraphviz", None)


@pytest.fixture
def no_graphviz(
    no_pygraphviz: None, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path_factory.mktemp("empty")))


def put_on_path(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    folder.mkdir()
    program = folder / "dot"
    program.write_text(f"#!{sys.executable}\nimport sys\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder))


class TestEngines:
    def test_the_library_comes_first(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        pytest.importorskip("pygraphviz")
        monkeypatch.setenv("PATH", str(tmp_path))
        assert layout.lay_out("digraph { a -> b }", "svg").startswith(b"<?xml")

    @pytest.mark.skipif(os.name == "nt", reason="the stand-in for dot is a script")
    def test_dot_on_the_path_is_the_alternative(
        self, no_pygraphviz: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        answer = "print(sys.argv[1:], sys.stdin.buffer.read().decode())"
        put_on_path(monkeypatch, tmp_path / "bin", answer)
        said = layout.lay_out("digraph { ö }", "png").decode()
        assert "-Kdot" in said
        assert "-Tpng" in said
        assert "digraph { ö }" in said

    @pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz itself is not installed")
    def test_the_real_dot_draws_the_same_boxes(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        pytest.importorskip("pygraphviz")
        graph = AutogradGraph(square_of("wte.weight", "head.weight"))
        by_library = graph.render(tmp_path / "library.svg")
        monkeypatch.setitem(sys.modules, "pygraphviz", None)
        by_program = graph.render(tmp_path / "program.svg")
        assert texts(by_program.read_bytes()) == texts(by_library.read_bytes())

    @pytest.mark.skipif(os.name == "nt", reason="the stand-in for dot is a script")
    def test_dot_failing_is_a_render_error(
        self, no_pygraphviz: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        put_on_path(monkeypatch, tmp_path / "bin", "sys.exit('no room for the picture')")
        with pytest.raises(RenderError, match="dot: "):
            layout.lay_out("digraph { a }", "svg")

    def test_a_refused_graph_is_a_render_error(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        pytest.importorskip("pygraphviz")
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(RenderError, match="pygraphviz: "):
            layout.lay_out("digraph { unfinished", "svg")
        with pytest.raises(RenderError, match="pygraphviz: "):
            layout.lay_out("digraph { a }", "no such format")

    def test_libraries_that_do_not_load_are_named(
        self, no_graphviz: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "pygraphviz.py").write_text("raise OSError('libcgraph.so: cannot open')")
        monkeypatch.delitem(sys.modules, "pygraphviz")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(RenderError, match=r"pygraphviz: OSError: libcgraph\.so: cannot open"):
            layout.lay_out("digraph { a }", "svg")

    def test_the_import_is_silent(self) -> None:
        pytest.importorskip("pygraphviz")
        code = (
            "from gradscope.graphs.layout import lay_out\n"
            "assert lay_out('digraph { a }', 'svg').startswith(b'<?xml')"
        )
        subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_a_notebook_hears_of_a_real_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(dot: str, file_format: str, time_limit: float) -> bytes:
        raise ZeroDivisionError

    monkeypatch.setattr(autograd_graph, "lay_out", broken)
    with pytest.raises(ZeroDivisionError):
        AutogradGraph(square_of("w"))._repr_svg_()
