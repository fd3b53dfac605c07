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
      ranks/0001/          the same for another process that trained with it, but for the tables,
                           whose parts all lie together

A file appears under its name when it is complete: it is written under a name that begins with a
dot, which every engine passes over, and then renamed. Names of parts carry the rank that wrote
them.
"""

from __future__ import annotations

import contextlib
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
RANKS: Final = "ranks"

_PART: Final = re.compile(r"part-(\d{4})-(\d{6,})\.(parquet|safetensors)")
_OF_STEP: Final = re.compile(r"step-(\d{1,19})\.(json|safetensors)")
_RANK: Final = re.compile(r"\d{4,6}")

MOST_RANKS: Final = 10_000
"""More processes than that do not write one run."""


def home_of(path: Path, rank: int) -> Path:
    """Return the folder of what is no table of one rank."""
    return path if rank == 0 else path / RANKS / f"{rank:04d}"


def ranks_in(path: Path) -> list[int]:
    """Return the ranks that have written to a run directory, in order."""
    known = [0] if _has_begun(path) else []
    for each in files_in(path / RANKS):
        if _RANK.fullmatch(each.name) and _has_begun(each):
            known.append(int(each.name))
    return sorted(known)


def _has_begun(home: Path) -> bool:
    """Whether a rank has written; an empty file only keeps its place."""
    try:
        return (home / RUN).stat().st_size > 0
    except OSError:
        return False


def claim(path: Path, wanted: int, first_other: int) -> int:
    """Take a place in a directory that several processes share, and return its number.

    Args:
        path: the directory.
        wanted: the number that it is to have.
        first_other: the first that is tried where another process has taken that.

    Raises:
        OSError: if nothing can be written there.
    """
    for number in (wanted, *range(first_other, MOST_RANKS)):
        home = home_of(path, number)
        home.mkdir(parents=True, exist_ok=True)
        try:
            (home / RUN).touch(exist_ok=False)
        except FileExistsError:
            continue
        return int(number)
    raise OSError(f"{path}: there are {MOST_RANKS} processes already")


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


def read_run(path: Path, rank: int = 0) -> dict[str, Any]:
    """Return what ``run.json`` of a run directory says.

    Args:
        path: the directory.
        rank: which of the processes that wrote it is asked for.

    Raises:
        RunDirectoryError: if there is no such directory, it holds no run, or one that is written in
            a newer format than this gradscope reads.
    """
    if not path.exists():
        raise RunDirectoryError(f"there is no directory {path}")
    if not path.is_dir():
        raise RunDirectoryError(f"{path} is a file; a run is a directory with a {RUN} in it")
    path = home_of(path, rank)
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


def make_room(name: str, path: Path, *, force: bool, rank: int = 0, world_size: int = 1) -> None:
    """See that a new run can be written to a directory.

    Processes that write one run together come here at the same time: each answers for its own part,
    and the first also for those of ranks that there are no more.

    Args:
        name: of the option that says which.
        path: the directory.
        force: whether a run that is there is removed.
        rank: of this process.
        world_size: how many processes write there.

    Raises:
        UsageError: if something else than a run lies there.
        OutputExistsError: if a run does, and ``force`` is not set.
    """
    if is_free(path, rank, world_size):
        return
    is_run = (home_of(path, rank) / RUN).exists() or (world_size == 1 and ranks_in(path))
    if not is_run:
        raise UsageError(f"{name} {path}: holds something else than a run; name another one")
    if not force:
        raise OutputExistsError(
            f"{name} {path}: holds a run already; overwrite it with --force, or name another "
            "directory"
        )
    remove_run(path, rank, world_size)


def is_free(path: Path, rank: int = 0, world_size: int = 1) -> bool:
    """Whether a rank can begin a run in a directory: nothing is there, or only of other ranks."""
    if not path.exists():
        return True
    there = [each.name for each in path.iterdir()]
    if world_size == 1:
        return not there
    # Another rank may be about to give a file its name.
    there = [name for name in there if not name.startswith(".")]
    return not (home_of(path, rank) / RUN).exists() and _OURS.issuperset(there)


def remove_run(path: Path, rank: int = 0, world_size: int = 1) -> None:
    """Remove a rank's files of a run from a directory, and leave everything else in it.

    Args:
        path: the directory.
        rank: whose files; the first one's are also those of ranks that there are no more.
        world_size: how many ranks there are.

    Raises:
        OSError: if one cannot be removed.
    """
    gone = [each for each in ranks_in(path) if each >= world_size] if rank == 0 else []
    for folder in TABLES:
        for part, owner, _ in parts_in(path / folder, []):
            if owner == rank or (rank == 0 and owner >= world_size):
                part.unlink()
    for each in (rank, *gone):
        home = home_of(path, each)
        for folder in (GRAPHS, TENSORS, TRACKED, LAST):
            for file in files_in(home / folder):
                if _PART.fullmatch(file.name) or _OF_STEP.fullmatch(file.name):
                    file.unlink()
            if home != path:
                _remove_if_empty(home / folder)
        for name in (RUN, PEOPLE, MEMORY):
            (home / name).unlink(missing_ok=True)
        if home != path:
            _remove_if_empty(home)
    _remove_if_empty(path / RANKS)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


_OURS: Final = frozenset({*TABLES, RUN, PEOPLE, MEMORY, GRAPHS, TENSORS, TRACKED, LAST, RANKS})
