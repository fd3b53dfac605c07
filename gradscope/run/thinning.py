"""Which rows are forgotten when a run has become too long for memory.

Two kinds of rows belong to a step. The *light* ones are a handful, however large the model: those
of ``steps``, ``groups``, ``backwards`` and ``events``. The *heavy* ones are one or more for each
parameter: ``grads``, ``state``, ``moments`` and ``updates``. Heavy rows go first, all of one step
together; light rows go only once they alone would fill half of the memory, and a step that loses
them has lost its heavy ones before. So rules that follow the loop from step to step see every step
of all but the longest runs.

What stays: the first and the last steps; the suspicious ones, which are told by structural facts
(see :func:`_suspicious`); and of all others as many as fit, spread evenly over the run, for each
optimizer and for recorded and other steps apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gradscope.run.columns import MISSING, Columns

MOST_ROW_BYTES = 256 * 2**20
"""What the rows of all tables may take in memory; beyond that rows of some steps are forgotten."""

HEAVY = ("grads", "state", "moments", "updates")
LIGHT = ("steps", "groups")
OF_STEPS = (*LIGHT, *HEAVY)
"""Tables all of whose rows come when a step ends."""

_FIRST = 64
"""So many first steps stay, and as many last ones."""

_STATUSES = ("none", "fresh", "accumulated", "compounded", "stale", "assigned", "zeroed")
_OF_EVERY_STEP = ("zero_grad", "clip", "unscale", "scale_update", "scheduler", "mode")
"""Events that a loop brings about at each step; others are rare, and stay."""

_BEGINNING = "of the first"

Steps = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Thinning:
    """What memory holds of a run.

    Attributes:
        before: of the steps before this one only some are held; all of those from it on are.
        light: int64[k], the steps before it that are held, in order.
        heavy: int64[l], those among them whose heavy rows are held too.
    """

    before: int
    light: Steps
    heavy: Steps

    def as_plain(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {
            "before": self.before,
            "light": self.light.tolist(),
            "heavy": self.heavy.tolist(),
        }

    @classmethod
    def of_plain(cls, plain: Any) -> Thinning:
        """Return what :meth:`as_plain` has given.

        Raises:
            ValueError, TypeError, KeyError: if it is something else.
        """
        if type(plain["before"]) is not int:
            raise ValueError("before is no number")
        light, heavy = (np.array(plain[name], np.int64) for name in ("light", "heavy"))
        return cls(plain["before"], light, heavy)

    def holds(self, steps: npt.NDArray[Any], *, heavy: bool) -> npt.NDArray[np.bool_]:
        """Return bool[n], of which of these steps memory holds the light, or heavy, rows."""
        held = self.heavy if heavy else self.light
        return (steps >= self.before) | np.isin(steps, held)

    def in_words(self) -> str:
        """Say what is missing, for people."""
        text = (
            f"{_BEGINNING} {self.before:,} steps memory holds the rows of grads, state, moments "
            f"and updates for {len(self.heavy):,} only"
        )
        if len(self.light) < self.before:
            text += f", and those of steps, groups and backwards for {len(self.light):,}"
        return f"{text}; findings count the steps that are held"


def thin(
    columns: Mapping[str, Columns],
    most_bytes: int,
    graphs: Iterable[int],
    earlier: Thinning | None,
) -> Thinning:
    """Forget rows until at most half of ``most_bytes`` are taken by heavy rows, and by light ones.

    Args:
        columns: the stored rows by table; rows are removed from them.
        most_bytes: what they may take.
        graphs: steps whose graph was captured, which stay.
        earlier: what was forgotten before.

    Returns:
        What is held now.
    """
    steps = columns["steps"]
    numbers = steps.array("step").copy()
    if not len(numbers):
        return earlier or Thinning(0, np.zeros(0, np.int64), np.zeros(0, np.int64))
    before = int(numbers[-1]) + 1
    was_heavy = (
        np.ones(len(numbers), np.bool_) if earlier is None else earlier.holds(numbers, heavy=True)
    )
    suspicious = _suspicious(columns) | np.isin(numbers, list(graphs))
    classes = 2 * steps.array("optimizer") + steps.array("recorded")
    heavy_bytes = sum(columns[table].n_bytes for table in HEAVY)
    light_bytes = sum(c.n_bytes for name, c in columns.items() if name not in HEAVY)

    share = min(1.0, most_bytes / 4 / max(1, heavy_bytes))
    keeps_heavy = was_heavy.copy()
    keeps_heavy[was_heavy] = _chosen(
        numbers[was_heavy], suspicious[was_heavy], classes[was_heavy], share
    )
    keeps_light = np.ones(len(numbers), np.bool_)
    if light_bytes > most_bytes / 2:
        keeps_light = _chosen(numbers, suspicious, classes, most_bytes / 4 / light_bytes)
        keeps_heavy &= keeps_light
    found = Thinning(before, numbers[keeps_light], numbers[keeps_heavy])

    kept = {table: np.isin(columns[table].array("step"), found.heavy) for table in HEAVY}
    if not keeps_light.all():
        for table in LIGHT:
            kept[table] = np.isin(columns[table].array("step"), found.light)
        for table in ("backwards", "events"):
            kept[table] = is_held(table, columns[table], found)
    for table, wanted in kept.items():
        columns[table].keep(wanted)
    return found


def is_of_thinning(note: str) -> bool:
    """Whether a note was made by :meth:`Thinning.in_words`."""
    return note.startswith(_BEGINNING)


def is_held(table: str, columns: Columns, thinning: Thinning) -> npt.NDArray[np.bool_]:
    """Return bool[n], which rows of ``backwards`` or ``events`` memory is to hold."""
    if table == "backwards":
        return thinning.holds(owners_of(columns), heavy=False)
    held = thinning.holds(columns.array("step"), heavy=False)
    return held | ~np.isin(columns.texts("event"), _OF_EVERY_STEP)


def choose(steps: Columns, graphs: Iterable[int], share: float) -> Thinning:
    """Choose of which steps memory is to hold the heavy rows, knowing nothing but ``steps``."""
    numbers = steps.array("step")
    suspicious = _suspicious({"steps": steps}) | np.isin(numbers, list(graphs))
    classes = 2 * steps.array("optimizer") + steps.array("recorded")
    chosen = _chosen(numbers, suspicious, classes, share)
    before = int(numbers[-1]) + 1 if len(numbers) else 0
    return Thinning(before, numbers.copy(), numbers[chosen])


def owners_of(backwards: Columns) -> Steps:
    """Return int64[n], the step that each backward goes with: its own, or else the next known."""
    owners: Steps = backwards.array("step").copy()
    nobody = np.iinfo(np.int64).max
    owners[owners == MISSING] = nobody
    result: Steps = np.minimum.accumulate(owners[::-1])[::-1]
    return result


def _chosen(
    numbers: Steps, suspicious: npt.NDArray[np.bool_], classes: npt.NDArray[Any], share: float
) -> npt.NDArray[np.bool_]:
    """Choose a share of some steps: bool[n]."""
    n = len(numbers)
    most = max(int(share * n), 2)
    chosen = np.zeros(n, np.bool_)
    ends = min(_FIRST, most // 4)
    if ends:
        chosen[:ends] = chosen[-ends:] = True
    # Half of those: the first of an ailment say more than its thousandth.
    at = np.flatnonzero(suspicious & ~chosen)[: most // 4]
    chosen[at] = True
    left = most - int(chosen.sum())
    others = np.flatnonzero(~chosen)
    for each in np.unique(classes[others]) if left > 0 else ():
        own = others[classes[others] == each]
        n_own = max(1, round(left * len(own) / len(others)))
        wanted = np.linspace(numbers[own[0]], numbers[own[-1]], n_own)
        chosen[own[np.clip(np.searchsorted(numbers[own], wanted), 0, len(own) - 1)]] = True
    return chosen


def _suspicious(columns: Mapping[str, Columns]) -> npt.NDArray[np.bool_]:
    """Tell which steps are not like the others: bool[n], by row of ``steps``.

    Their outcome is not ``stepped``; the gradient norm or the loss is not finite, or a gradient has
    an element that is not; or their gradients have other statuses than those of the step of the
    same optimizer before.
    """
    steps = columns["steps"]
    numbers = steps.array("step")
    found = steps.texts("outcome") != "stepped"
    found |= ~np.isfinite(steps.array("grad_norm"))
    found |= ~np.isfinite(steps.array("loss")) & (steps.array("n_backward") > 0)
    if "grads" in columns:
        grads = columns["grads"]
        found |= np.isin(numbers, grads.array("step")[grads.array("nonfinite") > 0])
    statuses = np.stack([steps.array(f"n_{name}") for name in _STATUSES])
    for optimizer in np.unique(steps.array("optimizer")):
        own = np.flatnonzero(steps.array("optimizer") == optimizer)
        changed = (statuses[:, own[1:]] != statuses[:, own[:-1]]).any(0)
        found[own[1:]] |= changed
    result: npt.NDArray[np.bool_] = found
    return result
