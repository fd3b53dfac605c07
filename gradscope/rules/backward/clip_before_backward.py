"""GS409: gradients are clipped before the backward that computes them."""

from __future__ import annotations

from gradscope.rules.backward.clip_order import described, misplaced_clips
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording


class ClipBeforeBackward(Rule):
    """GS409 clip-before-backward: gradients are clipped before backward has computed them.

    ## What it finds

    `clip_grad_norm_` or `clip_grad_value_` is called before `loss.backward()`, and never between
    backward and step.

    ## Why it matters

    There is nothing to clip yet: `clip_grad_norm_` returns 0 and says nothing. The gradients that
    the step uses are as large as they were.

    ## How it is found

    gradscope notes the order of what happens between two steps. The finding is raised when no
    clipping ever came between a backward and its step, and already the first step had its clipping
    in front of the backward, or a `zero_grad` in front of the clipping.

    ## Example

        optimizer.zero_grad()
        clip_grad_norm_(model.parameters(), 1.0)
        loss.backward()
        optimizer.step()

    ## Fix

        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    ## When it is wrong

    When gradients are clipped on purpose before more is added to them.
    """

    code = "GS409"
    name = "clip-before-backward"
    severity = Severity.ERROR
    tables = ("steps", "events")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer."""
        findings = []
        for optimizer, own in misplaced_clips(run, "before"):
            clipping, details = described(run, optimizer, own)
            findings.append(
                self.finding(
                    message=(
                        f"{clipping} is called before loss.backward() has computed the gradients: "
                        f"none of {len(own)} steps of {optimizer} was clipped"
                    ),
                    **details,
                )
            )
        return findings
