"""Finds what a forward did several times in a row: the blocks of a model, the turns of a loop.

A run is a stretch of the order of execution that consists of copies of equal length, in which the
operations at corresponding places are alike and wired alike: each input comes from the
corresponding place of the same copy or of the copy before, or from one and the same place before
the run, or, from copy to copy, from places before the run that move on by a constant step (a loop
over what another loop has made), or from leaves that may stand for each other, the same one in all
copies or another one in each. Only into the first copy may values enter from elsewhere that later
copies take from their predecessor.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from gradscope.graphs.ranges import concatenated

if TYPE_CHECKING:
    import numpy.typing as npt

    from gradscope.graphs.execution import Execution
    from gradscope.run.captured_graph import LongIntegers

    Flags = npt.NDArray[np.bool_]

SMALLEST_PAIR: Final = 4
"""How many operations a thing that occurs only twice must have to be drawn once: two boxes that say
``add`` tell more than one that says ``add ×2``."""

_LONGEST_WINDOW: Final = 64
_ALWAYS_TRIED: Final = 8
"""Copies of so few items are looked for even where operations alone do not tell them apart."""

_FEWEST_PERIODS: Final = 4
_MOST_PERIODS: Final = 64
_ITEMS_PER_WINDOW: Final = 200_000
"""For windows of each length so many distances are tried, times the number of items."""

# What the longest runs have left over is searched again, as long as it pays and is soon done.
_SMALLEST_GAIN: Final = 0.02
_MOST_ITEMS_AGAIN: Final = 500_000

# What two corresponding inputs have to do with each other.
_SHIFTED, _CONSTANT, _WALKING, _SAME_LEAF, _OTHER_LEAF, _ENTERING, _DIFFERENT = range(7)


@dataclass(frozen=True, slots=True, order=True)
class Run:
    """Copies of the same thing, one directly after the other.

    Attributes:
        first: the item with which the first copy begins.
        period: how many items a copy has.
        count: how many copies there are.
    """

    first: int
    period: int
    count: int

    @property
    def stop(self) -> int:
        """The item after the last copy."""
        return self.first + self.period * self.count

    @property
    def n_saved(self) -> int:
        """How many items need not be drawn."""
        return self.period * (self.count - 1)


class Wiring:
    """Compares the inputs of operations with those of operations further on.

    Args:
        execution: the order of execution.
        leaf_likeness: int64[p], equal for leaves that may stand for each other.
    """

    def __init__(self, execution: Execution, leaf_likeness: LongIntegers) -> None:
        self.execution = execution
        self.leaf_likeness = leaf_likeness

    def runs(
        self, places: LongIntegers, first: LongIntegers, stop: LongIntegers, period: int
    ) -> tuple[list[Run], set[int]]:
        """Find runs in stretches of items that are known to repeat.

        Args:
            places: int64[k + 1], where each item begins, and where the last one ends.
            first: int64[s], where stretches begin, in ascending order: each item in a stretch is
                like the one ``period`` further on.
            stop: int64[s], where the stretches stop; there are gaps between them.
            period: how many items a copy has.

        Returns:
            The longest run in each part of a stretch in which nothing interrupts it, in order; and
            how many copies would have to be one, where a copy takes from earlier ones than the copy
            before.
        """
        pairs = _Pairs(self, places, first, stop, period)
        walls = np.unique(pairs.target[pairs.is_wall])
        lower = np.sort(np.concatenate([pairs.begin, walls + 1]))
        upper = np.sort(np.concatenate([walls, pairs.end]))
        length = pairs.length[np.searchsorted(pairs.begin, lower, "right") - 1]
        pays = _pays(length, (upper - lower) // length + 1)
        lower, upper, length = lower[pays], upper[pays], length[pays]
        item, part = concatenated(
            np.searchsorted(places, lower), np.searchsorted(places, upper - length, "right")
        )
        start, upper, length = places[item], upper[part], length[part]
        count = (upper - start) // length + 1
        may_begin = _pays(length, count)
        may_begin &= pairs.enter_well(start, upper, length)
        may_begin &= pairs.stay_before(start, upper)
        # Where copies hang together least, one thing ends and the next begins.
        carried = pairs.n_carried(start + length)
        keep = np.flatnonzero(may_begin)
        for score in (count, -carried, -item):
            keep = keep[_is_greatest(score[keep], part[keep])]
        reach = self._reach(start[keep], length[keep], count[keep])
        runs = [
            Run(begin, period, times)
            for begin, times, back, place, extent in zip(
                item[keep].tolist(),
                count[keep].tolist(),
                reach.tolist(),
                start[keep].tolist(),
                length[keep].tolist(),
                strict=True,
            )
            if back <= 1 and self._share_all_or_nothing(place, extent, times)
        ]
        return runs, set(reach[reach > 1].tolist())

    def _share_all_or_nothing(self, start: int, length: int, count: int) -> bool:
        """Whether each leaf of a copy is the same in all copies, or another one in each."""
        at = self.execution.first_input
        leaf = self.execution.leaf[at[start] : at[start + length * count]].reshape(count, -1)
        # What enters the first copy may be a leaf, and in the others is none.
        leaf = np.sort(leaf[:, leaf[1] >= 0], axis=0)
        recurs = leaf[1:] == leaf[:-1]
        return bool((recurs.all(axis=0) | ~recurs.any(axis=0)).all())

    def _reach(
        self, start: LongIntegers, length: LongIntegers, count: LongIntegers
    ) -> LongIntegers:
        """Return how many copies back the last copy of each run takes from, within the run."""
        at = self.execution.first_input
        last = start + length * (count - 1)
        edge, run = concatenated(at[last], at[last + length])
        source = self.execution.source[edge]
        back = -((source - last[run]) // length[run])
        back[source < start[run]] = 0
        reach = np.zeros(len(start), np.int64)
        np.maximum.at(reach, run, back)
        return reach


class _Pairs:
    """The inputs of the operations in some stretches, next to those one copy further on.

    Below, *s* is the number of stretches and *q* of pairs of inputs.

    Attributes:
        begin, end: int64[s], the places that each stretch covers.
        length: int64[s], how many places a copy has in it.
        target: int64[q], the place of the operation with the former input.
        kind: int8[q], what the two have to do with each other.
        is_wall: bool[q], whether the two cannot belong to one run.
    """

    def __init__(
        self,
        wiring: Wiring,
        places: LongIntegers,
        first: LongIntegers,
        stop: LongIntegers,
        period: int,
    ) -> None:
        edges = wiring.execution
        self.begin, self.end = places[first], places[stop]
        self.length = places[first + period] - self.begin
        at = edges.first_input
        low, high = at[self.begin], at[self.end]
        here, stretch = concatenated(low, high)
        shift = (at[self.begin + self.length] - low)[stretch]
        there = here + shift
        self.target = edges.target[here]
        self._length = self.length[stretch]
        self._later_target = edges.target[there]
        self._source, self._later = edges.source[here], edges.source[there]
        # The pair that begins with the later input of this one.
        following = np.arange(len(here)) + shift
        has_following = there < high[stretch]
        following = np.where(has_following, following, 0)

        leaf, later_leaf = edges.leaf[here], edges.leaf[there]
        kind = np.full(len(here), _DIFFERENT, np.int8)
        both = (leaf >= 0) & (later_leaf >= 0)
        likeness = wiring.leaf_likeness
        if both.any():
            kind[both & (likeness[leaf] == likeness[later_leaf])] = _OTHER_LEAF
            kind[both & (leaf == later_leaf)] = _SAME_LEAF
        kind[later_leaf < 0] = _ENTERING
        inner = (leaf < 0) & (later_leaf < 0)
        inner &= edges.source_output[here] == edges.source_output[there]
        step = self._later - self._source
        kind[inner & (step == 0)] = _CONSTANT
        kind[inner & (step == self._length)] = _SHIFTED
        # A step of its own is one only if it is taken twice.
        is_steady = has_following & inner & inner[following] & (step == step[following])
        walks = is_steady.copy()
        walks[following[is_steady]] = True
        kind[walks & (kind == _ENTERING)] = _WALKING
        self.kind = kind

        # Copies that treat an input in different ways are not all copies of one thing.
        after = kind[following]
        changes = (kind != after) & (kind != _ENTERING)
        changes |= (after == _WALKING) & ~is_steady
        self.is_wall = kind == _DIFFERENT
        self.is_wall[following[changes & has_following]] = True

    def enter_well(self, start: LongIntegers, upper: LongIntegers, length: LongIntegers) -> Flags:
        """Tell of each run whether what enters it from elsewhere does so where it may.

        It must come from before the run, in place of something that the second copy takes from the
        first; so it can only enter the first.
        """
        entering = np.flatnonzero(self.kind == _ENTERING)
        target = self.target[entering]
        at, last = np.searchsorted(target, start), np.searchsorted(target, upper) - 1
        does = at <= last
        at, last, begins, ends = at[does], last[does], start[does], (start + length)[does]
        source, later = self._source[entering], self._later[entering]
        enters_well = np.ones(len(start), np.bool_)
        enters_well[does] = (
            (_greatest(source, at, last) < begins)
            & (_greatest(later, at, last) < ends)
            & (-_greatest(-later, at, last) >= begins)
        )
        return enters_well

    def stay_before(self, start: LongIntegers, upper: LongIntegers) -> Flags:
        """Tell of each run whether what does not come from its copies lies before it."""
        staying = np.flatnonzero((self.kind == _CONSTANT) | (self.kind == _WALKING))
        target = self.target[staying]
        at, last = np.searchsorted(target, start), np.searchsorted(target, upper) - 1
        does = at <= last
        source = np.maximum(self._source[staying], self._later[staying])
        stays = np.ones(len(start), np.bool_)
        stays[does] = _greatest(source, at[does], last[does]) < start[does]
        return stays

    def n_carried(self, place: LongIntegers) -> LongIntegers:
        """Return how many values cross each of some places on their way between copies."""
        base = int(self.begin[0])
        comes = (self.kind == _SHIFTED) | (self.kind == _ENTERING)
        comes &= (self._later >= base) & (self._later_target - self._later < 2 * self._length)
        source, target = self._later[comes] - base, self._later_target[comes] - base
        size = int(max(place.max(initial=base) - base, target.max(initial=0))) + 2
        last_use = np.zeros(size, np.int64)
        np.maximum.at(last_use, source, target)
        source = np.flatnonzero(last_use)
        begins, ends = source + 1, last_use[source] + 1
        crossing = np.bincount(begins, minlength=size) - np.bincount(ends, minlength=size)
        return np.cumsum(crossing)[place - base]


def find_runs(likeness: LongIntegers, places: LongIntegers, wiring: Wiring) -> list[Run]:
    """Find the runs among items that follow each other, the longest first where they overlap.

    Args:
        likeness: int64[k], equal for items that are alike; those have equally many places.
        places: int64[k + 1], where each item begins, and where the last one ends.
        wiring: compares inputs.

    Returns:
        Runs that do not overlap, in order.
    """
    is_free = np.ones(len(likeness), np.bool_)
    runs: list[Run] = []
    n_left, n_again, gain = len(likeness), 0, 1.0
    while gain > _SMALLEST_GAIN and n_again <= _MOST_ITEMS_AGAIN:
        item, name = _left_over(likeness, is_free)
        found = []
        periods = _likely_periods(name)
        for period in periods:  # grows while it is walked
            of_period, multiples = _of_period(item, name, period, places, wiring)
            found += of_period
            longer = {period * multiple for multiple in multiples}.difference(periods)
            periods += sorted(each for each in longer if each <= len(item) // 2)
        chosen = _longest_first(found, is_free, places)
        runs += chosen
        gain = sum(run.n_saved for run in chosen) / max(1, n_left)
        n_left = int(is_free.sum())
        n_again += n_left
    return sorted(runs)


def _left_over(likeness: LongIntegers, is_free: Flags) -> tuple[LongIntegers, LongIntegers]:
    """Return the items that belong to no run, and numbers that are equal where they are alike.

    Between two pieces of them stands an item that is like no other.
    """
    is_kept = is_free.copy()
    is_kept[1:] |= is_free[:-1]
    item = np.flatnonzero(is_kept)
    _, name = np.unique(likeness[item], return_inverse=True)
    walls = np.flatnonzero(~is_free[item])
    name[walls] = len(item) + np.arange(len(walls))
    return item, name.astype(np.int64)


def _of_period(
    item: LongIntegers, name: LongIntegers, period: int, places: LongIntegers, wiring: Wiring
) -> tuple[list[Run], set[int]]:
    first, stop = _stretches(name[:-period] == name[period:])
    is_long = stop - first >= period
    first, stop = item[first[is_long]], item[stop[is_long] - 1] + 1
    pays = _pays(places[first + period] - places[first], (stop - first) // period + 1)
    if not pays.any():
        return [], set()
    return wiring.runs(places, first[pays], stop[pays], period)


def _longest_first(found: list[Run], is_free: Flags, places: LongIntegers) -> list[Run]:
    """Choose runs that do not overlap, the longest first, and mark their items as taken."""
    queue = [(-run.n_saved, run.first, run.period, run.count) for run in found]
    heapq.heapify(queue)
    chosen = []
    while queue:
        _, first, period, count = heapq.heappop(queue)
        free = is_free[first : first + period * count]
        if free.all():
            chosen.append(Run(first, period, count))
            free[:] = False
            continue
        # What other runs have left of it, in whole copies.
        is_whole = free.reshape(count, period).all(axis=1)
        if not is_whole.any():
            continue
        n_places = int(places[first + period] - places[first])
        for lower, upper in zip(*(ends.tolist() for ends in _stretches(is_whole)), strict=True):
            if _pays(n_places, upper - lower):
                rest = Run(first + lower * period, period, upper - lower)
                heapq.heappush(queue, (-rest.n_saved, rest.first, period, rest.count))
    return chosen


def _stretches(flags: Any) -> tuple[LongIntegers, LongIntegers]:
    """Return where the stretches of set flags begin and where they stop."""
    padded = np.zeros(len(flags) + 2, np.bool_)
    padded[1:-1] = flags
    ends = np.flatnonzero(padded[1:] != padded[:-1])
    return ends[::2], ends[1::2]


def _likely_periods(name: LongIntegers) -> list[int]:
    """Return distances at which items recur often, also where each item by itself is ambiguous.

    Windows of one, two, four … items are told apart, as in the construction of a suffix array by
    doubling (Manber and Myers, 1993), and the distance from each to its last occurrence counted.
    """
    n_items = len(name)
    periods = set(range(1, min(_ALWAYS_TRIED, n_items // 2) + 1))
    n_periods = max(_FEWEST_PERIODS, min(_MOST_PERIODS, _ITEMS_PER_WINDOW // max(1, n_items)))
    window = 1
    while window <= min(_LONGEST_WINDOW, n_items // 2):
        by_name = np.argsort(name, kind="stable")
        is_new = np.diff(name[by_name], prepend=-1) != 0
        distance = np.diff(by_name)[~is_new[1:]]
        if not len(distance):
            break
        how_often = np.bincount(distance[distance <= n_items // 2])
        how_often[[d for d in periods if d < len(how_often)]] = 0
        commonest = np.argsort(-how_often, kind="stable")[:n_periods]
        periods.update(int(d) for d in commonest if how_often[d])
        number = np.empty(n_items, np.int64)
        number[by_name] = np.cumsum(is_new)
        name = number[:-window] * (n_items + 1) + number[window:]
        n_items, window = n_items - window, 2 * window
    return sorted(periods)


def _pays(n_places: Any, count: Any) -> Any:
    """Whether copies of so many places are worth being drawn once, for numbers and for arrays."""
    return (count > 2) | ((count == 2) & (n_places >= SMALLEST_PAIR))


def _greatest(values: Any, first: LongIntegers, last: LongIntegers) -> Any:
    """Return, for each range, the greatest value from ``first`` to ``last``, which is included."""
    greatest = values[first]
    width = 1
    while len(wide := np.flatnonzero(last - first + 1 >= width)):
        # Two ranges as wide as a power of two cover any that is not twice as wide.
        greatest[wide] = np.maximum(values[first[wide]], values[last[wide] - width + 1])
        values = np.maximum(values[:-width], values[width:])
        width *= 2
    return greatest


def _is_greatest(score: LongIntegers, part: LongIntegers) -> Flags:
    """Tell which scores are the greatest of their part; parts follow each other."""
    begins = np.flatnonzero(np.diff(part, prepend=-1))
    if not len(part):
        return np.zeros(0, np.bool_)
    greatest = np.maximum.reduceat(score, begins)
    return np.asarray(score == np.repeat(greatest, np.diff(begins, append=len(part))))
