"""``open()`` and what it returns: a run that was recorded, on any machine, without torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradscope.errors import GradscopeError, UsageError
from gradscope.recorded_run import RecordedRun
from gradscope.run.directory.stored import StoredRecording
from gradscope.run.schema import TABLES, with_rank

if TYPE_CHECKING:
    import os

    import pandas as pd
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.dataset as ds

    from gradscope.run.schema import Table
    from gradscope.run.weight_step import WeightStep


class Run(RecordedRun):
    """A run that was recorded to a directory: its tables, its findings, its graphs.

    Made by :func:`open`. Everything that a :class:`Scope` tells after its loop, it tells too, and
    the same; torch need not be installed. Tables are read when they are first asked for.

    A long run has more rows than memory takes. Then the attributes (``run.grads``), like those of
    the live scope, hold the first, the last and the suspicious steps and an even choice of all
    others, and findings are judged by these; :meth:`table` and :meth:`dataset` reach every row.
    """

    _recording: StoredRecording

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._recording = StoredRecording(Path(path))
        self._criteria, unknown = _criteria_of(self._recording.facts)
        self._recording.notes += unknown

    @property
    def path(self) -> Path:
        """The directory."""
        return self._recording.path

    @property
    def about(self) -> dict[str, Any]:
        """What ``run.json`` says: versions, device, command, when it began and how it ended."""
        return dict(self._recording.facts)

    @property
    def notes(self) -> tuple[str, ...]:
        """What could not be observed while it ran, and what cannot be read now, in plain words."""
        return tuple(self._recording.notes)

    def dataset(self, table: str) -> ds.Dataset:
        """Return all rows of a table as a ``pyarrow.dataset.Dataset``; nothing is read yet.

        Args:
            table: its name, as in ``"grads"``.

        Raises:
            UsageError: if there is no such table.
        """
        return self._recording.dataset(_checked(table))

    def table(
        self,
        table: str,
        columns: Sequence[str] | None = None,
        where: str | pc.Expression | Sequence[Any] | None = None,
    ) -> pd.DataFrame:
        """Return rows of a table, reading no more of the files than is asked for.

        Args:
            table: its name, as in ``"grads"``.
            columns: these only; all by default.
            where: which rows: ``"param like 'h.0.%' and step >= 100"``, as in SQL;
                ``[("param", "==", "head.weight"), ("step", ">=", 100)]``, as ``filters`` in
                ``pandas.read_parquet``; or an expression of ``pyarrow.compute``.

        Returns:
            All rows that match, also those that memory does not hold. Texts are categories, which
            take a tenth of the memory and are grouped in a tenth of the time.

        Raises:
            UsageError: if there is no such table or column, or ``where`` cannot be understood.
        """
        names, filtered = self._asked(table, columns, where)
        return as_frame(self._recording.matching(table, names, filtered), table)

    def parts(
        self,
        table: str,
        columns: Sequence[str] | None = None,
        where: str | pc.Expression | Sequence[Any] | None = None,
    ) -> Iterator[pa.Table]:
        """Give what :meth:`table` would return piece by piece, for what does not fit into memory.

        Args:
            table: its name.
            columns: these only; all by default.
            where: which rows.

        Returns:
            Tables of Arrow's of some megabytes each, in the order in which the rows came.

        Raises:
            UsageError: as :meth:`table`.
        """
        names, filtered = self._asked(table, columns, where)
        return self._recording.parts_matching(table, names, filtered)

    def _asked(
        self, table: str, columns: Sequence[str] | None, where: Any
    ) -> tuple[list[str] | None, Any]:
        """The columns, and the rows as an expression, both checked."""
        import pyarrow as pa
        import pyarrow.dataset as ds
        import pyarrow.parquet as pq

        from gradscope.run.directory.condition import condition
        from gradscope.run.directory.parts import arrow_schema

        declared = self.declared(table)
        known = [column.name for column in declared.columns]
        for name in columns or ():
            if name not in known:
                raise UsageError(f"{table} has no column {name!r}; there are: {', '.join(known)}")
        names = None if columns is None else list(columns)
        if isinstance(where, str):
            return names, condition(where, declared)
        schema = arrow_schema(declared)
        try:
            if where is not None and not hasattr(where, "to_substrait"):
                where = pq.filters_to_expression(list(where))
            ds.dataset(schema.empty_table()).to_table(columns=names, filter=where)
        except (pa.ArrowException, TypeError, ValueError, IndexError) as error:
            raise UsageError(f"where={where!r} of {table}: {error}"[:500]) from error
        return names, where

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that have written the run, in order; one for a run of one process.

        Where there are several, every table has a column ``rank``, and findings are those of all.
        """
        return tuple(self._recording.ranks)

    def global_norms(self, table: str = "grads") -> pd.DataFrame:
        """Return norms of whole parameters where ranks hold parts of them (FSDP2, DTensor).

        In the tables each rank's rows are about its part; here the squares of all parts are added
        up. A parameter that every rank holds as a whole keeps its norm.

        Args:
            table: ``"grads"`` or ``"updates"``.

        Returns:
            A row per parameter and step at which all ranks that hold it have recorded it: ``step``,
            ``param`` and the norms of that table.

        Raises:
            UsageError: for another table.
        """
        from gradscope.run.global_norms import NORMS, global_norms

        if table not in NORMS:
            raise UsageError(f"there are no norms in {table!r}: pass 'grads' or 'updates'")
        return global_norms(self._recording, table)

    def declared(self, table: str) -> Table:
        """Return a table's columns as they are in this run.

        Args:
            table: its name.

        Raises:
            UsageError: if there is no such table.
        """
        return self._recording.declared(_checked(table))

    def _table(self, name: str) -> pd.DataFrame:
        return self._recording.all_ranks(name)

    def _versions(self) -> dict[str, str]:
        names = {"python": "Python", "torch": "torch", "device": "device", "git_commit": "commit"}
        facts = self._recording.facts
        return {said: str(facts[name]) for name, said in names.items() if facts.get(name)}

    def _last_copied(
        self, step: int, param: int, position: int, index: tuple[int, ...]
    ) -> WeightStep | None:
        return self._recording.last.weight(step, param, position, index)


