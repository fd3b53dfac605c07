"""``gradscope doctor``: what is installed, what works, and what is missing for what."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from gradscope._version import __version__
from gradscope.cli.output import show


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        state: ``ok``; ``missing`` if only some things do not work without it; ``bad`` if gradscope
            itself does not.
        found: what was found there.
        advice: what to do about it; empty if there is nothing to do.
    """

    name: str
    state: Literal["ok", "missing", "bad"]
    found: str
    advice: str = ""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "doctor",
        help="say what is installed, what works, and what to install for the rest",
        description="Look at what gradscope needs and may use. Exit with 0 if everything that it "
        "needs works, else with 1.",
    )
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Print what was found; 1 if something that is needed does not work."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    marks = {"ok": ("✓", "green"), "missing": ("–", "yellow"), "bad": ("✗", "bold red")}
    checks = []
    for check in _checks():
        checks.append(check)
        mark, style = marks[check.state]
        found = Text(check.found)
        if check.advice:
            found.append(f"\n{check.advice}", style="bold")
        table.add_row(Text(mark, style=style), Text(check.name), found)
    show(table)
    bad = [check.name for check in checks if check.state == "bad"]
    if bad:
        show(Text(f"\nwhat gradscope needs does not work: {', '.join(bad)}", style="bold red"))
        return 1
    show(Text("\neverything that gradscope needs works", style="bold green"))
    show(Text("next: gradscope demo, or gradscope run train.py"))
    return 0


def _checks() -> Iterator[Check]:
    yield Check("gradscope", "ok", f"{__version__}, {os.path.dirname(os.path.dirname(__file__))}")
    version = ".".join(map(str, sys.version_info[:3]))
    yield Check("Python", "ok", f"{version}, {sys.executable}")
    yield from _torch()
    for name in (
        "numpy",
        "pandas",
        "pyarrow",
        "safetensors",
        "rich",
        "jinja2",
        "bokeh",
        "graphviz",
    ):
        yield _package(name)
    yield from _renderers()
    for name, purpose in _OPTIONAL.items():
        yield _package(name, purpose)
    yield _pytest()
    yield _environment()
    yield _project()


_OPTIONAL = {
    "IPython": "the magics of notebooks",
    "tensorboard": "gradscope export --to tensorboard",
}

_DISTRIBUTION = {"IPython": "ipython"}


def _package(name: str, purpose: str = "") -> Check:
    """Whether a package can be imported; one with a purpose may be missing."""
    import importlib
    from importlib.metadata import PackageNotFoundError, version

    try:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(name=name)
        if not purpose:
            importlib.import_module(name)
        return Check(name, "ok", version(_DISTRIBUTION.get(name, name)))
    except ModuleNotFoundError as error:
        missing = _DISTRIBUTION.get(name, name) if error.name in (None, name) else error.name
        found = f"not installed; for {purpose}" if purpose else "not installed"
        return Check(name, "missing" if purpose else "bad", found, f"pip install {missing}")
    except PackageNotFoundError:
        return Check(name, "ok", "installed, of unknown version")
    except Exception as error:  # it is there, and broken
        return Check(
            name,
            "missing" if purpose else "bad",
            f"cannot be imported: {_in_words(error)}",
            f"pip install --force-reinstall {_DISTRIBUTION.get(name, name)}",
        )


def _torch() -> Iterator[Check]:
    check = _package("torch")
    if check.state != "ok":
        yield Check(
            "torch",
            "bad",
            f"{check.found}: recorded runs open without it, but nothing can be watched",
            "install the build of torch for this machine",
        )
        return
    import torch

    yield check
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
        yield Check("CUDA", "ok", f"{torch.version.cuda}, {', '.join(names)}")
    elif torch.version.cuda:
        yield Check("CUDA", "missing", f"torch is built for {torch.version.cuda}, no device found")
    else:
        yield Check("CUDA", "ok", "none: this build of torch is for other devices")


def _renderers() -> Iterator[Check]:
    """Each way to lay out a picture, tried on a graph of two boxes."""
    from gradscope.graphs.layout import ENGINES, failure_of

    failures = {name: failure_of(name) for name in ENGINES}
    some = not all(failures.values())
    for name, failure in failures.items():
        if failure:
            yield Check(name, "missing", failure + (" (one is enough)" if some else ""))
        else:
            yield Check(name, "ok", "lays out pictures")
    if not some:
        yield Check(
            "pictures",
            "missing",
            "nothing lays them out; graphs as text, .dot and .json work",
            "pip install pygraphviz, or install the program dot with the system's packages",
        )


def _pytest() -> Check:
    from importlib.metadata import entry_points

    check = _package("pytest", "watching loops in tests")
    if check.state != "ok":
        return check
    found = any(each.value.startswith("gradscope.") for each in entry_points(group="pytest11"))
    if not found:
        return Check(
            "pytest",
            "missing",
            f"{check.found}, without gradscope's plugin: gradscope is imported, not installed",
            "pip install gradscope's folder, or run pytest -p gradscope.integrations.pytest_plugin",
        )
    return Check("pytest", "ok", f"{check.found}, with gradscope's plugin")


def _environment() -> Check:
    from gradscope.config import switched_off

    given = {name: value for name, value in os.environ.items() if name.startswith("GRADSCOPE")}
    listed = ", ".join(f"{name}={value}" for name, value in sorted(given.items()))
    if switched_off():
        return Check("environment", "missing", listed, "unset GRADSCOPE: nothing is watched")
    unknown = sorted(set(given) - {"GRADSCOPE"})
    if unknown:
        return Check("environment", "missing", listed, f"{', '.join(unknown)}: means nothing here")
    return Check("environment", "ok", listed or "GRADSCOPE is not set: watching is on")


def _project() -> Check:
    from gradscope.config import project_config
    from gradscope.errors import GradscopeError
    from gradscope.rules.selection import check_selectors
    from gradscope.rules.thresholds import check_thresholds

    try:
        config = project_config(os.getcwd())
        check_selectors((*config.select, *config.ignore, *config.ignore_params))
        check_thresholds(config.thresholds)
    except GradscopeError as error:
        return Check("pyproject.toml", "bad", str(error), "mend that line")
    except OSError as error:
        return Check("pyproject.toml", "missing", _in_words(error))
    said = [
        f"{name.replace('_', '-')} {', '.join(value) if isinstance(value, tuple) else value}"
        for name in ("select", "ignore", "fail_on", "ignore_params", "thresholds")
        if (value := getattr(config, name))
    ]
    if config == type(config)():
        return Check("pyproject.toml", "ok", "says nothing under [tool.gradscope]")
    return Check("pyproject.toml", "ok", f"[tool.gradscope] {'; '.join(said)}")


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:200]
