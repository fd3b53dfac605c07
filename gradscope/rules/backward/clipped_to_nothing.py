"""GS410: clipping leaves next to nothing of the gradients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gradscope.rules.backward.clip_order import clips_of
from gradscope.rules.facts import at, span, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import pandas as pd

_NOTHING = 3e-3
"""What is left of the norm. Clipping is meant for outliers; usual limits leave a tenth or more of
an ordinary gradient, and differentially private training about a hundredth."""

_LITTLE = 1e-2
_SMALL = 1.0
"""What is left of gradients whose norm is below one anyway, which is what clipping usually allows:
limits below a hundredth are not in use."""

_HARDLY_MOVES = 1e-3
"""Size of single updates relative to the weights: a thousandth is what usual learning rates give.
A learning rate that makes up for the clipping gives that too."""

_ORDINARY = 1e3
"""Gradients with a larger norm than this are exploding, and clipping is what saves the run."""

_LEAST_SHARE = 0.9
"""Nearly every step: at the beginning of a training gradients may be large."""

_LEAST_STEPS = 5

_EPS_MATTERS = 10.0
"""Adam divides by the gradient's own size plus eps. Gradients smaller than ten times eps on
average move the weights less than they were to; larger ones are not affected by any scale."""


class ClippedToNothing(Rule):
    """GS410 clipped-to-nothing: clipping shrinks ordinary gradients hundreds of times, always.

    ## What it finds

    At nearly every step `clip_grad_norm_` or `clip_grad_value_` leaves next to nothing of the
    gradients' norm, although they are of ordinary size.

    ## Why it matters

    With SGD that is a learning rate hundreds of times smaller than the one that was chosen, and
    the same length for every step. The model hardly moves. Adam's updates do not depend on the
    scale of gradients until these come near to its eps.

    ## How it is found

    gradscope measures the norm that clipping finds and the norm that the step reads. The finding is
    raised when the second is below 0.3 % of the first at nine steps out of ten, and the first is
    below 1000; below 1 %, if the first is below one and single updates are smaller than a
    thousandth of the weights. For optimizers of the Adam family it is a note, unless what is left
    is within ten times eps.

    ## Example

        clip_grad_norm_(model.parameters(), max_norm=1e-4)

    ## Fix

        clip_grad_norm_(model.parameters(), max_norm=1.0)

    ## When it is wrong

    When the learning rate was raised to make up for it.
    """

    code = "GS410"
    name = "clipped-to-nothing"
    severity = Severity.WARNING
    tables = ("steps", "groups", "events", "updates")
    symptom_of = ("GS407", "GS404", "GS604", "GS607")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer."""
        findings = []
        for name, own in stepped(run).groupby("optimizer", sort=False):
            clipped = own.loc[(own["grad_norm_before_clipping"] > 0) & ~own["scaled"].astype(bool)]
            if len(clipped) < max(_LEAST_STEPS, _LEAST_SHARE * len(own)):
                continue
            before = clipped["grad_norm_before_clipping"]
            left = clipped["grad_norm"] / before
            is_small = before.median() < _SMALL and _hardly_moves(run, str(name))
            bound = _LITTLE if is_small else _NOTHING
            shrunk = clipped.loc[(left < bound) & (clipped["grad_norm"] > 0)]
            if len(shrunk) < _LEAST_SHARE * len(clipped) or before.median() >= _ORDINARY:
                continue
            file, line, detail, _ = clips_of(run, str(name))
            matters, eps = _matters(run, str(name), clipped)
            findings.append(
                self.finding(
                    severity=Severity.WARNING if matters else Severity.INFO,
                    message=(
                        f"{detail or 'clipping'}{at(file, line)} leaves {left.median():.2g} of the "
                        f"gradients of {name} at {len(shrunk)} of {len(own)} steps: their norm is "
                        f"{before.median():.3g} before and {clipped['grad_norm'].median():.3g} "
                        "after"
                    ),
                    fix=(
                        f"clip{at(file, line)} to a norm that ordinary steps stay below: it is "
                        f"{before.median():.3g} here, 1.0 is usual"
                    ),
                    optimizer=str(name),
                    **span(shrunk),
                    file=file,
                    line=line,
                    evidence={
                        "clipping": detail,
                        "norm_before": float(before.median()),
                        "norm_after": float(clipped["grad_norm"].median()),
                        "left": float(left.median()),
                        "eps": eps,
                    },
                )
            )
        return findings


def _hardly_moves(run: Recording, optimizer: str) -> bool:
    """Whether the typical update of an optimizer is small against its weights."""
    updates = run.frame("updates")
    updates = updates.loc[updates["optimizer"] == optimizer]
    squares = updates[["step", "update_norm", "weight_norm_before"]].fillna(0.0)
    squares[["update_norm", "weight_norm_before"]] **= 2
    sums = squares.groupby("step").sum()
    ratios = (sums["update_norm"] / sums["weight_norm_before"]) ** 0.5
    return bool(ratios.median() < _HARDLY_MOVES)


def _matters(run: Recording, optimizer: str, clipped: pd.DataFrame) -> tuple[bool, float]:
    """Whether an optimizer feels the scale of its gradients, and its eps if it divides by them."""
    groups = run.frame("groups")
    eps = groups.loc[groups["optimizer"] == optimizer, "eps"].dropna()
    if eps.empty:
        return True, math.nan
    held = [
        entry.numel
        for entry in run.parameters
        if any(run.optimizers[number].name == optimizer for number, _ in entry.holders)
    ]
    typical = clipped["grad_norm"].median() / math.sqrt(max(1, sum(held)))
    return bool(typical < _EPS_MATTERS * eps.max()), float(eps.max())
