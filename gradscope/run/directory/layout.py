"""What lies where in a run directory.

::

    runs/exp1/
      run.json             what ran, when, on what, how it ended, what watching cost
      parameters.json      models, optimizers and parameters, with all names they ever had
      memory.json          which steps memory held, once there were too many for it
      steps/ grads/ …      a folder for each table, Parquet files: a dataset for any engine
      graphs/              an autograd graph a file, as ``graph.to_json()`` writes it
      tensors/             whole tensors around a step (``keep=``), a safetensors file a step
      tracked/             a few weights of each parameter, by recorded step
      last/                whole tensors around the last recorded step of each optimizer

A file appears under its name when it is complete: it is written under a name that begins with a
dot, which every engine passes over, and then renamed. Names of parts carry the rank that wrote
them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from gradscope.errors import OutputExistsError, RunDirectoryError, UsageError
from gradscope.run.schema import TABLES

FORMAT: Final = "gradscope run"
VERSION: Final = 1

RUN: Final = "run.json"
PEOPLE: Final = "parameters.json"
MEMORY: Final = "memory.json"
GRAPHS: Final = "graphs"
TENSORS: Final = "tensors"
TRACKED: Final = "tracked"
LAST: Final = "last"

_PART: Final = re.compile(r"part-(\d{4})-(\d{6,})\.(parquet|safetensors)")
_OF_STEP: Final = re.compile(r"step-(\d{1,19})\.(json|safetensors)")


def part_name(rank: int, number: int, ending: str = "parquet") -> str:
    """Return the name of a part of a table."""
    return f"part-{rank:04d}-{number:06d}.{ending}"


def step_name(step: int, ending: str) -> str:
    """Return the name of a file about one step."""
    return f"step-{step}.{ending}"


def parts_in(
    folder: Path, notes: list[str], ending: str = "parquet"
) -> Iterator[tuple[Path, int, int]]:
    """Give path, rank and number of the parts in a folder, in order; others go to ``notes``."""
    found = []
    for path in files_in(folder):
        match = _PART.fullmatch(path.name)
        if match is None or match[3] != ending:
            notes.append(f"{shown(path)}: no file of a run, skipped")
        else:
            found.append((path, int(match[1]), int(match[2])))
    yield from sorted(found, key=lambda part: part[1:])


def steps_in(folder: Path, notes: list[str], ending: str) -> dict[int, Path]:
    """Return the files of a folder that are about one step each, by step; others go to notes."""
    found = {}
    for path in files_in(folder):
        match = _OF_STEP.fullmatch(path.name)
        if match is None or match[2] != ending:
            notes.append(f"{shown(path)}: no file of a run, skipped")
        else:
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def files_in(folder: Path) -> list[Path]:
    """Return what lies in a folder, half-written files left out; nothing if it is not there."""
    try:
        return sorted(path for path in folder.iterdir() if path.name[:1] not in "._")
    except OSError:
        return []


def shown(path: Path) -> str:
    """Return a path within a run directory, as people are told it: one line of some length."""
    text = f"{path.parent.name}/{path.name}".encode("utf-8", "backslashreplace").decode()
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= 80 else f"{text[:40]}…{text[-39:]}"


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a hidden name to write to, so that the file is there as a whole or not at all.

    The file takes its name when the block ends. If the block raises, nothing is left of it, and
    what was there before stays.
    """
    hidden = hidden_name(path)
    try:
        yield hidden
        os.replace(hidden, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(hidden)
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is there as a whole or not at all."""
    with written_whole(path) as hidden, open(hidden, "wb") as file:
        file.write(content)


def write_json(path: Path, document: Any) -> None:
    """Write a document of plain data as JSON, in ASCII."""
    write_bytes(path, json.dumps(document, indent=1).encode())


def hidden_name(path: Path) -> Path:
    """Return the name under which a file is written before it is complete."""
    return path.with_name(f".{path.name}.writing")


def read_json(path: Path) -> Any:
    """Return what is in a JSON file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_run(path: Path) -> dict[str, Any]:
    """Return what ``run.json`` of a run directory says.

    Raises:
        RunDirectoryError: if there is no such directory, it holds no run, or one that is written in
            a newer format than this gradscope reads.
    """
    if not path.exists():
        raise RunDirectoryError(f"there is no directory {path}")
    if not path.is_dir():
        raise RunDirectoryError(f"{path} is a file; a run is a directory with a {RUN} in it")
    try:
        run = read_json(path / RUN)
    except FileNotFoundError:
        raise RunDirectoryError(
            f"{path} holds no run: there is no {RUN} in it; watch(..., save=...) and "
            "gradscope run -o write one"
        ) from None
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{path / RUN} cannot be read: {error}") from None
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        raise RunDirectoryError(f"{path} holds no run: its {RUN} is something else")
    version = run.get("version")
    if type(version) is not int or version < 1:
        raise RunDirectoryError(f"{path / RUN} is damaged: its version is {version!r}"[:300])
    if version > VERSION:
        raise RunDirectoryError(
            f"{path} was written by gradscope {str(run.get('gradscope'))[:40]} in version "
            f"{version} of the format, and this one reads version {VERSION}: update gradscope"
        )
    return run


def make_room(name: str, path: Path, *, force: bool) -> None:
    """See that a new run can be written to a directory.

    Args:
        name: of the option that says which.
        path: the directory.
        force: whether a run that is there is removed.

    Raises:
        UsageError: if something else than a run lies there.
        OutputExistsError: if a run does, and ``force`` is not set.
    """
    if not path.exists() or not any(path.iterdir()):
        return
    if not (path / RUN).exists():
        raise UsageError(f"{name} {path}: holds something else than a run; name another one")
    if not force:
        raise OutputExistsError(
            f"{name} {path}: holds a run already; overwrite it with --force, or name another "
            "directory"
        )
    remove_run(path)


def remove_run(path: Path) -> None:
    """Remove the files of a run from a directory, and leave everything else in it.

    Raises:
        OSError: if one cannot be removed.
    """
    for folder in (*TABLES, GRAPHS, TENSORS, TRACKED, LAST):
        for each in files_in(path / folder):
            if _PART.fullmatch(each.name) or _OF_STEP.fullmatch(each.name):
                each.unlink()
    for name in (RUN, PEOPLE, MEMORY):
        (path / name).unlink(missing_ok=True)
