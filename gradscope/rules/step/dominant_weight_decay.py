"""GS511: weight decay shrinks the weights faster than anything can be learned."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradscope.rules.facts import made_at, span, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.rules.step.loss_trend import loss_trend
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import pandas as pd

_FEWEST_STEPS = 5

_FAST = 0.01
"""lr × weight_decay. The usual ones are at most a thousandth; at a hundredth weights halve in 69
steps, unless the gradient holds against it."""

_FORGETTING = 0.03
"""lr × weight_decay at which weights halve in 23 steps and so are made of the last few dozen
gradients only. Published recipes stay below a thousandth."""

_PULL = 2.0
"""Decay by gradient, where decay is a part of the gradient. A regularised model at its optimum has
exactly 1."""

_COLLAPSED = 0.7
"""Share of the first weights' norm."""

_LEARNED = 0.5
"""Share of the first loss below which SGD has found the minimum of loss and penalty together, as of
a ridge regression, and not only that of the penalty."""


class DominantWeightDecay(Rule):
    """GS511 dominant-weight-decay: weight decay is stronger than the gradient.

    ## What it finds

    An optimizer whose weight decay shrinks the weights by a percent and more in each step, or
    outweighs the gradient, and whose weights did collapse.

    ## Why it matters

    The model forgets faster than it learns: weights go to zero, outputs to a constant.

    ## How it is found

    Where decay is decoupled (AdamW) or linear (SGD): lr × weight_decay at most steps. Where it is
    added to the gradient of an adaptive optimizer (Adam): its norm against the gradient's, at the
    recorded steps. In both cases the norm of all weights has to have fallen by a third at least,
    and where decay is linear the loss not by half: a ridge regression shrinks its weights, too.
    Above 3 % a step decoupled decay is named whatever the norm does: the weights forget what was
    learned some dozen steps ago.

    ## Example

        torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=50.0)

    ## Fix

        torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)

    ## When it is wrong

    Weights that are meant to shrink, as for sparsity.
    """

    code = "GS511"
    name = "dominant-weight-decay"
    severity = Severity.WARNING
    tables = ("groups", "steps", "grads", "updates", "events")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer whose decay wins."""
        steps, groups = stepped(run), run.frame("groups")
        kinds = {known.name: known.kind for known in run.optimizers}
        findings = []
        for optimizer, own in steps.groupby("optimizer", sort=False):
            decayed = groups.loc[
                (groups["optimizer"] == optimizer)
                & groups["step"].isin(own["step"])
                & (groups["weight_decay"] > 0)
            ]
            norms = own["weight_norm"].dropna()
            if len(own) < _FEWEST_STEPS or decayed.empty or len(norms) < 2:
                continue
            shrunk = float(norms.iloc[-1] / norms.iloc[0]) if norms.iloc[0] > 0 else 1.0
            kind = kinds.get(str(optimizer), "")
            decoupled = kind == "AdamW" or bool(
                decayed["options"].str.contains("decoupled_weight_decay=True").any()
            )
            linear = decoupled or kind == "SGD"
            share = (decayed["lr"] * decayed["weight_decay"]).groupby(decayed["step"]).max()
            pull = _pull(own, float(decayed["weight_decay"].median()))
            fast = linear and float((share >= _FAST).sum()) >= len(own) / 2
            forgets = decoupled and float((share >= _FORGETTING).sum()) >= len(own) / 2
            forgets = forgets and len(own) * _FORGETTING > 1  # for long enough to have happened
            trend = loss_trend(own)
            learns = trend is not None and 0 < trend.last < _LEARNED * trend.first
            if not (fast or (not linear and pull >= _PULL)):
                continue
            if not forgets and (shrunk > _COLLAPSED or (fast and learns)):
                continue
            decay, lr = float(decayed["weight_decay"].max()), float(decayed["lr"].median())
            how = (
                f"shrinks the weights by {float(share.median()):.1%} in every step"
                if fast
                else f"is {pull:.2g} times as large as the gradient it is added to"
            )
            findings.append(
                self.finding(
                    message=(
                        f"weight_decay={decay:g} of {optimizer} ({kind}, lr={lr:.3g}) {how}: "
                        + (
                            f"the norm of all weights fell to {shrunk:.0%} of what it was"
                            if shrunk <= _COLLAPSED
                            else "what was learned some dozen steps ago is forgotten"
                        )
                    ),
                    fix=f"lower weight_decay of {optimizer}; 0.01 is usual for AdamW, 1e-4 for SGD",
                    optimizer=str(optimizer),
                    **span(own),
                    **made_at(run, str(optimizer)),
                    evidence={
                        "weight_decay": decay,
                        "lr": lr,
                        "shrinking_per_step": float(share.median()),
                        "decay_by_gradient": pull,
                        "weight_norm_first": float(norms.iloc[0]),
                        "weight_norm_last": float(norms.iloc[-1]),
                    },
                )
            )
        return findings


def _pull(own: pd.DataFrame, decay: float) -> float:
    """Median of the decay's norm by the gradient's over the recorded steps."""
    rows = own.loc[own["weight_norm"].notna() & (own["grad_norm"] > 0)]
    return float(np.median(decay * rows["weight_norm"] / rows["grad_norm"])) if len(rows) else 0.0
