"""GS307: cross-entropy is given what already went through a softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradscope.rules.facts import at, in_phases, place_of, reached_losses
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.forward.loss_inputs import culprits, spread, with_kind
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import pandas as pd

_SUMS_TO_ONE = 1e-3
"""How far the sum over classes of a softmax, in single precision or half, may be from one."""

_LEAST_LOOKS = 3
"""Numbers that look like probabilities at one look may do so by chance."""


class SoftmaxBeforeCrossEntropy(Rule):
    """GS307 softmax-before-cross-entropy: cross-entropy is given probabilities, not logits.

    ## What it finds

    The prediction passed to `cross_entropy` comes out of a softmax.

    ## Why it matters

    Cross-entropy applies a log-softmax by itself. Applied twice, the loss cannot fall by more than
    0.6 (4 classes), 0.8 (10 classes) or, with many, 1 from where it started, and gradients become
    small where the model is sure and wrong: it learns slowly, and stops early.

    ## How it is found

    At closer looks the operation is noted that made the prediction, views passed over. Where it
    was changed in between, values that are not negative and sum to one over the classes at three
    looks tell the same. A log-softmax is harmless, since applying it twice changes nothing, and a
    note.

    ## Example

        model = nn.Sequential(nn.Linear(64, 10), nn.Softmax(dim=1))
        loss = F.cross_entropy(model(x), y)

    ## Fix

        model = nn.Sequential(nn.Linear(64, 10))
        loss = F.cross_entropy(model(x), y)

    ## When it is wrong

    When probabilities are passed as logits on purpose, to soften what the model says.
    """

    code = "GS307"
    name = "softmax-before-cross-entropy"
    severity = Severity.ERROR
    tables = ("losses", "calls", "events")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per line that calls the loss."""
        losses = reached_losses(run)
        losses = losses.loc[losses["function"] == "cross_entropy"]
        findings = []
        for _, of_line in losses.groupby(["file", "line"], sort=False, dropna=False):
            rows = next((own for own in in_phases(run, of_line) if _made_by(own)), None)
            if rows is None:
                continue
            what = _made_by(rows)
            severity = Severity.INFO if what == "LogSoftmax" else Severity.ERROR
            file, line = place_of(rows.iloc[0], "made_at_")
            called = at(*place_of(rows.iloc[0]))
            modules = culprits(run, what)
            harm = (
                "cross_entropy (CrossEntropyLoss) applies a softmax by itself"
                if what == "Softmax"
                else "applying it twice changes nothing, and costs time"
            )
            findings.append(
                self.finding(
                    severity=severity,
                    message=(
                        f"the prediction given to cross_entropy{called} has already gone "
                        f"through {with_kind(modules, what)}: {harm}"
                    ),
                    fix=(
                        f"leave out {with_kind(modules, what)}{at(file, line)} and pass the "
                        "logits; apply it only where probabilities are wanted"
                    ),
                    modules=modules,
                    file=file,
                    line=line,
                    evidence={
                        "input_made_by": ", ".join(sorted(set(rows["input_made_by"]))),
                        "input_min": float(rows["input_min"].min()),
                        "input_max": float(rows["input_max"].max()),
                        "input_row_sum": float(rows["input_row_sum"].mean()),
                    },
                    **spread(run, rows),
                )
            )
        return findings


def _made_by(rows: pd.DataFrame) -> str:
    """Which kind of softmax all predictions come out of; nothing if none, or of some only."""
    made_by = set(rows["input_made_by"])
    looks_so = (
        rows["step"].nunique() >= _LEAST_LOOKS
        and (rows["input_min"] >= 0).all()
        and ((rows["input_row_sum"] - 1).abs() < _SUMS_TO_ONE).all()
    )
    if made_by == {"LogSoftmax"}:
        return "LogSoftmax"
    return "Softmax" if made_by == {"Softmax"} or looks_so else ""
