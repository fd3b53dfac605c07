"""GS802: DistributedDataParallel holds the model, and the gradients are not reduced."""

from __future__ import annotations

from gradscope.rules.distributed.comparison import Attempt, attempts, groups, replicas_in
from gradscope.rules.facts import listed
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.ranks import listed_ranks
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording


class UnreducedGradients(Rule):
    """GS802 unreduced-gradients: each rank steps with gradients of its own.

    ## What it finds

    A model that is wrapped in `DistributedDataParallel`, whose gradients differ between the ranks
    when the optimizer steps: they were never averaged.

    ## Why it matters

    Each rank trains alone on its share of the data, and their weights drift apart. What rank 0
    saves has seen one part of the data only.

    ## How it is found

    The wrapper reduces gradients only if the forward went through it. Each rank writes down
    checksums of the gradients at the beginning of an optimizer's steps 0, 1, 2, 4, 8 …; at none
    of them is any gradient the same on two ranks.

    ## Example

        model = DistributedDataParallel(net)
        loss = criterion(model.module(x), y)       # past the wrapper

    ## Fix

        loss = criterion(model(x), y)

    ## When it is wrong

    A wrapper with a communication hook, or one whose forwards run under `no_sync()`, promises
    nothing and is passed over.
    """

    code = "GS802"
    name = "unreduced-gradients"
    severity = Severity.ERROR
    tables = ("checksums", "params")
    symptom_of = ("GS803",)
    compares_ranks = True

    def check(self, run: Recording) -> list[Finding]:
        """Return at most one finding per group of processes and optimizer."""
        findings = []
        for group in groups(run):
            replicas = replicas_in(group)
            by_optimizer: dict[str, list[Attempt]] = {}
            for attempt in attempts(group):
                by_optimizer.setdefault(attempt.optimizer, []).append(attempt)
            for optimizer, own in by_optimizer.items():
                for ranks in dict.fromkeys(replicas.values()):
                    params = {param for param, held in replicas.items() if held == ranks}
                    finding = self._finding(optimizer, own, ranks, params)
                    if finding is not None:
                        findings.append(finding)
        return findings

    def _finding(
        self, optimizer: str, own: list[Attempt], ranks: tuple[int, ...], params: set[str]
    ) -> Finding | None:
        unreduced: set[str] = set()
        steps = []
        for attempt in own:
            here = [rank for rank in ranks if rank in attempt.steps]
            compared = {
                param: [found[rank] for rank in here if found.get(rank)]
                for param, found in attempt.gradients.items()
                if param in params
            }
            compared = {param: sums for param, sums in compared.items() if len(sums) > 1}
            if not compared:
                continue
            if any(len(set(sums)) < len(sums) for sums in compared.values()):
                return None  # something is reduced, if not everything
            unreduced |= set(compared)
            steps.append(attempt.first_step)
        if not steps:
            return None
        names = sorted(unreduced)
        return self.finding(
            message=(
                f"the gradients of {listed(names)} differ between {listed_ranks(ranks)} when "
                f"{optimizer} steps, although DistributedDataParallel wraps the model: they are "
                "never averaged"
            ),
            fix="call the wrapper itself, model(x), and not model.module(x): only a forward "
            "through it has backward average the gradients",
            params=tuple(names),
            optimizer=optimizer,
            step_first=steps[0],
            step_last=steps[-1],
            count=len(steps),
            evidence={
                "ranks": listed_ranks(ranks),
                "unreduced_parameters": len(names),
                "compared_steps": len(steps),
            },
        )
