"""Ranges of numbers, many at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from gradscope.run.captured_graph import LongIntegers


def concatenated(first: LongIntegers, stop: LongIntegers) -> tuple[LongIntegers, LongIntegers]:
    """Return the numbers in all ranges, one range after the other, and the range of each."""
    length = np.maximum(stop - first, 0)
    of_range = np.repeat(np.arange(len(first)), length)
    begins = np.cumsum(length) - length
    return np.arange(len(of_range)) + (first - begins)[of_range], of_range
