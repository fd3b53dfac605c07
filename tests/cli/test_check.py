"""``gradscope check``, and what it shares with ``gradscope run``, from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gradscope.cli import main

ROOT = Path(__file__).resolve().parents[2]

BROKEN = """
import sys
import torch
from torch import nn
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
adam = torch.optim.Adam(net.parameters())
for step in range(6):
    net(torch.randn(3, 4)).pow(2).mean().backward()
    adam.step()
print("said by the program", end="")
"""


def gradscope(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return python(folder, "-m", "gradscope", *arguments, **env)


def python(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(BROKEN, "utf-8")
    return tmp_path


def test_a_finding_fails_the_check_and_json_is_alone_on_standard_output(broken: Path) -> None:
    result = gradscope(broken, "check", "--format", "json", "train.py")
    assert result.returncode == 1
    document = json.loads(result.stdout)
    assert "said by the program" in result.stderr
    (found,) = [each for each in document["findings"] if each["code"] == "GS201"]
    assert found["severity"] == "error"
    assert found["location"] == {"file": str(broken / "train.py"), "line": 9}
    assert document["exit"] == {"status": 0, "exception": None}
    assert document["steps"] == 6


def test_github_gets_annotations_at_the_beginning_of_lines(broken: Path) -> None:
    result = gradscope(broken, "check", "--format", "github", "train.py")
    assert result.returncode == 1
    assert "\n::error file=train.py,line=9,title=GS201 missing-zero-grad::" in result.stdout


def test_the_project_says_what_fails(broken: Path) -> None:
    (broken / "pyproject.toml").write_text('[tool.gradscope]\nignore = ["GS"]\n', "utf-8")
    result = gradscope(broken, "check", "train.py")
    assert result.returncode == 0, result.stdout
    assert "no defect found" in result.stdout
    assert "GS201 missing-zero-grad" not in result.stdout


def test_a_program_that_fails_fails_the_check_with_its_own_status(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("raise SystemExit(7)\n", "utf-8")
    assert gradscope(tmp_path, "check", "train.py").returncode == 7


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check"], "name the script to run"),
        (["run", "--select", "GS777", "train.py"], "no rule is meant by 'GS777'"),
        (["run", "--findings", "no/where.json", "train.py"], "there is no folder"),
        (["run", "--findings", "train.py", "train.py"], "overwrite it with --force"),
        (["run", "-m", "no_such_module"], "No module named no_such_module"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_runs(
    broken: Path,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(broken)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert "said by the program" not in out
    assert (broken / "train.py").read_text("utf-8") == BROKEN


def findings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out.json").read_text("utf-8"))


def test_the_findings_file_and_the_traceback_of_a_program_that_raises(broken: Path) -> None:
    (broken / "train.py").write_text(BROKEN.replace("adam.step()", "step / 0"), "utf-8")
    watched = gradscope(broken, "run", "--findings", "out.json", "train.py")
    bare = python(broken, "train.py")
    assert watched.returncode == bare.returncode == 1
    assert watched.stderr.startswith(bare.stderr)
    exit_ = {"status": 1, "exception": "ZeroDivisionError: division by zero"}
    assert findings(broken)["exit"] == exit_
    assert "ZeroDivisionError ended the program" in watched.stderr or "✗" in watched.stderr


def test_an_exception_of_autograds_is_explained_after_its_traceback(broken: Path) -> None:
    twice = "loss = net(torch.randn(3, 4)).mean()\n    loss.backward()\n    loss.backward()\n"
    source = BROKEN.replace("net(torch.randn(3, 4)).pow(2).mean().backward()\n", twice)
    (broken / "train.py").write_text(source, "utf-8")
    watched, bare = gradscope(broken, "run", "train.py"), python(broken, "train.py")
    assert watched.stderr.startswith(bare.stderr)
    explanation = watched.stderr.removeprefix(bare.stderr)
    assert explanation.startswith("\ngradscope: what led to this\n")
    assert "second backward of the very same loss" in explanation


def test_an_interrupt_ends_as_pythons_own_after_the_findings(broken: Path) -> None:
    (broken / "train.py").write_text(BROKEN + "raise KeyboardInterrupt\n", "utf-8")
    watched = gradscope(broken, "run", "--findings", "out.json", "train.py")
    bare = python(broken, "train.py")
    assert watched.returncode == bare.returncode == -signal.SIGINT
    assert watched.stderr.startswith(bare.stderr)
    assert watched.stderr.count("KeyboardInterrupt\n") == bare.stderr.count("KeyboardInterrupt\n")
    assert "GS201" in [each["code"] for each in findings(broken)["findings"]]


def test_a_module_runs_as_python_runs_it_and_steps_end_the_watch(broken: Path) -> None:
    package = broken / "package"
    package.mkdir()
    (package / "__init__.py").write_text("", "utf-8")
    says = "\nprint(__name__, __package__, __spec__.name, __file__, sys.argv, sys.path[0])\n"
    (package / "train.py").write_text(BROKEN + says, "utf-8")
    watched = gradscope(
        broken, "run", "--steps", "2", "--findings", "out.json", "-m", "package.train", "--lr", "1"
    )
    bare = python(broken, "-m", "package.train", "--lr", "1")
    assert watched.stdout == bare.stdout
    assert bare.returncode == watched.returncode == 0, watched.stderr
    assert findings(broken)["steps"] == 2
    assert "what came after 2 steps" in watched.stderr


def test_switched_off_it_is_the_bare_program(tmp_path: Path) -> None:
    names = "sorted(set(globals()) - {'sys'}), __spec__, __package__, type(__loader__).__name__"
    (tmp_path / "train.py").write_text(
        f"import sys\nprint('torch' in sys.modules, {names}, sys.argv)\n1 / 0\n", "utf-8"
    )
    watched = gradscope(tmp_path, "run", "train.py", "-m", "x", GRADSCOPE="0")
    bare = python(tmp_path, "train.py", "-m", "x")
    assert watched.stdout == bare.stdout
    assert bare.stdout.startswith("False ")
    assert (watched.stderr, watched.returncode) == (bare.stderr, bare.returncode)


def test_warnings_that_do_not_fail_are_told_so(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import torch\n"
        "net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))\n"
        "opt = torch.optim.SGD(net[0].parameters(), lr=0.1)\n"
        "for _ in range(8):\n"
        "    opt.zero_grad()\n"
        "    net(torch.randn(4, 6)).pow(2).mean().backward()\n"
        "    opt.step()\n"
    )
    passed = gradscope(tmp_path, "check", "train.py")
    assert passed.returncode == 0
    assert "GS101" in passed.stdout
    assert "--fail-on warning" in passed.stderr
    assert gradscope(tmp_path, "check", "--fail-on", "warning", "train.py").returncode == 1
