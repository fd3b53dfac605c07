"""GS801: ranks that are meant to hold the same weights do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gradscope.rules.distributed.comparison import Attempt, attempts, groups, replicas_in
from gradscope.rules.facts import listed
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.ranks import listed_ranks
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording


class RanksOutOfSync(Rule):
    """GS801 ranks-out-of-sync: ranks average their gradients over different weights.

    ## What it finds

    Processes of one group that are meant to hold the same weights and do not: the gradients with
    which they step are the same to the last bit, so somebody averages them, or
    `DistributedDataParallel` holds the weights; yet the weights differ.

    ## Why it matters

    A gradient averaged over different weights belongs to none of them. Each rank trains a model of
    its own with gradients that are mostly of others, and what rank 0 saves is one of them. Nothing
    fails, and every rank's loss may fall.

    ## How it is found

    Each rank writes down a checksum of every weight and gradient at the beginning of an optimizer's
    steps 0, 1, 2, 4, 8 …, without a word to the others; they are compared afterwards. Equal
    numbers mean equal bits. With `watch(sync_every=n)` they are compared while they train, at every
    n-th step.

    ## Example

        torch.manual_seed(42 + rank)
        model = make_model()                       # other weights on every rank
        ...
        for p in model.parameters():
            dist.all_reduce(p.grad)                # and the same gradients

    ## Fix

        model = DistributedDataParallel(model)     # broadcasts rank 0's weights

    or, without the wrapper, `dist.broadcast(p.data, src=0)` for each parameter before the loop.

    ## When it is wrong

    Where ranks are to differ (shards, pipelines, local steps between averages, models that are
    trained independently) their gradients differ too, and nothing is said.
    """

    code = "GS801"
    name = "ranks-out-of-sync"
    severity = Severity.ERROR
    tables = ("checksums", "groups", "params", "events")
    symptom_of = ("GS802", "GS803")
    compares_ranks = True

    def check(self, run: Recording) -> list[Finding]:
        """Return at most one finding per group of processes and optimizer."""
        findings = []
        for group in groups(run):
            apart: dict[str, list[_Apart]] = {}
            for each in _apart(group):
                apart.setdefault(each.attempt.optimizer, []).append(each)
            findings += [self._finding(group, found) for found in apart.values()]
        return findings or self._told_live(run)

    def _told_live(self, run: Recording) -> list[Finding]:
        """What the ranks have told each other while they trained (``sync_every``)."""
        events = run.frame("events")
        told = events.loc[events["event"] == "out_of_sync"]
        return [
            self.finding(
                message=(
                    f"the weights of {optimizer} differ between ranks {rows['detail'].iloc[0]} at "
                    f"step {rows['step'].iloc[0]}, where they are meant to be the same"
                ),
                fix="give all ranks the same weights before the loop, and average all gradients: "
                "wrap the model in DistributedDataParallel and call the wrapper. Recorded to one "
                "directory (save=), the ranks tell which parameters differ, and since when",
                optimizer=str(optimizer),
                step_first=int(rows["step"].iloc[0]),
                step_last=int(rows["step"].iloc[-1]),
                count=len(rows),
                evidence={"ranks": str(rows["detail"].iloc[0]), "compared_while_it_ran": True},
            )
            for optimizer, rows in told.groupby("subject", sort=False)
        ]

    def _finding(self, group: dict[int, Recording], found: list[_Apart]) -> Finding:
        first = found[0]
        attempt, ranks, params = first.attempt, first.ranks, first.params
        why, fix = _cause(group, first)
        differ = "differs" if len(params) == 1 else "differ"
        return self.finding(
            message=f"{listed(params)} {differ} {_between(first)}: {why}",
            fix=fix,
            params=tuple(params),
            optimizer=attempt.optimizer,
            step_first=attempt.first_step,
            step_last=found[-1].attempt.first_step,
            count=len(found),
            evidence={
                "first_step": attempt.first_step,
                "ranks": listed_ranks(ranks),
                "differing_parameters": len(params),
                "gradients_are_the_same": first.have_one_gradient,
                "compared_steps_that_differ": len(found),
            },
        )


@dataclass(frozen=True, slots=True)
class _Apart:
    """An attempt that ranks began with other weights than they are meant to.

    Attributes:
        attempt: the attempt.
        ranks: the ranks that are meant to agree.
        params: the parameters in which they do not.
    """

    attempt: Attempt
    ranks: list[int]
    params: list[str]

    @property
    def have_one_gradient(self) -> bool:
        """Whether all of these ranks step with the same gradients."""
        return self.ranks in self.attempt.ranks_by_gradients()


def _apart(group: dict[int, Recording]) -> Iterator[_Apart]:
    """Attempts that ranks began with other weights than they are meant to, in order."""
    replicas = replicas_in(group)
    for attempt in attempts(group):
        meant: list[tuple[list[int], set[str] | None]] = [
            (ranks, None) for ranks in attempt.ranks_by_gradients()
        ]
        for held in dict.fromkeys(replicas.values()):
            own = {param for param, ranks in replicas.items() if ranks == held}
            meant.append(([rank for rank in held if rank in attempt.steps], own))
        for ranks, only in meant:
            params = [p for p in attempt.unequal(ranks) if only is None or p in only]
            if params:
                yield _Apart(attempt, ranks, params)
                break


def _between(apart: _Apart) -> str:
    """Which ranks differ from which, in words."""
    found = apart.attempt.weights[apart.params[0]]
    alike: dict[int, list[int]] = {}
    for rank in apart.ranks:
        if rank in found:
            alike.setdefault(found[rank], []).append(rank)
    most = max(alike.values(), key=len)
    others = [rank for rank in apart.ranks if rank in found and rank not in most]
    if 2 * len(most) <= len(apart.ranks) or len(apart.ranks) == 2:
        return f"between {listed_ranks(apart.ranks)}"
    return f"on {listed_ranks(others)} from those of {listed_ranks(most)}"


def _cause(group: dict[int, Recording], apart: _Apart) -> tuple[str, str]:
    """Why, in words, and what to change."""
    attempt = apart.attempt
    if attempt.number == 0:
        averaged = ", and their gradients are averaged all the same"
        return (
            "they began with different weights (other seeds, or a checkpoint that some have not "
            f"loaded, and nobody broadcast them){averaged if apart.have_one_gradient else ''}",
            "give all ranks the same weights before the loop: wrap the model in "
            "DistributedDataParallel, which broadcasts those of rank 0, or call "
            "dist.broadcast(p.data, src=0) for each parameter",
        )
    other = _other_hyperparameters(group, attempt.optimizer, attempt, apart.ranks)
    if other:
        return (
            f"before step {attempt.first_step} they were the same, but {other}",
            "give the optimizers of all ranks the same hyper-parameters at every step",
        )
    return (
        f"they began with the same weights, and at step {attempt.first_step} no longer have them",
        "look for what one rank does and another does not: other optimizer state after loading a "
        "checkpoint, weights written outside of the step, a step that is skipped",
    )


def _other_hyperparameters(
    group: dict[int, Recording], optimizer: str, attempt: Attempt, ranks: list[int]
) -> str:
    """The first hyper-parameter in which ranks differ before an attempt; nothing if none does."""
    columns = ("lr", "weight_decay", "beta1", "beta2", "eps", "momentum")
    first = {}
    for rank in ranks:
        recording = group[rank]
        rows = recording.frame("groups")
        steps = recording.frame("steps")
        rows = rows.loc[(rows["optimizer"] == optimizer) & (rows["step"] < attempt.steps[rank])]
        order = steps.set_index("step")["optimizer_step"]
        last = int(order.max()) if len(order) else 0
        numbers = rows["step"].map(order).fillna(last).astype(int)
        first[rank] = rows.assign(number=numbers - int(numbers.min()) if len(rows) else numbers)
    base_rank = ranks[0]
    for rank in ranks[1:]:
        both = first[base_rank].merge(
            first[rank], on=["number", "group"], suffixes=("_here", "_there")
        )
        for name in columns:
            here, there = both[f"{name}_here"], both[f"{name}_there"]
            differs = (here != there) & ~(here.isna() & there.isna())
            if differs.any():
                row = both.loc[differs].iloc[0]
                return (
                    f"{name} is {row[f'{name}_here']:g} on rank {base_rank} and "
                    f"{row[f'{name}_there']:g} on rank {rank} at step {int(row['step_here'])}"
                )
    return ""
