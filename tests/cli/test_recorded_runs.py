"""The verbs about a recorded run: what they print, write, refuse and suggest."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradscope
from gradscope.cli import main
from gradscope.run.schema import TABLES
from gradscope.views import table_files

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 steps without zero_grad, saved whole."""
    path = tmp_path_factory.mktemp("runs") / "exp1"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    adam = torch.optim.AdamW(net.parameters(), lr=1e-2)
    with gradscope.watch(net, adam, save=path, graph=[0, 7], keep="*", every=1):
        for _ in range(30):
            x = torch.randn(16, 6)
            F.cross_entropy(net(x), x[:, :3].argmax(1)).backward()
            adam.step()
    return path


@pytest.fixture(autouse=True)
def _no_window(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.chdir(tmp_path)


class Said:
    """What a command printed."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status = status
        self.out = out
        self.err = err


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Any:
    def say(*arguments: Any) -> Said:
        status = main([str(each) for each in arguments])
        captured = capsys.readouterr()
        return Said(status, captured.out, captured.err)

    return say


# -- summary ----------------------------------------------------------------------------------


def test_the_summary_is_the_screen_and_says_what_else_there_is(path: Path, say: Any) -> None:
    said = say("summary", path)
    assert said.status == 0
    assert said.out.startswith(str(gradscope.open(path)))
    for suggestion in (
        "gradscope rule GS201",
        f"gradscope report {path} -o run.html",
        f"gradscope table {path} steps",
        f"gradscope explain {path} 2.bias",
        f"gradscope graph {path} -o graph.svg",
    ):
        assert f"  {suggestion}" in said.out


def test_milder_findings_are_shown_on_demand(tmp_path: Path, say: Any) -> None:
    path = tmp_path / "run"
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    adam = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.5)
    with gradscope.watch(net, adam, save=path):
        for _ in range(30):
            x = torch.randn(16, 6)
            adam.zero_grad()
            F.cross_entropy(net(x), x[:, :3].argmax(1)).backward()
            adam.step()
    notes = [finding for finding in gradscope.open(path).findings if finding.severity == 0]
    assert notes
    assert f"  i {notes[0].code}" in say("summary", path, "--show", "info").out
    assert f"  i {notes[0].code}" not in say("summary", path).out


def test_what_cannot_be_read_is_told(path: Path, say: Any, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    gradscope_run = subprocess.run(["cp", "-r", path, damaged], check=True)
    assert gradscope_run.returncode == 0
    (damaged / "grads" / "part-0000-000000.parquet").write_bytes(b"PAR1 torn")
    said = say("table", damaged, "grads")
    assert said.status == 0
    assert "no rows" in said.out
    assert "grads/part-0000-000000.parquet" in said.err


# -- table ------------------------------------------------------------------------------------


def columns_of(text: str) -> list[str]:
    return text.splitlines()[0].split()


def test_a_table_in_a_pipe_has_every_column(path: Path, say: Any) -> None:
    said = say("table", path, "steps")
    assert columns_of(said.out) == [column.name for column in TABLES["steps"].columns]
    assert len(said.out.splitlines()) == 31
    assert said.err == f"next: gradscope table {path} steps -o steps.csv writes all of it\n"


def test_numbers_have_four_digits_and_missing_ones_a_dash(path: Path, say: Any) -> None:
    said = say("table", path, "steps", "--columns", "step,loss,recorded", "--head", "2")
    expected = gradscope.open(path).steps["loss"]
    assert said.out.splitlines() == [
        "step   loss  recorded",
        f"   0  {expected[0]:.4g}       yes",
        f"   1  {expected[1]:.4g}       yes",
    ]
    missing = say("table", path, "grads", "--columns", "carried_from", "--where", "step = 0")
    assert missing.out.split() == ["carried_from", *["–"] * 4]


def test_the_middle_of_a_long_table_is_left_out(path: Path, say: Any) -> None:
    lines = say("table", path, "grads", "--columns", "step,param").out.splitlines()
    assert len(lines) == 1 + 40 + 1
    assert lines[21] == "… 80 more rows …"
    assert lines[1].split() == ["0", "0.weight"]
    assert lines[20].split() == ["4", "2.bias"]
    assert lines[22].split() == ["25", "0.weight"]
    assert lines[-1].split() == ["29", "2.bias"]


@pytest.mark.parametrize("n", [0, 1, 7, 43, 120, 500])
def test_head_and_tail_give_as_many_rows_as_asked_for(path: Path, say: Any, n: int) -> None:
    expected = gradscope.open(path).grads["step"].tolist()
    for option, some in (("--head", expected[:n]), ("--tail", expected[max(120 - n, 0) :])):
        said = say("table", path, "grads", option, n, "--columns", "step")
        assert [int(line) for line in said.out.splitlines()[1:] if n] == some
        if n == 0:
            assert said.out == "no rows\n"


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_a_table_fits_the_window_and_names_what_does_not(
    path: Path, say: Any, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for name in TABLES:
        said = say("table", path, name)
        assert max(map(len, said.out.splitlines())) <= columns, name
        if said.out != "no rows\n":
            words = set(re.findall(r"\w+", said.out))
            assert {column.name for column in TABLES[name].columns} <= words
        assert not any(line.endswith(" ") for line in said.out.splitlines())


def test_columns_of_one_value_make_room_for_the_others(
    path: Path, say: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = say("table", path, "grads", "--where", "step = 3")
    assert "norm" in columns_of(said.out)
    assert "optimizer" not in columns_of(said.out)
    assert "optimizer = adam" in said.out


def test_the_condition_chooses_rows(path: Path, say: Any) -> None:
    said = say(
        "table",
        path,
        "grads",
        "--where",
        "param like '%.bias' and step >= 28",
        "--columns",
        "param",
    )
    assert said.out.split() == ["param", "0.bias", "2.bias", "0.bias", "2.bias"]
    # What is suggested has the same condition, quoted for a shell.
    suggested = shlex.split(said.err.removeprefix("next: ").removesuffix(" writes all of it\n"))
    assert say(*suggested[1:]).status == 0
    read = pd.read_csv("grads.csv")
    assert read["param"].tolist() == ["0.bias", "2.bias", "0.bias", "2.bias"]


def expected_grads(path: Path) -> pd.DataFrame:
    grads = gradscope.open(path).grads
    return grads[grads["param"].str.startswith("0.")].reset_index(drop=True)


def test_csv_has_every_digit(path: Path, say: Any) -> None:
    said = say("table", path, "grads", "--where", "param like '0.%'", "--format", "csv")
    assert said.err == ""
    expected = expected_grads(path)
    assert said.out.splitlines()[0].split(",") == list(expected)
    read = pd.read_csv(io.StringIO(said.out))
    assert read["param"].tolist() == expected["param"].tolist()
    np.testing.assert_array_equal(read["norm"], expected["norm"])
    # Single precision is written in as many digits as tell it from its neighbours.
    np.testing.assert_array_equal(read["std"].astype("f4"), expected["std"].astype("f4"))
    assert read["carried_from"].isna().tolist() == expected["carried_from"].isna().tolist()


def test_json_is_a_list_of_rows(path: Path, say: Any) -> None:
    said = say("table", path, "grads", "--where", "param like '0.%'", "--format", "json")
    rows = json.loads(said.out)
    expected = expected_grads(path)
    assert [row["norm"] for row in rows] == expected["norm"].tolist()
    assert [row["edited"] for row in rows] == expected["edited"].tolist()
    assert rows[0]["carried_from"] is None
    assert json.loads(say("table", path, "grads", "--head", "0", "--format", "json").out) == []


def test_parquet_keeps_the_types(path: Path, say: Any, tmp_path: Path) -> None:
    said = say("table", path, "grads", "--where", "param like '0.%'", "-o", "some.parquet")
    assert said.out == ""
    assert said.err == "wrote some.parquet: 60 rows of grads\n"
    read = pq.read_table(tmp_path / "some.parquet")
    assert read.schema.equals(gradscope.open(path).dataset("grads").schema)
    assert read["norm"].to_pylist() == expected_grads(path)["norm"].tolist()


@pytest.mark.parametrize("ending", ["csv", "json", "parquet", "txt"])
def test_the_ending_says_what_is_written_and_nothing_is_overwritten(
    path: Path, say: Any, tmp_path: Path, ending: str
) -> None:
    output = tmp_path / f"steps.{ending}"
    assert say("table", path, "steps", "-o", output).status == 0
    begins = {"csv": b"step,opt", "json": b"[\n{", "parquet": b"PAR1", "txt": b"step  opt"}
    written = output.read_bytes()
    assert written.startswith(begins[ending])

    output.write_bytes(b"mine")
    said = say("table", path, "steps", "-o", output)
    assert said.status == 2
    assert "overwrite it with --force" in said.err
    assert output.read_bytes() == b"mine"
    assert say("table", path, "steps", "-o", output, "--force").status == 0
    assert output.read_bytes() == written
    assert [each.name for each in tmp_path.iterdir()] == [output.name]


def test_what_a_link_leads_to_is_written(path: Path, say: Any, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "steps.csv").symlink_to(tmp_path / "elsewhere" / "real.csv")
    assert say("table", path, "steps", "-o", "steps.csv").status == 0
    assert (tmp_path / "steps.csv").is_symlink()
    assert (tmp_path / "elsewhere" / "real.csv").read_bytes().startswith(b"step,")


def test_a_full_disk_is_told(
    path: Path, say: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(table_files.WRITERS, "csv", full)
    said = say("table", path, "steps", "-o", "steps.csv")
    assert said.status == 2
    assert "steps.csv: cannot be written: [Errno 28] No space left on device" in said.err
    assert list(tmp_path.iterdir()) == []


@contextmanager
def disk_for(n_bytes: int) -> Iterator[None]:
    """Let no file become longer than so many bytes, as on a disk that is full."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    "words",
    [
        *(("graph", "-o", f"g.{ending}") for ending in ("svg", "html", "dot", "txt", "json")),
        ("report", "-o", "run.html"),
        *(("table", "grads", "-o", f"grads.{ending}") for ending in ("txt", "csv", "parquet")),
    ],
    ids=" ".join,
)
def test_on_a_full_disk_what_was_there_stays(
    path: Path, say: Any, tmp_path: Path, words: tuple[str, ...]
) -> None:
    output = tmp_path / words[-1]
    output.write_text("mine")
    with disk_for(500):
        said = say(words[0], path, *words[1:], "--force")
    assert said.status == 2
    assert f"--output {words[-1]}: cannot be written: [Errno 27] File too large" in said.err
    assert "Traceback" not in said.err
    assert output.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [output]


