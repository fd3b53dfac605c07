"""``gradscope doctor``: what works, what does not, and what to do about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradscope.cli import main
from gradscope.graphs import layout


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRADSCOPE", raising=False)
    monkeypatch.setenv("COLUMNS", "200")


def lines_of(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What was printed, by the name of what was looked at."""
    found = {}
    for line in capsys.readouterr().out.splitlines():
        if line[:1] in "✓–✗" and line[:1]:
            mark, name, rest = line.split(maxsplit=2)
            found[name] = f"{mark} {rest}"
    return found


def test_where_everything_works_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "everything that gradscope needs works" in out
    assert torch.__version__ in out
    for line in out.splitlines():
        assert not line.endswith(" ")


def test_each_renderer_is_tried(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["doctor"]) == 0
    found = lines_of(capsys)
    assert found["pygraphviz"] == "✓ lays out pictures"
    assert found["dot"] == "– not on the PATH (one is enough)"

    monkeypatch.setattr(layout, "_WORKER", Path("/nowhere.py"))
    assert main(["doctor"]) == 0  # a picture is not what gradscope is for
    said = capsys.readouterr().out
    assert "nothing lays them out" in said
    assert "pip install pygraphviz" in said


def test_the_environment_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADSCOPE", "0")
    main(["doctor"])
    said = capsys.readouterr().out
    assert "GRADSCOPE=0" in said
    assert "nothing is watched" in said
    monkeypatch.delenv("GRADSCOPE")
    monkeypatch.setenv("GRADSCOPE_EVERY", "3")
    main(["doctor"])
    assert "GRADSCOPE_EVERY: means nothing here" in capsys.readouterr().out


def test_the_projects_table_is_checked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    project = tmp_path / "pyproject.toml"
    project.write_text('[tool.gradscope]\nignore = ["GS607"]\nfail-on = "warning"\n')
    assert main(["doctor"]) == 0
    assert lines_of(capsys)["pyproject.toml"] == (
        "✓ [tool.gradscope] ignore GS607; fail-on warning"
    )
    for wrong in ('ignore = ["GS999"]', "nonsense = 1", "ignore = 3", "= ["):
        project.write_text(f"[tool.gradscope]\n{wrong}\n")
        assert main(["doctor"]) == 1
        assert lines_of(capsys)["pyproject.toml"].startswith("✗ ")


def test_a_broken_package_is_told_from_a_missing_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    (tmp_path / "safetensors.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "safetensors", raising=False)
    assert main(["doctor"]) == 1
    assert "cannot be imported: ZeroDivisionError" in lines_of(capsys)["safetensors"]
