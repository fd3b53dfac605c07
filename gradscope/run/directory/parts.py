"""From rows to Parquet and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradscope.run.columns import MISSING, Coded, Columns, storable
from gradscope.run.directory.layout import written_whole
from gradscope.run.schema import RANK, Kind, Table, with_rank

ROWS_PER_GROUP = 1 << 20
"""As many rows at most lie in one row group: what engines read and skip as a whole."""

_NAMES = b"gradscope.names"
"""Which version of the parameters' names a part is written in; see ``people.py``."""

_TABLE = b"gradscope.table"
"""Of which table a part is."""

_TEXTS = (Kind.TEXT, Kind.PARAM, Kind.OPTIMIZER)
_REALS = (Kind.REAL, Kind.SINGLE)
_TYPES: dict[Kind, Any] = {
    Kind.COUNT: pa.int64(),
    Kind.OPTIONAL_COUNT: pa.int64(),
    Kind.REAL: pa.float64(),
    Kind.SINGLE: pa.float32(),
    Kind.FLAG: pa.bool_(),
    **dict.fromkeys(_TEXTS, pa.dictionary(pa.int32(), pa.string())),
}


def arrow_schema(table: Table) -> pa.Schema:
    """Return the columns of a table as Arrow has them."""
    return pa.schema([(column.name, _TYPES[column.kind]) for column in table.columns])


def numbered(table: Table, taken: Mapping[str, Any]) -> pa.Table:
    """Return rows as an Arrow table in which parameters and optimizers are still numbers.

    Args:
        table: what they are rows of.
        taken: the rows, as :meth:`Columns.take` gives them.
    """
    arrays = []
    for column in table.columns:
        values = taken[column.name]
        if isinstance(values, Coded):
            texts = pa.array([storable(text) for text in values.texts], pa.string())
            arrays.append(pa.DictionaryArray.from_arrays(values.codes, texts))
        elif column.kind is Kind.OPTIONAL_COUNT:
            arrays.append(pa.array(values, mask=values == MISSING))
        else:
            arrays.append(pa.array(values))
    return pa.table(arrays, names=[column.name for column in table.columns])


def named(
    table: Table, rows: pa.Table, params: Sequence[str], optimizers: Sequence[str], version: int
) -> pa.Table:
    """Return numbered rows with the names of parameters and optimizers in them.

    Args:
        table: what they are rows of.
        rows: as :func:`numbered` gives them.
        params: names by number.
        optimizers: likewise.
        version: of the parameters' names.
    """
    for place, column in enumerate(table.columns):
        if column.kind in (Kind.PARAM, Kind.OPTIMIZER):
            names = params if column.kind is Kind.PARAM else optimizers
            spelled = pa.array([*map(storable, names), ""], pa.string())
            numbers = rows.column(place).to_numpy()
            numbers = np.where(numbers < 0, len(names), numbers)
            if len(names) > len(numbers):
                used, numbers = np.unique(numbers, return_inverse=True)
                spelled = spelled.take(pa.array(used))
            coded = pa.DictionaryArray.from_arrays(numbers.astype(np.int32), spelled)
            rows = rows.set_column(place, column.name, coded)
    return marked(table, rows, version)


def marked(table: Table, rows: pa.Table, version: int) -> pa.Table:
    """Return rows that say of which table they are, and in which version of the names."""
    return rows.replace_schema_metadata(
        {_NAMES: str(version).encode(), _TABLE: table.name.encode()}
    )


def write_part(path: Path, table: Table, rows: pa.Table, rank: int | None = None) -> None:
    """Write rows with names as a part that is there as a whole or not at all.

    Args:
        path: of the part.
        table: what they are rows of.
        rows: the rows.
        rank: what their column ``rank`` is to say; None for rows without one.
    """
    rows = rows.unify_dictionaries()
    if rank is not None:
        rows, table = ranked(rows, rank), with_rank(table)
    kinds = {c.name: c.kind for c in table.columns if c.name in rows.column_names}
    with written_whole(path) as hidden:
        pq.write_table(
            rows,
            hidden,
            row_group_size=ROWS_PER_GROUP,
            compression="zstd",
            compression_level=1,
            use_dictionary=[n for n, kind in kinds.items() if kind not in (*_REALS, Kind.FLAG)],
            use_byte_stream_split=[n for n, kind in kinds.items() if kind in _REALS],
            write_page_checksum=True,
        )


