"""Importing gradscope costs next to nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gradscope

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(gradscope.__file__).parents[1])}
HEAVY = ("torch", "pandas", "numpy", "pyarrow", "rich", "graphviz", "pygraphviz", "jinja2", "bokeh")


def python(program: str, *options: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *options, "-c", program],
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize(
    "program",
    [
        "import gradscope",
        "import gradscope; gradscope.__version__; dir(gradscope)",
        "import gradscope.errors, gradscope.config; gradscope.GradscopeError",
    ],
)
def test_importing_brings_none_of_the_heavy_packages(program: str) -> None:
    loaded = python(f"{program}\nimport sys; print([n for n in {HEAVY} if n in sys.modules])")
    assert loaded.strip() == "[]"


def test_importing_costs_at_most_fifteen_milliseconds() -> None:
    def seconds(program: str) -> float:
        began = time.perf_counter()
        python(program)
        return time.perf_counter() - began

    seconds("import gradscope")  # compiles, and warms the disk's cache
    empty, with_import = [], []
    for _ in range(12):
        empty.append(seconds("pass"))
        with_import.append(seconds("import gradscope"))
    assert min(with_import) - min(empty) < 0.015


def test_a_watch_that_is_switched_off_does_not_import_torch() -> None:
    program = (
        "import gradscope, sys\n"
        "with gradscope.watch(None, None): pass\n"
        "print('torch' in sys.modules)"
    )
    assert python(program, GRADSCOPE="0").strip() == "False"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'wotch'"):
        gradscope.wotch  # noqa: B018
