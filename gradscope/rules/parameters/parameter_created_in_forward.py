"""GS106: a new parameter in every forward, that nobody trains."""

from __future__ import annotations

import ast
import linecache
from typing import Any

from gradscope.rules.facts import first_place, listed, phases
from gradscope.rules.finding import Finding, Severity
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
    are different tensors each time, inside the call of a watched module or in a
    line of a `forward`.

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
    tables = ("strangers", "params", "events")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per module that makes parameters."""
        rows = run.frame("strangers")
        rows = rows.loc[rows["is_parameter"] & ~rows["recurs"]]
        # What a later training begins with was not there at the look before.
        rows = rows.loc[~rows["step"].isin([begin for begin, _ in phases(run)[1:]])]
        inside = (rows["module"] != "") | rows.apply(_is_in_forward, axis=1).astype(bool)
        rows = rows.loc[inside]
        findings = []
        for module, own in rows.groupby("module", sort=False):
            looks = int(own["step"].nunique())
            if looks < _FEWEST_LOOKS:
                continue
            unreached = [e.name for e in run.parameters if e.module == module and not e.reached]
            instead = f"; its own {listed(unreached)} got no gradient" if unreached else ""
            of = str(module) or (run.models[0].name if len(run.models) == 1 else "a model")
            findings.append(
                self.finding(
                    message=(
                        f"the forward of {of} makes a new parameter of shape "
                        f"{own['shape'].iloc[0]} each time, that no optimizer holds{instead}"
                    ),
                    fix=(
                        f"make parameters and layers in __init__ of {of}; in forward compute "
                        "with tensors, without nn.Parameter()"
                    ),
                    params=tuple(unreached),
                    modules=(str(module),) if module else (),
                    step_first=int(own["step"].min()),
                    step_last=int(own["step"].max()),
                    count=looks,
                    **first_place(own),
                    evidence={"looks": looks, "shape": str(own["shape"].iloc[0])},
                )
            )
        return findings


def _is_in_forward(row: Any) -> bool:
    """Whether a line of the program lies in a function called forward, by its source."""
    if not row["file"] or row["line"] is None or row["line"] != row["line"]:
        return False
    line = int(row["line"])
    try:
        tree = ast.parse("".join(linecache.getlines(str(row["file"]))))
    except (SyntaxError, ValueError):
        return False
    around = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.lineno <= line <= (node.end_lineno or node.lineno)
    ]
    return bool(around) and max(around, key=lambda node: node.lineno).name == "forward"
