"""GS603: a loss that cannot be negative is driven below zero: its sign is flipped."""

from __future__ import annotations

import math
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
    }
)
"""Operations whose result is zero at best and positive otherwise, of ordinary targets."""

_SIZES = frozenset({"Abs", "Pow", "LinalgVectorNorm"})
"""Operations that are errors only of what a target is subtracted from: a projection, a distance
between means or a length may well be what is to become large."""

_DIFFERENCES = frozenset({"Sub", "Rsub"})

_VIEWS = frozenset({"Squeeze", "Unsqueeze", "View", "ToCopy"})
_MEANS = _VIEWS | {"Mean", "Sum"}
_SCALES = frozenset({"Mul", "Div"})
_KEEPS_THE_MEANING = _MEANS | _SCALES | {"Neg"}
_SUMS = frozenset({"Add"})
"""Operations between such a loss and the root that only scale it or take its mean, and those that
may add a penalty on weights, or another loss."""

_LONGEST_WAY = 16

_OF_PARAMETERS = frozenset(
    {"AccumulateGrad", "Pow", "Sum", "Mean", "Add", "Mul", "Div", "Abs", "Sqrt", "Stack", "Cat"}
    | {"View", "UnsafeView", "LinalgVectorNorm", "Norm", "ForeachNorm", "Square"}
)
"""Operations of which a penalty on weights consists. None makes more elements than it is given,
unless data go in."""

_WRITTEN = {
    "written_cross_entropy": "a cross-entropy",
    "written_binary_cross_entropy": "a binary cross-entropy",
}

