"""GS311: a softmax runs over examples, heads or places and not over classes or keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradscope.rules.facts import at, place_of, reached_losses, shape_of
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.forward.loss_inputs import culprits, spread
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import pandas as pd

_OF_CLASSES = (
    "nll_loss",
    "cross_entropy",
    "kl_div",
    "getitem",
    "gather",
    "written_cross_entropy",
)
"""Loss functions over classes, and how a negative log-likelihood is written by hand: picking the
entries of the right classes. What is multiplied with a log-softmax may be a distribution over the
same dimension, as in a ranking of lists; of a cross-entropy that is written out it sums to one over
the second."""


_ATTENTION = "matmul"
"""The product of attention weights with values."""


class SoftmaxOverBatch(Rule):
    """GS311 softmax-over-batch: probabilities sum to one over the batch, not over the classes.

    ## What it finds

    The prediction of a classification went through a softmax or log-softmax over another dimension
    than that of its classes: over the examples, or over the places of an image or a sequence.

    Or the softmax of attention scores ran over the examples, or over the heads.

    ## Why it matters

    The examples of a batch compete with each other for each class, instead of the classes for each
    example. What the model says of one input depends on the others, and the loss is best when
    each class is given to some example, right or wrong.

    ## How it is found

    At closer looks gradscope notes which operation made the prediction of a loss function, or a
    matrix that right classes are picked from, and over which dimension it runs, views followed. The
    finding is raised when that is the first of two, or where `nll_loss` or `cross_entropy` has its
    classes in another one. Square matrices are silent: in a contrastive loss both
    dimensions are the batch. So are entries picked along the first dimension as well, and weights
    that are multiplied with something: a choice among moments, and an attention over them. A
    softmax over dimension 0 of three, or over 0 or 1 of four, is named where scores come out of a
    batched matrix product, and go into another one, whose batch is that of the model's input:
    neither sums over it.

    ## Example

        logp = torch.log_softmax(model(x), dim=0)

    ## Fix

        logp = torch.log_softmax(model(x), dim=1)

    ## When it is wrong

    When examples are to compete on purpose, as in a ranking of a list.
    """

    code = "GS311"
    name = "softmax-over-batch"
    severity = Severity.ERROR
    tables = ("losses", "calls", "batches")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per line that uses such a prediction."""
        losses = reached_losses(run)
        losses = losses.loc[
            losses["input_made_by"].isin(["Softmax", "LogSoftmax"]) & losses["input_dim"].notna()
        ]
        attention = losses.loc[losses["function"] == _ATTENTION]
        losses = losses.loc[losses["function"].isin(_OF_CLASSES)]
        sizes = _batch_sizes(run)
        findings = []
        by = ["file", "line", "input_dim"]
        for _, rows in losses.groupby(by, sort=False, dropna=False):
            shapes = [shape_of(text) or () for text in rows["input_shape"]]
            dim = int(rows["input_dim"].iloc[0])
            if any(len(shape) == 2 for shape in shapes):
                is_wrong = dim == 0 and not all(shape[:1] == shape[1:] for shape in shapes)
            else:
                is_wrong = bool((rows["class_dim"] != dim).fillna(False).all())
            if not is_wrong or any(len(shape) < 2 or shape[1] < 2 for shape in shapes):
                continue
            if not all(
                _picks_classes(str(function), shape, shape_of(target) or ())
                for function, shape, target in zip(
                    rows["function"],
                    shapes,
                    rows["target_shape"],
                    strict=True,
                )
            ):
                continue
            findings.append(self._finding_for(run, rows, shapes[0], 1, "classes"))
        for _, rows in attention.groupby(by, sort=False, dropna=False):
            shapes = [shape_of(text) or () for text in rows["input_shape"]]
            batch = [sizes.get(step) for step in rows["step"]]
            if all(own[0] == size for own, size in zip(shapes, batch, strict=True)):
                last = len(shapes[0]) - 1
                findings.append(self._finding_for(run, rows, shapes[0], last, "keys"))
        return findings

    def _finding_for(
        self, run: Recording, rows: pd.DataFrame, shape: tuple[int, ...], right: int, others: str
    ) -> Finding:
        row = rows.iloc[0]
        kind = str(row["input_made_by"])
        file, line = place_of(row, "made_at_")
        modules = culprits(run, kind)
        dim = int(row["input_dim"])
        of, who = (
            ("attention weights", "heads") if others == "keys" else ("the prediction", "places")
        )
        over = f"the {shape[dim]} {who}"
        if dim == 0:
            over, who = f"the batch of {shape[0]}", "examples"
        return self.finding(
            message=(
                f"the {kind}"
                + (f" (module {', '.join(modules)})" if modules else "")
                + f" of {of} of shape {list(shape)}{at(file, line)} runs over dim={dim}, {over}, "
                f"and not over the {shape[right]} {others}: {who} compete with each other"
            ),
            fix=f"give the {kind} the dimension of the {others}, which is dim={right} there",
            modules=modules,
            file=file,
            line=line,
            evidence={
                "operation": kind,
                "dim": dim,
                "input_shape": str(shape),
                "function": str(row["function"]),
            },
            **spread(run, rows),
        )


def _picks_classes(function: str, shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether a use of a matrix takes its rows for examples, and its columns for classes."""
    is_by_hand = function in ("getitem", "gather")
    return not is_by_hand or target[:1] == shape[:1]  # something of every row


def _batch_sizes(run: Recording) -> dict[int, int]:
    """Of each look the extent of dimension 0 of what the model was given."""
    batches = run.frame("batches")
    inputs = batches.loc[batches["role"] == "input"]
    first = inputs.drop_duplicates("step")
    shapes = (shape_of(text) for text in first["shape"])
    return {int(step): shape[0] for step, shape in zip(first["step"], shapes, strict=True) if shape}
