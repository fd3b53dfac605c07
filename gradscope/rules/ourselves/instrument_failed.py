"""GS901: a part of gradscope failed and was switched off."""

from __future__ import annotations

from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording


class InstrumentFailed(Rule):
    """GS901 instrument-failed: a part of gradscope raised, and is silent since.

    ## What it finds

    An instrument of gradscope raised an exception. It was switched off; training went on.

    ## Why it matters

    What this instrument measures is missing from then on, and rules that need it find nothing.
    That is no sign of health.

    ## How it is found

    Every error inside of gradscope is caught where it happens and noted in the table `events`.

    ## Example

        GradscopeWarning: graph_cut failed and is switched off; training goes on (...)

    ## Fix

    Report it, with the message and the version of torch. The program needs no change.

    ## When it is wrong

    It says what happened; there is nothing to be wrong about.
    """

    code = "GS901"
    name = "instrument-failed"
    severity = Severity.INFO
    tables = ("events",)

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per failure."""
        events = run.frame("events")
        failed = events.loc[events["event"] == "instrument_failed"].drop_duplicates("detail")
        return [
            self.finding(
                message=f"a part of gradscope failed and is switched off: {detail}",
                fix="report this message; the program itself needs no change",
                step_first=int(step),
                step_last=int(step),
                count=1,
                evidence={"detail": str(detail)},
            )
            for step, detail in zip(failed["step"], failed["detail"], strict=True)
        ]
