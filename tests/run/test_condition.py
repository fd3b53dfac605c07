"""Conditions as in SQL: they choose the rows that DuckDB chooses, and say what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradscope.errors import UsageError
from gradscope.run.directory.condition import condition
from gradscope.run.directory.parts import arrow_schema
from gradscope.run.schema import Column, Kind, Table

TABLE = Table(
    "grads",
    "row",
    (
        Column("step", Kind.COUNT, ""),
        Column("param", Kind.PARAM, ""),
        Column("status", Kind.TEXT, ""),
        Column("norm", Kind.REAL, ""),
        Column("mean", Kind.SINGLE, ""),
        Column("carried_from", Kind.OPTIONAL_COUNT, ""),
        Column("edited", Kind.FLAG, ""),
    ),
)

ROWS = [
    {
        "step": n,
        "param": ["h.0.attn.weight", "h.1.attn.weight", "h_0.bias", "it's", "50%"][n % 5],
        "status": ["fresh", "stale", ""][n % 3],
        "norm": [0.0, -1.5, 1e-3, 7.0][n % 4],
        "mean": [0.25, 2.0, -0.5][n % 3],
        "carried_from": [None, 3, 0][n % 3],
        "edited": n % 4 == 1,
    }
    for n in range(40)
]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS, schema=arrow_schema(TABLE)), path)
    return path


def ours(path: Path, text: str) -> list[int]:
    rows = ds.dataset(str(path), schema=arrow_schema(TABLE))
    return sorted(rows.to_table(["step"], filter=condition(text, TABLE))["step"].to_pylist())


def theirs(path: Path, text: str) -> list[int]:
    found = duckdb.sql(f"select step from '{path}' where {text}").fetchall()
    return sorted(step for (step,) in found)


NUMBERS = ("step", "norm", "mean", "carried_from")
TEXTS = ("param", "status")
number = st.sampled_from(["0", "3", "-1.5", "1e-3", ".25", "7", "+2.0", "19"])
text = st.sampled_from(
    ["'fresh'", "'it''s'", "''", "'h.0.attn.weight'", "'50%'", "'no such'", "'zz'"]
)
pattern = st.sampled_from(["'h.%'", "'h_0%'", "'%''%'", "'fresh'", "'%'", "''", "'_t_s'", "'5%'"])
sign = st.sampled_from(["=", "==", "!=", "<>", "<", "<=", ">", ">="])
negation = st.sampled_from(["", "not "])


def of_kind(columns: tuple[str, ...], value: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    column = st.sampled_from(columns)
    values = st.lists(value, min_size=1, max_size=3).map(", ".join)
    return st.one_of(
        st.builds("{} {} {}".format, column, sign, value),
        st.builds("{} {} {}".format, value, sign, column),
        st.builds("{} {} {}".format, column, sign, column),
        st.builds("{} {}in ({})".format, column, negation, values),
        st.builds("{} {}between {} and {}".format, column, negation, value, value),
        st.builds("{} is {}null".format, column, negation),
    )


leaf = st.one_of(
    of_kind(NUMBERS, number),
    of_kind(TEXTS, text),
    st.builds("{} {}like {}".format, st.sampled_from(TEXTS), negation, pattern),
    st.sampled_from(["edited", "not edited", "edited = true", "edited != false", "true", "FALSE"]),
)
conditions = st.recursive(
    leaf,
    lambda inner: st.one_of(
        st.builds("{} {} {}".format, inner, st.sampled_from(["and", "or", "AND", "Or"]), inner),
        st.builds("({})".format, inner),
        st.builds("not ({})".format, inner),
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(text=conditions)
def test_the_rows_are_those_that_duckdb_chooses(stored: Path, text: str) -> None:
    assert ours(stored, text) == theirs(stored, text)


def test_nan_is_null_and_no_comparison_holds_for_it(tmp_path: Path) -> None:
    rows = [{**ROWS[n], "norm": value} for n, value in enumerate([1.0, float("nan"), 2.0])]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=arrow_schema(TABLE)), path)
    assert ours(path, "norm is null") == [1]
    assert ours(path, "norm is not null") == [0, 2]
    assert ours(path, "norm > 0 or norm <= 0") == [0, 2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it is empty"),
        ("   ", "it is empty"),
        ("parm = 'x'", "grads has no column 'parm'"),
        ("parm = 'x'", "there are: step, param, status, norm"),
        ("status = fresh", "a text is written in single quotes, 'fresh'"),
        ('status = "fresh"', "a text is written in single quotes, 'fresh'"),
        ("norm = 'x'", "norm is a number, and 'x' is a text; compare it with a number"),
        ("'x' < norm", "norm is a number, and 'x' is a text; compare it with a number"),
        ("param > 3", "param is a text, and 3 is a number; compare it with a text"),
        ("edited = 1", "edited is a flag, and 1 is a number; compare it with true or false"),
        ("norm in (1, 'x')", "norm is a number"),
        ("norm like '1%'", "like compares texts, and norm is a number"),
        ("param like 3", "write a pattern in single quotes"),
        ("param like status", "write a pattern in single quotes"),
        ("step in (step)", "step is a column"),
        ("step >", "a column or a value is expected, after: step >"),
        ("= 3", "a column or a value is expected, at the beginning"),
        ("(step > 1", ") is expected, after: ( step > 1"),
        ("step > 1)", ") is not expected here"),
        ("step = 1 norm = 2", "norm is not expected here"),
        ("norm", "a comparison is expected after norm"),
        ("norm and edited", "a comparison is expected after norm"),
        ("edited not", "a comparison is expected"),
        ("step between 1 or 2", "and is expected"),
        ("step is 3", "null is expected"),
        ("param = 'x", "a quote is not closed: 'x"),
        ("step + 1 > 3", "cannot be understood"),
        ("step = 3; drop table x", "cannot be understood"),
        ("step = 1.2.3", "cannot be understood"),
        ("__import__('os').system('x')", "cannot be understood"),
        ("lower(param) = 'x'", "there are no functions here, and so no lower()"),
        ("__import__('os') = 1", "there are no functions here, and so no __import__()"),
        ("(select 1) = 1", "grads has no column 'select'"),
        ("(" * 100_000, "nested too deeply"),
        ("not " * 100_000, "nested too deeply"),
    ],
)
def test_a_mistake_is_named(text: str, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        condition(text, TABLE)
    assert said in str(raised.value)
    assert len(str(raised.value)) < 600


@given(text=st.text("abcdefgst ()'\"=<>%,.0123456789", max_size=40))
def test_whatever_is_written_is_a_condition_or_an_error_of_ours(text: str) -> None:
    try:
        found: Any = condition(text, TABLE)
    except UsageError:
        return
    empty = ds.dataset(arrow_schema(TABLE).empty_table())
    assert empty.count_rows(filter=found) == 0
