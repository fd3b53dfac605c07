"""GS308: nll_loss or kl_div is given something that is no log-probability."""

from __future__ import annotations

from gradscope.rules.facts import at, place_of, reached_losses
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.forward.loss_inputs import culprits, spread, with_kind
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording

_POSITIVE = 1e-3
"""A log-probability is never positive; rounding may make it a little so."""

_FUNCTIONS = {"nll_loss": "NLLLoss", "kl_div": "KLDivLoss"}

_LOGARITHMS = frozenset({"LogSoftmax", "Log", "LogSigmoid", "Logsumexp"})


class NllWithoutLogSoftmax(Rule):
    """GS308 nll-without-log-softmax: nll_loss or kl_div is given no log-probabilities.

    ## What it finds

    The prediction passed to `nll_loss`, or as the first argument to `kl_div`, is a probability or a
    logit, and no log-probability.

    ## Why it matters

    `nll_loss` only picks the entry of the right class and negates it. Of probabilities that is a
    loss between -1 and 0 with weak gradients; of logits it has no lower end, and diverges. `kl_div`
    is linear in its first argument as well: it takes a logarithm of the target only.

    ## How it is found

    At closer looks the operation is noted that made the prediction, and its range. The finding is
    raised when it came out of a softmax or sigmoid, or when it is positive somewhere, which a
    log-probability never is. Log-probabilities that are multiplied with weights or advantages,
    which may be negative, are silent.

    ## Example

        loss = F.nll_loss(F.softmax(logits, dim=1), y)
        loss = F.kl_div(F.softmax(student, dim=1), F.softmax(teacher, dim=1))

    ## Fix

        loss = F.nll_loss(F.log_softmax(logits, dim=1), y)     # or F.cross_entropy(logits, y)

    ## When it is wrong

    When the entries are scores whose normalisation is subtracted later, or logarithms of a density,
    which may be positive.
    """

    code = "GS308"
    name = "nll-without-log-softmax"
    severity = Severity.ERROR
    tables = ("losses", "calls")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per line that calls the loss."""
        losses = reached_losses(run)
        losses = losses.loc[losses["function"].isin(_FUNCTIONS)]
        findings = []
        for (function, *_), rows in losses.groupby(
            ["function", "file", "line"], sort=False, dropna=False
        ):
            made_by = set(rows["input_made_by"])
            is_probability = made_by <= {"Softmax", "Sigmoid"}
            is_positive = bool((rows["input_max"] > _POSITIVE).all())
            if made_by & _LOGARITHMS or not (is_probability or is_positive):
                continue
            file, line = place_of(rows.iloc[0], "made_at_")
            called = at(*place_of(rows.iloc[0]))
            what = next(iter(made_by)) if is_probability else ""
            function = str(function)
            modules = culprits(run, what) if what else ()
            given = f"comes out of {with_kind(modules, what)}" if what else "is no log-probability"
            low, high = float(rows["input_min"].min()), float(rows["input_max"].max())
            findings.append(
                self.finding(
                    message=(
                        f"the prediction given to {function} ({_FUNCTIONS[function]}){called} "
                        f"{given}: its "
                        f"values go from {low:.3g} to {high:.3g}, log-probabilities are never "
                        "positive"
                    ),
                    fix=(
                        f"use log_softmax in the place of softmax{at(file, line)}"
                        + (", or cross_entropy on the logits" if function == "nll_loss" else "")
                        if what
                        else "pass it the log_softmax of the logits"
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
