"""GS508: the learning rate moves on before it was used."""

from __future__ import annotations

from gradscope.rules.facts import events_of, first_place
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording


class SchedulerBeforeStep(Rule):
    """GS508 scheduler-before-step: `scheduler.step()` comes before the first `optimizer.step()`.

    ## What it finds

    A loop that steps the scheduler at its beginning, before the optimizer has stepped.

    ## Why it matters

    The first value of the schedule is never used, and every later one is used too early.

    ## How it is found

    The first call of the scheduler came before the first step of its optimizer, and the same line
    was called again after it. A program that resumes, and steps its scheduler several times to
    where it had been, does so before the loop.

    ## Example

        for epoch in range(epochs):
            scheduler.step()
            for xb, yb in loader:
                ...
                optimizer.step()

    ## Fix

        for epoch in range(epochs):
            for xb, yb in loader:
                ...
                optimizer.step()
            scheduler.step()

    ## When it is wrong

    A program written for PyTorch before 1.1, where this was the order, and whose schedule was tuned
    to it.
    """

    code = "GS508"
    name = "scheduler-before-step"
    severity = Severity.WARNING
    tables = ("steps", "events")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer whose scheduler runs ahead."""
        steps = run.frame("steps")
        steps = steps.loc[steps["outcome"].isin(("stepped", "skipped"))]
        firsts = steps.groupby("optimizer", sort=False)["step"].min()
        findings = []
        for optimizer, first in firsts.items():
            calls = events_of(run, "scheduler", str(optimizer))
            early = calls.loc[calls["step"] <= first]
            if len(early) != 1:
                continue
            again = calls.loc[
                (calls["step"] > first)
                & (calls["file"] == early["file"].iloc[0])
                & (calls["line"] == early["line"].iloc[0]).fillna(False)
            ]
            if again.empty:
                continue
            kind = str(early["detail"].iloc[0])
            findings.append(
                self.finding(
                    message=(
                        f"{kind}.step() was called before the first {optimizer}.step(): the first "
                        f"learning rate of the schedule is skipped, and all {len(calls)} changes "
                        "come too early"
                    ),
                    fix=f"call {kind}.step() after {optimizer}.step(), at the end of the epoch",
                    optimizer=str(optimizer),
                    step_first=int(first),
                    step_last=int(first),
                    count=len(calls),
                    **first_place(early),
                    evidence={"scheduler": kind, "scheduler_steps": len(calls)},
                )
            )
        return findings
