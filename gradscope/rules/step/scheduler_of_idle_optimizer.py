"""GS509: the scheduler turns a knob that is connected to nothing, or to another optimizer."""

from __future__ import annotations

from gradscope.rules.facts import events_of, first_place, held_by, span, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording

_FEWEST_CALLS = 2
"""One call may come before a phase in which the optimizer is used."""


class SchedulerOfIdleOptimizer(Rule):
    """GS509 scheduler-of-idle-optimizer: the scheduler belongs to an optimizer that never steps.

    ## What it finds

    A scheduler that is stepped, bound to one optimizer, while another optimizer does the training.
    Or two schedulers of one class that are both bound to the same optimizer, while another one has
    none.

    ## Why it matters

    The learning rate that is used stays constant, whatever the schedule says; what is printed by
    `get_last_lr()` looks right.

    ## How it is found

    The scheduler's optimizer made no step in the run, another one did, and that one has no
    scheduler. Where both hold the same parameters this is certain. Of two schedulers of one
    optimizer, both are stepped, in turn.

    ## Example

        optimizer = SGD(model.parameters(), lr=0.1)
        scheduler = StepLR(optimizer, 10)
        optimizer = AdamW(model.parameters(), lr=1e-3)     # the scheduler still has the SGD

        scheduler_g = StepLR(optimizer_g, 10)
        scheduler_d = StepLR(optimizer_g, 10)              # copied, and optimizer_d forgotten

    ## Fix

        optimizer = AdamW(model.parameters(), lr=1e-3)
        scheduler = StepLR(optimizer, 10)

    ## When it is wrong

    A phase of training in which one optimizer rests, seen without the phases in which it works.
    Two schedules of one kind that are to multiply, with a constant learning rate elsewhere.
    """

    code = "GS509"
    name = "scheduler-of-idle-optimizer"
    severity = Severity.ERROR
    tables = ("steps", "events", "params")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per idle optimizer with a scheduler."""
        counts = stepped(run).groupby("optimizer", sort=False)["step"].count()
        tried = set(run.frame("steps")["optimizer"])
        calls = events_of(run, "scheduler")
        scheduled = set(calls["subject"]) - {""}
        findings = []
        for known in run.optimizers:
            idle = known.name
            own = calls.loc[calls["subject"] == idle]
            if len(own) < _FEWEST_CALLS or idle in counts.index:
                continue
            busy = [str(name) for name in counts.index if name not in scheduled]
            if not busy:
                continue
            held = set(held_by(run, idle))
            sharing = [name for name in busy if held & set(held_by(run, name))]
            if not sharing and idle in tried:
                continue  # gradients wait for it: it is its step that is missing
            by = (sharing or busy)[-1]
            kind = str(own["detail"].iloc[0])
            findings.append(
                self.finding(
                    message=(
                        f"{kind}.step() was called {len(own)} times for {idle}, which never "
                        f"stepped; {by} made {int(counts[by])} steps without a scheduler"
                    ),
                    fix=f"make {kind} with {by}, the optimizer that steps",
                    severity=Severity.ERROR if sharing else Severity.WARNING,
                    optimizer=idle,
                    **span(own),
                    **first_place(own),
                    evidence={
                        "scheduler": kind,
                        "scheduler_steps": len(own),
                        "idle_optimizer": idle,
                        "stepping_optimizer": by,
                    },
                )
            )
        return findings or self._twice(run, set(counts.index) - scheduled)

    def _twice(self, run: Recording, unscheduled: set[object]) -> list[Finding]:
        """Find two schedulers of a class on one optimizer, where another has none."""
        busy = [known.name for known in run.optimizers if known.name in unscheduled]
        calls = events_of(run, "scheduler")
        calls = calls.assign(kind=[str(detail).partition("#")[0] for detail in calls["detail"]])
        findings = []
        for (optimizer, kind), own in calls.groupby(["subject", "kind"], sort=False):
            each = own.groupby("detail", sort=False)["step"].agg(["min", "max", "count"])
            if (
                not busy
                or len(each) != 2
                or each["count"].min() < _FEWEST_CALLS
                or each["min"].max() > each["max"].min()  # one after the other
            ):
                continue
            findings.append(
                self.finding(
                    message=(
                        f"two schedulers of class {kind} are both stepped for {optimizer}, which "
                        f"follows their product, and {busy[0]}, which steps as well, has none"
                    ),
                    fix=f"make one of them with {busy[0]}",
                    severity=Severity.WARNING,
                    optimizer=str(optimizer),
                    **span(own),
                    **first_place(own.loc[own["detail"] == each.index[-1]]),
                    evidence={
                        "scheduler": str(kind),
                        "scheduler_steps": len(own),
                        "optimizer_without_scheduler": busy[0],
                    },
                )
            )
        return findings
