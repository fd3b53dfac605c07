"""A condition on the rows of a table, written as in SQL's ``where``, as an expression of Arrow's.

::

    param like 'h.0.%' and (norm > 1e3 or nonfinite > 0) and status not in ('fresh', 'none')

A parser of all of SQL would be a hundred times as long, and accept functions, casts and queries
that would have to be refused again; nothing of what is written here is ever run as a program.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from gradscope.errors import UsageError
from gradscope.run.schema import Kind, Table

_TOKEN: Final = re.compile(
    r"""\s*(?:
      (?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?(?![\w.]))
    | (?P<text>'(?:[^']|'')*')
    | (?P<name>"[^"]+"|[^\W\d]\w*)
    | (?P<sign><=|>=|<>|!=|==|[=<>(),])
    )""",
    re.VERBOSE | re.IGNORECASE,
)

_KEYWORDS: Final = frozenset(
    ("and", "or", "not", "like", "in", "between", "is", "null", "true", "false")
)

_COMPARISONS: Final = {
    "=": pc.equal,
    "==": pc.equal,
    "!=": pc.not_equal,
    "<>": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}

_KIND_OF: Final = {
    Kind.TEXT: "text",
    Kind.PARAM: "text",
    Kind.OPTIMIZER: "text",
    Kind.FLAG: "flag",
}
_WRITTEN: Final = {"text": "a text, 'fresh'", "number": "a number", "flag": "true or false"}


def condition(text: str, table: Table) -> pc.Expression:
    """Return a condition as an expression to filter rows by.

    It may consist of columns, numbers, texts in single quotes, ``true`` and ``false``; of ``=``
    (``==``), ``!=`` (``<>``), ``<``, ``<=``, ``>``, ``>=``, ``like`` (``%`` stands for any
    characters, ``_`` for one), ``in``, ``between`` and ``is null``, each also with ``not``; and of
    ``and``, ``or``, ``not`` and parentheses. No comparison but ``!=`` holds for NaN; ``is null``
    does.

    Args:
        text: the condition.
        table: what it is about.

    Raises:
        UsageError: naming what cannot be understood, and the columns if one of them is wrong.
    """
    try:
        return _Parser(text, table).whole()
    except RecursionError:
        raise UsageError(f"where: {text[:60]}…: is nested too deeply") from None


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str  # number, text, name, keyword, sign, end
    text: str


@dataclass(frozen=True, slots=True)
class _Operand:
    kind: str  # text, number, flag
    value: Any
    written: str
    is_column: bool
    may_be_nan: bool = False


class _Parser:
    """One function for each level of SQL's precedence, the loosest first."""

    def __init__(self, text: str, table: Table) -> None:
        self._text = text
        self._table = table
        self._columns = {column.name: column.kind for column in table.columns}
        self._tokens = self._tokenized()
        self._at = 0

    def whole(self) -> Any:
        if self._next.kind == "end":
            raise self._error("it is empty; write, for example, step >= 10")
        found = self._any_of()
        if self._next.kind != "end":
            raise self._error(f"{self._next.text} is not expected here", here=True)
        return found

    def _any_of(self) -> Any:
        found = self._all_of()
        while self._took("or"):
            found = pc.or_kleene(found, self._all_of())
        return found

    def _all_of(self) -> Any:
        found = self._negated()
        while self._took("and"):
            found = pc.and_kleene(found, self._negated())
        return found

    def _negated(self) -> Any:
        if self._took("not"):
            return pc.invert(self._negated())
        if self._took("("):
            found = self._any_of()
            self._demand(")")
            return found
        return self._compared()

    def _compared(self) -> Any:
        left = self._operand()
        if self._next.text in _COMPARISONS and self._next.kind == "sign":
            compare = _COMPARISONS[self._take().text]
            return compare(*self._same_kind(left, self._operand()))
        if self._took("is"):
            negated = self._took("not")
            self._demand("null")
            found = pc.is_null(left.value)
            if left.may_be_nan:
                # Not nan_is_null=True: where a file counts no nulls, pyarrow 26 takes that for
                # "never", whatever is NaN.
                found = pc.or_kleene(found, pc.is_nan(left.value))
            return pc.invert(found) if negated else found
        negated = self._took("not")
        if self._took("like"):
            found = self._like(left)
        elif self._took("in"):
            found = self._in(left)
        elif self._took("between"):
            least = self._operand()
            self._demand("and")
            found = pc.and_kleene(
                pc.greater_equal(*self._same_kind(left, least)),
                pc.less_equal(*self._same_kind(left, self._operand())),
            )
        elif left.kind == "flag" and not negated:
            return left.value
        else:
            raise self._error(f"a comparison is expected after {left.written}", here=True)
        return pc.invert(found) if negated else found

    def _like(self, left: _Operand) -> Any:
        pattern = self._operand()
        if left.kind != "text":
            raise self._error(f"like compares texts, and {left.written} is a {left.kind}")
        if pattern.kind != "text" or pattern.is_column:
            raise self._error("write a pattern in single quotes after like, such as 'h.0.%'")
        return pc.match_like(_as_text(left), self._unquoted(pattern.written))

    def _in(self, left: _Operand) -> Any:
        self._demand("(")
        values = []
        while True:
            each = self._operand()
            if each.is_column:
                raise self._error(f"in compares with values, and {each.written} is a column")
            values.append(self._same_kind(left, each)[1])
            if not self._took(","):
                break
        self._demand(")")
        found = pc.equal(left.value, values[0])
        for value in values[1:]:
            found = pc.or_kleene(found, pc.equal(left.value, value))
        return found

    def _operand(self) -> _Operand:
        token = self._take()
        if token.kind == "number":
            number = float(token.text) if re.search(r"[.e]", token.text, re.I) else int(token.text)
            if isinstance(number, int) and abs(number) >= 2**63:
                number = float(number)
            return _Operand("number", pc.scalar(number), token.text, is_column=False)
        if token.kind == "text":
            value = pc.scalar(self._unquoted(token.text))
            return _Operand("text", value, token.text, is_column=False)
        if token.kind == "keyword" and token.text in ("true", "false"):
            value = pc.scalar(token.text == "true")
            return _Operand("flag", value, token.text, is_column=False)
        if token.kind == "name":
            return self._column(token.text)
        self._at -= token.kind != "end"
        raise self._error("a column or a value is expected", here=True)

    def _column(self, written: str) -> _Operand:
        name = written.strip('"')
        name = name if name in self._columns else name.lower()
        if name not in self._columns:
            if self._next.text == "(":
                raise self._error(f"there are no functions here, and so no {name}()")
            raise self._error(
                f"{self._table.name} has no column {name!r} (a text is written in single quotes, "
                f"'{name}'); there are: {', '.join(self._columns)}"
            )
        kind = self._columns[name]
        return _Operand(
            _KIND_OF.get(kind, "number"),
            pc.field(name),
            name,
            is_column=True,
            may_be_nan=kind in (Kind.REAL, Kind.SINGLE),
        )

    def _same_kind(self, left: _Operand, right: _Operand) -> tuple[Any, Any]:
        if left.kind != right.kind:
            column, other = (left, right) if left.is_column else (right, left)
            raise self._error(
                f"{column.written} is a {column.kind}, and {other.written} is a {other.kind}; "
                f"compare it with {_WRITTEN[column.kind]}"
            )
        if left.kind == "text" and left.is_column and right.is_column:
            return _as_text(left), _as_text(right)
        return left.value, right.value

    # -- tokens -----------------------------------------------------------------------------

    def _tokenized(self) -> list[_Token]:
        tokens, place = [], 0
        text = self._text.rstrip()
        while place < len(text):
            match = _TOKEN.match(text, place)
            if match is None:
                rest = text[place:].lstrip()
                if rest[0] == "'":
                    raise self._error(f"a quote is not closed: {rest[:40]}")
                raise self._error(f"{rest[:20]!r} cannot be understood")
            kind, written = str(match.lastgroup), match[0].strip()
            if kind == "name" and written.lower() in _KEYWORDS:
                kind, written = "keyword", written.lower()
            tokens.append(_Token(kind, written))
            place = match.end()
        return [*tokens, _Token("end", "")]

    @property
    def _next(self) -> _Token:
        return self._tokens[self._at]

    def _take(self) -> _Token:
        token = self._next
        self._at += token.kind != "end"
        return token

    def _took(self, written: str) -> bool:
        taken = self._next.text == written and self._next.kind in ("keyword", "sign")
        self._at += taken
        return taken

    def _demand(self, written: str) -> None:
        if not self._took(written):
            raise self._error(f"{written} is expected", here=True)

    def _error(self, what: str, *, here: bool = False) -> UsageError:
        if here:
            before = " ".join(token.text for token in self._tokens[: self._at])
            what += f", after: {before[-60:]}" if before else ", at the beginning"
        shown = self._text if len(self._text) <= 200 else f"{self._text[:200]}…"
        return UsageError(f"where: {shown}: {what}")

    def _unquoted(self, written: str) -> str:
        return written[1:-1].replace("''", "'")


def _as_text(operand: _Operand) -> Any:
    """A column of texts, which the files hold as numbers of a dictionary, as texts."""
    return operand.value.cast(pa.string()) if operand.is_column else operand.value
