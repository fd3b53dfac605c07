"""GS404: gradients are thousands of times too large, from the start or ever more so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradscope.rules.facts import in_phase, listed, phases, span, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import pandas as pd

_FROM_THE_START = 1e3
"""Norm of all gradients of a mean cross-entropy before the first update. The loss is about ln C
then, and the norm between 0.1 and a few dozen whatever the size of the network."""

_GROWN_BY = 1e4
"""How much larger than at the start. Learning changes the norm by a factor of ten or a hundred."""

_GROWN_TO = 1e3
"""Small gradients may grow a lot without harm."""

_LEAST_STEPS = 8

_LEAST_LARGE = 3
"""A single spike is a bad batch."""

_OF_ORDER_ONE = ("cross_entropy", "nll_loss", "binary_cross_entropy_with_logits")
"""Loss functions whose value, and gradient by the prediction, is of order one at the start."""

_OUT_OF_PROPORTION = 1e4
"""Mean squared error before the first update, against the mean square of targets, or one where they
are small. An untrained network gives values of order one, whatever its targets are; these are a
hundred times as large."""

_PLAIN = ("Addmm", "Mm", "Convolution")
"""Layers that give a prediction. What is computed from one, such as the residual of a differential
equation, may be of any size."""


class ExplodingGradient(Rule):
    """GS404 exploding-gradient: gradients grow from layer to layer or from step to step.

    ## What it finds

    The norm of all gradients is above a thousand at the first step, or grows
    more than ten thousand times during the run.

    ## Why it matters

    A single step with such gradients throws the weights far away, and what was learnt is gone.
    Often the next thing to be seen is NaN.

    ## How it is found

    At the start: the norm before the first update, of a mean cross-entropy, whose gradient is of
    order one for an untrained network, or of a mean squared error ten thousand times as large as
    the mean square of the targets. Later: the norm of at least three steps, and of the last
    quarter of the run, against that of the first. What clipping finds is measured, too, but where
    clipping brings the norm down the finding is only a note.

    ## Example

        for layer in layers:
            nn.init.normal_(layer.weight, std=0.7)    # 64 inputs: every layer multiplies by five

    ## Fix

        for layer in layers:
            nn.init.kaiming_normal_(layer.weight)     # std = sqrt(2 / 64)

    ## When it is wrong

    When losses are scaled by hand, or a game between two networks swings on its own.
    """

    code = "GS404"
    name = "exploding-gradient"
    severity = Severity.WARNING
    tables = ("steps", "grads", "losses", "batches", "events")
    symptom_of = ("GS505", "GS607", "GS514", "GS201", "GS603", "GS407")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer."""
        steps = stepped(run)
        steps = steps.loc[~steps["scaled"].astype(bool)]
        findings = []
        for optimizer, own in steps.groupby("optimizer", sort=False):
            norms = own["grad_norm_before_clipping"].fillna(own["grad_norm"]).to_numpy()
            at_start = _is_large_at_start(run, own, norms)
            grown = _growth(norms)
            if not at_start and grown is None:
                continue
            is_clipped = bool((own["grad_norm_before_clipping"] > own["grad_norm"] * 1.01).any())
            large = own.loc[~(norms < _FROM_THE_START)]
            params = _largest(run, int(large["step"].iloc[0]))
            if at_start:
                what = f"is {norms[0]:.3g} before the first update"
            else:
                what = f"grew from {grown[0]:.3g} to {grown[1]:.3g}" if grown else ""
            findings.append(
                self.finding(
                    severity=Severity.INFO if is_clipped else Severity.WARNING,
                    message=(
                        f"the norm of all gradients of {optimizer} {what}; the largest are those "
                        f"of {listed(params)}"
                    ),
                    fix=(
                        "initialise the weights smaller (nn.init.kaiming_normal_), normalise "
                        "between layers, or lower the learning rate"
                        + (
                            ""
                            if is_clipped
                            else "; clip_grad_norm_(model.parameters(), 1.0) before "
                            f"{optimizer}.step() limits the harm"
                        )
                    ),
                    params=params,
                    optimizer=str(optimizer),
                    **span(large),
                    evidence={
                        "grad_norm_first": float(norms[0]),
                        "grad_norm_max": float(np.nanmax(norms)),
                        "grad_norm_last": float(norms[-1]),
                        "clipped": is_clipped,
                    },
                )
            )
        return findings


def _is_large_at_start(run: Recording, own: pd.DataFrame, norms: np.ndarray) -> bool:
    losses = run.frame("losses")
    began_at = int(own["step"].iloc[0])
    own_phase = next(((a, b) for a, b in phases(run) if a <= began_at < b), None)
    losses = losses if own_phase is None else in_phase(losses, own_phase)
    first = losses.loc[losses["step"] == losses["step"].min()] if len(losses) else losses
    first = first.loc[first["reached"].astype(bool)]
    began = int(own["optimizer_step"].iloc[0]) == 0
    if not began or first.empty or (first["reduction"] != "mean").any():
        return False
    is_of_order_one = first["function"].isin(_OF_ORDER_ONE).all()
    if not is_of_order_one and not _is_out_of_proportion(run, first):
        return False
    # A loss that was scaled by hand has gradients as much larger.
    scale = abs(float(own["loss"].iloc[0])) / max(float(first["value"].sum()), 1e-12)
    return bool(norms[0] > _FROM_THE_START * max(scale, 1.0))


def _is_out_of_proportion(run: Recording, first: pd.DataFrame) -> bool:
    """Whether all losses are squared errors of predictions that are far larger than targets."""
    batches = run.frame("batches")
    targets = batches.loc[
        (batches["role"] == "target")
        & (batches["owner"] == "mse_loss")
        & (batches["step"] == first["step"].min())
    ]
    if targets.empty or not (targets["std"] > 0).all():
        return False
    squares = targets["mean"] ** 2 + targets["std"] ** 2
    bound = _OUT_OF_PROPORTION * max(float(squares.max()), 1.0)
    return bool(
        (first["function"] == "mse_loss").all()
        and first["input_made_by"].isin(_PLAIN).all()
        and (first["value"] > bound).all()
    )


def _growth(norms: np.ndarray) -> tuple[float, float] | None:
    """The typical norm at the start and a late one, where there is an explosion between them."""
    known = norms[~np.isnan(norms)]
    if len(known) < _LEAST_STEPS:
        return None
    quarter = max(2, len(known) // 4)
    start = float(np.median(known[:quarter]))
    # A loop that ends in overflow has its last finite norms in the place of its last ones.
    late = float(np.median(known[-quarter:]))
    large = known > max(_GROWN_TO, _GROWN_BY * start)
    if start > 0 and large.sum() >= _LEAST_LARGE and late > max(_GROWN_TO, _GROWN_BY * start):
        return start, late
    return None


def _largest(run: Recording, step: int) -> tuple[str, ...]:
    grads = run.frame("grads")
    rows = grads.loc[grads["step"] == step].sort_values("norm", ascending=False)
    return tuple(rows["param"].head(3))
