"""GS606: every target of a classification is the same."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from gradscope.rules.facts import at, place_of, reached_losses, shape_of, span, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.learning.last_layer import outputs_of_last_layer
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import pandas as pd

_LEAST_LOOKS = 3
"""Looks lie ever further apart: data sorted by class show another class by then."""

_LEAST_TARGETS = 8
"""A small batch may have one class by chance."""

_PLAIN = ("Addmm", "Mm", "Linear", "Add", "Convolution", "LogSoftmax")
"""How the prediction of a classifier is made. A contrastive loss, whose targets are all 0 on
purpose, concatenates similarities or divides them by a temperature."""

_WITHOUT_BIAS = "Mm"
"""A score without a bias is none of "yes": of pairs, the first of which is always preferred."""

_RISES = 3.0
"""Above the highest of the steps before it: a loss that the rare class brings."""

_SURPRISE = 0.1
"""Of the untrained loss, at least: an example of a class that is never expected costs several times
of that. Losses of one class leap as well, under a dropout, but came to 0.05 at most in 32 runs."""

_STEPS_BEFORE = 8

_BINARY = "binary_cross_entropy_with_logits"
_FUNCTIONS = ("cross_entropy", "nll_loss", _BINARY)


class ConstantTarget(Rule):
    """GS606 constant-target: the targets of a classification have one value only.

    ## What it finds

    At every look all targets given to a classification loss were the same class.

    ## Why it matters

    The model learns to say this class whatever it sees; the loss goes to zero, and nothing was
    learnt. Usually the labels were lost on the way: a wrong column, an integer division, a cast.

    ## How it is found

    At closer looks gradscope counts the different values of every target. The finding is raised
    when there was one, the same, at three looks or more, of at least eight targets each. Programs
    with several optimizers are silent, as are contrastive losses: a discriminator is told "real"
    for a whole batch. So are losses over candidates, where the last layer has not as many outputs
    as there are classes, and the right one stands first on purpose; binary ones of a score without
    bias, of pairs whose better half comes first; and a loss that leaps up at times, because
    another class is there, and rare.

    ## Example

        y = (labels / 10).long()     # 0 for all of 0 … 9

    ## Fix

        y = labels.long()

    ## When it is wrong

    When one class only is what there is to learn from, or when no batch with another class has
    come by the end of the run.
    """

    code = "GS606"
    name = "constant-target"
    severity = Severity.WARNING
    tables = ("batches", "losses", "steps")

    def check(self, run: Recording) -> list[Finding]:
        """Return at most one finding."""
        steps = stepped(run)
        batches = run.frame("batches")
        batches = batches.loc[batches["role"] == "target"]
        if len(run.optimizers) != 1 or batches.empty or steps.empty:
            return []
        losses = reached_losses(run)
        for function in _FUNCTIONS:
            own = losses.loc[losses["function"] == function]
            rows = batches.loc[batches["owner"] == function]
            if own.empty or rows["step"].nunique() < _LEAST_LOOKS:
                continue
            if not own["input_made_by"].isin(_PLAIN).all() or own["line"].nunique() > 1:
                continue
            if not _are_outputs(run, own, function) or _rises_at_times(steps["loss"].to_numpy()):
                continue
            sizes = [math.prod(shape_of(text) or (0,)) for text in rows["shape"]]
            is_one = (rows["distinct"].fillna(0) == 1).all() and rows["min"].nunique() == 1
            if not is_one or min(sizes) < _LEAST_TARGETS:
                continue
            file, line = place_of(own.iloc[0])
            value = float(rows["min"].iloc[0])
            return [
                self.finding(
                    message=(
                        f"every target given to {function}{at(file, line)} is {value:g}: the same "
                        f"at all {rows['step'].nunique()} looks, in batches of {min(sizes)}"
                    ),
                    fix=(
                        f"look at where the targets of {function}{at(file, line)} come from: "
                        "labels were lost on the way, by a cast, a division or a wrong index"
                    ),
                    **span(steps),
                    file=file,
                    line=line,
                    evidence={
                        "target": value,
                        "looks": int(rows["step"].nunique()),
                        "batch": min(sizes),
                    },
                )
            ]
        return []


def _are_outputs(run: Recording, own: pd.DataFrame, function: str) -> bool:
    """Whether classes are outputs of a layer, and no candidates of which the first is right."""
    if function == _BINARY:
        return not (own["input_made_by"] == _WITHOUT_BIAS).any()
    sizes = outputs_of_last_layer(run.graphs[min(run.graphs)]) if run.graphs else set()
    return not sizes or bool(own["n_classes"].isin(list(sizes)).all())


def _rises_at_times(losses: np.ndarray) -> bool:
    """Whether a loss leaps up and comes down again: another class was there, between the looks."""
    losses = losses[np.isfinite(losses)]
    if len(losses) <= _STEPS_BEFORE:
        return False
    before = np.lib.stride_tricks.sliding_window_view(losses[:-1], _STEPS_BEFORE).max(1)
    limit = np.maximum(_RISES * before, _SURPRISE * abs(losses[0]))
    return bool((losses[_STEPS_BEFORE:] > limit).any())