def test_an_export_is_whole_or_not_there(path: Path, say: Any, tmp_path: Path) -> None:
    with disk_for(500):
        said = say("export", path, "--to", "csv", "-o", "out")
    assert said.status == 2
    assert "File too large" in said.err
    assert list(tmp_path.iterdir()) == []


def test_infinity_and_nan_in_every_format(tmp_path: Path, say: Any) -> None:
    net = nn.Linear(2, 1)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    with gradscope.watch(net, sgd, save=tmp_path / "run", every=1):
        for _ in range(2):
            sgd.zero_grad()
            (net(torch.full((1, 2), 3e38)).sum() * 1e38).backward()
            sgd.step()
    where = ("--where", "step = 0 and param = 'weight'", "--columns", "norm,mean,abs_max")
    assert say("table", tmp_path / "run", "grads", *where).out.split()[-3:] == ["inf"] * 3
    text = say("table", tmp_path / "run", "grads", *where, "--format", "json").out
    assert json.loads(text) == [{"norm": "inf", "mean": "inf", "abs_max": "inf"}]
    text = say("table", tmp_path / "run", "grads", *where, "--format", "csv").out
    assert pd.read_csv(io.StringIO(text)).to_numpy().tolist() == [[np.inf] * 3]


def test_names_that_would_steer_the_terminal_are_shown_harmless(tmp_path: Path, say: Any) -> None:
    name = "a\x1b[31m\n\u202eb\ud800=cmd|' ,\"x"
    net = nn.Module()
    net.register_parameter(name, nn.Parameter(torch.ones(2)))
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    with gradscope.watch(net, sgd, save=tmp_path / "run"):
        net.get_parameter(name).sum().backward()
        sgd.step()
    for verb in (
        ["summary"],
        ["graph"],
        ["explain", gradscope.open(tmp_path / "run").params["param"][0]],
    ):
        said = say(verb[0], tmp_path / "run", *verb[1:])
        assert said.status == 0
        assert all(char.isprintable() or char == "\n" for char in said.out + said.err)
        assert "\\x1b[31m" in said.out or verb[0] != "explain"
    said = say("table", tmp_path / "run", "params", "--columns", "param")
    (line,) = said.out.splitlines()[1:]
    assert line.isprintable()
    assert "\\x1b[31m\\n" in line
    for format_, read in (
        ("csv", lambda text: list(csv.reader(io.StringIO(text, newline="")))[1][0]),
        ("json", lambda text: json.loads(text)[0]["param"]),
    ):
        text = say("table", tmp_path / "run", "params", "--columns", "param", "--format", format_)
        assert read(text.out) == gradscope.open(tmp_path / "run").params["param"][0]


