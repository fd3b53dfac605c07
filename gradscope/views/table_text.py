"""Rows of a table as text: numbers one can read, columns as far as there is room."""

from __future__ import annotations

import itertools
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from gradscope.run.schema import Kind, Table

_DIGITS = 4
"""Significant digits; the other formats have all of them."""

_WIDEST = 40
"""Longer texts are cut in the middle where there is a width to keep."""

_GAP = "  "


def table_text(
    table: Table, rows: Sequence[dict[str, Any]], n_hidden: int = 0, width: int | None = None
) -> str:
    """Return rows with a line of column names above them.

    Args:
        table: of which columns; those that the rows have are shown.
        rows: as ``pyarrow.Table.to_pylist`` gives them.
        n_hidden: how many rows were left out in the middle of ``rows``, or would follow them.
        width: how many characters a line may have; None for any. If there are too many columns
            for it, those of which all rows say the same are told below, and those that still do not
            fit are named there.
    """
    columns = [column for column in table.columns if not rows or column.name in rows[0]]
    if not rows:
        return "no rows"
    cells = {
        column.name: [_cell(row[column.name], column.kind, width) for row in rows]
        for column in columns
    }
    widths = {
        column.name: max(map(text_width, [column.name, *cells[column.name]])) for column in columns
    }
    shown = _fitting(widths, width)
    same = []
    if len(shown) < len(columns) and len(rows) > 1:
        same = [name for name, texts in cells.items() if len({*texts}) == 1]
        shown = _fitting({name: each for name, each in widths.items() if name not in same}, width)
    is_text = {column.name: column.kind in _TEXTS for column in columns}

    def line(texts: Iterable[tuple[str, str]]) -> str:
        return _GAP.join(
            _padded(text, widths[name], left=is_text[name]) for name, text in texts
        ).rstrip()

    lines = [line((name, name) for name in shown)]
    lines += [line((name, cells[name][number]) for name in shown) for number in range(len(rows))]
    if n_hidden:
        # The first half of the rows are the first ones of the table, the others its last.
        middle = 1 + (len(rows) + 1) // 2
        lines.insert(middle, f"… {n_hidden:,} more row{'s' * (n_hidden > 1)} …")
    hidden = [name for name in widths if name not in shown and name not in same]
    alike = ", ".join(f"{name} = {cells[name][0] or repr('')}" for name in same)
    for what, named in (("alike in all of these", alike), ("not shown", ", ".join(hidden))):
        if named:
            wrapped = textwrap.wrap(f"{what}: {named}", width or 100, break_on_hyphens=False)
            lines += ["", *wrapped]
    return "\n".join(lines)


_TEXTS = (Kind.TEXT, Kind.PARAM, Kind.OPTIMIZER)


def text_width(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.combining(char) > 0 for char in text)


def printable(text: str) -> str:
    """Return a text without characters that would steer the terminal, or break the line."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _padded(text: str, width: int, *, left: bool) -> str:
    gap = " " * (width - text_width(text))
    return text + gap if left else gap + text


def _fitting(widths: dict[str, int], width: int | None) -> list[str]:
    """The first columns that fit; one is always shown, if there is any."""
    if width is None:
        return list(widths)
    ends = itertools.accumulate(each + len(_GAP) for each in widths.values())
    fitting = [name for name, end in zip(widths, ends, strict=True) if end - len(_GAP) <= width]
    return fitting or list(widths)[:1]


def _cell(value: Any, kind: Kind, width: int | None) -> str:
    if value is None or value != value:
        return "–"
    if kind is Kind.FLAG:
        return "yes" if value else "no"
    if kind in (Kind.REAL, Kind.SINGLE):
        return _real(value)
    if kind in _TEXTS:
        text = printable(str(value))
        if width is not None and len(text) > _WIDEST:
            return f"{text[: _WIDEST // 2]}…{text[-_WIDEST // 2 + 1 :]}"
        return text
    return str(value)


def _real(value: float) -> str:
    text = f"{value:.{_DIGITS}g}"
    # A whole number of many digits, such as a loss scale, is not worth an exponent.
    if "e+" in text and value == int(value) and abs(value) < 1e9:
        return str(int(value))
    return text
