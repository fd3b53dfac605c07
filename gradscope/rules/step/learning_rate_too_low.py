"""GS506: updates too small to matter, and a loss that stands still."""

from __future__ import annotations

import math

from gradscope.rules.facts import made_at, span, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.rules.step.loss_trend import loss_trend, update_ratios
from gradscope.run.recording import Recording

_FEWEST_STEPS = 20
"""Warm-ups are this short where they are short."""

_SMALL = 2e-5
"""Update by weights, as norms. Fine-tuning a large model at 2e-5 with Adam comes to 5e-4."""

_LARGEST_TRAVEL = 1e-2
"""All updates of the run together, were they all in one direction, by the weights."""

_LARGEST_RATE = 1e-4
"""At a larger learning rate it is the gradient that is small, and not the rate."""


class LearningRateTooLow(Rule):
    """GS506 learning-rate-too-low: the updates are too small to change anything.

    ## What it finds

    An optimizer whose updates, at every recorded step, are less than a fifty-thousandth of the
    weights, so that the whole run moves them by less than a percent, while the loss stands still.

    ## Why it matters

    Nothing is learned, although everything works.

    ## How it is found

    From the norms of update and weights at recorded steps, the number of steps, the learning rate
    itself (at most 1e-4, so that a converged model with tiny gradients is left alone), and the
    loss, which ends within its own scatter of where it began.

    ## Example

        optimizer = torch.optim.SGD(model.parameters(), lr=1e-8)

    ## Fix

        optimizer = torch.optim.SGD(model.parameters(), lr=5e-2)

    ## When it is wrong

    A short look into a long training whose learning rate is meant to be tiny.
    """

    code = "GS506"
    name = "learning-rate-too-low"
    severity = Severity.WARNING
    tables = ("steps", "groups", "events")
    symptom_of = ("GS403", "GS410", "GS503", "GS504", "GS517", "GS301", "GS202")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer that stands still."""
        steps, groups = stepped(run), run.frame("groups")
        findings = []
        for optimizer, own in steps.groupby("optimizer", sort=False):
            trend, ratios = loss_trend(own), update_ratios(own)
            rates = groups.loc[groups["optimizer"] == optimizer, "lr"]
            if len(own) < _FEWEST_STEPS or trend is None or ratios.empty or rates.empty:
                continue
            rate, ratio = float(rates.max()), float(ratios.max())
            moved = abs(trend.last - trend.first)
            stands_still = moved <= max(trend.spread, 0.02 * abs(trend.first))
            if (
                not 0 < rate <= _LARGEST_RATE
                or not ratio < _SMALL
                or float(ratios.mean()) * len(own) > _LARGEST_TRAVEL
                or not own["grad_norm"].median() > 0
                or not math.isfinite(trend.last)
                or not stands_still
            ):
                continue
            findings.append(
                self.finding(
                    message=(
                        f"the learning rate {rate:.3g} of {optimizer} makes updates of at most "
                        f"{ratio:.1g} of the weights: in {len(own)} steps the loss went from "
                        f"{trend.first:.4g} to {trend.last:.4g}"
                    ),
                    fix=f"raise the learning rate of {optimizer}",
                    optimizer=str(optimizer),
                    **span(own),
                    **made_at(run, str(optimizer)),
                    evidence={
                        "lr": rate,
                        "largest_update_ratio": ratio,
                        "grad_norm": float(own["grad_norm"].median()),
                        "loss_first": trend.first,
                        "loss_last": trend.last,
                    },
                )
            )
        return findings
