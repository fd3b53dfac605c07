"""Storage of rows, and the DataFrames made of them."""

from __future__ import annotations

import threading

import numpy as np
import pandas as pd
import pytest

from gradscope.run.columns import Coded, Columns
from gradscope.run.entries import ParameterEntry
from gradscope.run.recording import Recording
from gradscope.run.schema import TABLES, Column, Kind, Table

EXAMPLE = Table(
    "example",
    "test",
    tuple(
        Column(name, kind, "")
        for name, kind in [
            ("n", Kind.COUNT),
            ("maybe", Kind.OPTIONAL_COUNT),
            ("x", Kind.REAL),
            ("yes", Kind.FLAG),
            ("word", Kind.TEXT),
            ("param", Kind.PARAM),
        ]
    ),
)


def test_rows_come_back_as_they_were_put_in_however_many() -> None:
    columns = Columns(EXAMPLE)
    for i in range(300):
        columns.append({"n": i, "maybe": None if i % 2 else i, "x": i / 2, "word": f"w{i % 3}"})
    columns.extend(3, {"n": np.array([7, 8, 9]), "word": Coded(np.array([0, 1, 0]), ("u", "v")),
                       "yes": True, "param": [0, 1, 0]})  # fmt: skip
    frame = columns.frame(["a", "b"], [])
    assert frame["n"].tolist() == [*range(300), 7, 8, 9]
    assert frame["x"].iloc[:4].tolist() == [0, 0.5, 1, 1.5]
    assert frame["maybe"].isna().sum() == 153
    assert frame["maybe"].dtype == "Int64"
    assert frame["word"].iloc[-4:].tolist() == ["w2", "u", "v", "u"]
    assert frame["param"].iloc[-3:].tolist() == ["a", "b", "a"]
    assert frame["param"].iloc[0] == ""
    assert frame["yes"].iloc[-1]


def test_an_unknown_column_is_refused() -> None:
    with pytest.raises(KeyError, match="table 'example' has no column 'nope'"):
        Columns(EXAMPLE).append({"nope": 1})


def test_an_empty_table_has_its_columns_and_types() -> None:
    run = Recording()
    for name, table in TABLES.items():
        frame = run.frame(name)
        assert frame.columns.tolist() == [column.name for column in table.columns]
        assert len(frame) == 0
    assert run.latest() == {}


def test_a_frame_is_the_readers_own() -> None:
    run = Recording()
    run.rows("events").append({"event": "zero_grad"})
    frame = run.frame("events")
    frame["event"] = "spoilt"
    assert run.frame("events")["event"].tolist() == ["zero_grad"]


def test_a_name_learnt_late_holds_for_earlier_rows() -> None:
    run = Recording()
    run.parameters.append(ParameterEntry(name="optimizer.param_groups[0]['params'][0]"))
    run.rows("grads").append({"param": 0})
    assert run.frame("grads")["param"].tolist() == ["optimizer.param_groups[0]['params'][0]"]
    run.parameters[0].name = "head.weight"
    assert run.frame("grads")["param"].tolist() == ["head.weight"]


def test_every_column_says_what_it_means() -> None:
    for table in TABLES.values():
        names = [column.name for column in table.columns]
        assert len(set(names)) == len(names)
        for column in table.columns:
            assert column.meaning, f"{table.name}.{column.name}"


def test_text_columns_are_text_in_pandas() -> None:
    run = Recording()
    run.rows("events").append({"event": "zero_grad"})
    assert pd.api.types.is_string_dtype(run.frame("events")["event"])


def test_rows_that_wait_come_out_as_they_came_in() -> None:
    columns = Columns(EXAMPLE)
    alone = Columns(EXAMPLE)
    names = [column.name for column in EXAMPLE.columns]
    lots: list[tuple[int, dict[str, object]]] = [
        (1, {"n": 1, "word": "a"}),
        (1, {"n": np.array([2]), "word": ["b"]}),
        (2, {"n": [3, 4], "word": "c"}),
        (2, {"n": 5, "word": Coded(np.array([1, 0]), ("d", "e"))}),
        (1, {"n": None, "word": None}),
        (1, {"word": "f"}),
        (0, {"n": np.zeros(0, np.int64), "word": []}),
        (1, {"n": 7, "word": "a"}),
    ]
    for n, values in lots:
        columns.extend(n, values)
        alone.extend(n, values)
        alone.store()
    assert columns.n_rows == alone.n_rows == 9
    together, apart = (each.frame([], []) for each in (columns, alone))
    assert together["word"].tolist() == ["a", "b", "c", "c", "e", "d", "", "f", "a"]
    assert together["n"].tolist() == [1, 2, 3, 4, 5, 5, 0, 0, 7]
    assert names == together.columns.tolist()
    pd.testing.assert_frame_equal(together, apart)


def test_of_rows_that_wait_only_what_cannot_be_stored_is_lost() -> None:
    columns = Columns(EXAMPLE)
    columns.append({"n": 1})
    columns.append({"n": "one"})
    columns.append({"n": 3})
    with pytest.raises(ValueError, match="one"):
        columns.store()
    assert columns.array("n").tolist() == [1, 3]
    assert columns.n_rows == 2


def test_a_backward_belongs_to_the_step_that_claims_it_first() -> None:
    run = Recording()
    for number in range(3):
        run.add_backward({"backward": number})
    run.claim_backward(0, 5)
    run.claim_backward(0, 6)
    run.claim_backward(2, 6)
    run.claim_backward(7, 6)  # its row was forgotten
    assert not run.are_claimed([0, 1])
    assert run.are_claimed([0, 2])
    run.claim_backward(2, 8)
    assert run.frame("backwards")["step"].fillna(-1).tolist() == [5, -1, 6]


def test_no_row_is_lost_while_another_thread_takes_rows_away() -> None:
    run = Recording()
    n_steps, taken, failed = 3000, [], []
    is_over = threading.Event()

    def take() -> None:
        try:
            while not is_over.is_set():
                columns = run.rows("backwards")
                taken.append(columns.take(run.settled.get("backwards", 0)))
                run.rows("events").texts("event")
        except Exception as error:
            failed.append(error)

    reader = threading.Thread(target=take)
    reader.start()
    for step in range(n_steps):
        run.rows("events").append({"step": step, "event": "zero_grad"})
        run.add_backward({"backward": step, "root": step / 2})
        run.claim_backward(step, step)
        if step % 7 == 0:
            run.steps_ended(step + 1)
    run.steps_ended(n_steps)
    is_over.set()
    reader.join()
    assert not failed
    taken.append(run.rows("backwards").take(n_steps))
    for name in ("backward", "step"):
        values = np.concatenate([np.asarray(rows[name]) for rows in taken])
        assert values.tolist() == list(range(n_steps))
    assert run.rows("events").array("step").tolist() == list(range(n_steps))
