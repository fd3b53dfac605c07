"""``gradscope table DIR grads --where "param like 'h.0.%'"``: rows of a recorded run."""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from gradscope.cli.output import checked_output, command, harmless, tell, width_of, written_to
from gradscope.cli.recorded import add_output, add_run, opened, tell_notes
from gradscope.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

    from gradscope.opening import Run

_FORMATS = ("text", "csv", "json", "parquet")

_MOST_ROWS = 40
"""Of a longer table the first and last rows are shown as text, half of them each."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "table",
        help="print rows of a recorded run, or write them to a file",
        description="Print rows of a table of a recorded run. As text, numbers have four digits "
        "and of a long table the middle is left out; the other formats have everything.",
    )
    add_run(parser)
    parser.add_argument("table", help="which one: steps, grads, updates, moments, params …")
    parser.add_argument(
        "--where",
        metavar="CONDITION",
        help="which rows, as in SQL: \"param like 'h.0.%%' and (norm > 10 or status = 'stale')\"",
    )
    parser.add_argument("--columns", metavar="A,B", help="these columns only, in this order")
    ends = parser.add_mutually_exclusive_group()
    ends.add_argument("--head", type=_count, metavar="N", help="the first N of these rows")
    ends.add_argument("--tail", type=_count, metavar="N", help="the last N of these rows")
    parser.add_argument(
        "--format",
        choices=_FORMATS,
        help="default: what FILE ends with (.csv, .json, .parquet), else text",
    )
    add_output(parser, "write to FILE; by default to standard output")
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Print the rows, or write them.

    Raises:
        UsageError: if there is no such table, column or format, or the condition is wrong.
        OutputExistsError: if the file is there already.
    """
    columns = _names(arguments.columns)
    run = opened(arguments)
    parts = run.parts(arguments.table, columns, arguments.where)
    output = arguments.output
    if output is not None:
        checked_output(output, force=arguments.force)
    as_what = arguments.format or _format_of(output)
    if output is None and as_what == "parquet" and sys.stdout.isatty():
        raise UsageError("parquet is not for a terminal: name a file with -o, or use a pipe")
    n_notes = len(run.about.get("notes") or ())
    chosen = _Chosen(parts, arguments.head, arguments.tail)
    with _opened(output, binary=as_what != "text") as file:
        if as_what == "text":
            _write_text(run, arguments, chosen, columns, file)
        else:
            from gradscope.views.table_files import WRITERS

            WRITERS[as_what](chosen, _schema(run, arguments.table, columns), file)
    tell_notes(run, n_notes)
    if output is not None:
        n = chosen.n_given
        tell(f"wrote {output}: {n:,} row{'s' * (n != 1)} of {arguments.table}")
    _tell_next(arguments, as_what, chosen.n_given)
    return 0


class _Chosen:
    """The first or last rows of a table that comes part by part, or all of them.

    Attributes:
        n_given: how many rows were given so far.
    """

    def __init__(self, parts: Iterator[pa.Table], head: int | None, tail: int | None) -> None:
        self._parts = parts
        self._head = head
        self._tail = tail
        self.n_given = 0

    def __iter__(self) -> Iterator[pa.Table]:
        parts = self._parts if self._tail is None else last_rows(self._parts, self._tail)
        for part in parts:
            if self._head is not None:
                part = part.slice(0, self._head - self.n_given)
            self.n_given += part.num_rows
            if part.num_rows:
                yield part
            if self._head is not None and self.n_given >= self._head:
                return


def last_rows(parts: Iterator[pa.Table], n: int) -> list[pa.Table]:
    """Return the last rows of what comes part by part, holding little more than these."""
    held: deque[pa.Table] = deque()
    n_held = 0
    for part in parts:
        held.append(part)
        n_held += part.num_rows
        while held and n_held - held[0].num_rows >= n:
            n_held -= held.popleft().num_rows
    if held and n_held > n:
        held[0] = held[0].slice(n_held - n)
    return list(held)


def _write_text(
    run: Run, arguments: argparse.Namespace, chosen: _Chosen, columns: Any, file: IO[str]
) -> None:
    from gradscope.run.schema import Table
    from gradscope.views.table_text import table_text

    # Who asks for a number of rows gets them all.
    asked = arguments.head if arguments.head is not None else arguments.tail
    half = (_MOST_ROWS if asked is None else asked + 1) // 2
    first: list[dict[str, Any]] = []

    def after_first() -> Iterator[pa.Table]:
        for part in chosen:
            taken = part.slice(0, half - len(first))
            first.extend(taken.to_pylist())
            yield part.slice(taken.num_rows)

    last = [row for part in last_rows(after_first(), half) for row in part.to_pylist()]
    table = run.declared(arguments.table)
    if columns is not None:
        by_name = {column.name: column for column in table.columns}
        table = Table(table.name, table.row, tuple(by_name[name] for name in columns))
    n_hidden = chosen.n_given - len(first) - len(last)
    width = None if arguments.output else width_of(file)
    text = table_text(table, [*first, *last], n_hidden, width)
    file.write(harmless(text, file) + "\n")


def _schema(run: Run, table: str, columns: list[str] | None) -> pa.Schema:
    import pyarrow as pa

    schema = run.dataset(table).schema
    return schema if columns is None else pa.schema([schema.field(name) for name in columns])


def _tell_next(arguments: argparse.Namespace, as_what: str, n_rows: int) -> None:
    if arguments.output is not None or as_what != "text" or not n_rows:
        return
    words = ["table", arguments.run, arguments.table]
    if arguments.where is not None:
        words += ["--where", arguments.where]
    tell(f"next: {command(*words, '-o', f'{arguments.table}.csv')} writes all of it")


def _format_of(output: str | None) -> str:
    if output is None:
        return "text"
    ending = Path(output).suffix.lower().lstrip(".").replace("txt", "text")
    if ending not in _FORMATS:
        raise UsageError(
            f"--output {output}: its ending says as what, .txt, .csv, .json or .parquet; or say it "
            "with --format"
        )
    return ending


def _names(given: str | None) -> list[str] | None:
    names = [name.strip() for name in (given or "").split(",") if name.strip()]
    return list(dict.fromkeys(names)) or None


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is not a number of rows")
    return number


@contextmanager
def _opened(output: str | None, *, binary: bool) -> Iterator[Any]:
    """Our standard output, or a file that is there as a whole or not at all."""
    if output is None:
        sys.stdout.flush()
        yield sys.stdout.buffer if binary else sys.stdout
        sys.stdout.flush()
        return
    from pathlib import Path

    from gradscope.run.directory.layout import written_whole

    path = Path(output).resolve()  # what a link leads to is written, and the link stays
    opening: Callable[..., IO[Any]] = open
    with (
        written_to(output),
        written_whole(path) as hidden,
        opening(hidden, "wb") if binary else opening(hidden, "w", encoding="utf-8") as file,
    ):
        yield file
