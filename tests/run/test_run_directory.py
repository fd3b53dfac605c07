"""What a run directory holds is what the scope held, for us and for any engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars
import pytest
import torch
from recorded_loops import perceptron, recorded, train
from torch import nn
from torch.nn import functional as F

import gradscope
from gradscope.errors import GradscopeWarning, RunDirectoryError, ScopeStateError, UsageError
from gradscope.run.directory import writer
from gradscope.run.directory.layout import read_json, write_json
from gradscope.run.schema import TABLES
from gradscope.scope import Scope
from gradscope.session import saving

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(gradscope.__file__).parents[1])}


def same_tables(run: gradscope.Run, scope: Scope) -> None:
    for name, table in scope.tables.items():
        pd.testing.assert_frame_equal(table, run.tables[name], check_exact=True, obj=name)


def explained(run: gradscope.Run | Scope, param: str, index: Any, step: int) -> str:
    try:
        return repr(run.explain(param, index, step))
    except ScopeStateError as error:
        return str(error)


@pytest.mark.parametrize("clears", [True, False])
def test_an_opened_run_tells_what_the_scope_tells(tmp_path: Path, clears: bool) -> None:
    scope = recorded(tmp_path / "run", clears=clears, keep="0.weight")
    run = gradscope.open(tmp_path / "run")
    same_tables(run, scope)
    assert list(run.findings) == list(scope.findings)
    assert bool(run.findings.errors) is not clears
    assert repr(run) == repr(scope)
    assert run._repr_html_() == scope._repr_html_()
    assert run.latest == scope.latest
    assert run.graph().to_json() == scope.graph().to_json()
    pd.testing.assert_frame_equal(run.overhead, scope.overhead)
    assert run.notes == ()


def test_what_is_explained_live_is_explained_afterwards(tmp_path: Path) -> None:
    scope = recorded(tmp_path / "run", keep="2.bias")
    run = gradscope.open(tmp_path / "run")
    for param, index in (("0.weight", (3, 4)), ("0.weight", (0, 0)), ("2.bias", 1)):
        for step in (-1, 0, 1):
            assert explained(run, param, index, step) == explained(scope, param, index, step)
    assert repr(run.explain("0.weight")) == repr(scope.explain("0.weight"))
    kept, expected_tensors = run.tensors("2.bias"), scope.tensors("2.bias")
    assert kept.keys() == expected_tensors.keys()
    for name, array in kept.items():
        np.testing.assert_array_equal(array, expected_tensors[name], err_msg=name)


@pytest.mark.parametrize("kind", ["Adafactor", "SGD", "LBFGS", "Rprop"])
def test_every_kind_of_optimizer_is_explained_afterwards(tmp_path: Path, kind: str) -> None:
    model = perceptron()
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=1e-2)

    with gradscope.watch(model, optimizer, save=tmp_path / "run", every=1) as scope:
        for _ in range(3):
            x = torch.randn(4, 6)

            def closure(x: torch.Tensor = x) -> torch.Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), x[:, :3].argmax(1))
                loss.backward()
                return loss

            optimizer.step(closure)
    run = gradscope.open(tmp_path / "run")
    same_tables(run, scope)
    for step in (-1, 0):
        expected = explained(scope, "0.weight", (0, 0), step)
        assert explained(run, "0.weight", (0, 0), step) == expected


def test_complex_and_half_precision_parameters_survive(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))
    half = nn.Parameter(torch.randn(4, dtype=torch.bfloat16))
    model = nn.Module()
    model.weight, model.small = weight, half
    optimizer = torch.optim.Adam(model.parameters())
    with gradscope.watch(model, optimizer, save=tmp_path / "run", keep="*", every=1) as scope:
        for _ in range(2):
            optimizer.zero_grad()
            ((weight * weight.conj()).real.sum() + half.float().pow(2).sum()).backward()
            optimizer.step()
    run = gradscope.open(tmp_path / "run")
    for param in ("weight", "small"):
        for name, array in scope.tensors(param).items():
            found = run.tensors(param)[name]
            assert found.dtype == array.dtype
            np.testing.assert_array_equal(found, array)
    assert repr(run.explain("weight", (1, 1, 0))) == repr(scope.explain("weight", (1, 1, 0)))


def test_a_run_opens_where_there_is_no_torch(tmp_path: Path) -> None:
    scope = recorded(tmp_path / "run", clears=False, ignore=["GS607"], keep="0.bias")
    program = """