# -- graph ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "begins"),
    [
        ("svg", b"<?xml"),
        ("png", b"\x89PNG"),
        ("pdf", b"%PDF"),
        ("html", b"<!doctype html>"),
        ("dot", b"digraph"),
        ("txt", b"autograd graph"),
        ("json", b"{"),
    ],
)
def test_the_graph_is_drawn_as_its_ending_says(
    path: Path, say: Any, tmp_path: Path, ending: str, begins: bytes
) -> None:
    said = say("graph", path, "-o", f"g.{ending}", "--step", 7)
    assert said.out == ""
    assert said.err.startswith(f"wrote g.{ending}: the graph of step 7, ")
    assert "next: --step 0 draws another one" in said.err
    assert (tmp_path / f"g.{ending}").read_bytes().lower().lstrip().startswith(begins.lower())
    assert "overwrite it with --force" in say("graph", path, "-o", f"g.{ending}").err


def test_without_a_file_the_graph_is_printed_as_a_tree(
    path: Path, say: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert say("graph", path).out == gradscope.open(path).graph().to_text() + "\n"
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, say("graph", path).out.splitlines())) <= 60


def test_json_of_a_graph_is_read_back(path: Path, say: Any, tmp_path: Path) -> None:
    say("graph", path, "-o", "g.json")
    read = gradscope.AutogradGraph.from_json((tmp_path / "g.json").read_text())
    assert read.fingerprint() == gradscope.open(path).graph().fingerprint()


