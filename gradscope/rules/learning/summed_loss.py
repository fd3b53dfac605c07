"""GS608: the loss is a sum over the batch."""

from __future__ import annotations

from math import prod

from gradscope.rules.facts import at, place_of, reached_losses, shape_of, span, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.rules.step.learning_rate_too_high import LearningRateTooHigh
from gradscope.run.recording import Recording

_DIVIDED = 0.5
"""Share of the sum that is left of one that the program divides before the backward."""

_OF_CLASSES = ("cross_entropy", "nll_loss")


class SummedLoss(Rule):
    """GS608 summed-loss: the loss is summed over the batch instead of averaged.

    ## What it finds

    A loss function was called with `reduction="sum"`.

    ## Why it matters

    Gradients grow with the size of the batch. With SGD the learning rate that suits a batch of 32
    is four times too high for one of 128, and a smaller last batch weighs less. It is a note: some
    objectives are sums, and are divided later.

    ## How it is found

    At closer looks gradscope notes how loss functions are called. A sum of which the backward gets
    less than half has been divided later.

    ## Example

        criterion = nn.CrossEntropyLoss(reduction="sum")

    ## Fix

        criterion = nn.CrossEntropyLoss()

    ## When it is wrong

    When the sum is meant.
    """

    code = "GS608"
    name = "summed-loss"
    severity = Severity.INFO
    tables = ("losses", "steps")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per line that sums."""
        losses, steps = reached_losses(run), stepped(run)
        summed = losses.loc[losses["reduction"] == "sum"]
        if summed.empty:
            return []
        # A step too large for the loss to fall is no longer a matter of style.
        jumps = bool(LearningRateTooHigh().check(run))
        findings = []
        given = steps.drop_duplicates("step").set_index("step")["loss"]
        for _, rows in summed.groupby(["function", "file", "line"], sort=False, dropna=False):
            row = rows.iloc[0]
            file, line = place_of(row, "owner_")
            called = str(row["owner"] or row["function"])
            shape = shape_of(str(row["input_shape"])) or ()
            batch = shape[0] if shape else 1
            is_divided = rows["step"].map(given) < _DIVIDED * rows["value"]
            if batch < 2 or steps.empty or is_divided.any():
                continue
            function = str(row["function"])
            times = _n_summed(function, shape, shape_of(str(row["target_shape"])) or ())
            findings.append(
                self.finding(
                    message=(
                        f'{called}(reduction="sum"){at(file, line)} adds up the losses of a '
                        f"batch: it and its gradients are about {times} times those of the mean"
                    ),
                    fix=(
                        f'leave out reduction="sum"{at(file, line)}, or divide the loss by the '
                        "size of the batch"
                    ),
                    severity=Severity.WARNING if jumps else self.severity,
                    **span(steps),
                    file=file,
                    line=line,
                    evidence={
                        "function": function,
                        "batch": batch,
                        "value": float(row["value"]),
                    },
                )
            )
        return findings


def _n_summed(function: str, given: tuple[int, ...], target: tuple[int, ...]) -> int:
    """How many losses are added up that ``reduction="mean"`` would divide by."""
    if function not in _OF_CLASSES:
        return prod(given)
    return prod(target) if len(target) < len(given) else prod(given) // given[1]
