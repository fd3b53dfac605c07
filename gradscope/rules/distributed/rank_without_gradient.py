"""GS803: one rank steps without any gradient, and the others with theirs."""

from __future__ import annotations

from gradscope.rules.distributed.comparison import attempts, groups, replicas_in
from gradscope.rules.facts import stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.ranks import listed_ranks
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording

_FEWEST_STEPS = 2

_NOTHING = ("none", "zeroed")


class RankWithoutGradient(Rule):
    """GS803 rank-without-gradient: a rank steps without any gradient while others have theirs.

    ## What it finds

    A process whose optimizer steps and finds no gradient in any of its parameters, at every step,
    while the same optimizer finds gradients on other ranks that began with the same weights.

    ## Why it matters

    Its share of the data trains nothing, and its weights stay behind.

    ## How it is found

    The statuses of gradients at every step, rank by rank. That the ranks are replicas is told by
    `DistributedDataParallel`, or by the checksums of their first weights.

    ## Example

        loss = criterion(model(x), y) if rank == 0 else torch.zeros(1)

    ## Fix

        loss = criterion(model(x), y)              # on every rank

    ## When it is wrong

    A rank that is there for something else, such as an evaluation, needs no optimizer that steps.
    """

    code = "GS803"
    name = "rank-without-gradient"
    severity = Severity.ERROR
    tables = ("grads", "steps", "checksums")
    symptom_of = ("GS301", "GS303", "GS304")
    compares_ranks = True

    def check(self, run: Recording) -> list[Finding]:
        """Return at most one finding per group of processes and optimizer."""
        findings = []
        for group in groups(run):
            for optimizer in _common_optimizers(group):
                counts = {rank: _counts(each, optimizer) for rank, each in group.items()}
                idle = [
                    rank
                    for rank, (n_steps, n_there) in counts.items()
                    if n_steps >= _FEWEST_STEPS and not n_there
                ]
                busy = [rank for rank, (n_steps, n_there) in counts.items() if n_there == n_steps]
                if not idle or not busy or not _are_replicas(group, optimizer, [*idle, *busy]):
                    continue
                where = listed_ranks(idle)
                n_steps = max(counts[rank][0] for rank in idle)
                findings.append(
                    self.finding(
                        message=(
                            f"{optimizer} steps without any gradient on {where}, at all "
                            f"{n_steps} steps; on {listed_ranks(busy)} it has gradients"
                        ),
                        fix="compute the same loss from the model's output on every rank",
                        optimizer=optimizer,
                        step_first=0,
                        step_last=max(0, max(group[rank].n_steps for rank in idle) - 1),
                        count=n_steps,
                        evidence={"ranks": where, "ranks_with_gradients": listed_ranks(busy)},
                    )
                )
        return findings


def _common_optimizers(group: dict[int, Recording]) -> list[str]:
    names = [{each.name for each in recording.optimizers} for recording in group.values()]
    return sorted(set.intersection(*names))


def _counts(run: Recording, optimizer: str) -> tuple[int, int]:
    """How many steps there are, and at how many of them there was any gradient."""
    steps = stepped(run)
    own = steps.loc[steps["optimizer"] == optimizer, "step"]
    grads = run.frame("grads")
    there = grads.loc[grads["step"].isin(own) & ~grads["status"].isin(_NOTHING), "step"]
    return len(own), int(there.nunique())


def _are_replicas(group: dict[int, Recording], optimizer: str, ranks: list[int]) -> bool:
    """Whether ranks hold the same model: a wrapper says so, or they began with the same weights."""
    replicas = replicas_in(group)
    if any(set(ranks) <= set(held) for held in replicas.values()):
        return True
    for attempt in attempts(group):
        if attempt.optimizer == optimizer and attempt.number == 0:
            is_whole = all(set(ranks) <= set(found) for found in attempt.weights.values())
            return bool(attempt.weights) and is_whole and not attempt.unequal(ranks)
    return False
