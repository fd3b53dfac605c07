"""Writing a recording to its directory while the program trains, in a thread of its own.

The thread that trains does nothing but append rows. Every few seconds the writer's thread copies
what is new and settled out of the columns, which takes NumPy a moment, and encodes and writes the
copies; pyarrow lets the program run meanwhile.

The last part of each table is small and grows: it is written anew, under a hidden name that is then
renamed over the old one, until it is large enough and the next begins. So there are few files, each
row lies in exactly one, and what a kill leaves behind is what the last flush has written.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradscope.errors import text_of
from gradscope.run.captured_graph import CapturedGraph
from gradscope.run.columns import Coded, Columns
from gradscope.run.directory import layout
from gradscope.run.directory.people import NameHistory, people_of
from gradscope.run.directory.tensors import Kept, write_kept, write_tracked
from gradscope.run.recording import MADE_WHEN_ASKED, Recording
from gradscope.run.schema import TABLES
from gradscope.run.thinning import MOST_ROW_BYTES
from gradscope.run.weight_step import TrackedWeights

if TYPE_CHECKING:
    import pyarrow as pa

FLUSH_SECONDS = 5.0
"""So often what is new is written."""

PART_BYTES = 4 * 2**20
"""A part of a table that has come to so much in memory is finished, and the next one begun."""

_MOST_SECONDS_AT_END = 60.0
"""So long the end of a watch waits for the last flush; a disk may hang."""


@dataclass(slots=True)
class _News:
    """What is to be written at a flush."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    graphs: dict[int, CapturedGraph] = field(default_factory=dict)
    tracked: dict[int, TrackedWeights] = field(default_factory=dict)
    kept: dict[int, Kept] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """What the rows take."""
        return sum(
            values.codes.nbytes if isinstance(values, Coded) else values.nbytes
            for rows in self.rows.values()
            for values in rows.values()
        )


@dataclass(slots=True)
class _Tail:
    """The part of a table that still grows.

    Attributes:
        number: of the part.
        rows: what it holds, parameters and optimizers as numbers.
        is_written: whether its file is what it is to be.
        version: of the names with which it was written.
    """

    number: int
    rows: list[pa.Table] = field(default_factory=list)
    is_written: bool = False
    version: int = 0


