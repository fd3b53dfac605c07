from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from gradscope.cli import main
from gradscope.demo import loops


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "out"


@pytest.fixture(scope="module")
def printed(folder: Path) -> str:
    import contextlib
    import io

    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main(["demo", "--steps", "25", "--out", str(folder)]) == 0
    return output.getvalue()


def two_runs(printed: str) -> tuple[str, str]:
    healthy, broken = printed.split("2  The same loop without zero_grad")
    return healthy, broken


@pytest.mark.slow
def test_the_healthy_run_has_no_finding_and_the_broken_twin_has_gs201(printed: str) -> None:
    healthy, broken = two_runs(printed)
    assert "no defect found" in healthy
    assert "✗" not in healthy
    assert "no defect found" not in broken
    assert re.search(r"✗ GS201 missing-zero-grad +error", broken)


@pytest.mark.slow
def test_the_finding_names_a_line_that_was_shown(printed: str) -> None:
    _, broken = two_runs(printed)
    (line,) = re.findall(r"^ +(\d+) \| +loss\.backward\(\)$", broken, flags=re.MULTILINE)
    source = Path(loops.__file__).read_text().splitlines()
    assert source[int(line) - 1].strip() == "loss.backward()"
    assert f"loops.py:{line}" in broken


@pytest.mark.slow
def test_every_file_that_is_named_was_written_and_every_file_written_is_named(
    printed: str, folder: Path
) -> None:
    _, ending = printed.split("Written, from the healthy run")
    named = {Path(line.strip()) for line in ending.splitlines() if line.startswith(f"  {folder}")}
    assert named == set(folder.iterdir())
    assert {
        "report.html",
        "graph.svg",
        "graph.png",
        "graph.html",
        "steps.csv",
        "grads.csv",
        "moments.csv",
    } <= {path.name for path in named}


@pytest.mark.slow
def test_the_files_are_what_their_names_say(printed: str, folder: Path) -> None:
    assert "<svg" in (folder / "graph.svg").read_text()
    assert (folder / "graph.png").read_bytes().startswith(b"\x89PNG")
    steps = pd.read_csv(folder / "steps.csv")
    assert steps["step"].tolist() == list(range(25))
    assert steps["loss"].iloc[-1] < steps["loss"].iloc[0]
    assert len(pd.read_csv(folder / "params.csv")) == 54


@pytest.mark.slow
def test_it_ends_with_the_next_command(printed: str) -> None:
    assert printed.rstrip().endswith("gradscope run train.py")


def test_a_folder_with_files_in_it_is_refused_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    assert main(["demo", "--out", str(tmp_path)]) != 0
    captured = capsys.readouterr()
    assert "--force" in captured.err
    assert str(tmp_path) in captured.err
    assert captured.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_the_place_of_the_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("precious")
    assert main(["demo", "--out", str(taken), "--force"]) != 0
    assert "is a file" in capsys.readouterr().err
    assert taken.read_text() == "precious"


@pytest.mark.slow
def test_force_writes_beside_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    (tmp_path / "graph.svg").write_text("old")
    assert main(["demo", "--steps", "2", "--out", str(tmp_path), "--force"]) == 0
    assert (tmp_path / "thesis.txt").read_text() == "precious"
    assert "<svg" in (tmp_path / "graph.svg").read_text()


@pytest.mark.parametrize("steps", ["0", "-3", "many"])
def test_a_number_of_steps_that_is_none_is_refused(
    steps: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["demo", "--steps", steps, "--out", str(tmp_path / "out")])
    assert refused.value.code == 2
    assert "--steps" in capsys.readouterr().err
