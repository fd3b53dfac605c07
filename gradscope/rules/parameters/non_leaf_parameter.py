"""GS110: what is to be trained is a result, and no leaf."""

from __future__ import annotations

from gradscope.rules.finding import Finding, Severity
from gradscope.rules.lookup import place_of
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording


class NonLeafParameter(Rule):
    """GS110 non-leaf-parameter: an optimizer was given a tensor that is the result of an operation.

    ## What it finds

    A program that PyTorch ended with "can't optimize a non-leaf Tensor".

    ## Why it matters

    Only leaves of the graph have a `.grad`. `torch.randn(3, requires_grad=True) * 0.1` is the
    result of a multiplication, whose leaf nobody has a name for.

    ## How it is found

    From what the program was ended by.

    ## Example

        w = torch.randn(64, 32, requires_grad=True) * 0.1

    ## Fix

        w = (torch.randn(64, 32) * 0.1).requires_grad_()

    ## When it is wrong

    Not known.
    """

    code = "GS110"
    name = "non-leaf-parameter"
    severity = Severity.ERROR
    tables = ("events",)

    def check(self, run: Recording) -> list[Finding]:
        """Return at most one finding."""
        events = run.frame("events")
        ended = events.loc[
            events["event"].isin(("ended", "exception"))
            & events["detail"].str.contains("optimize a non-leaf Tensor", regex=False)
        ]
        if ended.empty:
            return []
        return [
            self.finding(
                message=(
                    "an optimizer was given a tensor that is the result of an operation and no "
                    "leaf, so that it has no .grad of its own"
                ),
                fix="make the values first, and call requires_grad_() on the finished tensor",
                **place_of(ended),
                evidence={"raised": str(ended["detail"].iloc[0])},
            )
        ]