class DirectoryWriter:
    """Writes one recording to one directory.

    Args:
        path: the directory; made if it is not there.
        recording: what is written.
        facts: what ``run.json`` says besides what the recording knows.
        elapsed: tells for how many seconds the program has been watched.
        history: the names of parameters so far, when a run is resumed.
        first_part: number of the first part that is written.
        rank: of this process among those that train together, by which its files are told apart.
        says_rank: whether the rows say of which rank they are.
        writes_all: whether all that memory holds is written, and not only what nobody has taken;
            for :meth:`write_all`.
        settle: has everything seen so far turned into rows, when Python ends in the middle of it.

    Attributes:
        failure: what ended the writing before its time; None if nothing did.
        is_told: whether anybody was told of that.
        n_flushes: how often something was written.
    """

    def __init__(
        self,
        path: Path,
        recording: Recording,
        facts: dict[str, Any],
        elapsed: Callable[[], float],
        history: NameHistory | None = None,
        first_part: int = 0,
        rank: int = 0,
        *,
        says_rank: bool = False,
        writes_all: bool = False,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self._settle = settle
        self.path = path
        self.home = layout.home_of(path, rank)
        self.failure: Exception | None = None
        self.is_told = False
        self.n_flushes = 0
        self._recording = recording
        self._facts = facts
        self._elapsed = elapsed
        self._history = history or NameHistory()
        self._rank = rank
        self._said_rank = rank if says_rank else None
        self._writes_all = writes_all
        self._tails = {
            name: _Tail(first_part, is_written=first_part > 0)
            for name in TABLES
            if name not in MADE_WHEN_ASKED
        }
        self._finished: dict[str, dict[int, int]] = {name: {} for name in self._tails}
        self._waiting: list[_News] = []
        self._written_graphs: set[int] = set()
        self._last_tracked = self._last_kept = -1
        if not writes_all:  # what is there already comes from this directory
            self._written_graphs |= set(recording.graphs)
            self._last_tracked = max(recording.tracked, default=-1)
            self._last_kept = max(recording.kept.steps, default=-1)
        self._n_steps = recording.n_steps
        self._people: Any = None
        self._last: dict[str, Kept] = {}
        self._memory: Any = None
        self._n_notes = -1
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._flushing = threading.Lock()
        self._ended: str | None = None
        self._at_exit: Callable[[], None] | None = None

    # -- in the thread that trains ----------------------------------------------------------

    def start(self) -> None:
        """Make the directory, and begin to write in a thread.

        Raises:
            OSError: if the directory cannot be made or written.
            RuntimeError: if no thread can be begun.
        """
        self._make_folders()
        self._ended = None
        self._wake.clear()
        reference = weakref.ref(self)

        def at_exit() -> None:
            writer = reference()
            if writer is not None:
                writer.stop_at_exit()

        self._at_exit = at_exit
        atexit.register(at_exit)
        thread = threading.Thread(target=self._run, name="gradscope-writer", daemon=True)
        thread.start()
        self._thread = thread
        self._recording.before_thinning = self._take_before_thinning

    @property
    def is_running(self) -> bool:
        """Whether it writes, and in this process: not in one that this one was forked from."""
        return self._thread is not None and os.getpid() == self._pid

    def write_all(self, last: dict[str, Kept]) -> None:
        """Write everything now, without a thread.

        Raises:
            OSError: if it cannot be written.
        """
        self._make_folders()
        self._last = last
        self.flush(is_last=True)
        self._finish("saved")

    def _make_folders(self) -> None:
        for name in (*self._tails, *MADE_WHEN_ASKED):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        (self.home / layout.GRAPHS).mkdir(parents=True, exist_ok=True)
        self._write_facts(None)

    def stop(self, ended: str, last: dict[str, Kept] | None = None) -> None:
        """Write what is left, and end the thread.

        Args:
            ended: how the run ended, in a few words.
            last: whole tensors around the last steps, by the name of their file.
        """
        thread = self._thread
        if thread is None or not self.is_running:
            return
        self._thread = None
        self._last = last or {}
        self._ended = ended
        self._recording.before_thinning = lambda: None
        self._wake.set()
        thread.join(_MOST_SECONDS_AT_END)
        if thread.is_alive() and self.failure is None:
            self.failure = TimeoutError(f"{self.path} did not take what was left in a minute")
        if self._at_exit is not None:
            atexit.unregister(self._at_exit)

    def stop_at_exit(self) -> None:
        """Write what is left when Python ends; nobody is there to be told but who reads stderr."""
        try:
            self._settle()
            self.stop("the program ended while it was watched")
            error = self.failure
        except Exception as found:
            error = found
        if error is not None and not self.is_told:
            with suppress(Exception):  # it may be closed by now
                print(
                    f"gradscope: run_directory failed at the end of the program "
                    f"({text_of(error)}) [saving-failed]",
                    file=sys.stderr,
                )

    def _take_before_thinning(self) -> None:
        try:
            if self.failure is None:
                with self._recording.lock:
                    self._waiting.append(self._take())
                    if sum(news.n_bytes for news in self._waiting) > MOST_ROW_BYTES:
                        self._waiting.clear()
                        self.failure = TimeoutError(f"{self.path} takes rows slower than they come")
                self._wake.set()
        except Exception as error:  # in the thread that trains, whose watch goes on
            self.failure = error

    # -- in the writer's thread -------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                self._wake.wait(FLUSH_SECONDS)
                self._wake.clear()
                ended = self._ended
                if self.failure is not None:
                    return
                self.flush(is_last=ended is not None)
                if ended is not None:
                    self._finish(ended)
                    return
        except Exception as error:
            self.failure = error

    def flush(self, *, is_last: bool = False) -> None:
        """Write everything that is new and will not change any more.

        Args:
            is_last: whether nothing will change any more.
        """
        with self._flushing:
            self._flush(is_last=is_last)

    def _flush(self, *, is_last: bool) -> None:
        recording = self._recording
        with recording.lock:
            news = [*self._waiting, self._take(everything=is_last)]
            self._waiting.clear()
            memory = recording.memory()
            people = people_of(recording)
            has_news = self.n_flushes == 0 or people != self._people
            made_now = {name: recording.made_now(name) for name in MADE_WHEN_ASKED if has_news}
        params = [entry["name"] for entry in people["parameters"]]
        optimizers = [entry["name"] for entry in people["optimizers"]]
        self._history.update(params)
        if has_news:
            self._people = people
            layout.write_json(
                self.home / layout.PEOPLE, {**people, "names": self._history.versions}
            )
            self._write_made(made_now, params)
        for each in news:
            for name, rows in each.rows.items():
                has_news |= self._add(name, rows)
            has_news |= bool(each.graphs or each.tracked or each.kept)
            self._write_kept(each)
        for name in sorted(self._tails, key=lambda name: name == "steps"):
            # The step itself last: what a kill leaves behind of one has no row there.
            self._write_tail(name, params, optimizers)
        if memory != self._memory:
            self._memory = memory
            layout.write_json(self.home / layout.MEMORY, memory)
        if has_news or len(recording.notes) != self._n_notes:
            self._n_notes = len(recording.notes)
            self._write_facts(None)
        self.n_flushes += 1

    def _take(self, *, everything: bool = False) -> _News:
        recording, settled = self._recording, self._recording.settled
        news = _News()
        for name in self._tails:
            columns: Columns = recording.rows(name)
            is_open = name in _CHANGING and not everything
            stop = settled.get(name, 0) if is_open else columns.n_rows
            news.rows[name] = columns.copies(0, stop) if self._writes_all else columns.take(stop)
            if name == "steps" and stop:
                # Not what the program has come to meanwhile: this is what a reader may count on.
                self._n_steps = int(columns.array("step")[stop - 1]) + 1
        last = self._n_steps - 1
        for step, graph in list(recording.graphs.items()):
            if step not in self._written_graphs:
                news.graphs[step] = graph
        self._written_graphs |= set(news.graphs)
        news.tracked = {s: t for s, t in recording.tracked.items() if self._last_tracked < s}
        self._last_tracked = max(news.tracked, default=self._last_tracked)
        for step in recording.kept.steps:
            if self._last_kept < step <= last:
                news.kept[step] = dict(recording.kept.of_step(step))
        self._last_kept = max(news.kept, default=self._last_kept)
        return news

    def _add(self, name: str, taken: dict[str, Any]) -> bool:
        from gradscope.run.directory.parts import numbered

        rows = numbered(TABLES[name], taken)
        if rows.num_rows:
            self._tails[name].rows.append(rows)
            self._tails[name].is_written = False
        return bool(rows.num_rows)

    def _write_tail(self, name: str, params: list[str], optimizers: list[str]) -> None:
        import pyarrow as pa

        from gradscope.run.directory.parts import named, numbered, write_part

        tail, table = self._tails[name], TABLES[name]
        if tail.is_written and (tail.version == self._history.latest or not tail.rows):
            return
        if tail.rows:
            rows = pa.concat_tables(tail.rows)
            tail.rows = [rows]
        else:
            rows = numbered(table, Columns(table).take(0))  # from now on any engine can read it
        spelled = named(table, rows, params, optimizers, self._history.latest)
        path = self.path / name / layout.part_name(self._rank, tail.number)
        write_part(path, table, spelled, self._said_rank)
        tail.is_written, tail.version = True, self._history.latest
        if rows.nbytes >= PART_BYTES:
            self._finished[name][tail.number] = tail.version
            self._tails[name] = _Tail(tail.number + 1, is_written=True, version=tail.version)

    def _write_made(self, made_now: dict[str, Columns], params: list[str]) -> None:
        from gradscope.run.directory.parts import named, numbered, write_part

        for name, columns in made_now.items():
            table = columns.table
            rows = numbered(table, columns.take(columns.n_rows))
            rows = named(table, rows, params, [], self._history.latest)
            path = self.path / name / layout.part_name(self._rank, 0)
            write_part(path, table, rows, self._said_rank)

    def _write_kept(self, news: _News) -> None:
        from gradscope.run.interchange import to_json

        for step, graph in news.graphs.items():
            path = self.home / layout.GRAPHS / layout.step_name(step, "json")
            layout.write_bytes(path, to_json(graph, step).encode())
        if news.tracked:
            folder = self.home / layout.TRACKED
            folder.mkdir(exist_ok=True)
            write_tracked(folder / layout.step_name(min(news.tracked), "safetensors"), news.tracked)
        if news.kept:
            folder = self.home / layout.TENSORS
            folder.mkdir(exist_ok=True)
            for step, kept in news.kept.items():
                write_kept(folder / layout.step_name(step, "safetensors"), kept)
            if self._recording.kept.n_last is not None:
                known = layout.steps_in(folder, [], "safetensors")
                for step in list(known)[: -self._recording.kept.n_last]:
                    known[step].unlink()

    def _finish(self, ended: str) -> None:
        """Write what only the end allows."""
        for name, versions in self._finished.items():
            for number, version in versions.items():
                self._rename_in(name, number, version)
        for name, kept in self._last.items():
            folder = self.home / layout.LAST
            folder.mkdir(exist_ok=True)
            write_kept(folder / name, kept)
        self._write_facts(ended)

    def _rename_in(self, name: str, number: int, version: int) -> None:
        """Give a finished part the names of today."""
        from gradscope.run.directory.parts import (
            marked,
            open_part,
            read_part,
            renamed,
            write_part,
        )

        new_names = self._history.changed_since(version)
        if not new_names:
            return
        table = TABLES[name]
        path = self.path / name / layout.part_name(self._rank, number)
        rows = renamed(read_part(open_part(path, table), table), new_names)
        marked_rows = marked(table, rows, self._history.latest)
        write_part(path, table, marked_rows, self._said_rank)
        self._finished[name][number] = self._history.latest

    def _write_facts(self, ended: str | None) -> None:
        recording = self._recording
        document = {
            "format": layout.FORMAT,
            "version": layout.VERSION,
            **self._facts,
            "flushed": now(),
            "ended": None if ended is None else now(),
            "how_it_ended": ended,
            "steps": self._n_steps,
            "total_steps": recording.total_steps,
            "seconds": self._elapsed(),
            "observe_seconds": dict(recording.observe_seconds),
            "observe_calls": dict(recording.observe_calls),
            "notes": list(recording.notes),
        }
        layout.write_json(self.home / layout.RUN, document)


_CHANGING = frozenset({"steps", "groups", "grads", "state", "moments", "updates", "backwards"})
"""Tables whose last rows are final only when the step has ended."""


def now() -> str:
    """Return the time in UTC, as in ``2026-01-31T12:00:00Z``."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
