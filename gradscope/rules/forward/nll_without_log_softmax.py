"""GS308: nll_loss is given something that is no log-probability."""

from __future__ import annotations

from gradscope.rules.facts import at, place_of, reached_losses
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.forward.loss_inputs import culprits, spread, with_kind
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording

_POSITIVE = 1e-3
"""A log-probability is never positive; rounding may make it a little so."""

_LOGARITHMS = frozenset({"LogSoftmax", "Log", "LogSigmoid", "Logsumexp"})


class NllWithoutLogSoftmax(Rule):
    """GS308 nll-without-log-softmax: nll_loss is given no log-probabilities.

    ## What it finds

    The prediction passed to `nll_loss` is a probability or a logit, and no log-probability.

    ## Why it matters

    `nll_loss` only picks the entry of the right class and negates it. Of probabilities that is a
    loss between -1 and 0 with weak gradients; of logits it has no lower end, and diverges.

    ## How it is found

    At closer looks the operation is noted that made the prediction, and its range. The finding is
    raised when it came out of a softmax or sigmoid, or when it is positive somewhere, which a
    log-probability never is.

    ## Example

        loss = F.nll_loss(F.softmax(logits, dim=1), y)

    ## Fix

        loss = F.nll_loss(F.log_softmax(logits, dim=1), y)     # or F.cross_entropy(logits, y)

    ## When it is wrong

    When the entries are scores whose normalisation is subtracted later.
    """

    code = "GS308"
    name = "nll-without-log-softmax"
    severity = Severity.ERROR
    tables = ("losses", "calls")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per line that calls the loss."""
        losses = reached_losses(run)
        losses = losses.loc[losses["function"] == "nll_loss"]
        findings = []
        for _, rows in losses.groupby(["file", "line"], sort=False, dropna=False):
            made_by = set(rows["input_made_by"])
            is_probability = made_by <= {"Softmax", "Sigmoid"}
            is_positive = bool((rows["input_max"] > _POSITIVE).all())
            if made_by & _LOGARITHMS or not (is_probability or is_positive):
                continue
            file, line = place_of(rows.iloc[0], "made_at_")
            called = at(*place_of(rows.iloc[0]))
            what = next(iter(made_by)) if is_probability else ""
            modules = culprits(run, what) if what else ()
            given = f"comes out of {with_kind(modules, what)}" if what else "is no log-probability"
            low, high = float(rows["input_min"].min()), float(rows["input_max"].max())
            findings.append(
                self.finding(
                    message=(
                        f"the prediction given to nll_loss (NLLLoss){called} {given}: its "
                        f"values go from {low:.3g} to {high:.3g}, log-probabilities are never "
                        "positive"
                    ),
                    fix=(
                        f"use log_softmax in the place of softmax{at(file, line)}, or "
                        "cross_entropy on the logits"
                    ),
                    modules=modules,
                    file=file,
                    line=line,
                    evidence={
                        "input_made_by": ", ".join(sorted(made_by)),
                        "input_min": low,
                        "input_max": high,
                    },
                    **spread(run, rows),
                )
            )
        return findings