# -- report -----------------------------------------------------------------------------------


def test_the_report_is_the_runs_own(path: Path, say: Any, tmp_path: Path) -> None:
    said = say("report", path, "-o", "run.html")
    assert (said.status, said.out) == (0, "")
    assert re.match(r"wrote run\.html: \d\.\d MB", said.err)
    page = (tmp_path / "run.html").read_text("utf-8")
    assert "missing-zero-grad" in page
    assert (tmp_path / "run.html").as_uri() in said.err
    (tmp_path / "run.html").write_text("mine")
    said = say("report", path, "-o", "run.html")
    assert said.status == 2
    assert "overwrite it with --force" in said.err
    assert (tmp_path / "run.html").read_text() == "mine"
    assert say("report", path, "-o", "run.html", "--force").status == 0
    assert say("report", path).err.startswith("wrote report.html: ")


# -- explain ----------------------------------------------------------------------------------


def test_one_weight_is_explained(path: Path, say: Any) -> None:
    run = gradscope.open(path)
    said = say("explain", path, "2.weight[1,3]")
    assert said.out == f"{run.explain('2.weight', (1, 3))}\n"
    said = say("explain", path, "2.weight[1, -1]", "--step", 20)
    assert said.out == f"{run.explain('2.weight', (1, -1), 20)}\n"
    said = say("explain", path, "2.weight[1,3]", "--format", "json")
    assert json.loads(said.out) == run.explain("2.weight", (1, 3)).to_dict()


def test_a_parameter_is_summed_up_and_the_command_for_a_weight_works(path: Path, say: Any) -> None:
    said = say("explain", path, "2.bias", "--step", "-2")
    assert said.out == gradscope.open(path).explain("2.bias", step=-2).to_text() + "\n"
    assert said.err == f"next: gradscope explain {path} '2.bias[0]' explains one weight\n"
    assert "step 29 of 2.bias[0]" in say("explain", path, "2.bias[0]").out


def test_a_parameter_may_have_brackets_in_its_name() -> None:
    from gradscope.cli.explain import split

    assert split("w[0]", {"w[0]"}) == ("w[0]", None)
    assert split("w[0][1,2]", {"w[0]"}) == ("w[0]", (1, 2))
    assert split("scale[]", {"scale"}) == ("scale", ())


