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
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gradscope

HERE = Path(__file__).parent


def faults(program: str, tmp_path: Path, *options: str, timeout: float) -> dict[str, Any]:
    """Let gradscope fail in a process of its own, in which it is compiled with its points."""
    report = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, str(HERE / program), "--json", str(report), *options],
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


def test_training_goes_on_after_a_fault_at_any_sixteenth_point(tmp_path: Path) -> None:
    found = faults("fault_programs.py", tmp_path, "--share", "16", timeout=900)
    assert found["n_points"] > 2_000
    assert found["n_faults"] > found["n_points"] / 25
    assert all(found["by_kind"][kind] >= 10 for kind in ("torch", "files", "threads", "pyarrow"))


def test_a_verb_writes_all_or_nothing_wherever_it_fails(tmp_path: Path) -> None:
    found = faults("fault_verbs.py", tmp_path, "--share", "200", timeout=900)
    assert found["n_points"] > 2_000
    assert found["n_faults"] > 10


@pytest.mark.slow
def test_the_harness_sees_what_a_fault_breaks(tmp_path: Path) -> None:
    """An engine that lets its own errors into the program is found out, and so is a silent loss."""
    for broken, said, point in (
        ("taps/tap.py", "raised into the program", "_sequence_nr"),
        ("session/failures.py", "without a word", "np.sqrt"),
    ):
        changed = tmp_path / broken.replace("/", "-").removesuffix(".py")
        shutil.copytree(Path(gradscope.__file__).parent, changed / "gradscope")
        file = changed / "gradscope" / broken
        text = file.read_text()
        if broken.startswith("taps"):
            text = text.replace("listener.failed(event, error)", "raise error")
        else:
            text = text.replace("        self._silent.add(part)\n", "        return\n")
        assert text != file.read_text()
        file.write_text(text)
        done = subprocess.run(
            [
                sys.executable,
                str(HERE / "fault_programs.py"),
                *("--scenario", "all taps", "--point", point, "--share", "1"),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1", "GRADSCOPE_TESTED": str(changed)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert said in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
        assert done.returncode == 1


@pytest.mark.skipif(
    os.environ.get("GRADSCOPE_ALL_FAULTS") != "1", reason="takes half an hour: make faults"
)
@pytest.mark.parametrize("program", ["fault_programs.py", "fault_verbs.py"])
def test_a_fault_at_any_point_is_no_matter(program: str, tmp_path: Path) -> None:
    found = faults(program, tmp_path, timeout=20_000)
    print(found["n_points"], "points", found["n_faults"], "faults", found["by_kind"])
