"""Rows of a table as CSV, JSON or Parquet, written part by part."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc


def write_csv(parts: Iterable[pa.Table], schema: pa.Schema, file: IO[bytes]) -> None:
    """Write rows as CSV: what is missing, NaN too, is empty; numbers have all their digits.

    Args:
        parts: the rows.
        schema: their columns.
        file: where to, in UTF-8.
    """
    import pyarrow.csv as pc_csv

    plain = pa.schema([(field.name, _plain_type(field.type)) for field in schema])
    options = pc_csv.WriteOptions(quoting_style="needed", quoting_header="none")
    with pc_csv.CSVWriter(file, plain, write_options=options) as writer:
        for part in parts:
            writer.write_table(_plain(part))


def write_json(parts: Iterable[pa.Table], schema: pa.Schema, file: IO[bytes]) -> None:
    """Write rows as a JSON array of objects, one a line.

    What is missing, NaN too, is ``null``; infinities, for which JSON has no number, are the texts
    ``inf`` and ``-inf``.

    Args:
        parts: the rows.
        schema: their columns.
        file: where to, in UTF-8.
    """
    before = "[\n"
    for part in parts:
        for row in _plain(part).to_pylist():
            text = json.dumps({name: _for_json(value) for name, value in row.items()})
            file.write(f"{before}{text}".encode())
            before = ",\n"
    file.write(b"\n]\n" if before != "[\n" else b"[]\n")


def write_parquet(parts: Iterable[pa.Table], schema: pa.Schema, file: IO[bytes]) -> None:
    """Write rows as Parquet, in the types that the run directory has.

    Args:
        parts: the rows.
        schema: their columns.
        file: where to.
    """
    import pyarrow.parquet as pq

    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for part in parts:
            writer.write_table(part.cast(schema))


WRITERS = {"csv": write_csv, "json": write_json, "parquet": write_parquet}


def _plain_type(kind: pa.DataType) -> pa.DataType:
    return pa.string() if pa.types.is_dictionary(kind) else kind


def _plain(rows: pa.Table) -> pa.Table:
    """Texts as texts, and NaN, which stands for what is not known, as missing."""
    for place, field in enumerate(rows.schema):
        column = rows.column(place)
        if pa.types.is_dictionary(field.type):
            rows = rows.set_column(place, field.name, column.cast(pa.string()))
        elif pa.types.is_floating(field.type):
            known = pc.if_else(pc.is_nan(column), pa.scalar(None, field.type), column)
            rows = rows.set_column(place, field.name, known)
    return rows


def _for_json(value: Any) -> Any:
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return str(value)
    return value