@pytest.mark.parametrize("columns", [60, 80])
def test_explanations_fit_the_window(
    path: Path, say: Any, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for weight in ("2.weight", "0.bias[1]"):
        lines = say("explain", path, weight).out.splitlines()
        assert columns / 2 < max(map(len, lines)) <= columns, weight


# -- export -----------------------------------------------------------------------------------


def test_csv_files_of_every_table(path: Path, say: Any, tmp_path: Path) -> None:
    said = say("export", path, "--to", "csv", "-o", "out")
    assert said.err.startswith("wrote out: ")
    assert {each.name for each in (tmp_path / "out").iterdir()} == {f"{t}.csv" for t in TABLES}
    run = gradscope.open(path)
    for table, frame in run.tables.items():
        read = pd.read_csv(tmp_path / "out" / f"{table}.csv")
        assert list(read) == list(frame)
        assert len(read) == len(frame)
    read = pd.read_csv(tmp_path / "out" / "steps.csv")
    np.testing.assert_array_equal(read["loss"], run.steps["loss"])

    (tmp_path / "out" / "mine.txt").write_text("mine")
    said = say("export", path, "--to", "csv", "-o", "out")
    assert said.status == 2
    assert "has files in it" in said.err
    assert say("export", path, "--to", "csv", "-o", "out", "--force").status == 0
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_tensorboard_reads_the_scalars(path: Path, say: Any, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said = say("export", path, "--to", "tensorboard", "-o", "tb")
    assert "next: tensorboard --logdir tb" in said.err
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    run = gradscope.open(path)

    def values(tag: str) -> list[float]:
        return [event.value for event in events.Scalars(tag)]

    np.testing.assert_array_equal(values("loss"), run.steps["loss"].astype("f4"))
    np.testing.assert_array_equal(values("grad_norm"), run.steps["grad_norm"].astype("f4"))
    np.testing.assert_array_equal(values("lr/group0"), run.groups["lr"].astype("f4"))
    for param in run.params["param"]:
        own = run.updates[run.updates["param"] == param]
        ratios = events.Scalars(f"update_ratio_of/{param}")
        assert [event.step for event in ratios] == own["step"].tolist()
        known = own["update_ratio"].astype("f4")
        np.testing.assert_array_equal([event.value for event in ratios], known)
    times = [event.wall_time for event in events.Scalars("loss")]
    assert times == sorted(times)
    assert f"wrote tb: {said.err.split()[2]}" in said.err


def test_without_tensorboard_it_says_what_to_install(
    path: Path, say: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    said = say("export", path, "--to", "tensorboard", "-o", "tb")
    assert said.status == 2
    assert "pip install tensorboard" in said.err
    assert list(tmp_path.iterdir()) == []


# -- all of them ------------------------------------------------------------------------------

COMMANDS = (
    ("summary",),
    ("table", "steps"),
    ("graph",),
    ("explain", "2.bias"),
    ("export", "--to", "csv"),
    ("report",),
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_run_that_is_none_is_named(say: Any, tmp_path: Path, command: tuple[str, ...]) -> None:
    verb, *rest = command
    said = say(verb, tmp_path / "nowhere", *rest)
    assert (said.status, said.out) == (2, "")
    assert said.err == f"gradscope: there is no directory {tmp_path / 'nowhere'}\n"
    said = say(verb, tmp_path, *rest)
    assert said.status == 2
    assert f"{tmp_path} holds no run" in said.err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("table", "weights"), "there is no table 'weights'; there are: models, params"),
        (("table", "steps", "--columns", "lost"), "steps has no column 'lost'; there are: step"),
        (("table", "steps", "--where", "lost > 1"), "steps has no column 'lost'"),
        (("table", "steps", "-o", "no/such/file.csv"), "there is no folder no/such"),
        (("table", "steps", "-o", "."), "is a folder"),
        (("table", "steps", "-o", "/dev/null", "--force"), "is a device or a pipe"),
        (("graph", "--step", "3"), "the graph of step 3 was not captured; captured: [0, 7]"),
        (("graph", "-o", "g.jpeg"), "use one of .svg"),
        (("graph", "-o", "g"), "use one of .svg"),
        (("explain", "3.weight"), "did you mean 2.weight"),
        (("explain", "2.weight[1]"), "2.weight has the shape (3, 8)"),
        (("explain", "2.weight[a,b]"), "write whole numbers in the brackets"),
        (("explain", "2.weight", "--step", "99"), "there is no step 99; the last one is 29"),
        (("export", "--to", "csv", "-o", "no/such"), "there is no folder no"),
    ],
)
def test_a_mistake_is_named(
    path: Path, say: Any, tmp_path: Path, command: tuple[str, ...], said: str
) -> None:
    verb, *rest = command
    answer = say(verb, path, *rest)
    assert (answer.status, answer.out) == (2, "")
    assert said in answer.err
    assert list(tmp_path.iterdir()) == []


WITHOUT_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("torch is not here")
sys.meta_path.insert(0, NoTorch())
from gradscope.cli import main
status = main(sys.argv[1:])
assert "torch" not in sys.modules
sys.exit(status)
"""


def without_torch(tmp_path: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "command",
    [*COMMANDS, ("graph", "-o", "g.svg"), ("export", "--to", "tensorboard")],
    ids=" ".join,
)
def test_no_verb_needs_torch_to_read_a_run(
    path: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    verb, *rest = command
    output = ("-o", "out") if verb == "export" else ()
    done = without_torch(tmp_path, verb, path, *rest, *output)
    assert done.returncode == 0, done.stderr


def test_the_doctor_says_what_torch_is_missing_for(tmp_path: Path) -> None:
    done = without_torch(tmp_path, "doctor")
    assert done.returncode == 1
    assert "recorded runs open without it, but nothing can be watched" in done.stdout
    assert "what gradscope needs does not work: torch" in done.stdout


def in_a_terminal(*arguments: Any, **environment: str) -> str:
    """What a command prints on a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "gradscope", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **environment},
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        said += part
    process.wait()
    os.close(ours)
    return said.decode().replace("\r\n", "\n")


