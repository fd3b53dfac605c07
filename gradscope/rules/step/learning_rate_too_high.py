"""GS505: updates as large as the weights, and a loss that does not fall."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from gradscope.rules.facts import made_at, span, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.rules.step.loss_trend import loss_trend, update_ratios
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import pandas as pd

_FEWEST_STEPS = 10
"""In fewer steps a healthy loss need not have fallen."""

_LARGE = 0.3
"""Update by weights, as norms. Rules of thumb ask for a thousandth; Adam's first steps on a small
network at a learning rate of 0.01 come to a tenth."""

_FIRST = 3
"""Steps after which weights that have grown make the same updates look small."""

_MUCH_WORSE = 2.0
"""By what factor a loss has risen that such steps have driven away for good."""

_NO_BETTER = 0.95
"""A loss that ends above this share of where it began has not been learned from."""


class LearningRateTooHigh(Rule):
    """GS505 learning-rate-too-high: single updates are as large as the weights themselves.

    ## What it finds

    An optimizer whose first updates are a large part of the weights, in a run whose loss then does
    not fall, rises, or stops being finite.

    ## Why it matters

    Each step jumps over what the last one found. Units die or saturate, losses become huge or NaN.

    ## How it is found

    At the recorded steps of the first quarter of the run the norm of the whole update is compared
    with the norm of the weights; the median has to be above 0.3. Then the loss decides: the median
    of the last fifth of the steps is no better than that of the first, or not finite. Where only
    the first three updates were as large, as weights that grow with them make the later ones look
    small, the loss has to end at twice of what the untrained model had. A loss that begins below
    zero has to end as far above: that of a policy whose actions cost something rises to zero as
    it grows certain.

    ## Example

        optimizer = torch.optim.SGD(model.parameters(), lr=50)

    ## Fix

        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    ## When it is wrong

    The same happens at a usual learning rate where gradients are huge for another reason: inputs
    that were not normalised, a summed loss, weights that were initialised too large.
    """

    code = "GS505"
    name = "learning-rate-too-high"
    severity = Severity.WARNING
    tables = ("steps", "groups", "events")
    symptom_of = (
        "GS201",
        "GS204",
        "GS402",
        "GS404",
        "GS511",
        "GS512",
        "GS514",
        "GS603",
        "GS604",
        "GS605",
        "GS607",
        "GS608",
    )

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer that jumps."""
        steps, groups = stepped(run), run.frame("groups")
        findings = []
        for optimizer, own in steps.groupby("optimizer", sort=False):
            trend = loss_trend(own)
            early = own.iloc[: max(4, len(own) // 4)]
            ratios = update_ratios(early)
            if len(own) < _FEWEST_STEPS or trend is None or len(ratios) < 2:
                continue
            ratio = float(ratios.replace(np.inf, np.nan).median())
            begin = float(own["loss"].iloc[0])
            worse = not math.isfinite(trend.last) or (
                trend.last >= _NO_BETTER * max(trend.first, begin)
                if begin > 0
                else trend.last > -begin
            )
            # Where every first loss is bad already, the very first is what a fresh model has.
            worse = worse or (begin > 0 and trend.last >= _NO_BETTER * begin)
            if not (ratio >= _LARGE or math.isnan(ratio)):
                ratio = _of_first(own)
                worse = trend.last >= _MUCH_WORSE * begin > 0 and trend.last - begin > trend.spread
            if not (ratio >= _LARGE or math.isnan(ratio)) or not worse:
                continue
            lr = float(groups.loc[groups["optimizer"] == optimizer, "lr"].max())
            end = f"{trend.last:.3g}" if math.isfinite(trend.last) else "no finite number"
            findings.append(
                self.finding(
                    message=(
                        f"the learning rate {lr:.3g} of {optimizer} makes single updates "
                        f"{ratio:.2g} times as large as the weights, and the loss went from "
                        f"{begin:.3g} to {end}"
                    ),
                    fix=f"lower the learning rate of {optimizer}, ten times at first",
                    optimizer=str(optimizer),
                    **span(own),
                    **made_at(run, str(optimizer)),
                    evidence={
                        "lr": lr,
                        "update_ratio": ratio,
                        "loss_first": begin,
                        "loss_last": trend.last,
                        "nonfinite_losses": trend.n_nonfinite,
                    },
                )
            )
        return findings


def _of_first(own: pd.DataFrame) -> float:
    """The median ratio of the first steps; 0 where weights began with zeros, and had to grow."""
    ratios = update_ratios(own.iloc[:_FIRST])
    return float(ratios.median()) if len(ratios) == _FIRST else 0.0
