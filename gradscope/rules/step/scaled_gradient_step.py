"""GS514: the optimizer is given gradients that are still multiplied by the loss scale."""

from __future__ import annotations

import numpy as np

from gradscope.rules.facts import backwards_at, first_place, numbers_in, span, stepped, words_of
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.rules.wording import some_of
from gradscope.run.recording import Recording


class ScaledGradientStep(Rule):
    """GS514 scaled-gradient-step: `optimizer.step()` on gradients of a scaled loss.

    ## What it finds

    A loss scaled by a `GradScaler` whose gradients are used by `optimizer.step()` directly, without
    `scaler.step(optimizer)` and without `scaler.unscale_(optimizer)`.

    ## Why it matters

    The gradients are 65536 times too large. SGD diverges at once. Adam hides it, but clipping,
    weight decay and eps are off by that factor, and infinite gradients are not skipped.

    ## How it is found

    The root of the backward came out of `scaler.scale`; the step was not called by the scaler, no
    `unscale_` came before it, and the program did not change the gradients itself.

    ## Example

        scaler.scale(loss).backward()
        optimizer.step()
        scaler.update()

    ## Fix

        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    ## When it is wrong

    A program that divides by the scale in a way of its own which cannot be seen.
    """

    code = "GS514"
    name = "scaled-gradient-step"
    severity = Severity.ERROR
    tables = ("steps", "grads", "backwards")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer that steps on scaled gradients."""
        backwards = run.frame("backwards")
        scaled = set(backwards.loc[backwards["scaled"], "backward"])
        steps, findings = stepped(run), []
        if not scaled:
            return []
        grads = run.frame("grads")
        by_hand = set(grads.loc[grads["edited"] | (grads["status"] == "assigned"), "step"])
        for optimizer, own in steps.groupby("optimizer", sort=False):
            wrong = own.loc[
                ~own["through_scaler"]
                & ~own["step"].isin(by_hand)
                & np.array(
                    [
                        bool(scaled & set(numbers_in(text))) and "unscale" not in words_of(order)
                        for text, order in zip(own["backwards"], own["order"], strict=True)
                    ],
                    np.bool_,
                )
            ]
            if len(wrong) < len(own) / 2 or wrong.empty:
                continue
            findings.append(
                self.finding(
                    message=(
                        f"{optimizer}.step() used gradients of a scaled loss at "
                        f"{some_of(len(wrong), len(own))} steps: nothing divided them by the scale"
                    ),
                    fix=f"call scaler.step({optimizer}) instead of {optimizer}.step()",
                    optimizer=str(optimizer),
                    **span(wrong),
                    **first_place(backwards_at(run, numbers_in(wrong["backwards"].iloc[0]))),
                    evidence={
                        "steps_on_scaled_gradients": len(wrong),
                        "steps_of_optimizer": len(own),
                        "grad_norm": float(wrong["grad_norm"].median()),
                    },
                )
            )
        return findings