import sys
sys.modules["torch"] = None  # importing it raises ImportError
import gradscope
run = gradscope.open(sys.argv[1])
print(repr(run.findings))
print(run)
print(repr(run.explain("0.weight", (3, 4))))
print(len(run.grads), run.tensors("0.bias")["gradient"].shape, run.graph().to_json())
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(tmp_path / "run")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr == ""
    gradient = scope.tensors("0.bias")["gradient"]
    expected = [
        repr(scope.findings),
        str(scope),
        repr(scope.explain("0.weight", (3, 4))),
        f"{len(scope.grads)} {gradient.shape} {scope.graph().to_json()}",
    ]
    assert done.stdout == "\n".join(expected) + "\n"


def test_any_engine_reads_the_tables(tmp_path: Path) -> None:
    scope = recorded(tmp_path / "run")
    for name, table in scope.tables.items():
        folder = tmp_path / "run" / name
        assert len(pd.read_parquet(folder)) == len(table)
        assert len(polars.read_parquet(folder / "*.parquet")) == len(table)
        found = duckdb.sql(f"select count(*) from '{folder}/*.parquet'").fetchall()
        assert found == [(len(table),)]
        assert list(pd.read_parquet(folder).columns) == [c.name for c in TABLES[name].columns]

    grads = tmp_path / "run" / "grads"
    expected = scope.grads.groupby("param")["norm"].sum().to_dict()
    by_pandas = pd.read_parquet(grads).groupby("param", observed=True)["norm"].sum()
    by_polars = polars.scan_parquet(grads / "*.parquet").group_by("param").agg(polars.sum("norm"))
    by_duckdb = duckdb.sql(f"select param, sum(norm) from '{grads}/*.parquet' group by param")
    assert by_pandas.to_dict() == pytest.approx(expected)
    assert dict(by_polars.collect().iter_rows()) == pytest.approx(expected)
    assert dict(by_duckdb.fetchall()) == pytest.approx(expected)


def test_rows_are_read_by_column_and_condition(tmp_path: Path) -> None:
    scope = recorded(tmp_path / "run")
    run = gradscope.open(tmp_path / "run")
    for name, table in scope.tables.items():
        found = run.table(name)
        texts = dict.fromkeys(found.select_dtypes("category"), object)
        pd.testing.assert_frame_equal(
            found.astype(texts), table.astype(texts), check_exact=True, obj=name
        )
    rows = run.table("grads", ["step", "norm"], [("param", "==", "2.bias"), ("step", ">", 16)])
    wanted = scope.grads.query("param == '2.bias' and step > 16")[["step", "norm"]]
    pd.testing.assert_frame_equal(rows, wanted.reset_index(drop=True))
    assert run.dataset("grads").count_rows() == len(scope.grads)
    with pytest.raises(UsageError, match=r"no column 'nrom'.*norm"):
        run.table("grads", ["nrom"])
    with pytest.raises(UsageError, match=r"no table 'gards'.*grads"):
        run.table("gards")
    with pytest.raises(UsageError, match="where="):
        run.table("grads", where=[("param", "=", 3, 4)])
    with pytest.raises(UsageError, match="where="):
        run.table("grads", where=[("nowhere", "==", 3)])


def test_single_precision_is_what_the_scope_shows_too(tmp_path: Path) -> None:
    scope = recorded(tmp_path / "run")
    stored = pd.read_parquet(tmp_path / "run" / "grads")
    assert stored["abs_max"].dtype == np.float32
    assert stored["norm"].dtype == np.float64
    np.testing.assert_array_equal(stored["abs_max"].astype(float), scope.grads["abs_max"])


