"""The checksums of several ranks, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from gradscope.run.columns import MISSING
from gradscope.run.recording import Recording


@dataclass(slots=True)
class Attempt:
    """One attempt of an optimizer as several ranks began it.

    Attributes:
        optimizer: its name.
        number: of the attempt, since the watch began.
        steps: its step by rank.
        weights: checksums by parameter and rank; ranks that hold but a part are left out.
        gradients: likewise; ranks that have none are left out.
    """

    optimizer: str
    number: int
    steps: dict[int, int] = field(default_factory=dict)
    weights: dict[str, dict[int, int]] = field(default_factory=dict)
    gradients: dict[str, dict[int, int]] = field(default_factory=dict)

    @property
    def first_step(self) -> int:
        """The step of the least rank."""
        return self.steps[min(self.steps)]

    def of_rank(self, rank: int) -> dict[str, int]:
        """Return the checksums of all gradients of a rank by parameter."""
        return {param: found[rank] for param, found in self.gradients.items() if found.get(rank)}

    def ranks_by_gradients(self) -> list[list[int]]:
        """Return the ranks that have the very same gradients, of several parameters or of one.

        Gradients of zeros say nothing.
        """
        alike: dict[frozenset[tuple[str, int]], list[int]] = {}
        for rank in sorted(self.steps):
            own = self.of_rank(rank)
            if own:
                alike.setdefault(frozenset(own.items()), []).append(rank)
        return [ranks for ranks in alike.values() if len(ranks) > 1]

    def unequal(self, ranks: list[int]) -> list[str]:
        """Return the parameters that differ between some ranks."""
        return [
            param
            for param, found in self.weights.items()
            if len({found[rank] for rank in ranks if rank in found}) > 1
        ]


def groups(run: Recording) -> list[dict[int, Recording]]:
    """Return the processes of a run that train together, each group by rank within it.

    A program may begin one group after the other; the first to hold a rank belong together.
    """
    found: list[dict[int, Recording]] = []
    for recording in run.ranks.values():
        if recording.world_size < 2:
            continue
        for group in found:
            other = next(iter(group.values()))
            if recording.rank_in_group not in group and other.world_size == recording.world_size:
                group[recording.rank_in_group] = recording
                break
        else:
            found.append({recording.rank_in_group: recording})
    return [group for group in found if len(group) > 1]


def attempts(group: dict[int, Recording]) -> list[Attempt]:
    """Return the attempts that several ranks have begun, in order."""
    found: dict[tuple[str, int], Attempt] = {}
    for rank, recording in sorted(group.items()):
        for optimizer, number, step, param, weight, gradient in _rows(recording):
            key = (optimizer, number)
            attempt = found.setdefault(key, Attempt(optimizer, number))
            attempt.steps[rank] = step
            if weight != MISSING:
                attempt.weights.setdefault(param, {})[rank] = weight
            if gradient != MISSING:
                attempt.gradients.setdefault(param, {})[rank] = gradient
    several = [attempt for attempt in found.values() if len(attempt.steps) > 1]
    return sorted(several, key=lambda attempt: (attempt.number, attempt.first_step))


def _rows(recording: Recording) -> Iterator[tuple[str, int, int, str, int, int]]:
    rows = recording.rows("checksums")
    if not rows.n_rows:
        return
    names = [entry.name for entry in recording.parameters]
    optimizers = [entry.name for entry in recording.optimizers]
    # A run that was gone on with counts attempts anew: its last start is compared.
    events = recording.rows("events")
    seams = events.array("step")[events.texts("event") == "seam"]
    begins = int(seams.max()) if len(seams) else 0
    columns = ("optimizer", "attempt", "step", "param", "weight", "gradient")
    for optimizer, number, step, param, weight, gradient in zip(
        *(rows.array(name).tolist() for name in columns), strict=True
    ):
        is_known = 0 <= optimizer < len(optimizers) and 0 <= param < len(names)
        if is_known and step >= begins:
            yield optimizers[optimizer], number, step, names[param], weight, gradient


def replicas_in(group: dict[int, Recording]) -> dict[str, tuple[int, ...]]:
    """Return the ranks that torch's own wrapper keeps alike, by parameter.

    Only where all of these ranks say so that are there.
    """
    found: dict[str, tuple[int, ...]] = {}
    claims: dict[str, dict[int, tuple[int, ...]]] = {}
    for rank, recording in group.items():
        for entry in recording.parameters:
            if entry.replicas:
                claims.setdefault(entry.name, {})[rank] = entry.replicas
    for param, by_rank in claims.items():
        ranks = tuple(sorted(by_rank))
        if len(ranks) > 1 and len(set(by_rank.values())) == 1:
            found[param] = ranks
    return found
