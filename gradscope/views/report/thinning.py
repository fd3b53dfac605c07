"""Fewer steps than there were, where more could not be told apart on a screen."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]


def thinned_rows(series: list[Reals], most: int) -> Integers:
    """Return which rows of some series to draw, so that no peak is lost.

    Args:
        series: real[n] each; of every stretch of rows the least and the greatest value stay, and
            one that is not finite, if there is any.
        most: about how many rows are wanted; up to so many all stay.

    Returns:
        int64[k], in ascending order, the first and the last row among them.
    """
    n = len(series[0]) if series else 0
    if n <= most:
        return np.arange(n)
    kept = {0, n - 1}
    edges = np.linspace(0, n, max(1, most // (2 * len(series))) + 1).astype(np.int64)
    for values in series:
        finite = np.isfinite(values)
        for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            known = start + np.flatnonzero(finite[start:stop])
            if len(known):
                kept |= {
                    int(known[values[known].argmin()]),
                    int(known[values[known].argmax()]),
                }
            # A series that is never known, such as a norm before clipping, says nothing.
            if 0 < len(known) < stop - start:
                kept.add(start + int(np.flatnonzero(~finite[start:stop])[0]))
    return np.array(sorted(kept), np.int64)


def bins_of(n: int, most: int) -> Integers:
    """Return where each of at most ``most`` neighbouring, equally long stretches of n rows begins.

    Returns:
        int64[k + 1]; stretch i goes from entry i up to, and not including, entry i + 1.
    """
    length = max(1, -(-n // most))
    return np.append(np.arange(0, n, length), n).astype(np.int64)


def spread(values: npt.NDArray[Any], most: int) -> npt.NDArray[Any]:
    """Return at most ``most`` of some values, evenly spread, the first three and the last kept."""
    if len(values) <= most:
        return values
    dense = min(3, most - 1)
    later = np.linspace(dense, len(values) - 1, most - dense).round().astype(np.int64)
    kept: npt.NDArray[Any] = values[np.unique(np.concatenate([np.arange(dense), later]))]
    return kept
