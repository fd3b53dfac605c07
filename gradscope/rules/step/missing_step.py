"""GS501: gradients are computed and no optimizer step ever uses them."""

from __future__ import annotations

from gradscope.rules.facts import events_of, first_place, held_by
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording

_FEWEST_BACKWARDS = 3
"""A script that calls backward once or twice to look at gradients is no training loop."""


class MissingStep(Rule):
    """GS501 missing-step: backward computes gradients, but `optimizer.step()` is never called.

    ## What it finds

    A run in which `loss.backward()` wrote the gradients of an optimizer's parameters again and
    again, and neither that optimizer nor anything else ever changed them.

    ## Why it matters

    Nothing is learned. The loss only moves with the batches, dropout and running statistics.

    ## How it is found

    The optimizer made no attempt to step in the whole run, no other optimizer stepped its
    parameters, and the norms of their values are the same at the end as when they were first met.
    A program that updates weights by hand changes their values, and is left alone.

    ## Example

        loss.backward()
        scheduler.step()        # the learning rate moves, the weights do not

    ## Fix

        loss.backward()
        optimizer.step()
        scheduler.step()

    ## When it is wrong

    A program that makes an optimizer and only studies gradients, without any training.
    """

    code = "GS501"
    name = "missing-step"
    severity = Severity.ERROR
    tables = ("steps", "backwards", "params", "events")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer that never steps."""
        steps = run.frame("steps")
        tried = set(steps.loc[steps["outcome"] != "open", "optimizer"])
        backwards = run.frame("backwards")
        unused = backwards.loc[
            (backwards["function"] == "backward")
            & (backwards["n_reached"] > 0)
            & (backwards["error"] == "")
            & ~backwards["step"].isin(steps.loc[steps["outcome"] != "open", "step"])
        ]
        if len(unused) < _FEWEST_BACKWARDS:
            return []
        findings = []
        for known in run.optimizers:
            optimizer = known.name
            held = [run.parameters[number] for number in held_by(run, optimizer)]
            trained = [entry for entry in held if entry.requires_grad and entry.reached]
            if (
                optimizer in tried
                or not trained
                or any(entry.norm_first != entry.norm_last for entry in trained)
                or any(run.optimizers[n].name in tried for e in trained for n, _ in e.holders)
            ):
                continue
            n_scheduled = len(events_of(run, "scheduler", optimizer))
            instead = f"; its scheduler stepped {n_scheduled} times" if n_scheduled else ""
            findings.append(
                self.finding(
                    message=(
                        f"{optimizer}.step() was never called: {len(unused)} backwards computed "
                        f"gradients for its {len(held)} parameters, whose values did not "
                        f"change{instead}"
                    ),
                    fix=f"call {optimizer}.step() after loss.backward()",
                    params=tuple(entry.name for entry in trained),
                    optimizer=optimizer,
                    **first_place(unused.iloc[::-1]),
                    evidence={
                        "backwards": len(unused),
                        "steps_of_optimizer": 0,
                        "scheduler_steps": n_scheduled,
                        "parameters": len(held),
                    },
                )
            )
        return findings
