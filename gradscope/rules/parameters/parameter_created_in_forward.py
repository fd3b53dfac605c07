"""GS106: a new parameter in every forward, that nobody trains."""

from __future__ import annotations

from gradscope.rules.finding import Finding, Severity
from gradscope.rules.lookup import listed, place_of
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording

_FEWEST_LOOKS = 2


class ParameterCreatedInForward(Rule):
    """GS106 parameter-created-in-forward: the forward makes new parameters each time.

    ## What it finds

    A module whose forward computes with an `nn.Parameter`, or a layer, that it has just made.

    ## Why it matters

    A parameter is a leaf: no gradient passes through it to what it was made from, and it is gone
    after the step, so that no optimizer ever moves it.

    ## How it is found

    The graph ends, at two closer looks and more, in parameters that belong to no model and that
    are different tensors each time, inside the call of a watched module.

    ## Example

        w = nn.Parameter(self.weight * self.mask)
        return F.linear(x, w)

    ## Fix

        w = self.weight * self.mask

    ## When it is wrong

    A module that optimises something of its own inside its forward.
    """

    code = "GS106"
    name = "parameter-created-in-forward"
    severity = Severity.ERROR
    tables = ("strangers", "params")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per module that makes parameters."""
        rows = run.frame("strangers")
        rows = rows.loc[rows["is_parameter"] & ~rows["recurs"] & (rows["module"] != "")]
        findings = []
        for module, own in rows.groupby("module", sort=False):
            looks = int(own["step"].nunique())
            if looks < _FEWEST_LOOKS:
                continue
            unreached = [e.name for e in run.parameters if e.module == module and not e.reached]
            instead = f"; its own {listed(unreached)} got no gradient" if unreached else ""
            findings.append(
                self.finding(
                    message=(
                        f"the forward of {module} makes a new parameter of shape "
                        f"{own['shape'].iloc[0]} each time, that no optimizer holds{instead}"
                    ),
                    fix=(
                        f"make parameters and layers in __init__ of {module}; in forward compute "
                        "with tensors, without nn.Parameter()"
                    ),
                    params=tuple(unreached),
                    modules=(str(module),),
                    step_first=int(own["step"].min()),
                    step_last=int(own["step"].max()),
                    count=looks,
                    **place_of(own),
                    evidence={"looks": looks, "shape": str(own["shape"].iloc[0])},
                )
            )
        return findings
