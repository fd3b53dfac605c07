"""Which gradients were not finite, and which steps have used them."""

from __future__ import annotations

import bisect
import math
from typing import TYPE_CHECKING

from gradscope.rules.facts import first_unread

if TYPE_CHECKING:
    import pandas as pd

    from gradscope.run.recording import Recording


def nonfinite_gradients(run: Recording) -> pd.DataFrame:
    """Return the rows of ``grads`` that hold a NaN or an infinity; none if no norm was read."""
    grads = run.frame("grads")
    # Elements are counted on recorded steps; of the others the norm tells.
    there = grads["status"] != "none"
    was_read = grads["norm"].notna() | (grads["step"] < first_unread(run))
    is_finite = grads["norm"].map(math.isfinite)
    if not is_finite[there].any() and not (grads["nonfinite"] > 0).any():
        return grads.head(0)
    return grads.loc[there & ((grads["nonfinite"] > 0) | (was_read & ~is_finite))]


def passed_over(run: Recording, own: pd.DataFrame, bad: pd.DataFrame) -> set[int]:
    """Return the steps whose gradients were not finite and did the weights no harm.

    No arithmetic makes a number of a NaN again: where the weights are finite at the next recorded
    step, and nothing but the optimizer wrote them, it has passed such gradients over. Of one that
    does so the same is believed where no recorded step follows.

    Args:
        run: the run.
        own: rows of ``steps`` of one optimizer.
        bad: rows of ``grads`` that are not finite.
    """
    used = own.loc[own["outcome"] == "stepped", "step"]
    bad = bad.loc[bad["step"].isin(used)]
    updates = run.frame("updates")
    updates = updates.loc[updates["optimizer"].isin(own["optimizer"])]
    finite = updates.loc[updates["weight_norm_after"].map(math.isfinite)]
    if bad.empty or not (finite["step"] >= bad["step"].min()).any():
        return set()  # as in most runs, whether all is well or all is lost
    intact = finite.groupby("step")["param"].agg(set).to_dict()
    recorded = sorted(set(updates["step"]))
    written = sorted(own.loc[own["written_between"] > 0, "step"])
    harmless: set[int] = set()
    unknown: set[int] = set()
    of_step: dict[int, set[str]] = {}
    for step, param in zip(bad["step"], bad["param"], strict=True):
        of_step.setdefault(step, set()).add(param)
    for step, affected in of_step.items():
        at = bisect.bisect_left(recorded, step)
        if at == len(recorded):
            unknown.add(step)
        elif affected <= intact.get(recorded[at], set()):
            is_written = bisect.bisect(written, recorded[at]) > bisect.bisect(written, step)
            harmless |= set() if is_written else {step}
    return harmless | unknown if harmless else set()
