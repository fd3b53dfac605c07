"""``gradscope run``: a script nobody edited, run as Python would run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import gradscope

ROOT = Path(__file__).resolve().parents[2]

BROKEN = """
import sys, torch
from torch import nn
torch.manual_seed(0)
class Trainer:
    def __init__(self):
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        self.adam = torch.optim.Adam(self.net.parameters())
    def fit(self, n):
        for _ in range(n):
            loss = self.net(torch.randn(3, 4)).pow(2).mean()
            loss.backward()
            self.adam.step()
        print("loss", loss.item(), sys.argv[1:], __name__, __file__)
if __name__ == "__main__":
    Trainer().fit(6)
"""

HEALTHY = BROKEN.replace("loss.backward()", "self.adam.zero_grad(); loss.backward()")


def run(
    tmp_path: Path, source: str, *args: str, watched: bool = True, **env: str
) -> subprocess.CompletedProcess[str]:
    (tmp_path / "train.py").write_text(source, "utf-8")
    command = [sys.executable, *(["-m", "gradscope", "run"] if watched else []), "train.py", *args]
    return subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_defect_of_an_unedited_script_is_named_with_its_own_names(tmp_path: Path) -> None:
    watched = run(tmp_path, BROKEN, "--flag", "1")
    assert watched.returncode == 0
    assert "✗ GS201 missing-zero-grad" in watched.stderr
    assert "train.py:12" in watched.stderr
    assert "net (Sequential) · adam (Adam) · 6 steps" in watched.stderr
    assert "adam.step() used gradients" in watched.stderr


def test_output_and_arguments_are_those_of_the_bare_script(tmp_path: Path) -> None:
    for source in (BROKEN, HEALTHY):
        watched, bare = (run(tmp_path, source, "--x", "y", watched=w) for w in (True, False))
        assert watched.stdout == bare.stdout
        assert "['--x', 'y'] __main__" in bare.stdout


def test_a_healthy_script_has_no_finding(tmp_path: Path) -> None:
    watched = run(tmp_path, HEALTHY)
    assert "✓ no defect found" in watched.stderr
    assert "✗" not in watched.stderr


@pytest.mark.parametrize(
    ("last_line", "status"),
    [("sys.exit(3)", 3), ("sys.exit('bye')", 1), ("sys.exit()", 0), ("raise SystemExit(4)", 4)],
)
def test_the_exit_status_is_the_scripts(tmp_path: Path, last_line: str, status: int) -> None:
    watched, bare = (run(tmp_path, f"import sys\n{last_line}\n", watched=w) for w in (True, False))
    assert watched.returncode == bare.returncode == status
    assert watched.stdout == bare.stdout


def test_an_exception_is_shown_without_our_frames_and_the_screen_follows(tmp_path: Path) -> None:
    source = BROKEN.replace("loss.backward()", "loss = loss.detach(); loss.backward()")
    watched, bare = (run(tmp_path, source, watched=w) for w in (True, False))
    assert watched.returncode == bare.returncode == 1
    message = "RuntimeError: element 0 of tensors does not require grad"
    assert message in bare.stderr
    traceback, _, screen = watched.stderr.partition(message)
    assert 'File "train.py"' not in screen
    assert "gradscope" not in traceback.replace(str(ROOT), "")
    assert "✗ GS301 detached-loss" in screen
    assert "train.py:12" in screen


def test_a_syntax_error_is_the_scripts_own(tmp_path: Path) -> None:
    watched, bare = (run(tmp_path, "x = = 1\n", watched=w) for w in (True, False))
    assert watched.returncode == bare.returncode == 1
    # The screen that follows is ours.
    assert bare.stderr.splitlines()[-1] in watched.stderr
    assert "gradscope/" not in watched.stderr.replace(str(ROOT), "").split("SyntaxError")[0]


def test_a_chained_exception_keeps_its_cause(tmp_path: Path) -> None:
    source = "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise ValueError('no') from e\n"
    watched, bare = (run(tmp_path, source, watched=w) for w in (True, False))
    for line in ("ZeroDivisionError: division by zero", "ValueError: no", "direct cause"):
        assert line in bare.stderr
        assert line in watched.stderr


def test_nothing_is_watched_when_switched_off(tmp_path: Path) -> None:
    watched = run(tmp_path, BROKEN, GRADSCOPE="0")
    assert watched.returncode == 0
    assert watched.stderr == ""


def test_a_script_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "gradscope", "run", "nowhere.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    expected = f"gradscope: cannot read {tmp_path / 'nowhere.py'}: No such file or directory"
    assert result.stderr.strip() == expected


def test_discovery_and_a_given_census_record_the_same(tmp_path: Path) -> None:
    """Discovery is the only difference between ``run`` and ``watch``: the tables are equal."""
    body = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters())
def loop():
    for i in range(5):
        loss = model(torch.randn(3, 4)).pow(2).mean()
        if i % 2:
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
"""
    (tmp_path / "discovered.py").write_text(body + "loop()\n", "utf-8")
    (tmp_path / "compare.py").write_text(
        body
        + """
import gradscope, sys
from gradscope.config import WatchOptions
from gradscope.session.session import Session
from gradscope.cli.program import script_program
with gradscope.watch(model, optimizer, every=1) as scope:
    loop()
session = Session(WatchOptions(every=1), discovers=True)
session.start()
script_program("discovered.py", []).run()
session.stop()
found = session.recording.tables
for name, table in scope.tables.items():
    same = [c for c in table.columns if not c.endswith("_ms") and c not in ("time", "file", "line")]
    if name != "events":
        assert table[same].equals(found[name][same]), name
        assert len(table) or name in ("losses", "strangers", "checksums"), name
print("equal")
""",
        "utf-8",
    )
    result = subprocess.run(
        [sys.executable, "compare.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == "equal", result.stderr


def recorded(tmp_path: Path, source: str, *options: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "train.py").write_text(source, "utf-8")
    return subprocess.run(
        [sys.executable, "-m", "gradscope", "run", "-o", "out", *options, "train.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_script_is_recorded_and_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    first = recorded(tmp_path, BROKEN)
    assert first.returncode == 0
    assert f"recorded to {tmp_path / 'out'}: gradscope.open(" in first.stderr
    run = gradscope.open(tmp_path / "out")
    assert [finding.code for finding in run.findings.errors] == ["GS201"]
    assert len(run.steps) == 6

    again = recorded(tmp_path, HEALTHY)
    assert again.returncode == 2
    assert "holds a run already; overwrite it with --force" in again.stderr
    assert again.stdout == ""  # the program has not run
    (tmp_path / "out" / "mine.txt").write_text("mine")
    forced = recorded(tmp_path, HEALTHY.replace("fit(6)", "fit(4)"), "--force")
    assert forced.returncode == 0
    run = gradscope.open(tmp_path / "out")
    assert len(run.steps) == 4
    assert not run.findings.errors
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_an_exception_and_an_exit_are_recorded_too(tmp_path: Path) -> None:
    raised = recorded(tmp_path, HEALTHY + "\nraise ValueError('over')\n")
    assert raised.returncode == 1
    run = gradscope.open(tmp_path / "out")
    assert run.about["how_it_ended"] == "ValueError"
    assert len(run.steps) == 6
    left = recorded(tmp_path, HEALTHY + "\nsys.exit(3)\n", "--force")
    assert left.returncode == 3
    assert gradscope.open(tmp_path / "out").about["how_it_ended"] == "finished"
    assert recorded(tmp_path / "out", HEALTHY, "--steps", "2").returncode == 0
    assert len(gradscope.open(tmp_path / "out" / "out").steps) == 2


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("three years")
    done = recorded(tmp_path, HEALTHY, "--force")
    assert done.returncode == 2
    assert "holds something else than a run" in done.stderr
