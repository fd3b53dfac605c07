"""GS310: prediction and target have shapes that broadcast against each other."""

from __future__ import annotations

from math import prod

from gradscope.rules.facts import at, place_of, reached_losses, shape_of
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.forward.loss_inputs import spread
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording

_WRITTEN = {"sub": "subtraction's", "written_binary_cross_entropy": "cross-entropy's"}

_ELEMENTWISE = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", *_WRITTEN)
"""Loss functions that compare element with element, and what is written by hand."""


class LossBroadcast(Rule):
    """GS310 loss-broadcast: the loss compares every prediction with every target.

    ## What it finds

    A loss that compares element with element was given a prediction of shape `[N, 1]` and a target
    of shape `[N]`, or shapes that likewise stretch each other.

    ## Why it matters

    Broadcasting makes an `[N, N]` matrix of both: every prediction is compared with every target.
    The best the model can do then is to predict the mean, for every input. PyTorch warns once, if
    the loss is one of its own.

    ## How it is found

    At closer looks gradscope notes the shapes given to loss functions, and subtractions of `[N]`
    and `[N, 1]` of which only one side requires grad, and products of labels and logarithms. The
    finding is raised when the result has more elements than either side. Sides that were given
    dimensions to meet in all pairs, `x[:, None]` and `y[None]` of the same features or with
    `reduction="none"`, are silent, and so is `x[:, None] - y`.

    ## Example

        loss = F.mse_loss(model(x), y)                # [64, 1] and [64]

    ## Fix

        loss = F.mse_loss(model(x).squeeze(1), y)     # [64] and [64]

    ## When it is wrong

    When all pairs of predictions and targets are to be compared on purpose.
    """

    code = "GS310"
    name = "loss-broadcast"
    severity = Severity.ERROR
    tables = ("losses",)

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per line that calls the loss."""
        losses = reached_losses(run)
        losses = losses.loc[losses["function"].isin(_ELEMENTWISE)]
        findings = []
        for (function, *_), rows in losses.groupby(
            ["function", "file", "line"], sort=False, dropna=False
        ):
            shapes = [
                (shape_of(left) or (), shape_of(right) or ())
                for left, right in zip(rows["input_shape"], rows["target_shape"], strict=True)
            ]
            stretched = [pair for pair in shapes if _stretch_each_other(*pair)]
            if (rows["reduction"] == "none").all():  # all pairs, which the program goes on with
                stretched = [(left, right) for left, right in stretched if len(left) != len(right)]
            if function in _WRITTEN:  # no comparison, unless a column meets its row
                stretched = [
                    pair for pair in stretched if _is_column(*pair) or _is_column(*pair[::-1])
                ]
            if not stretched or len(stretched) < len(shapes) / 2:
                continue
            left, right = stretched[0]
            result = _broadcast(left, right)
            row = rows.iloc[0]
            function = str(function)
            called = _WRITTEN.get(function) or _spelled(function)
            file, line = place_of(row)
            findings.append(
                self.finding(
                    message=(
                        f"the {called} inputs{at(file, line)} are a prediction of shape "
                        f"{list(left)} and a target of shape {list(right)}, which broadcast to "
                        f"{list(result)}: "
                        "every prediction is compared with every target"
                    ),
                    fix=(
                        f"give both the same shape{at(file, line)}: prediction.squeeze(-1), or "
                        "target.unsqueeze(-1)"
                    ),
                    file=file,
                    line=line,
                    evidence={
                        "function": function,
                        "input_shape": str(left),
                        "target_shape": str(right),
                        "result_shape": str(result),
                    },
                    **spread(run, rows),
                )
            )
        return findings


def _broadcast(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    n = max(len(left), len(right))
    padded = [(1,) * (n - len(shape)) + shape for shape in (left, right)]
    return tuple(max(a, b) for a, b in zip(*padded, strict=True))


def _stretch_each_other(left: tuple[int, ...], right: tuple[int, ...]) -> bool:
    # A smaller side alone may be stretched on purpose: one target, or one weight, for all.
    stretched = prod(_broadcast(left, right)) > max(prod(left), prod(right))
    return stretched and not _are_paired(left, right)


def _are_paired(left: tuple[int, ...], right: tuple[int, ...]) -> bool:
    """Whether dimensions were put in so that all pairs meet: ``x[:, None]`` and ``y[None]``.

    It takes as many features on both sides, or another number of examples, which nobody has by
    mistake.
    """
    if len(left) != len(right):
        return False
    stretched = [(a, b) for a, b in zip(left, right, strict=True) if a != b]
    counts = [max(pair) for pair in stretched]
    return len(stretched) == 2 and (left[-1] == right[-1] > 1 or counts[0] != counts[1])


def _is_column(left: tuple[int, ...], right: tuple[int, ...]) -> bool:
    return left == (*right, 1)


def _spelled(function: str) -> str:
    kinds = {
        "mse_loss": "MSELoss",
        "l1_loss": "L1Loss",
        "smooth_l1_loss": "SmoothL1Loss",
        "huber_loss": "HuberLoss",
    }
    return kinds[function]
