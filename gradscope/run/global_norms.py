"""Norms of whole parameters from what each rank has recorded of its part."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import pandas as pd

NORMS = {
    "grads": ("norm", "norm_before_clipping"),
    "updates": ("weight_norm_before", "weight_norm_after", "update_norm"),
}
"""The columns of tables that are norms over the elements of a parameter."""

_PLACEMENT = re.compile(r"(\w+)\([^)]*\) of (\d+)")


def global_norms(run: Recording, table: str) -> pd.DataFrame:
    """Return the norms of whole parameters at every step at which all ranks have recorded theirs.

    The squares of the parts are added up; of a parameter that every rank holds as a whole the first
    rank's norm is taken.

    Args:
        run: with all its ranks.
        table: ``grads`` or ``updates``.

    Returns:
        A row per step and parameter: ``step``, ``param``, and the columns of :data:`NORMS`.
    """
    import pandas as pd

    columns = list(NORMS[table])
    frames = []
    for rank, recording in run.ranks.items():
        frame = recording.frame(table)[["step", "param", *columns]].assign(rank=rank)
        spread = {entry.name: _spread(entry.placements) for entry in recording.parameters}
        held = [spread.get(name, (1, 1)) for name in frame["param"]]
        frame["n_ranks"] = [n_ranks for n_ranks, _ in held]
        frame["n_copies"] = [n_copies for _, n_copies in held]
        frames.append(frame)
    rows = pd.concat(frames, ignore_index=True)
    whole = rows.loc[rows["n_ranks"] == 1].drop_duplicates(["step", "param"])
    parts = rows.loc[rows["n_ranks"] > 1].copy()
    parts[columns] = parts[columns] ** 2
    # A part of no elements has no norm, and adds nothing.
    together = parts.groupby(["step", "param"], sort=False)
    sums = together[columns].sum(min_count=1)
    counts = together[["n_ranks", "n_copies"]].first()
    is_there = together.size() == counts["n_ranks"]
    sums = (sums.div(counts["n_copies"], axis=0) ** 0.5).loc[is_there].reset_index()
    found = pd.concat([whole[["step", "param", *columns]], sums], ignore_index=True)
    order = {entry.name: n for n, entry in enumerate(run.parameters)}
    places = found["param"].map(lambda name: order.get(name, len(order)))
    found["place"] = places
    ordered: pd.DataFrame = found.sort_values(["step", "place"], kind="stable", ignore_index=True)
    return ordered.drop(columns="place")


def _spread(placements: str) -> tuple[int, int]:
    """Over how many ranks a parameter is spread, and how many of them hold the same part."""
    n_ranks = n_copies = 1
    for kind, size in _PLACEMENT.findall(placements):
        n_ranks *= int(size)
        n_copies *= int(size) if kind == "Replicate" else 1
    return n_ranks, n_copies
