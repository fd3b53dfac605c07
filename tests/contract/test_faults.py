"""Wherever gradscope fails, training ends as if nobody had watched, with a word about what is lost.

``fault_points`` finds every call that gradscope makes, ``fault_programs`` lets one after the other
fail while small trainings run: with an error of the disk, of memory or of any other kind, once or
from some call on. Of each it is asserted that

- the weights, losses and random numbers are those of an unwatched training, to the last bit;
- nothing is raised into the program, no hook, patch, mode or listener stays, no lock is held;
- what is missing in the recording is told by a warning with a slug, and nothing in it is wrong;
- no rule says anything that it does not say of the same training without the fault;
- the run directory opens, and has no torn or half-written file in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("fault_programs.py")


def faults(tmp_path: Path, *options: str, timeout: float) -> dict[str, Any]:
    """Let gradscope fail in a process of its own, in which it is compiled with its points."""
    report = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--json", str(report), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert report.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(report.read_text())
    assert found["broken"] == [], done.stdout[-10_000:]
    assert done.returncode == 0
    return found


def test_a_fault_at_any_of_a_tenth_of_all_points_is_no_matter(tmp_path: Path) -> None:
    found = faults(tmp_path, "--share", "12", timeout=900)
    assert found["n_points"] > 2_500
    assert found["n_faults"] > found["n_points"] / 20
    assert all(found["by_kind"][kind] > 10 for kind in ("torch", "files", "threads", "pyarrow"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch", "files", "threads", "pyarrow", "safetensors", "import"])
def test_a_fault_at_any_call_into_torch_or_the_file_system_is_no_matter(
    tmp_path: Path, kind: str
) -> None:
    found = faults(tmp_path, "--kind", kind, timeout=3_000)
    assert found["n_faults"] > 0


@pytest.mark.skipif(
    os.environ.get("GRADSCOPE_ALL_FAULTS") != "1", reason="takes hours: make faults"
)
def test_a_fault_at_any_point_is_no_matter(tmp_path: Path) -> None:
    faults(tmp_path, "--all", timeout=40_000)
