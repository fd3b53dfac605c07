"""GS309: the binary cross-entropy with logits is given probabilities."""

from __future__ import annotations

from gradscope.rules.facts import at, in_phases, place_of, reached_losses
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.forward.loss_inputs import culprits, spread, with_kind
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording


class SigmoidBeforeBceWithLogits(Rule):
    """GS309 sigmoid-before-bce-with-logits: the loss with logits is given probabilities.

    ## What it finds

    The prediction passed to `binary_cross_entropy_with_logits` comes out of a sigmoid or softmax.

    ## Why it matters

    The loss applies a sigmoid by itself. Applied twice, the model can say nothing outside of 0.5 to
    0.73: the loss of negative examples stays above 0.69, whatever is learnt.

    ## How it is found

    At closer looks the operation is noted that made the prediction, views passed over.

    ## Example

        model = nn.Sequential(nn.Linear(30, 1), nn.Sigmoid())
        loss = F.binary_cross_entropy_with_logits(model(x), y)

    ## Fix

        model = nn.Sequential(nn.Linear(30, 1))
        loss = F.binary_cross_entropy_with_logits(model(x), y)

    ## When it is wrong

    When probabilities are passed as logits on purpose, to soften what the model says.
    """

    code = "GS309"
    name = "sigmoid-before-bce-with-logits"
    severity = Severity.ERROR
    tables = ("losses", "calls", "events")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per line that calls the loss."""
        losses = reached_losses(run)
        losses = losses.loc[losses["function"] == "binary_cross_entropy_with_logits"]
        findings = []
        for _, of_line in losses.groupby(["file", "line"], sort=False, dropna=False):
            of_probabilities = (
                own
                for own in in_phases(run, of_line)
                if set(own["input_made_by"]) <= {"Sigmoid", "Softmax"}
            )
            rows = next(of_probabilities, None)
            if rows is None:
                continue
            what = sorted(set(rows["input_made_by"]))[0]
            file, line = place_of(rows.iloc[0], "made_at_")
            called = at(*place_of(rows.iloc[0]))
            modules = culprits(run, what)
            findings.append(
                self.finding(
                    message=(
                        "the prediction given to binary_cross_entropy_with_logits "
                        f"(BCEWithLogitsLoss){called} has already gone through "
                        f"{with_kind(modules, what)}: the loss applies a sigmoid by itself"
                    ),
                    fix=(
                        f"leave out {with_kind(modules, what)}{at(file, line)} and pass the "
                        "logits, or use binary_cross_entropy (BCELoss)"
                    ),
                    modules=modules,
                    file=file,
                    line=line,
                    evidence={
                        "input_made_by": what,
                        "input_min": float(rows["input_min"].min()),
                        "input_max": float(rows["input_max"].max()),
                    },
                    **spread(run, rows),
                )
            )
        return findings
