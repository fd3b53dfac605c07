"""GS604: the first loss is far worse than that of a model that knows nothing."""

from __future__ import annotations

import math

from gradscope.rules.facts import at, phases, place_of, reached_losses, shape_of, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording

_TIMES = 4.0
_MORE = 3.0
"""How far above ln C a first loss must be: four times, and by three. Initialisations in use end
within one or two of ln C, also with unit-variance logits."""

_HOPELESS = 50.0
"""From here on times ln C the first gradients alone throw the weights out of any useful range."""


_WRITTEN = "written_cross_entropy"
_FUNCTIONS = ("cross_entropy", "nll_loss", _WRITTEN)


class UninformedLossMismatch(Rule):
    """GS604 uninformed-loss-mismatch: the first cross-entropy is far above ln C.

    ## What it finds

    Before any update the loss of a classification with C classes is far larger than ln C, the loss
    of a model that says that all classes are equally likely.

    ## Why it matters

    The untrained model is very sure of something, and wrong: its logits are far too large, because
    its weights or its inputs are. The first steps go into undoing that, if they do not break it.

    ## How it is found

    The first call of a cross-entropy is compared with ln C, also where another training of a new
    model begins; so is one that the program writes out, where it is all that the backward starts
    from. The finding is raised when it is at least four
    times as large, and by three larger, divided by the number that the program multiplies its
    logits by, such as one over a temperature; it is an error from fifty times on.

    ## Example

        nn.init.normal_(layer.weight, std=0.7)    # each of six layers multiplies by five

    ## Fix

        nn.init.kaiming_normal_(layer.weight)

    ## When it is wrong

    When training goes on from weights that were made for another set of classes.
    """

    code = "GS604"
    name = "uninformed-loss-mismatch"
    severity = Severity.WARNING
    tables = ("losses", "params", "events")
    symptom_of = ("GS607",)

    def check(self, run: Recording) -> list[Finding]:
        """Return at most one finding."""
        losses = reached_losses(run)
        first = losses.loc[
            losses["step"].isin(_first_steps(run))
            & losses["function"].isin(_FUNCTIONS)
            & (losses["reduction"] == "mean")
            & (losses["n_classes"].fillna(0) >= 2)
            & losses["value"].map(math.isfinite)
        ]
        for _, row in first.iterrows():
            expected = math.log(int(row["n_classes"]))
            value = float(row["value"])
            # Logits that are multiplied by a number are meant to be as large.
            unscaled = value / max(float(row["input_scale"]), 1.0)
            if unscaled < _TIMES * expected or unscaled < expected + _MORE:
                continue
            is_written = row["function"] == _WRITTEN
            shape = shape_of(row["input_shape"]) or ()
            if is_written and shape[:1] == shape[1:]:
                continue  # similarities of all pairs: there are no classes
            name = "cross-entropy" if is_written else row["function"]
            logits = (
                ""
                if is_written
                else f": logits go from {row['input_min']:.3g} to {row['input_max']:.3g}"
            )
            file, line = place_of(row)
            return [
                self.finding(
                    severity=Severity.ERROR
                    if unscaled > _HOPELESS * expected
                    else Severity.WARNING,
                    message=(
                        f"the first {name}{at(file, line)} is {value:.4g}, far above "
                        f"the {expected:.3g} of a model that knows nothing of the "
                        f"{int(row['n_classes'])} classes{logits}"
                    ),
                    fix=(
                        "initialise the weights smaller (nn.init.kaiming_normal_ keeps the scale "
                        "from layer to layer), and standardise the inputs"
                    ),
                    modules=tuple(
                        dict.fromkeys(
                            entry.module
                            for entry in run.parameters
                            if entry.in_model and len(entry.shape) >= 2 and entry.requires_grad
                        )
                    ),
                    step_first=int(row["step"]),
                    step_last=int(row["step"]),
                    count=1,
                    file=file,
                    line=line,
                    evidence={
                        "loss": value,
                        "uninformed": expected,
                        "n_classes": int(row["n_classes"]),
                        **(
                            {}
                            if is_written
                            else {
                                "logit_min": float(row["input_min"]),
                                "logit_max": float(row["input_max"]),
                            }
                        ),
                    },
                )
            ]
        return []


def _first_steps(run: Recording) -> list[int]:
    """The steps with which the training of a new model begins: a look there precedes any update."""
    steps = stepped(run)
    first = steps.groupby("optimizer")["step"].min()
    found = [0]
    for begin, _ in phases(run)[1:]:
        new = {number for number, o in enumerate(run.optimizers) if first.get(o.name, -1) >= begin}
        held = [{n for n, _ in entry.holders} for entry in run.parameters]
        trained = [holders for holders in held if holders & new]
        if begin in set(first) and trained and all(holders <= new for holders in trained):
            found.append(begin)
    return found
