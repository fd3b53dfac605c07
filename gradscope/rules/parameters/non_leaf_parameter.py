"""GS110: what is to be trained is a result, and no leaf."""

from __future__ import annotations

from gradscope.rules.facts import first_place
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording


class NonLeafParameter(Rule):
    """GS110 non-leaf-parameter: an optimizer was given a tensor that is the result of an operation.

    ## What it finds

    A weight that was computed once, before the loop, from a leaf that is trained by nobody; also a
    program that PyTorch ended with "can't optimize a non-leaf Tensor".

    ## Why it matters

    Only leaves of the graph have a `.grad`. `torch.randn(3, requires_grad=True) * 0.1` is the
    result of a multiplication, whose leaf nobody has a name for.

    ## How it is found

    At the second backward its graph is compared with the first one's. Operations that both share,
    with a single unknown leaf behind each, are weights that are results. Or from what the program
    was ended by.

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
        results = events.loc[events["event"] == "non_leaf"]
        if len(results):
            return [self._finding_for(run, str(results["detail"].iloc[0]))]
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
                **first_place(ended),
                evidence={"raised": str(ended["detail"].iloc[0])},
            )
        ]

    def _finding_for(self, run: Recording, names: str) -> Finding:
        backwards = run.frame("backwards")
        raised = backwards.loc[backwards["error"] != ""]
        who = names or "a weight"
        then = (
            f"; backward raised {raised['error'].iloc[0]}, for the operation cannot be gone "
            "through twice"
            if len(raised)
            else ""
        )
        return self.finding(
            message=(
                f"{who} was computed once before the loop from a tensor that requires grad: it is "
                f"a result and no leaf, so its .grad stays None and nothing trains it{then}"
            ),
            fix="make the values first, and call requires_grad_() on the finished tensor",
            params=tuple(names.split(", ")) if names else (),
            **first_place(raised if len(raised) else backwards),
            evidence={"names": names},
        )
