"""GS515: a gradient scaler that steps and is never updated."""

from __future__ import annotations

from gradscope.rules.facts import backwards_at, events_of, first_place, numbers_in, span, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording

_RAISED = ("since the last update()", "unscale_() is being called after step()")
"""What PyTorch says of a second unscale_ or step (2.13): a second one there was."""


class ScalerNotUpdated(Rule):
    """GS515 scaler-not-updated: `scaler.step()` without `scaler.update()`.

    ## What it finds

    Optimizer steps made by a `GradScaler` whose `update` is never called.

    ## Why it matters

    The scale is never adapted: once it is too large every step is skipped, and where it is too
    small gradients underflow. PyTorch raises at the second step of the same scaler.

    ## How it is found

    The scaler called the optimizer's step at least twice, or PyTorch raised that the last update
    is missing, and no `update` was seen in the whole run.

    ## Example

        scaler.scale(loss).backward()
        scaler.step(optimizer)

    ## Fix

        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    ## When it is wrong

    A class of its own that adapts the scale by other means.
    """

    code = "GS515"
    name = "scaler-not-updated"
    severity = Severity.ERROR
    tables = ("steps", "events", "backwards")

    def check(self, run: Recording) -> list[Finding]:
        """Return at most one finding."""
        steps = run.frame("steps")
        scaled = steps.loc[steps["through_scaler"]]
        events = run.frame("events")
        texts = events.loc[events["event"].isin(("exception", "ended")), "detail"]
        raised = any(sign in text for text in texts for sign in _RAISED)
        if (len(scaled) < 2 and not raised) or len(events_of(run, "scale_update")):
            return []
        if scaled.empty:
            return self._without_the_scaler(run)
        optimizers = [str(name) for name in scaled["optimizer"].unique()]
        if len(scaled) == len(optimizers) and not raised:
            return []  # the first iteration only, of several optimizers
        numbers = numbers_in(str(scaled["backwards"].iloc[0]))
        then = "; PyTorch raised at the next one" if raised else ""
        return [
            self.finding(
                message=(
                    f"the gradient scaler stepped {' and '.join(optimizers)} {len(scaled)} times "
                    f"and scaler.update() was never called{then}"
                ),
                fix=f"call scaler.update() once per iteration, after scaler.step({optimizers[-1]})",
                optimizer=optimizers[0] if len(optimizers) == 1 else None,
                **span(scaled),
                **first_place(backwards_at(run, numbers)),
                evidence={"steps_through_scaler": len(scaled), "updates": 0, "raised": raised},
            )
        ]

    def _without_the_scaler(self, run: Recording) -> list[Finding]:
        """The second unscale_ raised, and neither step nor update of the scaler came between."""
        steps = stepped(run)
        if steps.empty:
            return []  # unscale_ twice in one iteration
        optimizer = str(steps["optimizer"].iloc[-1])
        numbers = numbers_in(str(steps["backwards"].iloc[0]))
        return [
            self.finding(
                message=(
                    f"scaler.unscale_({optimizer}) was called a second time, and PyTorch raised: "
                    f"{optimizer}.step() was called directly, and scaler.update() never"
                ),
                fix=f"call scaler.step({optimizer}) and scaler.update() in place of that step",
                optimizer=optimizer,
                **span(steps),
                **first_place(backwards_at(run, numbers)),
                evidence={"steps_through_scaler": 0, "updates": 0, "raised": True},
            )
        ]