def test_a_scope_is_saved_afterwards(tmp_path: Path) -> None:
    model = perceptron()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scope = train(gradscope.watch(model, optimizer, keep="0.*"), model, optimizer, clears=False)
    assert scope.save(tmp_path / "run") == (tmp_path / "run").absolute()
    run = gradscope.open(tmp_path / "run")
    same_tables(run, scope)
    assert list(run.findings) == list(scope.findings)
    assert repr(run.explain("2.weight", (1, 1))) == repr(scope.explain("2.weight", (1, 1)))
    assert run.about["how_it_ended"] == "saved"
    with pytest.raises(UsageError, match="something lies there already"):
        scope.save(tmp_path / "run")
    scope.save(tmp_path / "again")  # what was written once is still in memory
    same_tables(gradscope.open(tmp_path / "again"), scope)


def test_a_scope_that_is_written_can_be_saved_elsewhere_meanwhile(tmp_path: Path) -> None:
    model = perceptron()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scope = gradscope.watch(model, optimizer, save=tmp_path / "run")
    with scope:
        for number in range(6):
            F.cross_entropy(model(torch.randn(4, 6)), torch.zeros(4, dtype=torch.long)).backward()
            optimizer.step()
            if number == 2:
                scope.save(tmp_path / "first")
    assert len(gradscope.open(tmp_path / "first").steps) == 3
    same_tables(gradscope.open(tmp_path / "run"), scope)