def test_colours_are_for_terminals_and_not_for_who_does_not_want_them(path: Path) -> None:
    colour = re.compile(r"\x1b\[[\d;]*3[1-6]m")
    said = in_a_terminal("summary", path, COLUMNS="60")
    assert colour.search(said)
    plain = re.sub(r"\x1b\[[\d;]*m", "", said)
    assert max(map(len, plain.partition("\nnext:\n")[0].splitlines())) <= 60
    assert not colour.search(in_a_terminal("summary", path, COLUMNS="60", NO_COLOR="1"))


def test_whoever_reads_a_few_lines_only_sees_no_error(path: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m gradscope table {path} grads --format csv | head -n 1",
        shell=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("step,param,")
    assert done.stderr == ""


def test_what_the_output_cannot_write_is_spelled_out(path: Path) -> None:
    for verb in (["summary"], ["explain", "2.bias"], ["table", "params"], ["graph"]):
        done = subprocess.run(
            [sys.executable, "-m", "gradscope", verb[0], path, *verb[1:]],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.isascii()


@pytest.mark.parametrize("columns", ["60", "80", "120", ""])
def test_the_summary_keeps_its_width_and_has_no_trailing_spaces(
    path: Path, say: Any, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    lines = say("summary", path).out.partition("\nnext:\n")[0].splitlines()
    assert max(map(len, lines)) <= int(columns or 100)
    assert not any(line.endswith(" ") for line in lines)
    assert not any("\x1b" in line for line in lines)
    # Labels of evidence are whole.
    assert any("oldest gradient from step" in line for line in lines)


# -- what a first user stumbled over ------------------------------------------------------------


def test_any_weight_is_explained_where_the_optimizer_ended_before_the_watch(
    tmp_path: Path, say: Any
) -> None:
    program = tmp_path / "train.py"
    program.write_text(
        "import torch\n"
        "def main():\n"
        "    net = torch.nn.Linear(30, 20)\n"
        "    opt = torch.optim.AdamW(net.parameters())\n"
        "    for _ in range(6):\n"
        "        opt.zero_grad()\n"
        "        net(torch.randn(4, 30)).pow(2).mean().backward()\n"
        "        opt.step()\n"
        "main()\n"
    )
    command = [sys.executable, "-m", "gradscope", "run", "-o", "run", "train.py"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    for place in ("0,0", "3,7", "19,29"):
        said = say("explain", "run", f"weight[{place}]")
        assert said.status == 0, said.err
        assert "rounding" in said.out


def test_a_folder_by_its_dot(path: Path, say: Any) -> None:
    assert say("export", path, "--to", "csv", "-o", ".").status == 0
    assert Path("grads.csv").exists()


def test_an_ending_that_says_nothing(path: Path, say: Any) -> None:
    said = say("table", path, "grads", "-o", "x.xyz")
    assert said.status == 2
    assert "x.xyz" in said.err
    assert not Path("x.xyz").exists()
    assert say("table", path, "grads", "-o", "x.txt").status == 0


def test_no_rows_are_not_offered_to_be_written(path: Path, say: Any) -> None:
    said = say("table", path, "grads", "--where", "norm > 1e30")
    assert "no rows" in said.out
    assert "next" not in said.err


def test_a_table_that_is_nearly_meant(path: Path, say: Any) -> None:
    said = say("table", path, "grad")
    assert said.status == 2
    assert "did you mean grads?" in said.err
