"""The first step at which rows that both runs have hold other numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradscope.comparison.difference import Fact
from gradscope.comparison.numbers import relative
from gradscope.comparison.pair import Joined

_MOST_FACTS = 3

_WORDS = {
    "weight_norm_before": "norm",
    "weight_norm_after": "norm",
    "norm_before_clipping": "norm",
    "update_norm": "norm",
    "abs_max": "greatest magnitude",
}


@dataclass(frozen=True, slots=True)
class Apart:
    """The rows of one step that differ.

    Attributes:
        step: the number of the step.
        rows: int64[k], their places among the joined rows.
        n_compared: how many rows of that step were compared.
        relative: by column float64[n], how far apart the values of all joined rows are; infinite
            for other texts.
        rtol: float64[n], what was passed over in each row.
    """

    step: int
    rows: Any
    n_compared: int
    relative: Mapping[str, Any]
    rtol: Any

    def columns(self, row: int) -> list[str]:
        """Return the columns in which a row differs."""
        return [name for name, apart in self.relative.items() if apart[row] > self.rtol[row]]

    def furthest(self, row: int) -> float:
        """Return how far apart the numbers of a row are, at most."""
        return max(float(apart[row]) for apart in self.relative.values())

    def facts(self, joined: Joined, row: int, name: str = "") -> list[Fact]:
        """Return a few columns of a row that differ, as evidence."""
        return [
            fact_of(joined, column, row, f"{name} {word_of(column)}".strip(), apart[row])
            for column, apart in self.relative.items()
            if apart[row] > self.rtol[row]
        ][:_MOST_FACTS]


def first_apart(
    joined: Joined,
    columns: Mapping[str, Any],
    rtol: Any,
    *,
    within: Any = None,
    texts: tuple[str, ...] = (),
) -> Apart | None:
    """Return the first step at which any column differs; None if none does.

    Args:
        joined: the rows.
        columns: for each column of numbers what its values are a part of, real[n], or None.
        rtol: which relative differences are passed over, in all rows or real[n] in each.
        within: bool[n], which rows to look at; all by default.
        texts: columns of which every difference counts.
    """
    apart = {name: relative(*joined.column(name), scale) for name, scale in columns.items()}
    for name in texts:
        a, b = joined.column(name)
        apart[name] = np.where(np.asarray(a != b, np.bool_), np.inf, 0.0)
    if not len(joined):
        return None
    rtol = np.broadcast_to(np.asarray(rtol, np.float64), len(joined))
    anywhere = np.logical_or.reduce([each > rtol for each in apart.values()])
    looked_at = np.ones(len(joined), np.bool_) if within is None else within
    anywhere &= looked_at
    if not anywhere.any():
        return None
    step = int(joined.step[anywhere].min())
    at_step = joined.step == step
    return Apart(
        step, np.flatnonzero(anywhere & at_step), int((looked_at & at_step).sum()), apart, rtol
    )


def word_of(column: str) -> str:
    """Return what a column is called where the stage is told already."""
    return _WORDS.get(column, column.replace("_", " "))


def fact_of(joined: Joined, column: str, row: int, what: str, apart: float | None = None) -> Fact:
    """Return one value of a row in both runs."""
    a, b = (side[row] for side in joined.column(column))
    if isinstance(a, str):
        return Fact(what, a, b)
    if apart is None:
        apart = float(relative(a, b))
    return Fact(what, a.item(), b.item(), float(apart))
