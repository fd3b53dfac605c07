from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

pytestmark = pytest.mark.slow


def run_example(name: str, *arguments: str) -> str:
    """Run as a reader would, on the checkout, and return what it prints."""
    completed = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stderr == ""
    return completed.stdout


def test_the_healthy_script_ends_with_a_screen_that_finds_nothing() -> None:
    output = run_example("train_gpt.py", "--steps", "25")
    assert "step  20  loss" in output
    assert "no defect found" in output


def test_the_broken_script_ends_with_the_finding_and_its_line() -> None:
    name = "train_gpt_without_zero_grad.py"
    output = run_example(name, "--steps", "25")
    source = (EXAMPLES / name).read_text().splitlines()
    line = next(i for i, text in enumerate(source, 1) if "loss.backward()" in text)
    assert "✗ GS201 missing-zero-grad" in output
    assert f"{name}:{line}" in output


def test_the_plain_script_knows_nothing_of_being_watched() -> None:
    assert "step  20  loss" in run_example("plain_loop.py", "--steps", "25")
    assert "gradscope" not in (EXAMPLES / "plain_loop.py").read_text()


def test_the_two_watched_scripts_differ_by_the_missing_line() -> None:
    def code(name: str) -> list[str]:
        return (EXAMPLES / name).read_text().split('"""', 2)[2].splitlines()

    healthy, broken = code("train_gpt.py"), code("train_gpt_without_zero_grad.py")
    (missing,) = [line for line in healthy if line not in broken]
    assert missing.strip() == "optimizer.zero_grad(set_to_none=True)"
    assert [line for line in healthy if line != missing] == broken


def test_a_step_is_explained_summed_up_and_kept() -> None:
    output = run_example("explain_a_step.py")
    assert "of 0.weight[3, 0]" in output
    assert output.count("rounding explains up to") == 2
    assert "MORE than rounding" not in output
    assert "exp_avg_sq_after   (1, 16)" in output
    assert "anatomy" in output


def test_a_graph_is_drawn_and_asked(tmp_path: Path) -> None:
    output = run_example("draw_a_graph.py", "--out", str(tmp_path))
    assert "×12" in output
    assert "cut off" in output
    assert (tmp_path / "gpt2.svg").read_text().startswith("<?xml")
    assert "<script" in (tmp_path / "gpt2.html").read_text()


def test_the_networks_to_draw_know_nothing_of_being_drawn() -> None:
    output = run_example("architectures.py")
    assert "gpt2" in output
    assert "gradscope" not in (EXAMPLES / "architectures.py").read_text()


def test_a_recorded_run_is_opened_and_read_by_pandas(tmp_path: Path) -> None:
    output = run_example("record_a_run.py", str(tmp_path / "run"))
    assert "no defect found" in output
    assert "2.weight[0, 3]" in output
    assert (tmp_path / "run" / "run.json").exists()


def test_two_ranks_past_their_wrapper_are_told_so(tmp_path: Path) -> None:
    arguments = ["--steps", "6", "--save", str(tmp_path / "run"), "--past-the-wrapper"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, str(EXAMPLES / "ddp.py"), *arguments],
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    first, second = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert "rank 0 of 2" in first
    assert "GS802 unreduced-gradients" in first
    assert second == ""
