"""A session's recording, written to a run directory; or taken up from one, to be gone on with."""

from __future__ import annotations

import os
import platform
import socket
import sys
from collections import ChainMap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gradscope._version import __version__
from gradscope.errors import UsageError
from gradscope.run.directory import layout
from gradscope.run.directory.people import NameHistory
from gradscope.run.directory.writer import DirectoryWriter, now
from gradscope.run.recording import MADE_WHEN_ASKED, Recording
from gradscope.run.schema import TABLES
from gradscope.session.ranks import Place, place_now

if TYPE_CHECKING:
    from gradscope.run.directory.stored import StoredRecording

_MOST_LAST_BYTES = 256 * 2**20
"""What whole tensors around the last steps may take on disk; beyond that none are written."""

_written_here: set[Path] = set()
"""Directories that this process is writing."""


class Saving:
    """Writes a recording to a directory from the start of a watch to its end.

    Args:
        path: the directory.
        recording: what is written.
        elapsed: tells for how many seconds the program has been watched.
        last_copies: gives whole tensors around the last steps, by step.
        settle: has everything seen so far turned into rows.
        waits: whether nothing is written before something trains, since only then it is known
            which rank this is; and others may write there too.

    Attributes:
        path: the directory.
        place: of this process among those that train together.
        waits: whether it waits still.
        criteria: by what the run is judged, as plain data.
        earlier: what is told of the starts before this one, if the run is gone on with.
    """

    def __init__(
        self,
        path: Path,
        recording: Recording,
        elapsed: Callable[[], float],
        last_copies: Callable[[], dict[int, dict[int, Any]]],
        settle: Callable[[], None],
        *,
        waits: bool = False,
    ) -> None:
        self.path = path
        self._settle = settle
        self.place = place_now()
        self.waits = self._shares = waits
        self.criteria: dict[str, Any] = {}
        self.earlier: list[dict[str, Any]] = []
        self._recording = recording
        self._elapsed = elapsed
        self._last_copies = last_copies
        self._history: NameHistory | None = None
        self._first_part = 0
        self._writer: DirectoryWriter | None = None
        self._is_told = False

    @property
    def has_failed(self) -> bool:
        """Whether writing has ended before its time."""
        return self._is_told or (self._writer is not None and self._writer.failure is not None)

    @property
    def failure(self) -> Exception | None:
        """What ended the writing before its time, the first time it is asked for."""
        if self._is_told or self._writer is None or self._writer.failure is None:
            return None
        self.failure_is_told()
        return self._writer.failure

    def failure_is_told(self) -> None:
        """Take note that writing has failed, and that whoever watches knows."""
        self._is_told = True
        if self._writer is not None:
            self._writer.is_told = True

    def start(self) -> None:
        """Begin to write, or go on after a stop.

        Raises:
            OSError, RuntimeError: if the directory cannot be made or written, or no thread begun.
        """
        if self._is_told or self.waits:
            return
        if self._writer is None:
            self.place = place_now()
            recording, place = self._recording, self.place
            recording.rank_in_group, recording.world_size = place.rank, place.world_size
            number = place.rank
            try:
                if self._shares:
                    number = layout.claim(self.path, place.rank, max(1, place.world_size))
            except Exception:
                self._is_told = True
                raise
            facts = {
                **facts_of_process(place),
                "criteria": self.criteria,
                "earlier_starts": self.earlier,
            }
            self._writer = DirectoryWriter(
                self.path,
                self._recording,
                facts,
                self._elapsed,
                self._history,
                self._first_part,
                number,
                says_rank=place.world_size > 1 or number > 0,
                settle=self._settle,
            )
        _written_here.add(self.path)
        try:
            self._writer.start()
        except Exception:
            self._is_told = True
            raise

    def something_trains(self) -> None:
        """Begin to write, if that has waited for something to be written.

        Raises:
            OSError: as :meth:`start`.
        """
        if self.waits:
            self.waits = False
            self.start()

    def stop(self, ended: str) -> None:
        """Write what is left."""
        try:
            if self._writer is not None and self._writer.is_running:
                last: dict[str, Any] = {}
                try:
                    last = last_files(self._last_copies())
                finally:  # all else is written even if these are lost
                    self._writer.stop(ended, last)
        finally:
            _written_here.discard(self.path)

    def take_up(self, stored: StoredRecording) -> dict[int, int]:
        """Enter what was recorded before into the recording, which goes on from there.

        Args:
            stored: the run so far.

        Returns:
            How many steps each optimizer has made, by its number here.

        Raises:
            UsageError: if that run is of another training, or is being written now.
        """
        recording = self._recording
        self._refuse_if_alive(stored.facts)
        if stored.rank != self.place.rank:
            raise UsageError(
                f"save={str(self.path)!r}: the run that lies there has nothing of rank "
                f"{self.place.rank}; name another directory"
            )
        params, optimizers = _numbers_here(self.path, stored, recording)
        for old, new in enumerate(params):
            if new >= 0:
                _join(recording.parameters[new], stored.parameters[old])
        for table in TABLES:
            if table not in MADE_WHEN_ASKED:
                recording.rows(table).adopt(stored.rows(table), params, optimizers)
        recording.thinning, recording.tracked_before = stored.thinning, stored.tracked_before
        recording.seconds = stored.seconds
        recording.observe_seconds = dict(stored.observe_seconds)
        recording.observe_calls = dict(stored.observe_calls)
        recording.notes[:0] = [note for note in stored.facts.get("notes", []) if note]
        recording.graphs = ChainMap({}, stored.graphs)
        if params == list(range(len(params))):  # else their numbers mean others
            recording.tracked = ChainMap({}, stored.tracked)
            recording.kept.earlier = stored.kept
        recording.go_on(stored.n_steps)
        self._history = stored.history
        numbers = [
            number
            for table in TABLES
            for _, rank, number in layout.parts_in(self.path / table, [])
            if rank == stored.rank
        ]
        self._first_part = max(numbers, default=-1) + 1
        earlier = stored.facts.get("earlier_starts")
        self.earlier = [
            *(earlier if isinstance(earlier, list) else []),
            {
                **{key: stored.facts.get(key) for key in _OF_A_START},
                "steps": stored.n_steps,
            },
        ]
        steps = recording.rows("steps")
        made: dict[int, int] = {}
        for number in np.unique(steps.array("optimizer")).tolist():
            own = steps.array("optimizer") == number
            made[number] = int(steps.array("optimizer_step")[own].max()) + 1
        return made

    def _refuse_if_alive(self, facts: dict[str, Any]) -> None:
        pid = facts.get("pid")
        if facts.get("how_it_ended") is not None or facts.get("host") != socket.gethostname():
            return
        if self.path in _written_here or (type(pid) is int and pid != os.getpid() and _lives(pid)):
            raise UsageError(
                f"save={str(self.path)!r}: process {pid} is writing there now; name another "
                "directory"
            )


