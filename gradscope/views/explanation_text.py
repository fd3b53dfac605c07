"""One weight's step as text, as wide as there is room."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence

from gradscope.formulas.notation import number
from gradscope.views.explanation import Explanation, Given, Line

_LEAST_WIDTH = 50
"""A formula cannot be broken into much less."""

# As many digits as tell any two float32 numbers apart.
TELLING_APART = 9

_INDENT = 2
_MAY_BREAK = re.compile(r" (?=[+−/@] )|(?<=,) ")


def text(e: Explanation, width: int = 100) -> str:
    """Return the explanation for a monospaced font.

    Args:
        e: the explanation.
        width: how many characters a line may have.
    """
    width = max(width, _LEAST_WIDTH)
    body = (
        (_given(e, width), _rule(e.lines, width), _stored(e, width)) if e.lines else (_measured(e),)
    )
    remarks = ("\n".join(_wrapped(remark, width)) for remark in e.remarks)
    parts = [_head(e, width), *body, *remarks]
    return "\n\n".join(part for part in parts if part)


def value_of(value: float | None, digits: int = 6) -> str:
    """Write a value; what is no number of this weight is a whole array's business."""
    return "(array)" if value is None else number(value, digits)


def setting(given: Given) -> str:
    """Write a hyper-parameter, with its name where the symbol does not tell."""
    named = given.name in ("weight_decay", "dampening")
    return f"{given.symbol} = {value_of(given.value)}" + (f" ({given.name})" if named else "")


def _head(e: Explanation, width: int) -> str:
    title = f"{e.optimizer_kind}, step {e.step} of {e.where}"
    aside = " · ".join(e.context)
    gap = width - len(title) - len(aside)
    heads = [title + " " * gap + aside] if gap >= 4 else [title, *_wrapped(aside, width)]
    return "\n".join([*heads, *_wrapped(e.source, width)])


def _given(e: Explanation, width: int) -> str:
    rows = [(each.symbol, each.what, value_of(each.value)) for each in e.used if each.what]
    settings = [*(setting(each) for each in e.used if not each.what), *e.options]
    return "\n".join([*_columns(rows), *_wrapped(" · ".join(settings), width, "  ")])


def _measured(e: Explanation) -> str:
    rows = [(each.name, value_of(each.value)) for each in e.used]
    rows += [(f"{name} after", value_of(value)) for name, value in e.stored.items()]
    rows.append(("weight after", value_of(e.quantities["weight_stored"], TELLING_APART)))
    return "\n".join(_columns(rows))


def _rule(lines: tuple[Line, ...], width: int) -> str:
    symbols = max(len(line.symbol) for line in lines)
    values = [value_of(line.value) for line in lines]
    room = width - symbols - len("   = ")
    before_value = room - max(map(len, values)) - len(" = ")
    broken = [
        list(_rows(line, value, room, before_value))
        for line, value in zip(lines, values, strict=True)
    ]
    column = max(len(rows[-1][1]) for rows in broken)
    shown = []
    for line, value, rows in zip(lines, values, broken, strict=True):
        for place, (mark, part) in enumerate(rows):
            row = f"  {line.symbol if place == 0 else '':<{symbols}} {mark} {part}"
            if place == len(rows) - 1:
                row = f"{row:<{symbols + column + 5}} = {value}"
            shown.append(row)
    return "\n".join(shown)


def _rows(line: Line, value: str, room: int, before_value: int) -> Iterator[tuple[str, str]]:
    """The right sides of a line, broken to fit, each with what stands before it."""
    sides = [side for side in (line.formula, line.numbers) if side != value]
    sides = list(dict.fromkeys(sides)) or [""]
    for side in sides:
        # Only the last one shares its row with the value.
        is_last = side is sides[-1]
        first, *others = _broken(side, before_value if is_last else room)
        yield "=" if side else " ", first
        yield from ((" ", " " * _INDENT + part) for part in others)
        taken = len(others[-1]) + _INDENT if others else len(first)
        if is_last and taken > before_value:
            yield " ", ""  # what cannot be broken has left no room for the value


def _broken(side: str, room: int) -> Iterator[str]:
    """Break before an operator or after a comma, inside as few parentheses as possible."""
    indent = 0
    while len(side) > room - indent:
        best, depth, least = 0, 0, len(side)
        for place, character in enumerate(side[: room - indent + 1]):
            depth += (character == "(") - (character == ")")
            if depth <= least and _MAY_BREAK.match(side, place):
                best, least = place, depth
        if not best:
            break
        yield side[:best]
        side, indent = side[best + 1 :], _INDENT
    yield side


def _stored(e: Explanation, width: int) -> str:
    rows = [
        (line.symbol, line.key, value_of(line.stored, TELLING_APART), off(line))
        for line in e.compared
    ]
    lines = list(_columns(rows, "    "))
    if max(map(len, lines), default=0) > width:  # the symbols have been explained above
        lines = list(_columns([(symbol, *rest) for symbol, _, *rest in rows], "    "))
    return "\n".join([f"  after the step, as stored in {e.dtype}", *lines])


def off(line: Line) -> str:
    """Say how what is stored compares with the formula."""
    if line.difference == 0:
        return "as the formula says"
    off = f"differs by {number(abs(line.difference), 3)}"
    if line.agrees is None:
        return off
    return f"{off}: {'rounding' if line.agrees else 'MORE than rounding'}"


def _columns(rows: Sequence[tuple[str, ...]], indent: str = "  ") -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        yield (indent + "  ".join(cells)).rstrip()


def _wrapped(prose: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(prose, width, initial_indent=indent, subsequent_indent=indent)