def test_what_ran_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "repository"
    (repository / ".git" / "refs" / "heads").mkdir(parents=True)
    (repository / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (repository / ".git" / "refs" / "heads" / "main").write_text("0123abc\n")
    (repository / "inside").mkdir()
    monkeypatch.chdir(repository / "inside")
    recorded(tmp_path / "run")
    about = gradscope.open(tmp_path / "run").about
    assert about["torch"] == torch.__version__
    assert about["gradscope"] == gradscope.__version__
    assert about["git_commit"] == "0123abc"
    assert about["command"] == sys.orig_argv
    assert about["how_it_ended"] == "finished"
    assert about["steps"] == 20
    assert about["started"] <= about["ended"]
    json.dumps(about)


def test_the_commit_is_read_off_gits_own_files(tmp_path: Path) -> None:
    assert saving.git_commit(tmp_path) is None
    main = tmp_path / "main"
    (main / ".git" / "worktrees" / "side").mkdir(parents=True)
    (main / ".git" / "HEAD").write_text("4567def\n")
    (main / ".git" / "packed-refs").write_text("# pack-refs\n89abcde refs/heads/side\n")
    side = tmp_path / "side"
    side.mkdir()
    (side / ".git").write_text(f"gitdir: {main}/.git/worktrees/side\n")
    (main / ".git" / "worktrees" / "side" / "HEAD").write_text("ref: refs/heads/side\n")
    (main / ".git" / "worktrees" / "side" / "commondir").write_text("../..\n")
    assert saving.git_commit(main) == "4567def"
    assert saving.git_commit(side) == "89abcde"
    (main / ".git" / "HEAD").write_bytes(b"\xff\xfe\x00")
    assert saving.git_commit(main) is None


def test_a_loop_that_raises_says_so(tmp_path: Path) -> None:
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loop() -> None:
        with gradscope.watch(model, optimizer, save=tmp_path / "run"):
            model(torch.randn(2, 6)).sum().backward()
            optimizer.step()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()
    run = gradscope.open(tmp_path / "run")
    assert run.about["how_it_ended"] == "ZeroDivisionError"
    assert len(run.steps) == 1


def test_a_scope_goes_on_after_a_stop(tmp_path: Path) -> None:
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scope = gradscope.watch(model, optimizer, save=tmp_path / "run")
    for _ in range(2):
        train(scope, model, optimizer, 5)
    same_tables(gradscope.open(tmp_path / "run"), scope)
    assert len(scope.steps) == 10


def test_names_learnt_late_hold_for_the_rows_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "from torch import nn\n"
        "first, second = nn.Linear(2, 1), nn.Linear(3, 1)\n"
        "both = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)\n"
        "for step in range(40):\n"
        "    loss = first(torch.ones(1, 2)).sum()\n"
        "    if step >= 20:\n"
        "        loss = loss + second(torch.ones(1, 3)).sum()\n"
        "    both.zero_grad(); loss.backward(); both.step()\n"
        "    import gradscope_test_flush; gradscope_test_flush.flush()\n"
    )
    # A flush after each step, each row in a part of its own.
    (tmp_path / "gradscope_test_flush.py").write_text(
        "import gc\n"
        "from gradscope.run.directory import writer\n"
        "from gradscope.session import in_order\n"
        "writer.PART_BYTES = 1\n"
        "in_order._LONGEST_WAIT = -1.0\n"
        "def flush():\n"
        "    for each in gc.get_objects():\n"
        "        if type(each) is writer.DirectoryWriter:\n"
        "            each.flush()\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "gradscope", "run", "-o", str(tmp_path / "run"), str(script)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert f"gradscope.open('{tmp_path / 'run'}')" in done.stderr
    names = {"first.weight", "first.bias", "second.weight", "second.bias"}
    run = gradscope.open(tmp_path / "run")
    assert set(run.grads["param"]) == names
    assert len(read_json(tmp_path / "run" / "parameters.json")["names"]) > 1
    # The engines, too, find the names of today.
    assert set(pd.read_parquet(tmp_path / "run" / "grads")["param"]) == names
    assert len(list((tmp_path / "run" / "grads").iterdir())) > 10
    assert len(run.table("grads", where=[("param", "==", "first.bias")])) == 40


def test_a_killed_run_has_the_names_of_today(tmp_path: Path) -> None:
    recorded(tmp_path / "run")
    people = read_json(tmp_path / "run" / "parameters.json")
    people["names"].append([f"model.{name}" for name in people["names"][0]])
    for entry in people["parameters"]:
        entry["name"] = f"model.{entry['name']}"
    write_json(tmp_path / "run" / "parameters.json", people)
    run = gradscope.open(tmp_path / "run")
    assert set(run.grads["param"]) == {
        "model." + n for n in pd.read_parquet(tmp_path / "run/grads")["param"]
    }
    assert len(run.table("grads", where=[("param", "==", "model.0.bias")])) == 20
    assert run.dataset("grads").count_rows() == 80


# -- what cannot be opened or written -------------------------------------------------------------


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"there is no .*nowhere"):
        gradscope.open(tmp_path / "nowhere")
    with pytest.raises(RunDirectoryError, match="holds no run"):
        gradscope.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="is a file"):
        gradscope.open(tmp_path / "file")


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    recorded(tmp_path / "run")
    facts = read_json(tmp_path / "run" / "run.json")
    write_json(tmp_path / "run" / "run.json", facts | {"version": 2, "gradscope": "9.0"})
    with pytest.raises(RunDirectoryError, match=r"gradscope 9\.0 in version 2.*reads version 1"):
        gradscope.open(tmp_path / "run")


@pytest.mark.parametrize("save", ["", 3, "a\0b", b"bytes"])
def test_a_path_has_to_be_one(save: object) -> None:
    model = perceptron()
    with pytest.raises(UsageError, match="save="):
        gradscope.watch(model, torch.optim.SGD(model.parameters(), 0.1), save=save)  # type: ignore[arg-type]


