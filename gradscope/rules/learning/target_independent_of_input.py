"""GS609: a classifier that does move learns nothing at all."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from gradscope.rules.facts import at, place_of, reached_losses, shape_of, span, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording

Numbers = NDArray[np.float64]

_LEAST_STEPS = 100
"""A classifier whose labels have something to do with its inputs is below chance by then."""

_LEAST_CLASSES = 3
"""With two classes the difference between chance and a hard problem is small."""

_LEAST_SEEN = 10.0
"""How many examples of each class there must have been, on the average, to learn anything."""

_SURE = 3.0
"""Standard errors by which losses lie below those of guessing, where something is learnt."""

_LEARNT = 0.01
"""By how much of ln C losses lie below it where something is learnt from labels of which most are
noise: with 80 % of noise among four classes 2 to 4 %. Memorising what does not belong together
takes off 0.3 % in five passes over 1800 images."""

_NEAR = 0.04
"""Relative distance of the loss from ln C. Guessing alone stays within noise of it."""

_LEAST_MOVED = 0.02
"""By how much of their norm the weights must have moved, summed over the run: a learning rate that
is too small has the same curve."""

_FAR = 0.5
"""Weights that have moved less than this share of their norm may just have begun to learn, if the
loss falls."""


class TargetIndependentOfInput(Rule):
    """GS609 target-independent-of-input: the loss stays at that of guessing, weights move.

    ## What it finds

    The cross-entropy of three or more classes stays at ln C, the loss of guessing, for the whole
    run, although gradients and updates are of ordinary size.

    ## Why it matters

    The model is trained, but there is nothing to be learnt: labels do not belong to their inputs.
    Most often one of the two was shuffled or sorted without the other.

    ## How it is found

    The finding is raised when, over at least 100 steps, the median loss is within 4 % of ln C in
    each half of the run, gradients are not zero, and the updates add up to more than 2 % of the
    weights. A loss that ends surely below ln C, by more than 1 %, tells of noise in the labels, and
    is silent; so is one that surely falls while the weights are still near to where they began, and
    a run with fewer than ten examples of each class. Other causes of the same curve, such as dead
    units or a detached loss, are looked for first, and this finding is folded under theirs.

    ## Example

        perm = torch.randperm(len(x))
        x = x[perm]                      # and y?

    ## Fix

        perm = torch.randperm(len(x))
        x, y = x[perm], y[perm]

    ## When it is wrong

    When the problem is so hard that nothing is learnt in the first steps.
    """

    code = "GS609"
    name = "target-independent-of-input"
    severity = Severity.WARNING
    tables = ("losses", "steps", "updates", "batches")
    symptom_of = (
        *(f"GS10{number}" for number in range(1, 10)),
        *("GS110", "GS201", "GS202", "GS203", "GS205"),
        *(f"GS30{number}" for number in range(1, 10)),
        *(f"GS31{number}" for number in range(6)),
        *(f"GS40{number}" for number in range(1, 10)),
        *("GS410", "GS501", "GS502", "GS503", "GS504", "GS505", "GS506", "GS507", "GS508"),
        *("GS509", *(f"GS51{number}" for number in range(8))),
        *("GS601", "GS603", "GS604", "GS605", "GS606", "GS607"),
    )

    def check(self, run: Recording) -> list[Finding]:
        """Return at most one finding."""
        steps, losses = stepped(run), reached_losses(run)
        losses = losses.loc[losses["function"].isin(["cross_entropy", "nll_loss"])]
        if len(run.optimizers) != 1 or len(steps) < _LEAST_STEPS or losses.empty:
            return []
        shapes = [shape_of(text) or () for text in losses["input_shape"]]
        if losses["n_classes"].nunique() != 1 or (losses["reduction"] != "mean").any():
            return []
        n_classes = int(losses["n_classes"].iloc[0])
        # A matrix of similarities has as many classes as rows: a contrastive loss.
        if n_classes < _LEAST_CLASSES or any(shape[:1] == (n_classes,) for shape in shapes):
            return []
        by_look = losses.groupby("step")["value"].agg(["size", "first"])
        known = steps.set_index("step")["loss"].reindex(by_look.index).to_numpy()
        if (by_look["size"] != 1).any() or not np.allclose(
            known, by_look["first"].to_numpy(), rtol=1e-3, equal_nan=True
        ):
            return []  # the loss has other parts
        values = steps["loss"].to_numpy()
        chance = math.log(n_classes)
        rows = losses["input_shape"].map(lambda text: math.prod(shape_of(text) or (0,)))
        if float(rows.median()) / n_classes * len(steps) < _LEAST_SEEN * n_classes:
            return []
        halves = np.array_split(values[len(values) // 10 :], 2)
        if any(abs(float(np.median(half)) / chance - 1) > _NEAR for half in halves):
            return []
        last = float(halves[1].mean())
        if last < chance * (1 - _LEARNT) and _is_surely_below(halves[1], chance):
            return []
        if not (steps["grad_norm"] > 0).all():
            return []
        moved = run.frame("updates")[["step", "update_norm", "weight_norm_before"]].fillna(0.0)
        moved[["update_norm", "weight_norm_before"]] **= 2
        sums = moved.groupby("step").sum()
        ratios = (sums["update_norm"] / sums["weight_norm_before"]) ** 0.5
        way = ratios.median() * len(steps)
        if not way > _LEAST_MOVED or (way < _FAR and _surely_falls(*halves)):
            return []
        row = losses.iloc[0]
        file, line = place_of(row)
        return [
            self.finding(
                message=(
                    f"the cross-entropy{at(file, line)} stays at {last:.4g}, which is guessing "
                    f"among {n_classes} classes ({chance:.4g}), for all {len(steps)} steps, "
                    "although the weights move: the targets y seem to have nothing to do with the "
                    "inputs x"
                ),
                fix=(
                    "look at a few pairs of input and target: were both shuffled with the same "
                    "permutation, and sorted and split alike?"
                ),
                optimizer=str(steps["optimizer"].iloc[0]),
                **span(steps),
                file=file,
                line=line,
                evidence={
                    "loss_first": float(values[0]),
                    "loss_last": last,
                    "chance": chance,
                    "n_classes": n_classes,
                    "update_ratio": float(ratios.median()),
                },
            )
        ]


def _is_surely_below(values: Numbers, bound: float) -> bool:
    """Whether the mean of losses is surely below a bound."""
    return float(values.mean()) + _SURE * _error(values) < bound


def _surely_falls(early: Numbers, late: Numbers) -> bool:
    """Whether the mean of losses is surely lower later on."""
    fallen = float(early.mean()) - float(late.mean())
    return fallen > _SURE * math.hypot(_error(early), _error(late))


def _error(values: Numbers) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values))
