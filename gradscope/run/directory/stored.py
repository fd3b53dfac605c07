"""A recording as a run directory has it: each table is read when it is first asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradscope.errors import RunDirectoryError
from gradscope.run.columns import Columns
from gradscope.run.directory import layout
from gradscope.run.directory.people import NameHistory, add_people
from gradscope.run.directory.tensors import (
    StoredGraphs,
    StoredLast,
    StoredTensors,
    StoredTracked,
    read_or_note,
)
from gradscope.run.recording import MADE_WHEN_ASKED, Recording
from gradscope.run.schema import RANK, TABLES, Table, with_rank
from gradscope.run.thinning import HEAVY, OF_STEPS, Thinning, choose, is_held

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    import pyarrow.dataset as ds


class StoredRecording(Recording):
    """What a run directory holds, of one of the processes that have written it.

    Args:
        path: the directory.
        rank: of that process; None for the first that there is, which then knows of the others.

    Attributes:
        facts: what ``run.json`` says.
        history: the names that parameters have had.
        rank: of the process.

    Raises:
        RunDirectoryError: if there is no run, or one in a newer format.
    """

    def __init__(self, path: Path, rank: int | None = None) -> None:
        super().__init__()
        self.path = path
        known = [rank] if rank is not None else layout.ranks_in(path) or [0]
        self.rank = known[0]
        self.facts = layout.read_run(path, self.rank)
        home = layout.home_of(path, self.rank)
        self._home = home
        self.history = NameHistory()
        self._is_read: set[str] = set()
        self._damaged: set[str] = set()
        self._tracked_held: frozenset[int] = frozenset()
        self._read_facts()
        self._read_people()
        self._read_memory()
        self._parts: dict[str, list[Any]] = {}
        self.graphs = StoredGraphs(
            layout.steps_in(home / layout.GRAPHS, self.notes, "json"), self.notes
        )  # type: ignore[assignment]
        tracked = layout.steps_in(home / layout.TRACKED, self.notes, "safetensors")
        self.tracked = StoredTracked(tracked, self.notes, self._is_tracked)  # type: ignore[assignment]
        tensors = layout.steps_in(home / layout.TENSORS, self.notes, "safetensors")
        self.kept = StoredTensors(tensors, self.notes)
        self.last = StoredLast(
            layout.steps_in(home / layout.LAST, self.notes, "safetensors"), self.notes
        )
        self.is_unfinished = self.facts.get("how_it_ended") is None
        if self.is_unfinished:
            self.notes.append(
                "the run has not ended, or was killed: this is what its last flush wrote, at "
                f"{self.facts.get('flushed')}"
            )
        if rank is None:
            self._meet_others(known[1:])

    def _meet_others(self, ranks: list[int]) -> None:
        """Read what the other processes have told of themselves; their tables wait."""
        for rank in ranks:
            try:
                other = StoredRecording(self.path, rank)
            except RunDirectoryError as error:
                self.notes.append(f"rank {rank}: {error}")
                continue
            self.add_rank(rank, other)
            self.notes += [f"rank {rank}: {note}" for note in other.notes]
        size = max(run.world_size for run in self.ranks.values())
        lost = sorted(set(range(size)) - {run.rank_in_group for run in self.ranks.values()})
        if size > 1 and lost:
            plural = "s" if len(lost) > 1 else ""
            listed = ", ".join(map(str, lost[:8])) + ", …" * (len(lost) > 8)
            self.notes.append(f"nothing is there of rank{plural} {listed} of {size}")

    def _is_tracked(self, step: int) -> bool:
        return step >= self.tracked_before or step in self._tracked_held

    # -- tables -----------------------------------------------------------------------------

    def rows(self, table: str) -> Columns:
        """Return the rows of a table that memory is to hold, read with the first call."""
        if table not in self._is_read:
            self._is_read.add(table)
            self._read_table(table)
        return self._columns[table]

    def declared(self, table: str) -> Table:
        """Return a table's columns as they are here: with the rank where there are several."""
        return with_rank(TABLES[table]) if len(self.ranks) > 1 else TABLES[table]

    def all_ranks(self, table: str) -> pd.DataFrame:
        """Return what memory holds of a table, of all ranks, each behind the other."""
        import pandas as pd

        if len(self.ranks) == 1:
            return self.frame(table)
        frames = []
        for rank, run in self.ranks.items():
            frame = run.frame(table)
            frame.insert(0, RANK.name, rank)
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def unreadable(self, tables: Iterable[str]) -> tuple[str, ...]:
        """Return those of some tables of which a part lies in a file that cannot be read."""
        for table in tables:
            if table not in MADE_WHEN_ASKED:
                self.rows(table)
        return tuple([table for table in tables if table in self._damaged])

    def dataset(self, table: str) -> ds.Dataset:
        """Return all rows of a table, of all ranks, as a dataset that is read piece by piece."""
        import pyarrow.dataset as ds

        from gradscope.run.directory.parts import arrow_schema, as_in

        paths, others = [], []
        schema = arrow_schema(self.declared(table))
        for path, _, rows in self._pieces(table):
            if rows is None:
                paths.append(str(path))
            else:
                others.append(rows())
        found = ds.dataset(paths, schema=schema, format="parquet") if paths else None
        if not others:
            return found if found is not None else ds.dataset(schema.empty_table())
        renamed_rows = ds.dataset([as_in(schema, rows) for rows in others])
        return renamed_rows if found is None else ds.dataset([found, renamed_rows])

    def matching(self, table: str, columns: list[str] | None, where: Any) -> pa.Table:
        """Return some columns of the rows of a table that match; what is damaged is noted."""
        import pyarrow as pa
        import pyarrow.dataset as ds

        dataset = self.dataset(table)
        try:
            return dataset.to_table(columns=columns, filter=where)
        except (OSError, pa.ArrowException):
            none = ds.dataset(dataset.schema.empty_table()).to_table(columns=columns)
            return pa.concat_tables([none, *self.parts_matching(table, columns, where)])

    def parts_matching(
        self, table: str, columns: list[str] | None, where: Any
    ) -> Iterator[pa.Table]:
        """Give the rows that match part by part, in order; what is damaged is noted."""
        import pyarrow.dataset as ds

        from gradscope.run.directory.parts import arrow_schema, as_in

        schema = arrow_schema(self.declared(table))
        for path, run, changed in self._pieces(table):

            def read(path: Path, changed: Any = changed) -> pa.Table:
                if changed is not None:
                    found = ds.dataset(as_in(schema, changed()))
                else:
                    found = ds.dataset(str(path), schema=schema, format="parquet")
                return found.to_table(columns=columns, filter=where)

            rows = read_or_note(read, path, run.notes)
            if rows is not None:
                yield rows

    def _pieces(self, table: str) -> Iterator[tuple[Path, StoredRecording, Any]]:
        """Path, recording and None of each part of all ranks.

        In the place of None there is what reads the rows of a part that is not to be read as it is:
        its names are not those of today, or it was written before there were other ranks.
        """
        from gradscope.run.directory.parts import (
            has_rank,
            names_version,
            ranked,
            read_part,
            renamed,
        )

        several = len(self.ranks) > 1
        for rank, run in self.ranks.items():
            assert isinstance(run, StoredRecording)
            for path, part in run._parts_of(table):
                names = run.history.changed_since(names_version(part))
                names = names if table != "models" else {}
                if not names and has_rank(part) >= several:
                    yield path, run, None
                    continue

                def changed(part: Any = part, names: Any = names, rank: int = rank) -> pa.Table:
                    rows = renamed(read_part(part, TABLES[table]), names)
                    return ranked(rows, rank) if several else rows

                yield path, run, changed

    def _parts_of(self, table: str) -> list[Any]:
        """(path, part) of every part of a table that can be opened; the others are noted."""
        from gradscope.run.directory.parts import open_part

        if table not in self._parts:
            parts = []
            for path, rank, _ in layout.parts_in(self.path / table, self.notes):
                if rank != self.rank:
                    continue
                part = read_or_note(lambda path: open_part(path, TABLES[table]), path, self.notes)
                if part is not None:
                    parts.append((path, part))
                else:
                    self._damaged.add(table)
            self._parts[table] = parts
        return self._parts[table]

    def _read_table(self, table: str) -> None:
        from gradscope.run.directory.parts import append_rows, names_version, read_part, renamed

        columns = self._columns[table]
        params = {entry.name: n for n, entry in reversed(list(enumerate(self.parameters)))}
        optimizers = {entry.name: n for n, entry in enumerate(self.optimizers)}
        if table in HEAVY:
            self._choose_heavy()

        def read(path: Path, part: Any) -> bool:
            rows = renamed(
                read_part(part, columns.table),
                self.history.changed_since(names_version(part)),
            )
            wanted = None
            if table in OF_STEPS:
                steps = rows.column("step").to_numpy()
                wanted = steps < self._first_missing
                if self.thinning is not None:
                    wanted &= self.thinning.holds(steps, heavy=table in HEAVY)
            append_rows(columns, rows, params, optimizers, wanted)
            return True

        for path, part in self._parts_of(table):
            if not read_or_note(lambda path, part=part: read(path, part), path, self.notes):
                self._damaged.add(table)
        if table == "steps" and self._n_steps and not self._parts_of(table):
            self._damaged.add(table)
            text = f"{table}/: its files are gone; {self._n_steps:,} steps were recorded"
            if not any(f"{table}/" in note for note in self.notes):
                self.notes.append(text)
        if table == "backwards":
            columns.keep(columns.array("step") < self._first_missing)  # of none is far below
        if self.thinning is not None and table in ("backwards", "events"):
            columns.keep(is_held(table, columns, self.thinning))
        if table == "backwards":
            self._order_backwards(columns)

    def _order_backwards(self, columns: Columns) -> None:
        """Nothing to do but for damaged files: rows are found by the order of their numbers."""
        numbers = columns.array("backward")
        if len(numbers) and (np.diff(numbers) <= 0).any():
            highest = np.maximum.accumulate(numbers)
            columns.keep(np.concatenate([[True], numbers[1:] > highest[:-1]]))

    def _choose_heavy(self) -> None:
        """Choose what memory is to hold of a run of which that was not written down."""
        if self.thinning is not None:
            return
        n_rows = {
            table: sum(part.metadata.num_rows for _, part in self._parts_of(table))
            for table in HEAVY
        }
        n_bytes = sum(n * self._columns[table].row_bytes for table, n in n_rows.items())
        if n_bytes > self.most_row_bytes:
            steps = self.rows("steps")
            self.thinning = choose(steps, self.graphs, self.most_row_bytes / 2 / n_bytes)

    # -- the rest ---------------------------------------------------------------------------

    def _read_facts(self) -> None:
        facts = self.facts
        rank, size = facts.get("rank"), facts.get("world_size")
        if type(rank) is int and type(size) is int and 0 <= rank < size:
            self.rank_in_group, self.world_size = rank, size
        self._n_steps = facts["steps"] if type(facts.get("steps")) is int else 0
        total = facts.get("total_steps")
        self.total_steps = total if type(total) is int and total >= 1 else None
        # A kill in the midst of a flush leaves some tables with steps that others lack; run.json
        # is written last.
        has_ended = facts.get("how_it_ended") is not None
        self._first_missing = 2**62 if has_ended else self._n_steps
        seconds = facts.get("seconds")
        self.seconds = float(seconds) if isinstance(seconds, int | float) else 0.0
        for name, kind in (("observe_seconds", float), ("observe_calls", int)):
            given = facts.get(name)
            if isinstance(given, dict):
                numbers = {k: v for k, v in given.items() if isinstance(v, int | float)}
                setattr(self, name, {key: kind(value) for key, value in numbers.items()})
        both = [name for name in self.observe_seconds if name in self.observe_calls]
        self.observe_seconds = {name: self.observe_seconds[name] for name in both}
        self.observe_calls = {name: self.observe_calls[name] for name in both}
        notes = facts.get("notes")
        self.notes = [str(note) for note in notes] if isinstance(notes, list) else []

    def _read_people(self) -> None:
        def read(path: Path) -> NameHistory:
            return add_people(self, layout.read_json(path))

        path = self._home / layout.PEOPLE
        if path.exists():  # else it was killed before its first flush
            history = read_or_note(read, path, self.notes)
            self.history = history or self.history
            if history is None:  # without names nobody can tell what any row is about
                self._damaged |= set(TABLES)

    def _read_memory(self) -> None:
        def read(path: Path) -> None:
            memory = layout.read_json(path)
            if memory is None:
                return
            before, steps = memory["tracked_before"], memory["tracked"]
            if type(before) is not int:
                raise ValueError("tracked_before is no number")
            if memory["rows"] is not None:
                self.thinning = Thinning.of_plain(memory["rows"])
            self.tracked_before, self._tracked_held = before, frozenset(steps)

        path = self._home / layout.MEMORY
        if path.exists():
            read_or_note(read, path, self.notes)
