"""GS513: a step with gradients and a learning rate that changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradscope.rules.facts import has_moved, held_by, made_at, span, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import pandas as pd

_FEWEST_STEPS = 3
"""As many as are always recorded at the beginning."""

_FEWEST_SKIPPED = 20
"""A gradient scaler begins with a scale that is too large, and skips some first steps."""


class StepWithoutEffect(Rule):
    """GS513 step-without-effect: `optimizer.step()` leaves every weight as it was.

    ## What it finds

    An optimizer that steps with gradients that are not zero and a learning rate above 0, after
    which all of its weights are, bit for bit, what they were; or one whose every step a gradient
    scaler skipped.

    ## Why it matters

    Nothing is learned.

    ## How it is found

    At recorded steps the weights after the step are compared with a copy from before it. An
    optimizer that gathers gradients and moves weights at every tenth step only is silent: no step
    of it that is recorded may have moved any, but over the whole run their norms have changed
    though nothing was seen to write them between steps.

    ## Example

        class Frozen(torch.optim.SGD):
            def step(self, closure=None):
                with torch.no_grad():
                    for group in self.param_groups:
                        for p in group["params"]:
                            p = p - group["lr"] * p.grad     # a new tensor; the weight stays

    ## Fix

                            p.sub_(group["lr"] * p.grad)     # in place

    ## When it is wrong

    Not known: the fact is exact. Its reason may lie elsewhere, in updates that rounding loses.
    """

    code = "GS513"
    name = "step-without-effect"
    severity = Severity.ERROR
    tables = ("steps", "groups", "updates", "events")
    symptom_of = ("GS503", "GS517", "GS405")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer without effect."""
        groups, updates = run.frame("groups"), run.frame("updates")
        findings = []
        searching = {known.name for known in run.optimizers if known.kind == "LBFGS"}
        for optimizer, own in stepped(run).groupby("optimizer", sort=False):
            if optimizer in searching:
                continue  # it stops by itself where the gradient is small enough
            rates = groups.loc[groups["optimizer"] == optimizer].groupby("step")["lr"].max()
            recorded = own.loc[own["update_norm"].notna() & own["step"].isin(rates.index)]
            able = recorded.loc[
                (recorded["grad_norm"] > 0) & (rates.reindex(recorded["step"]).to_numpy() > 0)
            ]
            if len(able) < _FEWEST_STEPS or (able["update_norm"] != 0).any():
                continue
            if _moves_at_other_steps(run, own):
                continue
            rows = updates.loc[updates["step"].isin(able["step"])]
            lost = float(rows["unchanged_fraction"].median()) if len(rows) else float("nan")
            # An optimizer of the program's own has no formula that could ask for anything.
            has_formula = bool(rows["residual"].notna().any())
            rounding = (
                f"; the updates that its formula asks for are lost to rounding (lr "
                f"{float(rates.max()):.3g})"
                if lost > 0.99 and has_formula
                else ""
            )
            findings.append(
                self.finding(
                    message=(
                        f"{optimizer}.step() changed no weight at all {len(able)} steps that were "
                        "looked at, with gradients of norm "
                        f"{float(able['grad_norm'].median()):.3g} "
                        f"and a learning rate of {float(rates.max()):.3g}{rounding}"
                    ),
                    fix=(
                        f"raise the learning rate of {optimizer}, or keep its weights in float32"
                        if rounding
                        else f"look at what {optimizer}.step() does: it has to change parameters "
                        "in place"
                    ),
                    optimizer=str(optimizer),
                    **span(able),
                    **made_at(run, str(optimizer)),
                    evidence={
                        "recorded_steps": len(able),
                        "grad_norm": float(able["grad_norm"].median()),
                        "lr": float(rates.max()),
                        "unchanged_fraction": lost,
                    },
                )
            )
        return findings + self._skipped(run)

    def _skipped(self, run: Recording) -> list[Finding]:
        steps = run.frame("steps")
        findings = []
        for optimizer, own in steps.groupby("optimizer", sort=False):
            if len(own) < _FEWEST_SKIPPED or not (own["outcome"] == "skipped").all():
                continue
            findings.append(
                self.finding(
                    message=(
                        f"the gradient scaler skipped all {len(own)} steps of {optimizer}, because "
                        "its gradients were never finite"
                    ),
                    fix="look for what makes the gradients infinite or NaN",
                    optimizer=str(optimizer),
                    **span(own),
                    **made_at(run, str(optimizer)),
                    evidence={"skipped": len(own)},
                )
            )
        return findings


def _moves_at_other_steps(run: Recording, own: pd.DataFrame) -> bool:
    """Whether weights have moved in the end, and nothing but these steps is known to write any."""
    held = held_by(run, str(own["optimizer"].iloc[0]))
    is_written_elsewhere = bool((own["written_between"] > 0).any())
    return not is_written_elsewhere and any(has_moved(run.parameters[number]) for number in held)
