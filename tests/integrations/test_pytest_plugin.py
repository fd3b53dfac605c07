"""The pytest plugin, in a pytest of its own that finds it as an installed package's."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

TESTS = """
import sys

import pytest
import torch
from torch import nn


def made():
    model = nn.Linear(3, 1)
    return model, torch.optim.SGD(model.parameters(), lr=1e-3)


def train(model, optimizer, clear):
    for _ in range(6):
        if clear:
            optimizer.zero_grad()
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()


def test_fixture_broken(gradscope_watch):
    net, opt = made()
    with gradscope_watch(net, opt) as scope:
        train(net, opt, clear=False)


def test_fixture_healthy(gradscope_watch):
    net, opt = made()
    with gradscope_watch(net, opt, fail_on="warning", graph=None) as scope:
        train(net, opt, clear=True)
    assert len(scope.steps) == 6


def test_fixture_ignored(gradscope_watch):
    net, opt = made()
    with gradscope_watch(net, opt, ignore="GS201"):
        train(net, opt, clear=False)


def test_fixture_own_failure(gradscope_watch):
    net, opt = made()
    with gradscope_watch(net, opt):
        train(net, opt, clear=False)
        assert len("own failure") == 0


def test_fixture_bad_option(gradscope_watch):
    gradscope_watch(*made(), fail_on="always")


@pytest.mark.gradscope
def test_marker_broken():
    train(*made(), clear=False)


@pytest.mark.gradscope(fail_on="warning", ignore=["GS607"])
def test_marker_healthy():
    train(*made(), clear=True)


@pytest.mark.gradscope(ignore=["missing-zero-grad"])
class TestMarkedClass:
    def test_marker_ignored(self):
        train(*made(), clear=False)

    @pytest.mark.gradscope(ignore=[])
    def test_marker_overridden(self):
        train(*made(), clear=False)


@pytest.mark.gradscope
def test_marker_own_failure():
    train(*made(), clear=False)
    assert len("own failure") == 0


@pytest.mark.gradscope(ignore=["GS999"])
def test_marker_bad_option():
    pass


def test_unmarked():
    train(*made(), clear=False)
"""

UNUSED = """
import sys


def test_nothing_is_imported():
    assert "gradscope.integrations.pytest_plugin" in sys.modules
    for name in ("torch", "pandas", "numpy", "rich", "gradscope.scope", "gradscope.rules"):
        assert name not in sys.modules, name
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like an installed gradscope to whoever asks for entry points."""
    folder = tmp_path_factory.mktemp("installed")
    metadata = folder / "torch_gradscope_under_test-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch-gradscope-under-test\nVersion: 0\n"
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    entries = [f"{k} = {v}" for k, v in project["entry-points"]["pytest11"].items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[pytest11]", *entries, ""]))
    return folder


def run_pytest(installed: Path, folder: Path, tests: str) -> str:
    (folder / "test_it.py").write_text(tests)
    (folder / "pytest.ini").write_text(
        "[pytest]\naddopts = --strict-markers\nfilterwarnings = error\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(installed), str(ROOT)]),
        "GRADSCOPE": "",
        "COLUMNS": "120",
    }
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", str(folder)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def output(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return run_pytest(installed, tmp_path_factory.mktemp("tests"), TESTS)


def outcome_of(output: str, test: str) -> str:
    summary = output.rpartition("short test summary info")[2]
    return next(line for line in summary.splitlines() if line.split(" - ")[0].endswith(test))


@pytest.mark.parametrize(
    ("test", "outcome"),
    [
        ("test_fixture_broken", "FAILED"),
        ("test_fixture_healthy", "PASSED"),
        ("test_fixture_ignored", "PASSED"),
        ("test_fixture_own_failure", "FAILED"),
        ("test_fixture_bad_option", "FAILED"),
        ("test_marker_broken", "FAILED"),
        ("test_marker_healthy", "PASSED"),
        ("test_marker_ignored", "PASSED"),
        ("test_marker_overridden", "FAILED"),
        ("test_marker_own_failure", "FAILED"),
        ("test_marker_bad_option", "FAILED"),
        ("test_unmarked", "PASSED"),
    ],
)
def test_a_test_ends_as_its_loop_deserves(output: str, test: str, outcome: str) -> None:
    assert outcome_of(output, test).split()[0] == outcome, output


def section_of(output: str, test: str) -> str:
    return output.partition(f" {test} ")[2].partition("\n____")[0]


def test_the_findings_are_the_message(output: str) -> None:
    fixture = section_of(output, "test_fixture_broken")
    assert fixture.lstrip("_\n").startswith("gradscope: 1 error")  # and no traceback before it
    assert "✗ GS201 missing-zero-grad  error · steps 1–5 · test_it.py:" in fixture
    assert "opt.step() used gradients" in fixture
    marker = section_of(output, "test_marker_broken")
    assert marker.lstrip("_\n").startswith("gradscope: 1 error")
    assert "fix: call optimizer.zero_grad()" in marker


def test_a_test_that_fails_by_itself_keeps_its_own_reason(output: str) -> None:
    for test in ("test_fixture_own_failure", "test_marker_own_failure"):
        assert "assert 11 == 0" in outcome_of(output, test)
    section = section_of(output, "test_marker_own_failure")
    assert "gradscope" in section
    assert "GS201 missing-zero-grad" in section


def test_bad_options_are_named(output: str) -> None:
    assert "fail_on='always'" in outcome_of(output, "test_fixture_bad_option")
    assert "GS999" in outcome_of(output, "test_marker_bad_option")


def test_an_unused_plugin_imports_nothing(installed: Path, tmp_path: Path) -> None:
    output = run_pytest(installed, tmp_path, UNUSED)
    assert "1 passed" in output, output
