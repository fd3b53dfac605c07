"""GS312: a loss is computed, and nothing ever goes back from it."""

from __future__ import annotations

from gradscope.rules.facts import at, listed, place_of, without_gradient
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.forward.loss_inputs import spread
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording


class DiscardedLoss(Rule):
    """GS312 discarded-loss: a loss that alone trains some parameters is not part of the backward.

    ## What it finds

    A loss function was called with gradients enabled, no backward started from its result or came
    past it, and parameters that the optimizer holds depend on it alone.

    ## Why it matters

    These parameters never get a gradient. Most often a second loss overwrote the first one where
    it was to be added.

    ## How it is found

    At closer looks gradscope notes which parameters each loss leads to, and which losses backwards
    come past. The finding is raised when a loss was left out that leads to parameters which no
    backward of the whole run has reached. A loss that is only printed leads to parameters that
    others train, and is silent.

    ## Example

        loss = F.cross_entropy(logits, y)
        loss = 0.5 * F.mse_loss(recon, x)

    ## Fix

        loss = F.cross_entropy(logits, y)
        loss = loss + 0.5 * F.mse_loss(recon, x)

    ## When it is wrong

    When a part of the model is given to the optimizer, but not meant to be trained.
    """

    code = "GS312"
    name = "discarded-loss"
    severity = Severity.ERROR
    tables = ("losses", "params", "grads", "backwards")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per line that computes such a loss."""
        if not (run.frame("backwards")["n_reached"] > 0).any():
            return []  # nothing is trained at all, which is another matter
        missing = {entry.name for entry in without_gradient(run)}
        losses = run.frame("losses")
        losses = losses.loc[~losses["reached"].astype(bool) & (losses["left_out"] != "")]
        findings = []
        for _, rows in losses.groupby(["function", "file", "line"], sort=False, dropna=False):
            left_out = [
                name
                for name in dict.fromkeys(", ".join(rows["left_out"]).split(", "))
                if name in missing
            ]
            if not left_out:
                continue
            row = rows.iloc[0]
            file, line = place_of(row)
            findings.append(
                self.finding(
                    message=(
                        f"the {row['function']} computed{at(file, line)} is never propagated back, "
                        f"and {listed(left_out)} depend on it alone: they have never had a gradient"
                    ),
                    fix=(
                        f"add the loss{at(file, line)} to the one that backward() is called on; a "
                        "later line overwrites it or leaves it out"
                    ),
                    params=tuple(left_out),
                    modules=tuple(dict.fromkeys(name.rpartition(".")[0] for name in left_out)),
                    file=file,
                    line=line,
                    evidence={
                        "function": str(row["function"]),
                        "value": float(row["value"]),
                        "looks": int(rows["step"].nunique()),
                    },
                    **spread(run, rows),
                )
            )
        return findings
