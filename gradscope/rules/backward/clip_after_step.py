"""GS408: gradients are clipped after the step that they were for."""

from __future__ import annotations

from gradscope.rules.backward.clip_order import described, misplaced_clips
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording


class ClipAfterStep(Rule):
    """GS408 clip-after-step: gradients are clipped when the step has already used them.

    ## What it finds

    `clip_grad_norm_` or `clip_grad_value_` is called after `optimizer.step()`, and never between
    backward and step.

    ## Why it matters

    The step has used the gradients as they were. Clipping them afterwards changes nothing that
    anybody reads: the loop is one without clipping.

    ## How it is found

    gradscope notes the order of what happens between two steps. The finding is raised when no
    clipping ever came between a backward and its step, and the clippings came behind a step. A
    limit of infinity only measures the norm, and is silent.

    ## Example

        loss.backward()
        optimizer.step()
        clip_grad_norm_(model.parameters(), 0.5)

    ## Fix

        loss.backward()
        clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()

    ## When it is wrong

    When the clipped gradients are used again on purpose, by another step without a backward.
    """

    code = "GS408"
    name = "clip-after-step"
    severity = Severity.ERROR
    tables = ("steps", "events")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer."""
        findings = []
        for optimizer, own in misplaced_clips(run, "after"):
            clipping, details = described(run, optimizer, own)
            findings.append(
                self.finding(
                    message=(
                        f"{clipping} is called after {optimizer}.step(), which has already used "
                        f"the gradients: none of {len(own)} steps was clipped"
                    ),
                    **details,
                )
            )
        return findings
