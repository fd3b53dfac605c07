"""The magics of notebooks, run by IPython itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from traitlets.config import Config

import gradscope
from gradscope.errors import RenderError
from gradscope.graphs import autograd_graph

SETUP = """
import torch
from torch import nn
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
adam = torch.optim.Adam(net.parameters())
"""

HEALTHY = """
for _ in range(12):
    adam.zero_grad()
    loss = net(torch.randn(3, 4)).pow(2).mean()
    loss.backward()
    adam.step()
"""

BROKEN = HEALTHY.replace("    adam.zero_grad()\n", "")


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InteractiveShell]:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.chdir(tmp_path)
    InteractiveShell.clear_instance()
    config = Config()
    config.HistoryManager.enabled = False
    shell = InteractiveShell.instance(config=config)
    shell.run_cell("%load_ext gradscope").raise_error()
    shell.run_cell(SETUP).raise_error()
    yield shell
    InteractiveShell.clear_instance()


def run(shell: InteractiveShell, cell: str) -> tuple[Any, Any]:
    """The result of a cell, and what it displayed and printed."""
    with capture_output() as captured:
        result = shell.run_cell(cell, store_history=True)
    return result, captured


def shown(captured: Any) -> dict[str, str]:
    (display,) = captured.outputs
    return display.data


def test_a_cell_is_watched_and_what_was_seen_is_displayed_after_it(shell: Any) -> None:
    result, captured = run(shell, f"%%gradscope\n{BROKEN}\nprint('trained')\nloss.item()")
    result.raise_error()
    assert captured.stdout.startswith("trained")
    html, text = shown(captured)["text/html"], shown(captured)["text/plain"]
    assert "missing-zero-grad" in html
    assert "net (Sequential) · adam (Adam) · 12 steps" in text
    # Its last value is the value of the cell.
    assert result.result == pytest.approx(shell.user_ns["loss"].item())
    # Line 5 of the cell as the notebook counts them, the magic's included.
    assert f"In[{shell.execution_count - 1}]:5" in text
    assert BROKEN.splitlines()[5 - 2].strip() == "loss.backward()"


def test_variables_of_the_cell_are_the_notebooks(shell: Any) -> None:
    run(shell, f"%%gradscope\nn = 3\n{HEALTHY}")
    assert shell.user_ns["n"] == 3
    result, _ = run(shell, "n + 1")
    assert result.result == 4


def test_the_line_magic_gives_the_last_scope(shell: Any) -> None:
    _, captured = run(shell, "%gradscope")
    assert "no cell was watched yet" in captured.stderr + captured.stdout
    run(shell, f"%%gradscope\n{HEALTHY}")
    run(shell, f"%%gradscope\n{BROKEN}")
    run(shell, "scope = %gradscope")
    assert isinstance(shell.user_ns["scope"], gradscope.Scope)
    assert [finding.code for finding in shell.user_ns["scope"].findings][:1] == ["GS201"]
    assert len(shell.user_ns["scope"].steps) == 12


def test_an_exception_goes_on_and_what_was_seen_is_displayed_all_the_same(shell: Any) -> None:
    cell = f"%%gradscope\n{HEALTHY}\nloss.backward()\nnever = 1"
    result, captured = run(shell, cell)
    assert isinstance(result.error_in_exec, RuntimeError)
    assert "13 steps" in shown(captured)["text/plain"]
    assert "before RuntimeError ended the program" in shown(captured)["text/plain"]
    assert "what led to this" in captured.stderr
    assert "never" not in shell.user_ns
    # Nothing goes on being watched.
    run(shell, HEALTHY)
    result, _ = run(shell, "%gradscope")
    assert len(result.result.steps) == 13


def test_a_mistake_in_the_cell_is_told_as_ever(shell: Any) -> None:
    result, _ = run(shell, "%%gradscope\nfor")
    assert isinstance(result.error_in_exec, SyntaxError)


def test_options_say_how_long_what_for_and_where_to(shell: Any, tmp_path: Path) -> None:
    run(shell, f"%%gradscope --steps 4 --ignore GS201 -o run\n{BROKEN}")
    result, _ = run(shell, "%gradscope")
    assert len(result.result.steps) == 4
    assert "GS201" not in {finding.code for finding in result.result.findings}
    stored = gradscope.open(tmp_path / "run")
    assert len(stored.steps) == 4
    assert stored.about["how_it_ended"] == "finished"
    assert "GS201" not in {finding.code for finding in stored.findings}

    _, captured = run(shell, f"%%gradscope -o run\n{BROKEN}")
    assert "holds a run already" in captured.stderr + captured.stdout
    result, _ = run(shell, f"%%gradscope -o run --force\n{BROKEN}")
    result.raise_error()
    assert len(gradscope.open(tmp_path / "run").steps) == 12


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--select GS999", "GS999"),
        ("--steps 0", "--steps 0"),
        ("--steps x", "invalid int value"),
        ("--nonsense", "--nonsense"),
        ("-o 'x", "No closing quotation"),
    ],
)
def test_bad_options_are_told_before_anything_runs(shell: Any, options: str, said: str) -> None:
    _, captured = run(shell, f"%%gradscope {options}\nran = 1")
    assert said in captured.stderr + captured.stdout
    assert "Traceback" not in captured.stderr + captured.stdout
    assert "ran" not in shell.user_ns


def test_switched_off_the_cell_just_runs(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADSCOPE", "0")
    result, captured = run(shell, "%%gradscope\n1 + 1")
    assert result.result == 2
    assert not captured.outputs


def test_the_extension_can_be_taken_away(shell: Any) -> None:
    run(shell, "%unload_ext gradscope")
    _, captured = run(shell, "%gradscope")
    assert "not found" in captured.stderr + captured.stdout


def test_findings_graph_and_explanations_have_displays_of_their_own(
    shell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(shell, f"%%gradscope\n{BROKEN}")
    run(shell, "scope = %gradscope")
    data = {}
    for expression in ("findings", "explain('0.weight')", "explain('0.weight', (0, 0))", "graph()"):
        result, captured = run(shell, f"display(scope.{expression})")
        result.raise_error()
        data[expression] = shown(captured)
    assert "GS201" in data["findings"]["text/html"]
    assert "<table" in data["explain('0.weight')"]["text/html"]
    assert "exp_avg" in data["explain('0.weight', (0, 0))"]["text/html"]
    assert "<svg" in data["graph()"]["image/svg+xml"]
    assert data["graph()"]["text/plain"].startswith("autograd graph · ")

    def missing(*_: object) -> bytes:
        raise RenderError("no Graphviz")

    monkeypatch.setattr(autograd_graph, "lay_out", missing)
    _, captured = run(shell, "display(scope.graph())")
    assert "image/svg+xml" not in shown(captured)
    assert "Linear" in shown(captured)["text/plain"]


def test_looking_for_the_extension_imports_nothing() -> None:
    code = (
        "import sys, gradscope; assert not {'torch', 'IPython', 'pandas'} & set(sys.modules);"
        "gradscope.load_ipython_extension; assert not {'torch', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
