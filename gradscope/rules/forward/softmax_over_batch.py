"""GS311: the softmax of a prediction runs over the batch and not over the classes."""

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

    The prediction of a classification, a matrix of examples by classes, went through a softmax or
    log-softmax over its first dimension.

    Or the softmax of attention scores, a matrix for each example, did.

    ## Why it matters

    The examples of a batch compete with each other for each class, instead of the classes for each
    example. What the model says of one input depends on the others, and the loss is best when
    each class is given to some example, right or wrong.

    ## How it is found

    At closer looks gradscope notes which operation made the prediction of a loss function, or a
    matrix that right classes are picked from, and over which dimension it runs. The finding is
    raised when that is the first of two. Square matrices are silent: in a contrastive loss both
    dimensions are the batch. So are entries picked along the first dimension as well, and weights
    that are multiplied with something: a choice among moments, and an attention over them. The
    softmax over dimension 0 of three is named where scores come out of a batched matrix product,
    and go into another one, whose batch is that of the model's input: neither sums over it.

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
            losses["function"].isin(_OF_CLASSES)
            & losses["input_made_by"].isin(["Softmax", "LogSoftmax"])
        ]
        attention = _attention_over_batch(run)
        sizes = _batch_sizes(run)
        findings = []
        for _, rows in losses.groupby(["file", "line"], sort=False, dropna=False):
            shapes = [shape_of(text) or () for text in rows["input_shape"]]
            over_batch = (rows["input_dim"].fillna(-1) == 0).all()
            if not over_batch or any(len(shape) != 2 or shape[1] < 2 for shape in shapes):
                continue
            if all(shape[0] == shape[1] for shape in shapes):
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
            findings.append(self._finding_for(run, rows, shapes[0], f"{shapes[0][1]} classes", 1))
        for _, rows in attention.groupby(["file", "line"], sort=False, dropna=False):
            shapes = [shape_of(text) or () for text in rows["input_shape"]]
            batch = [sizes.get(step) for step in rows["step"]]
            if all(
                len(own) == 3 and own[0] == size for own, size in zip(shapes, batch, strict=True)
            ):
                findings.append(self._finding_for(run, rows, shapes[0], f"{shapes[0][2]} keys", 2))
        return findings

    def _finding_for(
        self, run: Recording, rows: pd.DataFrame, shape: tuple[int, ...], others: str, dim: int
    ) -> Finding:
        row = rows.iloc[0]
        kind = str(row["input_made_by"])
        file, line = place_of(row, "made_at_")
        modules = culprits(run, kind)
        of = "attention weights" if dim == 2 else "the prediction"
        return self.finding(
            message=(
                f"the {kind}"
                + (f" (module {', '.join(modules)})" if modules else "")
                + f" of {of} of shape {list(shape)}{at(file, line)} runs over dim=0, the batch of "
                f"{shape[0]}, and not over the {others}: examples compete with each other"
            ),
            fix=(f"give the {kind} dim={dim}, or dim=-1, the dimension of the {others.split()[1]}"),
            modules=modules,
            file=file,
            line=line,
            evidence={
                "operation": kind,
                "dim": 0,
                "input_shape": str(shape),
                "function": str(row["function"]),
            },
            **spread(run, rows),
        )


def _picks_classes(function: str, shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether a use of a matrix takes its rows for examples, and its columns for classes."""
    is_by_hand = function in ("getitem", "gather")
    return not is_by_hand or target[:1] == shape[:1]  # something of every row


def _attention_over_batch(run: Recording) -> pd.DataFrame:
    losses = reached_losses(run)
    return losses.loc[
        (losses["function"] == _ATTENTION)
        & (losses["input_made_by"] == "Softmax")
        & (losses["input_dim"] == 0)
    ]


def _batch_sizes(run: Recording) -> dict[int, int]:
    """Of each look the extent of dimension 0 of what the model was given."""
    batches = run.frame("batches")
    inputs = batches.loc[batches["role"] == "input"]
    first = inputs.drop_duplicates("step")
    shapes = (shape_of(text) for text in first["shape"])
    return {int(step): shape[0] for step, shape in zip(first["step"], shapes, strict=True) if shape}
