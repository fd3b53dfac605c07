"""GS902: something cannot be observed, and is not guessed at."""

from __future__ import annotations

from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording


class Unobserved(Rule):
    """GS902 unobserved: something in this program cannot be observed.

    ## What it finds

    A part of the program that gradscope cannot look into without changing what it does: the inside
    of a compiled model or function, an optimizer whose step is part of the graph.

    ## Why it matters

    Rules that need what is missing find nothing there. That is no sign of health.

    ## How it is found

    Whoever cannot observe something says so in the table `events`.

    ## Example

        model = torch.compile(model)

    ## Fix

    Nothing is broken. To have the inside of a compiled model checked, run a few steps of it
    uncompiled.

    ## When it is wrong

    It says what was not looked at; there is nothing to be wrong about.
    """

    code = "GS902"
    name = "unobserved"
    severity = Severity.INFO
    tables = ("events",)

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding for each thing that was not observed."""
        events = run.frame("events")
        missed = events.loc[events["event"] == "unobserved"].drop_duplicates("detail")
        return [
            self.finding(
                message=f"not observed: {detail}",
                fix="nothing has to be changed; what was not observed was not checked either",
                step_first=int(step),
                step_last=int(step),
                count=1,
                evidence={"detail": str(detail)},
            )
            for step, detail in zip(missed["step"], missed["detail"], strict=True)
        ]
