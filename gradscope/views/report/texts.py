"""A column of few different texts, without comparing a text in every row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from gradscope.run.columns import Columns


def coded_texts(rows: Columns, column: str) -> tuple[npt.NDArray[Any], list[str]]:
    """Return the texts of a column as numbers.

    Returns:
        integers[n], and the text of each number; empty for one that does not occur.
    """
    codes = rows.array(column)
    if not len(codes):
        return codes, []
    first = np.full(int(codes.max()) + 1, -1, np.int64)
    first[codes[::-1]] = np.arange(len(codes) - 1, -1, -1)
    texts = rows.texts(column)
    return codes, [str(texts[row]) if row >= 0 else "" for row in first.tolist()]