def open(path: str | os.PathLike[str]) -> Run:  # noqa: A001
    """Open a run directory, written by ``watch(save=...)``, ``scope.save`` or ``gradscope run -o``.

    Also one that is being written, or whose program was killed: it holds what the last flush wrote.
    What is torn or foreign in it is skipped, and named in ``run.notes``.

    Args:
        path: the directory.

    Raises:
        RunDirectoryError: if it holds no run, or one in a format newer than this gradscope reads.
    """
    return Run(path)


def _checked(table: str) -> str:
    if table not in TABLES:
        close = difflib.get_close_matches(table, TABLES, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise UsageError(f"there is no table {table!r}; {meant}there are: {', '.join(TABLES)}")
    return table


def _criteria_of(facts: dict[str, Any]) -> tuple[Any, list[str]]:
    """By what the run was judged while it ran, and what of it cannot be had any more."""
    from gradscope.rules.criteria import Criteria, criteria

    given = facts.get("criteria") or {}
    try:
        notes = [
            f"the program's own rule {name} is not applied: pass its class to watch() only"
            for name in given.get("own_rules", ())
        ]
        return (
            criteria(
                given.get("select", ()),
                given.get("ignore", ()),
                given.get("ignore_params"),
                given.get("thresholds"),
            ),
            notes,
        )
    except (GradscopeError, AttributeError, TypeError) as error:
        return Criteria(), [
            f"run.json: what to look for cannot be read, all is looked for ({error})"
        ]


def as_frame(rows: pa.Table, table: str) -> pd.DataFrame:
    """Return rows as the tables of a scope have them, but for texts, which are categories."""
    import numpy as np
    import pandas as pd
    import pyarrow as pa

    from gradscope.run.schema import Kind

    kinds = {column.name: column.kind for column in with_rank(TABLES[table]).columns}
    found: dict[str, Any] = {}
    for name in rows.column_names:
        column, kind = rows.column(name), kinds[name]
        if pa.types.is_dictionary(column.type):
            chunks = column.unify_dictionaries().chunks
            codes = [chunk.indices.to_numpy(zero_copy_only=False) for chunk in chunks]
            texts = chunks[0].dictionary.to_pylist() if chunks else []
            found[name] = pd.Categorical.from_codes(
                np.concatenate(codes) if codes else [], pd.Index(texts, dtype=object)
            )
        elif kind is Kind.OPTIONAL_COUNT:
            found[name] = column.to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
        else:
            values = column.to_numpy()
            found[name] = values.astype("float64") if kind is Kind.SINGLE else values
    return pd.DataFrame(found)
