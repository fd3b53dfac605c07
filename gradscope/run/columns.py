"""The rows of one table while they arrive: a numpy array per column that grows by doubling."""

from __future__ import annotations

import threading
from collections import deque
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

_MOST_LOTS, _MOST_WAITING = 64, 8192
"""Lots of rows, and rows in them, that wait at most."""

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

    Rows that come wait until someone reads, or until there are many: a column is then written once
    for all of them, which for a single row takes longer than for a hundred.

    Attributes:
        n_taken: how many of the first of them somebody has taken away with :meth:`take`.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self.n_taken = 0
        self._n_stored = 0
        self._waiting: deque[tuple[int, Mapping[str, Any]]] = deque()
        self._n_waiting = 0
        # A reader in another thread stores what waits, too.
        self._lock = threading.RLock()
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
    def n_rows(self) -> int:
        """How many rows there are."""
        return self._n_stored + self._n_waiting

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
        self.extend(1, values)

    def extend(self, n: int, values: Mapping[str, Any]) -> None:
        """Append ``n`` rows at once.

        Args:
            n: how many rows.
            values: for each column an array or list of ``n`` values, or one value for all; a
                column left out gets its empty value. Arrays are not to be changed afterwards.

        Raises:
            KeyError: if ``values`` names a column that the table has not.
        """
        if not values.keys() <= self._kinds.keys():
            unknown = next(name for name in values if name not in self._kinds)
            raise KeyError(f"table {self.table.name!r} has no column {unknown!r}")
        with self._lock:
            self._waiting.append((n, values))
            self._n_waiting += n
            if len(self._waiting) >= _MOST_LOTS or self._n_waiting >= _MOST_WAITING:
                self.store()

    def extend_by_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows, each as for :meth:`append`."""
        for row in rows:
            self.append(row)

    def store(self) -> None:
        """Write what waits into the columns."""
        # What single precision cannot hold is infinite.
        quiet = np.errstate(over="ignore") if self._has_single else _NOTHING
        with self._lock:  # also to see whether anything waits: it may be on its way
            if self._waiting:
                with quiet:
                    self._store_lots()

    def _store_lots(self) -> None:
        most = _MOST_LOTS
        while self._waiting:
            lots = [self._waiting.popleft()]
            names = lots[0][1].keys()
            while self._waiting and len(lots) < most and self._waiting[0][1].keys() == names:
                lots.append(self._waiting.popleft())
            n = sum(n for n, _ in lots)
            try:
                self._put(n, {name: self._joined(name, lots) for name in names})
            except BaseException as error:
                is_ours = isinstance(error, Exception)
                if is_ours and len(lots) == 1:  # only what cannot be stored is lost
                    self._n_waiting -= n
                    raise
                self._waiting.extendleft(reversed(lots))
                if not is_ours:
                    raise
                most = 1
            else:
                self._n_waiting -= n

    def _joined(self, name: str, lots: Sequence[tuple[int, Mapping[str, Any]]]) -> Any:
        """The values of one column in several lots of rows, as they are stored."""
        kind = self._kinds[name]
        values = [self._as_stored(given[name], kind) for _, given in lots]
        if len(lots) == 1:
            return values[0]
        if all(n == 1 for n, _ in lots):
            return [_single(value) for value in values]
        if all(value is values[0] for value in values) and not _has_length(values[0]):
            return values[0]
        dtype = _STORED_AS[kind]
        return np.concatenate(
            [
                np.broadcast_to(np.asarray(value, dtype), n)
                for (n, _), value in zip(lots, values, strict=True)
            ]
        )

    def _as_stored(self, value: Any, kind: Kind) -> Any:
        if value is None:
            return _EMPTY[kind]
        if kind is Kind.TEXT:
            return self._numbers_of(value)
        if kind is Kind.OPTIONAL_COUNT and isinstance(value, list):
            return [MISSING if item is None else item for item in value]
        return value

    def _put(self, n: int, values: Mapping[str, Any]) -> None:
        start, stop = self._n_stored, self._n_stored + n
        if stop > self._capacity:
            self._grow(stop)
        arrays = self._arrays
        try:
            for name, value in values.items():
                arrays[name][start:stop] = value
        except BaseException:
            for name, array in arrays.items():
                array[start:stop] = _EMPTY[self._kinds[name]]
            raise
        self._n_stored = stop

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
        with self._lock:
            self.store()
            self._arrays[name][row] = value

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """Return a column as stored, one value a row: a view, valid until the next append."""
        with self._lock:
            self.store()
            return self._arrays[name][: self._n_stored]

    def texts(self, name: str) -> np.ndarray[Any, Any]:
        """Return a text column as an object array of strings."""
        return self._spelled(self.array(name))

    def take(self, stop: int) -> dict[str, np.ndarray[Any, Any] | Coded]:
        """Return copies of the rows before ``stop`` that nobody has taken yet, by column.

        There may be fewer rows than ``stop``, after some were forgotten.

        Texts come as :class:`Coded`, parameters and optimizers as their numbers.
        """
        stop = min(stop, self.n_rows)
        start, self.n_taken = self.n_taken, max(stop, self.n_taken)
        return self.copies(start, stop)

    def copies(self, start: int, stop: int) -> dict[str, np.ndarray[Any, Any] | Coded]:
        """Return copies of some rows, as :meth:`take` does."""
        with self._lock:
            if stop > self._n_stored:
                self.store()
            arrays = dict(self._arrays)  # a later one may be longer
        return {
            name: _compact(array[start:stop], self._texts)
            if self._kinds[name] is Kind.TEXT
            else array[start:stop].copy()
            for name, array in arrays.items()
        }

    def keep(self, wanted: np.ndarray[Any, Any]) -> None:
        """Forget all rows but some.

        Args:
            wanted: bool[n], which rows stay.
        """
        self.store()
        n = int(wanted.sum())
        n_taken = int(wanted[: self.n_taken].sum())
        capacity = max(n, 64)
        coded = [name for name, kind in self._kinds.items() if kind is Kind.TEXT]
        # Made as a whole before anything takes its place: half of it would be rows of nothing.
        arrays = {}
        for name, array in self._arrays.items():
            arrays[name] = np.full(capacity, _EMPTY[self._kinds[name]], array.dtype)
            arrays[name][:n] = array[: self._n_stored][wanted]
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
        self._capacity, self._n_stored, self.n_taken = capacity, n, n_taken

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
            arrays[name][: self._n_stored] = array[: self._n_stored]
            arrays[name][self._n_stored :] = _EMPTY[self._kinds[name]]
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


def _has_length(value: Any) -> bool:
    return isinstance(value, np.ndarray | list)


def _single(value: Any) -> Any:
    """The only one of the values of one row."""
    if isinstance(value, np.ndarray):
        return value.item()
    return value[0] if isinstance(value, list) else value


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