_OF_A_START = ("started", "ended", "how_it_ended", "flushed", "command", "gradscope", "torch")


def last_files(copies: dict[int, dict[int, Any]]) -> dict[str, Any]:
    """Return whole tensors around the last steps by file name; none if they are too large."""
    n_bytes = sum(
        array.nbytes
        for kept in copies.values()
        for arrays, _ in kept.values()
        for array in arrays.values()
    )
    if n_bytes > _MOST_LAST_BYTES:
        return {}
    return {layout.step_name(step, "safetensors"): kept for step, kept in copies.items()}


def save_now(
    path: Path,
    recording: Recording,
    elapsed: float,
    criteria: dict[str, Any],
    copies: dict[int, dict[int, Any]],
    number: int | None = None,
) -> None:
    """Write everything that memory holds to a directory.

    Args:
        path: the directory.
        recording: what is written.
        elapsed: for how many seconds the program has been watched.
        criteria: by what the run is judged, as plain data.
        copies: whole tensors around the last steps, by step.
        number: under which it is written; None for the rank of this process.

    Raises:
        OSError: if it cannot be written; nothing is left of it.
    """
    place = place_now()
    number = place.rank if number is None else number
    facts = {**facts_of_process(place), "criteria": criteria, "earlier_starts": []}
    is_one_of_several = place.world_size > 1 or number > 0
    writer = DirectoryWriter(
        path,
        recording,
        facts,
        lambda: elapsed,
        rank=number,
        says_rank=is_one_of_several,
        writes_all=True,
    )
    try:
        writer.write_all(last_files(copies))
    except BaseException:
        if not is_one_of_several:
            with suppress(OSError):  # half of a run would pass for a killed one
                layout.remove_run(path)
                for folder in path.iterdir():
                    folder.rmdir()
        raise


