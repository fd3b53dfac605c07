"""GS603: a loss that cannot be negative is driven below zero: its sign is flipped."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from gradscope.rules.facts import at, place_of, span, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.captured_graph import operation
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import pandas as pd

    from gradscope.run.captured_graph import CapturedGraph

_NOT_NEGATIVE = frozenset(
    {
        "NllLoss",
        "NllLoss2D",
        "MseLoss",
        "L1Loss",
        "SmoothL1Loss",
        "HuberLoss",
        "BinaryCrossEntropy",
        "BinaryCrossEntropyWithLogits",
        "Abs",
        "LinalgVectorNorm",
    }
)
"""Operations whose result is zero at best and positive otherwise, of ordinary targets."""

_KEEPS_THE_MEANING = frozenset({"Neg", "Mul", "Div", "Mean", "Sum", "Squeeze", "View", "ToCopy"})
"""Operations between such a loss and the root that only scale it or take its mean."""

_LEAST_STEPS = 8

_FELL_BY = 0.1
"""By how much of its size at the start the root must have fallen: it is really driven down."""

_MAXIMIZES = re.compile(r"\bmaximize=True\b")


class RisingObjective(Rule):
    """GS603 rising-objective: training drives a loss up, because its sign is flipped.

    ## What it finds

    The loss given to `backward()` is the negative of a quantity that cannot be negative, such as a
    cross-entropy or a squared error, and it falls and falls; or the optimizer was made with
    `maximize=True` and maximises such a loss.

    ## Why it matters

    The model is trained to be as wrong as possible, and the number printed goes down all the same.

    ## How it is found

    From the root of the first graph gradscope goes back through negations, products and means. The
    finding is raised when this leads to a loss function that is never negative, while the root is
    negative at nearly every step and has fallen by the end. Programs with several optimizers are
    silent: in a game one of them may well maximise the other's loss.

    ## Example

        loss = -F.cross_entropy(model(xb), yb)
        loss.backward()

    ## Fix

        loss = F.cross_entropy(model(xb), yb)
        loss.backward()

    ## When it is wrong

    When a loss is driven up on purpose by a single optimizer: unlearning, or an attack.
    """

    code = "GS603"
    name = "rising-objective"
    severity = Severity.ERROR
    tables = ("steps", "backwards", "groups", "losses")
    symptom_of = ("GS308",)

    def check(self, run: Recording) -> list[Finding]:
        """Return at most one finding."""
        steps = stepped(run)
        if steps["optimizer"].nunique() != 1 or len(steps) < _LEAST_STEPS or not run.graphs:
            return []
        values = steps["loss"].to_numpy()
        values = values[np.isfinite(values)]
        if len(values) < _LEAST_STEPS:
            return []
        source = _source_of(run.graphs[min(run.graphs)])
        if not source:
            return []
        groups = run.frame("groups")
        maximizes = bool(groups["options"].map(lambda text: bool(_MAXIMIZES.search(text))).any())
        tail = max(2, len(values) // 4)
        first, last = float(np.median(values[:tail])), float(np.median(values[-tail:]))
        size = max(abs(float(values[0])), 1e-6)
        flipped = bool(np.mean(values < 0) > 0.9) and last < first - _FELL_BY * size
        climbs = maximizes and bool(np.mean(values > 0) > 0.9) and last > first + _FELL_BY * size
        if not flipped and not climbs:
            return []
        return [self._finding_for(run, steps, source, values, climbs)]

    def _finding_for(
        self,
        run: Recording,
        steps: pd.DataFrame,
        source: str,
        values: np.ndarray,
        climbs: bool,
    ) -> Finding:
        optimizer = str(steps["optimizer"].iloc[0])
        losses = run.frame("losses")
        rows = losses if len(losses) else run.frame("backwards")
        file, line = place_of(rows.iloc[0]) if len(rows) else (None, None)
        if climbs:
            message = (
                f"{optimizer} was made with maximize=True and drives the loss up, from "
                f"{values[0]:.4g} to {values[-1]:.4g}"
            )
            fix = f"make {optimizer} without maximize=True"
        else:
            message = (
                f"the loss given to backward{at(file, line)} is the negative of one that cannot "
                f"be negative ({source}): it went from {values[0]:.4g} to {values[-1]:.4g}, and "
                "the model is trained to be wrong"
            )
            fix = f"take away the minus sign in front of the loss{at(file, line)}"
        return self.finding(
            message=message,
            fix=fix,
            optimizer=optimizer,
            **span(steps),
            file=file,
            line=line,
            evidence={
                "loss_first": float(values[0]),
                "loss_last": float(values[-1]),
                "operation": source,
                "maximize": climbs,
            },
        )


def _source_of(graph: CapturedGraph) -> str:
    """The loss function behind the root, if only scaling and means lie between them."""
    if len(graph.roots) != 1:
        return ""
    node = int(graph.roots[0])
    for _ in range(16):
        name = operation(graph.op_of(node))
        if name in _NOT_NEGATIVE or _is_square(graph, node, name):
            return name
        if name not in _KEEPS_THE_MEANING:
            return ""
        givers = graph.source[graph.target == node]
        if len(givers) != 1:
            return ""
        node = int(givers[0])
    return ""


def _is_square(graph: CapturedGraph, node: int, name: str) -> bool:
    """Whether a node multiplies a tensor with itself; a power may be an odd one, but rarely is."""
    givers = graph.source[graph.target == node]
    return name == "Pow" or (name == "Mul" and len(givers) == 2 and givers[0] == givers[1])
