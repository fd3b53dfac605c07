"""Two recordings side by side: which parameters, steps and rows of the one are those of the other.

Rows are found by what they are about, never by their place: recorded steps are spaced by what they
cost, so two runs of the same training record others.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gradscope.comparison.numbers import rounding_of
from gradscope.run.columns import Columns
from gradscope.run.recording import Recording
from gradscope.run.schema import Kind

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Joined:
    """The rows of a table that both runs have, in the order of steps, then as A has them.

    Attributes:
        step: int64[n].
        rows: int64[n], their places in A's and in B's table.
        only: int64[k], int64[l], the places of rows that only A, or only B, has.
        tables: the two tables.
    """

    step: Integers
    rows: tuple[Integers, Integers]
    only: tuple[Integers, Integers]
    tables: tuple[Columns, Columns]

    def __len__(self) -> int:
        return len(self.step)

    def column(self, name: str) -> tuple[Any, Any]:
        """Return a column's values in A and in B: numbers, or texts as objects."""
        a, b = (
            _values(table, name)[rows] for table, rows in zip(self.tables, self.rows, strict=True)
        )
        return a, b


class Pair:
    """Two recordings A and B.

    Args:
        a: the first.
        b: the second.

    Attributes:
        a, b: the recordings.
        b_params: for each parameter of A its number in B, -1 if B has none of that name.
        a_params: int64[n + 1], likewise for each of B its number in A; -1 at the end, for none.
        steps: int64[n], the steps that both hold, in order.
        n_steps: how many steps each has.
        rounding: up to which relative difference rounding is taken for the cause.
        compared: how many values were compared, by stage.
    """

    def __init__(self, a: Recording, b: Recording) -> None:
        self.a, self.b = a, b
        numbers = {entry.name: number for number, entry in enumerate(b.parameters)}
        self.b_params = [numbers.get(entry.name, -1) for entry in a.parameters]
        to_a = np.full(len(b.parameters) + 1, -1, np.int64)
        for number, partner in enumerate(self.b_params):
            if partner >= 0:
                to_a[partner] = number
        self.a_params: Integers = to_a
        self.n_steps = (a.n_steps, b.n_steps)
        self.last_in_midst = self._is_cut_short()
        n_common = min(self.n_steps) - self.last_in_midst
        held: Integers = np.intersect1d(
            a.rows("steps").array("step"), b.rows("steps").array("step")
        )
        self.steps = held[held < n_common]
        self.n_common = n_common
        self.rounding = rounding_of(self._dtypes())
        self.compared: Counter[str] = Counter()
        self._joined: dict[tuple[str, tuple[str, ...]], Joined] = {}

    def param(self, number: int) -> str:
        """Return the name of one of A's parameters."""
        return self.a.parameters[number].name

    def optimizer(self, number: int) -> str:
        """Return the name of one of A's optimizers."""
        known = self.a.optimizers
        return known[number].name if 0 <= number < len(known) else ""

    def joined(self, table: str, keys: tuple[str, ...] = ()) -> Joined:
        """Return the rows of both runs that are about the same.

        Args:
            table: its name; it has a column ``step``.
            keys: the columns besides ``step`` that say what a row is about. Rows that these do not
                tell apart are taken in their order.
        """
        if (table, keys) not in self._joined:
            self._joined[table, keys] = self._join(table, keys)
        return self._joined[table, keys]

    def _join(self, table: str, keys: tuple[str, ...]) -> Joined:
        tables = self.a.rows(table), self.b.rows(table)
        usable = []
        for rows, to_a in zip(tables, (None, self.a_params), strict=True):
            is_usable = np.isin(rows.array("step"), self.steps)
            if "param" in keys and to_a is not None:
                is_usable &= to_a[rows.array("param")] >= 0
            usable.append(np.flatnonzero(is_usable))
        code = [
            rows.array("step")[at].astype(np.int64) for rows, at in zip(tables, usable, strict=True)
        ]
        for key in keys:
            a, b = (_values(rows, key)[at] for rows, at in zip(tables, usable, strict=True))
            if key == "param":
                b = self.a_params[b]
            numbers = np.concatenate([a, b])
            if numbers.dtype == object:
                numbers = _numbers_of(numbers)
            n = int(numbers.max(initial=0)) + 1
            code = [code[0] * n + numbers[: len(a)], code[1] * n + numbers[len(a) :]]
        at_a, at_b = _matched(code[0], code[1])
        only = []
        for at, found in zip(usable, (at_a, at_b), strict=True):
            is_left = np.ones(len(at), np.bool_)
            is_left[found] = False
            only.append(at[is_left])
        order = np.argsort(at_a, kind="stable")
        rows_a, rows_b = usable[0][at_a[order]], usable[1][at_b[order]]
        by_step = np.argsort(tables[0].array("step")[rows_a], kind="stable")
        found_rows = rows_a[by_step], rows_b[by_step]
        step = tables[0].array("step")[found_rows[0]]
        return Joined(step, found_rows, (only[0], only[1]), tables)

    def _is_cut_short(self) -> bool:
        """Whether the shorter run ended within its last step, and there is nothing else to it."""
        if not min(self.n_steps):
            return False
        last = min(self.n_steps) - 1
        rows = [run.row_of_step(last) for run in (self.a, self.b)]
        if rows[0] is None or rows[1] is None:
            return False
        outcome, order = (
            [
                str(run.rows("steps").texts(name)[row])
                for run, row in zip((self.a, self.b), rows, strict=True)
            ]
            for name in ("outcome", "order")
        )
        if outcome.count("open") != 1:
            return False
        cut = outcome.index("open")
        short = [event for event in events_of(order[cut]) if event != "step open"]
        full = events_of(order[1 - cut])
        return self.n_steps[cut] == last + 1 and full[: len(short)] == short

    def _dtypes(self) -> set[str]:
        found = {entry.dtype for run in (self.a, self.b) for entry in run.parameters}
        for run in (self.a, self.b):
            for step in list(run.graphs)[:1]:  # under autocast it tells more than parameters do
                for outputs in run.graphs[step].outputs:
                    found |= {str(dtype).removeprefix("torch.") for dtype in outputs.dtypes}
        return found