_MOST_NODES = 10_000

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

    From the root of the first graph gradscope goes back through negations, products and means, and
    past penalties on the weights alone. The finding is raised when this leads to a loss function
    that is never negative, to the square or size of a difference from data, or to the mean of
    log-probabilities of labels, while the root is negative at nearly every step and has fallen by
    the end. Of a sum that is negated, one term has to be such a loss, and none may be the negative
    of one. Sizes and squares of anything else are silent: a variance or a distance may be what is
    to become large. What is multiplied with a number for each example, as in a policy gradient, is
    silent as well, and so are programs with several optimizers: in a game one of them may well
    maximise the other's loss.

    ## Example

        loss = -F.cross_entropy(model(xb), yb)
        loss.backward()

    ## Fix

        loss = F.cross_entropy(model(xb), yb)
        loss.backward()

    ## When it is wrong

    When a loss is driven up on purpose by a single optimizer: unlearning, an attack, or a distance
    from fixed points that is to become large.
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
        written = _written(run)
        source = _source_of(run.graphs[min(run.graphs)]) if written.empty else ""
        if not source and written.empty:
            return []
        groups = run.frame("groups")
        maximizes = bool(groups["options"].map(lambda text: bool(_MAXIMIZES.search(text))).any())
        tail = max(2, len(values) // 4)
        first, last = float(np.median(values[:tail])), float(np.median(values[-tail:]))
        size = max(abs(float(values[0])), 1e-6)
        flipped = bool(np.mean(values < 0) > 0.9) and last < first - _FELL_BY * size
        climbs = maximizes and bool(np.mean(values > 0) > 0.9) and last > first + _FELL_BY * size
        if len(written):
            flipped = flipped and not maximizes and bool((written["value"] < 0).all())
            climbs = climbs and bool((written["value"] > 0).all())
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
        written = _written(run)
        if len(written):
            source = _WRITTEN[str(written["function"].iloc[0])]
            file, line = place_of(written.iloc[0])
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
            fix = (
                f"put a minus sign in front of the mean of log-probabilities{at(file, line)}"
                if len(written)
                else f"take away the minus sign in front of the loss{at(file, line)}"
            )
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


def _written(run: Recording) -> pd.DataFrame:
    """Losses that the program writes out, if there is one at every look, of one kind."""
    losses = run.frame("losses")
    rows = losses.loc[losses["function"].isin(list(_WRITTEN))]
    is_one = rows["function"].nunique() == 1 and not rows["step"].duplicated().any()
    return rows if is_one and set(rows["step"]) == set(losses["step"]) else rows.head(0)


def _source_of(graph: CapturedGraph) -> str:
    """The loss function behind the root, if only scaling, means and sums lie between them."""
    if len(graph.roots) != 1:
        return ""
    node, is_negated = int(graph.roots[0]), False
    for _ in range(_LONGEST_WAY):
        name = operation(graph.op_of(node))
        if _is_never_negative(graph, node, name):
            return name
        if name not in _KEEPS_THE_MEANING and name not in _SUMS:
            return ""
        if name in _SCALES and not _scales_all_alike(graph, node):
            return ""
        is_negated ^= name == "Neg"
        givers = [
            giver
            for giver in graph.givers_of(node)
            if name not in _SUMS or not _is_of_parameters(graph, giver)
        ]
        if len(givers) > 1 and name in _SUMS and is_negated:
            return _negated_in_sum(graph, givers)
        if len(givers) != 1:
            return ""
        node = givers[0]
    return ""


def _negated_in_sum(graph: CapturedGraph, terms: list[int]) -> str:
    """The first loss function among the terms of a negated sum, if none has a minus of its own.

    What is scaled is passed by: a factor may hold another minus, which the graph does not tell.
    """
    found: list[str] = []
    pending = [(term, False) for term in reversed(terms)]
    for _ in range(_LONGEST_WAY):
        if not pending:
            break
        node, is_negated = pending.pop()
        name = operation(graph.op_of(node))
        if _is_never_negative(graph, node, name):
            if is_negated:
                return ""
            found.append(name)
        elif name in _MEANS or name in _SUMS or name == "Neg":
            pending += [(giver, is_negated ^ (name == "Neg")) for giver in graph.givers_of(node)]
    return found[0] if found and not pending else ""


def _scales_all_alike(graph: CapturedGraph, node: int) -> bool:
    """Whether a product or quotient is one with a single number, as far as is known."""
    shapes = [graph.saved.shapes[place] for place in np.flatnonzero(graph.saved.node == node)]
    if not shapes:
        return _n_elements(graph, node) <= 1
    return all(shape is not None and math.prod(shape) <= 1 for shape in shapes)


def _is_of_parameters(graph: CapturedGraph, node: int) -> bool:
    """Whether a term of a loss is a penalty on weights: made of them, and of no data."""
    pending, seen = [node], {node}
    while pending:
        node = pending.pop()
        givers = graph.givers_of(node)
        if operation(graph.op_of(node)) not in _OF_PARAMETERS or len(seen) > _MOST_NODES:
            return False
        size = _n_elements(graph, node)
        if not givers and not _is_parameter(graph, node):
            return False
        if givers and size > max(_n_elements(graph, giver) for giver in givers):
            return False
        pending += [giver for giver in givers if giver not in seen]
        seen.update(givers)
    return True


def _is_parameter(graph: CapturedGraph, node: int) -> bool:
    leaf = int(graph.param[node])
    return leaf >= 0 and bool(graph.params[leaf])


def _n_elements(graph: CapturedGraph, node: int) -> int:
    return sum(math.prod(shape) for shape in graph.outputs_of(node).shapes)


def _is_never_negative(graph: CapturedGraph, node: int, name: str) -> bool:
    return name in _NOT_NEGATIVE or _is_of_a_difference(graph, node, name)


def _is_of_a_difference(graph: CapturedGraph, node: int, name: str) -> bool:
    """Whether a node takes the size or square of something from which data are subtracted.

    A power may be an odd one, but rarely is.
    """
    givers = graph.givers_of(node)
    is_square = name == "Mul" and len(givers) == 2 and givers[0] == givers[1]
    if not is_square and (name not in _SIZES or len(givers) != 1):
        return False
    for _ in range(_LONGEST_WAY):
        node = givers[0]
        givers, name = graph.givers_of(node), operation(graph.op_of(node))
        if name not in _VIEWS or len(givers) != 1:
            break
    return name in _DIFFERENCES and len(givers) == 1
