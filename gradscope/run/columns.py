"""The rows of one table while they arrive: a numpy array per column that grows by doubling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gradscope.run.schema import Kind, Table

if TYPE_CHECKING:
    import pandas as pd

_STORED_AS: dict[Kind, np.dtype[Any]] = {
    Kind.COUNT: np.dtype(np.int64),
    Kind.OPTIONAL_COUNT: np.dtype(np.int64),
    Kind.REAL: np.dtype(np.float64),
    Kind.SINGLE: np.dtype(np.float32),
    Kind.FLAG: np.dtype(np.bool_),
    # Texts recur in almost every row: each is kept once, and a row holds its number.
    Kind.TEXT: np.dtype(np.int32),
    Kind.PARAM: np.dtype(np.int32),
    Kind.OPTIMIZER: np.dtype(np.int32),
}

_NOTHING = nullcontext()

_BYTES_OF_TEXT = 150
"""What one more text takes besides its characters: an object, and its place in list and dict."""

MISSING = np.iinfo(np.int64).min
"""How a missing value of a :attr:`Kind.OPTIONAL_COUNT` column is stored."""


@dataclass(frozen=True, slots=True)
class Coded:
    """Texts of a column as numbers: row i holds ``texts[codes[i]]``.

    Attributes:
        codes: integers[n].
        texts: the few texts there are.
    """

    codes: np.ndarray[Any, Any]
    texts: tuple[str, ...]


class Columns:
    """The stored rows of one table.

    Parameters and optimizers are stored as their numbers; their names are looked up when a
    DataFrame is made, so that a name learnt late holds for the rows of before.

    Attributes:
        n_rows: how many rows there are.
        n_taken: how many of the first of them somebody has taken away with :meth:`take`.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self.n_rows = 0
        self.n_taken = 0
        self._capacity = 64
        self._kinds = {column.name: column.kind for column in table.columns}
        # Rows that are still to come hold what a column has that is left out.
        self._arrays = {
            name: np.full(self._capacity, _EMPTY[kind], _STORED_AS[kind])
            for name, kind in self._kinds.items()
        }
        self._texts: list[str] = [""]
        self._text_numbers: dict[str, int] = {"": 0}
        self._row_bytes = sum(array.itemsize for array in self._arrays.values())
        self._has_single = Kind.SINGLE in self._kinds.values()

    @property
    def n_bytes(self) -> int:
        """What the rows take in memory, give or take what is reserved for the next ones."""
        return self.n_rows * self._row_bytes + len(self._texts) * _BYTES_OF_TEXT

    @property
    def row_bytes(self) -> int:
        """What one row takes in memory, texts left out."""
        return self._row_bytes

    def append(self, values: Mapping[str, Any]) -> None:
        """Append one row; a column left out, or given None, gets its empty value.

        That is 0, NaN, missing or ``""``.

        Raises:
            KeyError: if ``values`` names a column that the table has not.
        """
        self._put(self.n_rows, self.n_rows + 1, self.n_rows, values)

    def extend(self, n: int, values: Mapping[str, Any]) -> None:
        """Append ``n`` rows at once.

        Args:
            n: how many rows.
            values: for each column an array or list of ``n`` values, or one value for all; a
                column left out gets its empty value.

        Raises:
            KeyError: if ``values`` names a column that the table has not.
        """
        self._put(self.n_rows, self.n_rows + n, slice(self.n_rows, self.n_rows + n), values)

    def extend_by_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows, each as for :meth:`append`, column by column."""
        if not rows:
            return
        values: dict[str, list[Any]] = {}
        for name in dict.fromkeys(name for row in rows for name in row):
            kind = self._kinds.get(name)
            empty = "" if kind is None or kind is Kind.TEXT else _EMPTY[kind]
            given = [row.get(name) for row in rows]
            values[name] = [empty if value is None else value for value in given]
        self.extend(len(rows), values)

    def _put(self, start: int, stop: int, at: int | slice, values: Mapping[str, Any]) -> None:
        if stop > self._capacity:
            self._grow(stop)
        arrays, kinds = self._arrays, self._kinds
        # What single precision cannot hold is infinite.
        quiet = np.errstate(over="ignore") if self._has_single else _NOTHING
        try:
            with quiet:
                for name, value in values.items():
                    if value is None:
                        continue
                    array, kind = arrays[name], kinds[name]
                    if kind is Kind.TEXT:
                        value = self._numbers_of(value)
                    elif kind is Kind.OPTIONAL_COUNT and isinstance(value, list):
                        value = [MISSING if item is None else item for item in value]
                    array[at] = value
        except BaseException as error:
            for name, array in arrays.items():
                array[start:stop] = _EMPTY[kinds[name]]
            if isinstance(error, KeyError):
                raise KeyError(f"table {self.table.name!r} has no column {error}") from None
            raise
        self.n_rows = stop

    def adopt(self, other: Columns, params: list[int], optimizers: list[int]) -> None:
        """Append all rows of another run of the same table; they count as taken.

        Args:
            other: the rows.
            params: numbers of parameters here by number there.
            optimizers: likewise.
        """
        values: dict[str, Any] = {}
        for name, kind in self._kinds.items():
            stored = other.array(name)
            if kind is Kind.TEXT:
                values[name] = _compact(stored, other._texts)
            elif kind in (Kind.PARAM, Kind.OPTIMIZER):
                numbers = params if kind is Kind.PARAM else optimizers
                values[name] = np.array([*numbers, -1], np.int32)[stored]
            else:
                values[name] = stored
        if other.n_rows:
            self.extend(other.n_rows, values)
        self.n_taken = self.n_rows

    def set(self, name: str, row: int, value: Any) -> None:
        """Fill in a value that was not known yet when its row was appended."""
        self._arrays[name][row] = value

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """Return a column as stored, one value a row: a view, valid until the next append."""
        return self._arrays[name][: self.n_rows]

    def texts(self, name: str) -> np.ndarray[Any, Any]:
        """Return a text column as an object array of strings."""
        return self._spelled(self.array(name))

    def take(self, stop: int) -> dict[str, np.ndarray[Any, Any] | Coded]:
        """Return copies of the rows before ``stop`` that nobody has taken yet, by column.

        Texts come as :class:`Coded`, parameters and optimizers as their numbers.
        """
        start, self.n_taken = self.n_taken, max(stop, self.n_taken)
        return self.copies(start, stop)

    def copies(self, start: int, stop: int) -> dict[str, np.ndarray[Any, Any] | Coded]:
        """Return copies of some rows, as :meth:`take` does."""
        return {
            name: _compact(array[start:stop], self._texts)
            if self._kinds[name] is Kind.TEXT
            else array[start:stop].copy()
            for name, array in self._arrays.items()
        }

    def keep(self, wanted: np.ndarray[Any, Any]) -> None:
        """Forget all rows but some.

        Args:
            wanted: bool[n], which rows stay.
        """
        n = int(wanted.sum())
        n_taken = int(wanted[: self.n_taken].sum())
        capacity = max(n, 64)
        coded = [name for name, kind in self._kinds.items() if kind is Kind.TEXT]
        # Made as a whole before anything takes its place: half of it would be rows of nothing.
        arrays = {}
        for name, array in self._arrays.items():
            arrays[name] = np.full(capacity, _EMPTY[self._kinds[name]], array.dtype)
            arrays[name][:n] = array[: self.n_rows][wanted]
        texts, text_numbers = self._texts, self._text_numbers
        if coded:
            used = np.unique(np.concatenate([[0], *(arrays[name][:n] for name in coded)]))
            numbers = np.zeros(len(texts) + 1, np.int32)
            numbers[used] = np.arange(len(used))
            for name in coded:
                arrays[name][:n] = numbers[arrays[name][:n]]
            texts = [texts[number] for number in used]
            text_numbers = {text: number for number, text in enumerate(texts)}
        self._arrays, self._texts, self._text_numbers = arrays, texts, text_numbers
        self._capacity, self.n_rows, self.n_taken = capacity, n, n_taken

    def frame(self, params: list[str], optimizers: list[str], rows: Any = None) -> pd.DataFrame:
        """Return the rows as a DataFrame of its own, that later rows do not change.

        Args:
            params: the parameters' names, by number.
            optimizers: the optimizers' names, by number.
            rows: int64[k], only these rows; None for all.
        """
        import pandas as pd

        return pd.DataFrame(dict(self._series(params, optimizers, rows)))

    def _series(
        self, params: list[str], optimizers: list[str], rows: Any
    ) -> Iterator[tuple[str, Any]]:
        import pandas as pd

        for name, kind in self._kinds.items():
            stored = self.array(name)
            stored = stored.copy() if rows is None else stored[rows]
            if kind is Kind.TEXT:
                yield name, self._spelled(stored)
            elif kind is Kind.PARAM:
                yield name, np.array([*params, ""], dtype=object)[stored]
            elif kind is Kind.OPTIMIZER:
                yield name, np.array([*optimizers, ""], dtype=object)[stored]
            elif kind is Kind.OPTIONAL_COUNT:
                missing = stored == MISSING
                yield name, pd.arrays.IntegerArray(np.where(missing, 0, stored), missing)
            elif kind is Kind.SINGLE:
                yield name, stored.astype(np.float64)  # sums of many are to be exact
            else:
                yield name, stored

    def _spelled(self, numbers: Any) -> np.ndarray[Any, Any]:
        spelled: np.ndarray[Any, Any] = np.array([*self._texts, ""], dtype=object).take(numbers)
        return spelled

    def _numbers_of(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._number_of(value)
        if isinstance(value, Coded):
            return np.array([self._number_of(text) for text in value.texts])[value.codes]
        return [self._number_of(text) for text in value]

    def _number_of(self, text: str) -> int:
        number = self._text_numbers.get(text)
        if number is None:
            number = self._text_numbers[text] = len(self._texts)
            self._texts.append(storable(text))
        return number

    def _grow(self, needed: int) -> None:
        capacity = max(needed, 2 * self._capacity)
        arrays = {}
        for name, array in self._arrays.items():
            arrays[name] = np.empty(capacity, array.dtype)
            arrays[name][: self.n_rows] = array[: self.n_rows]
            arrays[name][self.n_rows :] = _EMPTY[self._kinds[name]]
        self._arrays, self._capacity = arrays, capacity


# As stored: the text of number 0 is the empty one.
_EMPTY: dict[Kind, Any] = {
    Kind.COUNT: 0,
    Kind.OPTIONAL_COUNT: MISSING,
    Kind.REAL: np.nan,
    Kind.SINGLE: np.nan,
    Kind.FLAG: False,
    Kind.TEXT: 0,
    Kind.PARAM: -1,
    Kind.OPTIMIZER: -1,
}


def storable(text: str) -> str:
    """Return a text as any engine can hold it: half a pair of surrogates is spelled out.

    A name may hold one, and so does the path of a file whose name is no valid text.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()
    return text


def _compact(codes: np.ndarray[Any, Any], texts: list[str]) -> Coded:
    """Codes with only the texts that occur among them."""
    if len(texts) <= 4 * len(codes):  # mostly; far faster than to sort
        used = np.flatnonzero(np.bincount(codes, minlength=1))
        places = np.zeros(int(used[-1]) + 1 if len(used) else 1, np.int32)
        places[used] = np.arange(len(used))
        numbers = places[codes]
    else:
        used, numbers = np.unique(codes, return_inverse=True)
    return Coded(numbers.astype(np.int32), tuple([texts[number] for number in used.tolist()]))
