"""How the loss of an optimizer's steps went, in a few robust numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class LossTrend:
    """The loss at the beginning and at the end.

    Attributes:
        first: median over the first fifth of the steps.
        last: median over the last fifth; NaN if most of it is not finite.
        spread: how far single losses scatter: half the interquartile range of both ends.
        n_nonfinite: steps with a loss that is NaN or infinite, after a first finite one.
    """

    first: float
    last: float
    spread: float
    n_nonfinite: int


def loss_trend(own: pd.DataFrame) -> LossTrend | None:
    """Return the trend over some rows of ``steps``; None where there is no scalar loss at first."""
    losses = own.sort_values("step")["loss"].to_numpy(np.float64)
    if not len(losses) or not np.isfinite(losses[0]):
        return None
    n = max(1, len(losses) // 5)
    begin, end = losses[:n], losses[-n:]
    finite_begin, finite_end = begin[np.isfinite(begin)], end[np.isfinite(end)]
    last = float(np.median(finite_end)) if 2 * len(finite_end) > len(end) else float("nan")
    spreads = [
        float(np.subtract(*np.percentile(part, [75, 25]))) / 2
        for part in (finite_begin, finite_end)
        if len(part) > 3
    ]
    return LossTrend(
        first=float(np.median(finite_begin)),
        last=last,
        spread=max(spreads, default=0.0),
        n_nonfinite=int((~np.isfinite(losses)).sum()),
    )


def update_ratios(own: pd.DataFrame) -> pd.Series[float]:
    """Return update_norm / weight_norm of the recorded steps among some rows of ``steps``."""
    ratios = own["update_norm"] / own["weight_norm"]
    return ratios.loc[own["update_norm"].notna() & (own["weight_norm"] > 0)]