def events_of(order: str, most: int = 10_000) -> list[str]:
    """Return the single events of an order as ``steps`` spells it, ``(a, b) ×2, c``."""
    found: list[list[str]] = [[]]
    word = ""

    def repeated(what: list[str], text: str) -> list[str]:
        times = text.strip().removeprefix("×")
        return what * min(int(times) if times.isdigit() else 1, most)

    closed: list[str] | None = None
    for char in f"{order},":
        if char == "(":
            found.append([])
        elif char in "),":
            if closed is not None:
                found[-1] += repeated(closed, word)
            elif word.strip():
                name, _, times = word.partition("×")
                found[-1] += repeated([name.strip()], times)
            closed, word = None, ""
            if char == ")" and len(found) > 1:
                closed = found.pop()
        else:
            word += char
    return found[0][:most]


def _values(table: Columns, name: str) -> Any:
    kind = next(column.kind for column in table.table.columns if column.name == name)
    return table.texts(name) if kind is Kind.TEXT else table.array(name)


def _numbers_of(texts: Any) -> Integers:
    """Return int64[n], equal numbers for equal texts."""
    import pandas as pd

    numbers: Integers = pd.factorize(texts)[0].astype(np.int64)
    return numbers


def _matched(a: Integers, b: Integers) -> tuple[Integers, Integers]:
    """Return the places of equal codes; of codes that recur the first goes with the first."""
    sides = []
    for code in (a, b):
        order = np.argsort(code, kind="stable")
        ordered = code[order]
        begins = np.ones(len(code), np.bool_)
        begins[1:] = ordered[1:] != ordered[:-1]
        first = np.maximum.accumulate(np.where(begins, np.arange(len(code)), 0))
        sides.append((order, ordered, np.arange(len(code)) - first))
    n = 1 + max(int(nth.max(initial=0)) for _, _, nth in sides)
    (order_a, a, nth_a), (order_b, b, nth_b) = sides
    a, b = a * n + nth_a, b * n + nth_b
    if not len(b):
        return order_a[:0], order_b
    place = np.minimum(np.searchsorted(b, a), len(b) - 1)
    is_there = b[place] == a
    return order_a[is_there], order_b[place[is_there]]
