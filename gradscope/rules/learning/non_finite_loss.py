"""GS601: the loss is NaN or infinite."""

from __future__ import annotations

import numpy as np

from gradscope.rules.facts import at, numbers_in, place_of, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.nonfinite_gradients import nonfinite_gradients, passed_over
from gradscope.rules.rule import Rule
from gradscope.rules.wording import some_of
from gradscope.run.recording import Recording


class NonFiniteLoss(Rule):
    """GS601 non-finite-loss: an optimizer stepped on a loss that is NaN or infinite.

    ## What it finds

    The tensor that `backward()` started from was NaN or infinite, and the optimizer stepped.

    ## Why it matters

    The gradients of such a loss are NaN wherever they are not zero; after one step the weights are,
    too, and nothing that follows can be right.

    ## How it is found

    The root of every backward is recorded. Steps that a gradient scaler skipped are silent, and so
    are those of an optimizer that passes over gradients that are not finite. When
    the gradients were not finite either, GS405 tells where the first such value came from, and
    this finding is folded under it.

    ## Example

        loss = (pred - y).pow(2).sum() / mask.sum()    # a batch without a valid element: 0 / 0

    ## Fix

        loss = (pred - y).pow(2).sum() / mask.sum().clamp(min=1)

    ## When it is wrong

    There is no known case: a loss that is not finite trains nothing.
    """

    code = "GS601"
    name = "non-finite-loss"
    severity = Severity.ERROR
    tables = ("steps", "backwards", "grads", "updates", "events")
    symptom_of = ("GS405", "GS505", "GS404", "GS514", "GS603")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer."""
        backwards = run.frame("backwards")
        scalar = backwards.loc[
            backwards["root_shape"].isin(["()", "(1,)"]) & (backwards["function"] == "backward")
        ]
        bad = scalar.loc[~np.isfinite(scalar["root"])].set_index("backward")
        if bad.empty:
            return []
        findings = []
        bad_gradients = nonfinite_gradients(run)
        for optimizer, own in stepped(run).groupby("optimizer", sort=False):
            rows = own.loc[[bool(set(numbers_in(b)) & set(bad.index)) for b in own["backwards"]]]
            rows = rows.loc[~rows["step"].isin(passed_over(run, own, bad_gradients))]
            if rows.empty:
                continue
            first = rows.iloc[0]
            guilty = next(n for n in numbers_in(str(first["backwards"])) if n in bad.index)
            file, line = place_of(bad.loc[guilty])
            value = float(bad.loc[guilty, "root"])
            findings.append(
                self.finding(
                    message=(
                        f"the loss given to backward(){at(file, line)} became {value} at step "
                        f"{int(first['step'])}, and {optimizer}.step() used its gradients: "
                        f"{some_of(len(rows), len(own))} steps"
                    ),
                    fix=(
                        "look for log, sqrt, division, exp and masked softmax on the way to the "
                        "loss, or for steps so large that the weights overflow"
                    ),
                    optimizer=str(optimizer),
                    step_first=int(first["step"]),
                    step_last=int(rows["step"].max()),
                    count=len(rows),
                    file=file,
                    line=line,
                    evidence={"loss": value, "steps": len(rows), "of": len(own)},
                )
            )
        return findings