def facts_of_process(place: Place) -> dict[str, Any]:
    """Return what ``run.json`` says of the program and where it runs."""
    return {
        "gradscope": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": _devices(),
        "command": list(sys.orig_argv),
        "folder": os.getcwd(),
        "git_commit": git_commit(Path.cwd()),
        "pid": os.getpid(),
        "parent_pid": os.getppid(),
        "host": socket.gethostname(),
        "rank": place.rank,
        "world_size": place.world_size,
        "started": now(),
    }


def git_commit(folder: Path) -> str | None:
    """Return the commit that is checked out in a folder; None if that cannot be told.

    Read off git's own files: no program is started, none has to be there.
    """
    try:
        for each in (folder, *folder.parents):
            git = each / ".git"
            if not git.exists():
                continue
            if git.is_file():  # a worktree, whose own files lie elsewhere
                git = (each / git.read_text().partition("gitdir:")[2].strip()).resolve()
            head = (git / "HEAD").read_text().strip()
            if not head.startswith("ref:"):
                return head[:64]
            name = head.partition(":")[2].strip()
            common = git / "commondir"
            places = (
                [git, (git / common.read_text().strip()).resolve()] if common.exists() else [git]
            )
            for place in places:
                if (place / name).is_file():
                    return (place / name).read_text().strip()[:64]
            for line in (places[-1] / "packed-refs").read_text().splitlines():
                commit, _, ref = line.partition(" ")
                if ref == name:
                    return commit[:64]
            return None
    except (OSError, ValueError):
        pass
    return None


def _devices() -> str:
    """The device that tensors lie on, and its model where it is an accelerator in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()


def _numbers_here(
    path: Path, stored: StoredRecording, recording: Recording
) -> tuple[list[int], list[int]]:
    """Numbers here of the parameters and optimizers there, by number.

    Raises:
        UsageError: if they are not the same.
    """
    here = {entry.name: number for number, entry in enumerate(recording.parameters)}
    advice = "name another directory for this training, or delete that one"
    start = f"save={str(path)!r} holds the run of another training"
    for entry in stored.parameters:
        if not entry.in_model:
            continue
        if entry.name not in here:
            raise UsageError(f"{start}: it has a parameter {entry.name[:100]!r}; {advice}")
        shape = recording.parameters[here[entry.name]].shape
        if shape != entry.shape:
            raise UsageError(
                f"{start}: there {entry.name[:100]!r} has the shape {entry.shape}, here {shape}; "
                f"{advice}"
            )
    there = {entry.name for entry in stored.parameters}
    for entry in recording.parameters:
        if entry.in_model and entry.name not in there:
            raise UsageError(f"{start}: it has no parameter {entry.name[:100]!r}; {advice}")
    optimizers = {entry.name: number for number, entry in enumerate(recording.optimizers)}
    for optimizer in stored.optimizers:
        if optimizer.name not in optimizers:
            raise UsageError(f"{start}: it has an optimizer {optimizer.name!r}; {advice}")
    return (
        [here.get(entry.name, -1) for entry in stored.parameters],
        [optimizers[entry.name] for entry in stored.optimizers],
    )


def _join(entry: Any, before: Any) -> None:
    """Add to what is known of a parameter what was known of it before."""
    entry.norm_first = before.norm_first
    entry.reached = before.reached
    entry.requires_grad_changed = before.requires_grad_changed
    for name in ("n_symmetric_looks", "n_symmetric_columns_looks", "n_looks"):
        setattr(entry, name, getattr(before, name))
    entry.copy_of = entry.copy_of if before.copy_of is None else before.copy_of


def begins_beside(facts: dict[str, Any]) -> bool:
    """Whether a run is being written by a process that the same process as this has started."""
    pid = facts.get("pid")
    return (
        facts.get("how_it_ended") is None
        and facts.get("host") == socket.gethostname()
        and facts.get("parent_pid") == os.getppid()
        and type(pid) is int
        and pid != os.getpid()
        and _lives(pid)
    )


def is_gone(facts: dict[str, Any]) -> bool:
    """Whether the process that has written a run was one of this machine and lives no more."""
    pid = facts.get("pid")
    return facts.get("host") == socket.gethostname() and type(pid) is int and not _lives(pid)


def _lives(pid: int) -> bool:
    if os.name == "nt":
        return False  # there, to ask would end it
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