def test_nothing_of_the_users_is_overwritten(tmp_path: Path) -> None:
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    (tmp_path / "thesis.txt").write_text("three years")
    with pytest.raises(UsageError, match="holds no run"):
        gradscope.watch(model, optimizer, save=tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        gradscope.watch(model, optimizer, save=tmp_path / "thesis.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("when", ["start", "flush", "end"])
def test_a_full_disk_is_told_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    expected = train(*_watched(None))
    if when == "start":
        (tmp_path / "run").write_text("in the way")
        monkeypatch.setattr(Path, "exists", lambda path: False)
    else:

        def full(self: object, *args: object, **kwargs: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(writer.DirectoryWriter, "flush" if when == "flush" else "_finish", full)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scope = train(*_watched(tmp_path / "run"))
    (warning,) = [w.message for w in caught if isinstance(w.message, GradscopeWarning)]
    assert warning.slug == "saving-failed"
    pd.testing.assert_series_equal(scope.steps["loss"], expected.steps["loss"], check_exact=True)
    assert any("run_directory failed" in note for note in scope._recording.notes)
    assert "instrument-failed" in {finding.name for finding in scope.findings}


def test_half_of_a_saved_run_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scope = train(*_watched(None))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.DirectoryWriter, "_finish", full)
    with pytest.raises(OSError, match="No space left"):
        scope.save(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    monkeypatch.undo()
    scope.save(tmp_path / "run")
    assert len(gradscope.open(tmp_path / "run").steps) == len(scope.steps)


def test_what_cannot_be_written_at_exit_is_told_in_one_line(tmp_path: Path) -> None:
    program = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from recorded_loops import perceptron
import gradscope
from gradscope.run.directory.writer import DirectoryWriter

def full(self, *args):
    raise OSError(28, "No space left on device")

model = perceptron()
optimizer = torch.optim.SGD(model.parameters(), 0.1)
gradscope.watch(model, optimizer, save=sys.argv[1]).start()
model(torch.ones(1, 6)).sum().backward()
optimizer.step()
DirectoryWriter._finish = full
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "run"), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("gradscope: run_directory failed at the end of the program")
    assert "No space left on device" in line
    assert line.endswith("[saving-failed]")
    assert len(gradscope.open(tmp_path / "run").steps) == 1


def _watched(path: Path | None) -> tuple[Scope, nn.Module, torch.optim.Optimizer]:
    model = perceptron()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return gradscope.watch(model, optimizer, save=path), model, optimizer


KILLED = """
import sys, torch
from pathlib import Path
from typing import Any
sys.path.insert(0, sys.argv[2])
from gradscope.run.directory import writer
writer.FLUSH_SECONDS = 0.01
from recorded_loops import recorded
print("begins", flush=True)
recorded(Path(sys.argv[1]), 1_000_000, keep="0.bias", every=7)
"""


@pytest.mark.parametrize("seconds", [0.1, 0.4, 0.8, 1.3])
def test_a_killed_run_opens_up_to_its_last_flush(tmp_path: Path, seconds: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "run"), str(Path(__file__).parent)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(seconds)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    run_file = tmp_path / "run" / "run.json"
    if not run_file.exists():
        return  # killed before anything was written
    run = gradscope.open(tmp_path / "run")
    steps = run.steps["step"].to_numpy()
    np.testing.assert_array_equal(steps, np.arange(len(steps)))
    assert len(steps) == read_json(run_file)["steps"]
    assert run.grads["step"].value_counts().eq(4).all()
    assert set(run.grads["step"]) == set(steps)
    (note,) = run.notes
    assert "not ended, or was killed" in note
    assert "so far: the run has not ended, or was killed" in repr(run).splitlines()[1]


def test_a_program_that_never_leaves_the_block_is_flushed_at_exit(tmp_path: Path) -> None:
    program = (
        "import sys, torch, gradscope\n"
        "model = torch.nn.Linear(2, 1)\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "scope = gradscope.watch(model, optimizer, save=sys.argv[1]).start()\n"
        "for _ in range(7):\n"
        "    model(torch.ones(1, 2)).sum().backward(); optimizer.step()\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(tmp_path / "run")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    run = gradscope.open(tmp_path / "run")
    assert len(run.steps) == 7
    assert run.about["how_it_ended"] == "the program ended while it was watched"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_writes_nothing(tmp_path: Path) -> None:
    program = (
        "import os, sys, torch, gradscope\n"
        "model = torch.nn.Linear(2, 1)\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "def steps(n):\n"
        "    for _ in range(n):\n"
        "        model(torch.ones(1, 2)).sum().backward(); optimizer.step()\n"
        "with gradscope.watch(model, optimizer, save=sys.argv[1]):\n"
        "    steps(3)\n"
        "    child = os.fork()\n"
        "    steps(50 if child == 0 else 4)\n"
        "    if child:\n"
        "        assert os.waitpid(child, 0)[1] == 0\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(tmp_path / "run")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(gradscope.open(tmp_path / "run").steps) == 7
