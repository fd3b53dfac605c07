"""Programs on other people's frameworks, unmodified: silent when healthy, named when broken.

The frameworks are a dependency group of their own (``make frameworks``); without them nothing here
runs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = Path(__file__).parent / "programs"
NEEDS = {
    "hf_trainer": ("transformers", "accelerate"),
    "lightning_automatic": ("lightning",),
    "lightning_manual": ("lightning",),
    "accelerate_loop": ("accelerate",),
}
NAMED_BY = {
    "frozen-head": {"GS104"},
    "layer-outside-optimizer": {"GS101"},
    "eval-left-on": {"GS306"},
    "detached-loss": {"GS301", "GS302"},
}


def findings_of(program: str, defect: str, folder: Path) -> list[dict[str, Any]]:
    for module in NEEDS[program]:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    out = folder / "findings.json"
    command = [sys.executable, "-m", "gradscope", "run", "--findings", str(out)]
    ran = subprocess.run(
        [*command, str(PROGRAMS / f"{program}.py"), defect],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    document = json.loads(out.read_text())
    assert document["steps"] > 0
    found: list[dict[str, Any]] = document["findings"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("program", NEEDS)
def test_silent_when_healthy(program: str, tmp_path: Path) -> None:
    found = findings_of(program, "none", tmp_path)
    assert [f["message"] for f in found if f["severity"] != "info"] == []


@pytest.mark.slow
@pytest.mark.parametrize("defect", NAMED_BY)
@pytest.mark.parametrize("program", NEEDS)
def test_the_defect_is_named(program: str, defect: str, tmp_path: Path) -> None:
    found = findings_of(program, defect, tmp_path)
    assert NAMED_BY[defect] & {f["code"] for f in found}, [f["message"] for f in found]