def open_part(path: Path, table: Table) -> pq.ParquetFile:
    """Return a part, its columns checked.

    Columns that later versions have added may be missing.

    Raises:
        OSError, pyarrow.ArrowException, ValueError: if it is torn or something else.
    """
    part = pq.ParquetFile(
        path,
        read_dictionary=[c.name for c in table.columns if c.kind in _TEXTS],
        page_checksum_verification=True,
        memory_map=False,
    )
    schema = part.schema_arrow
    name = (schema.metadata or {}).get(_TABLE, b"").decode(errors="replace")
    if name != table.name:
        raise ValueError(f"it is no part of {table.name}" + (f", but of {name[:50]}" * bool(name)))
    for column in table.columns:
        place = schema.get_field_index(column.name)
        wanted = _TYPES[column.kind]
        if place >= 0 and schema.field(place).type != wanted:
            raise ValueError(
                f"its column {column.name} is {schema.field(place).type}, not {wanted}"
            )
    return part


def names_version(part: pq.ParquetFile) -> int:
    """Return in which version of the parameters' names a part is written."""
    metadata = part.schema_arrow.metadata or {}
    text = metadata.get(_NAMES, b"0")
    return int(text) if text.isdigit() else 0


def read_part(part: pq.ParquetFile, table: Table) -> pa.Table:
    """Return the rows of a part, the columns that it has in the order of the table."""
    return part.read(columns=[column.name for column in table.columns]).combine_chunks()


def ranked(rows: pa.Table, rank: int) -> pa.Table:
    """Return rows with the rank that they are of in front."""
    return rows.add_column(0, RANK.name, pa.array(np.full(rows.num_rows, rank, np.int64)))


def has_rank(part: pq.ParquetFile) -> bool:
    """Whether a part says of which rank its rows are."""
    return bool(part.schema_arrow.get_field_index(RANK.name) >= 0)


def as_in(schema: pa.Schema, rows: pa.Table) -> pa.Table:
    """Return rows with all columns of a schema; those that they have not hold nothing."""
    for field in schema:
        if field.name not in rows.column_names:
            rows = rows.append_column(field, pa.nulls(rows.num_rows, field.type))
    return rows.select(schema.names).cast(schema)


def renamed(rows: pa.Table, new_names: Mapping[str, str]) -> pa.Table:
    """Return rows with other names of parameters."""
    place = rows.schema.get_field_index("param")
    if place < 0:
        return rows
    chunk = _whole(rows.column(place))
    names = [new_names.get(name, name) for name in chunk.dictionary.to_pylist()]
    coded = pa.DictionaryArray.from_arrays(chunk.indices, pa.array(names, pa.string()))
    return rows.set_column(place, "param", coded)


def append_rows(
    columns: Columns,
    rows: pa.Table,
    params: Mapping[str, int],
    optimizers: Mapping[str, int],
    wanted: Any = None,
) -> None:
    """Append rows that were read to those in memory.

    Args:
        columns: where they go.
        rows: some columns of the table; the others get their empty values.
        params: numbers by name; an unknown one has none.
        optimizers: likewise.
        wanted: bool[n], which rows; None for all.

    Raises:
        ValueError: if a value is missing that cannot be.
    """
    values: dict[str, Any] = {}
    for column in columns.table.columns:
        if column.name not in rows.column_names:
            continue
        array = _whole(rows.column(column.name))
        if column.kind is Kind.OPTIONAL_COUNT:
            array = array.fill_null(MISSING)
        elif array.null_count:
            raise ValueError(f"its column {column.name} lacks values")
        if column.kind in _TEXTS:
            codes = array.indices.to_numpy(zero_copy_only=False)
            codes = codes if wanted is None else codes[wanted]
            texts = array.dictionary.to_pylist()
            if column.kind is Kind.TEXT:
                used, codes = np.unique(codes, return_inverse=True)
                values[column.name] = Coded(codes, tuple([texts[i] for i in used]))
            else:
                numbers = params if column.kind is Kind.PARAM else optimizers
                table = np.array([numbers.get(text, -1) for text in texts] or [-1], np.int32)
                values[column.name] = table[codes]
        else:
            stored = array.to_numpy(zero_copy_only=False)
            values[column.name] = stored if wanted is None else stored[wanted]
    n = rows.num_rows if wanted is None else int(wanted.sum())
    if n:
        columns.extend(n, values)


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """A column in one piece, its dictionaries made one."""
    if not column.num_chunks:
        return pa.array([], column.type)
    column = column.unify_dictionaries()
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
