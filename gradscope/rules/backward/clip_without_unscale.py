"""GS407: gradients are clipped while they are still multiplied by the scaler's scale."""

from __future__ import annotations

from gradscope.rules.facts import at, numbers_in, place_of, words_of
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.rules.wording import some_of
from gradscope.run.recording import Recording

_LEAST_SHARE = 0.5
"""A loop does it at every step."""


class ClipWithoutUnscale(Rule):
    """GS407 clip-without-unscale: gradients are clipped before the scaler's scale is taken out.

    ## What it finds

    Between `scaler.scale(loss).backward()` and the clipping there is no
    `scaler.unscale_(optimizer)`.

    ## Why it matters

    The gradients are larger by the scale, 65536 at first. Clipping them to a norm of 1 leaves a
    65536th of that once the scaler has divided: the model hardly learns, and differently whenever
    the scale changes.

    ## How it is found

    gradscope notes the order of what happens before each step, and whether the loss came out of
    `scaler.scale`. The finding is raised when clipping follows a scaled backward without an
    `unscale_` in between, at half of the steps or more.

    ## Example

        scaler.scale(loss).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)

    ## Fix

        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)

    ## When it is wrong

    When the program divides by the scale itself, or passes a limit that is multiplied by it.
    """

    code = "GS407"
    name = "clip-without-unscale"
    severity = Severity.ERROR
    tables = ("steps", "backwards", "events")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer."""
        steps = run.frame("steps")
        backwards = run.frame("backwards")
        scaled = set(backwards.loc[backwards["scaled"].astype(bool), "backward"])
        if not scaled:
            return []
        events = run.frame("events")
        clips = events.loc[events["event"] == "clip"]
        findings = []
        for optimizer, own in steps.groupby("optimizer", sort=False):
            own = own.loc[own["outcome"].isin(["stepped", "skipped"])]
            wrong = [
                int(step)
                for step, order, text in zip(
                    own["step"], own["order"], own["backwards"], strict=True
                )
                if _clips_scaled(words_of(order)) and scaled.intersection(numbers_in(text))
            ]
            if not wrong or len(wrong) < _LEAST_SHARE * len(own):
                continue
            row = clips.loc[clips["subject"].isin([optimizer, ""])].head(1)
            file, line = place_of(row.iloc[0]) if len(row) else (None, None)
            detail = str(row["detail"].iloc[0]) if len(row) else "clipping"
            findings.append(
                self.finding(
                    message=(
                        f"gradients of {optimizer} are clipped{at(file, line)} while they are "
                        f"still multiplied by the gradient scaler's scale: scaler.unscale_ is "
                        f"missing, at {some_of(len(wrong), len(own))} steps"
                    ),
                    fix=f"call scaler.unscale_({optimizer}) before the clipping{at(file, line)}",
                    optimizer=str(optimizer),
                    step_first=wrong[0],
                    step_last=wrong[-1],
                    count=len(wrong),
                    file=file,
                    line=line,
                    evidence={
                        "clipping": detail,
                        "order": str(own["order"].iloc[-1]),
                        "steps_of_optimizer": len(own),
                    },
                )
            )
        return findings


def _clips_scaled(words: list[str]) -> bool:
    """Whether a clip follows the last backward with no unscale in between."""
    if "backward" not in words:
        return False
    last = len(words) - 1 - words[::-1].index("backward")
    after = words[last:]
    return "clip" in after and "unscale" not in after[: after.index("clip")]
