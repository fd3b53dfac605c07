"""GS104 and GS108: parameters without gradients because they are frozen."""

from __future__ import annotations

import numpy as np

from gradscope.rules.facts import listed, made_at, span
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.learning.target_independent_of_input import TargetIndependentOfInput
from gradscope.rules.parameters.parameter_not_in_optimizer import ParameterNotInOptimizer
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording

_FEWEST_STEPS = 2

_LEAST_SHARE = 0.5
"""Of the steps of an optimizer: less may be the end of a training in phases."""


class FrozenParameter(Rule):
    """GS104 frozen-parameter: some parameters of a model are frozen while others train.

    ## What it finds

    Registered parameters with `requires_grad=False`, in a run that trains others.

    ## Why it matters

    Freezing is usually meant; a pattern that matched too much, or a flag left over from an earlier
    phase, looks the same. So this is a note.

    ## How it is found

    From `requires_grad` of each parameter at the last look, and the step at which it flipped.

    ## Example

        for name, p in model.named_parameters():
            if "conv" in name:                 # also matches conv_head
                p.requires_grad = False

    ## Fix

            if name.startswith(("conv1", "conv2")):

    ## When it is wrong

    Whenever the freeze is meant.
    """

    code = "GS104"
    name = "frozen-parameter"
    severity = Severity.INFO
    tables = ("params",)
    symptom_of = ("GS108",)

    def check(self, run: Recording) -> list[Finding]:
        """Return at most one finding."""
        frozen = [e for e in run.parameters if e.in_model and not e.requires_grad]
        if not frozen or not any(e.requires_grad and e.reached for e in run.parameters):
            return []
        since = [e.requires_grad_changed for e in frozen if e.requires_grad_changed is not None]
        # With most of the model fixed and nothing learnt, that is why.
        is_most = 2 * sum(e.numel for e in frozen) > sum(e.numel for e in run.parameters)
        learns_nothing = (
            is_most
            and bool(TargetIndependentOfInput().check(run))
            and not ParameterNotInOptimizer().check(run)  # which says why
        )
        at_chance = "; the loss stays where it began" if learns_nothing else ""
        when = f", {len(since)} of them since step {min(since)}" if since else ""
        return [
            self.finding(
                message=(
                    f"{listed(e.name for e in frozen)} are frozen (requires_grad is False){when}, "
                    f"while others train{at_chance}"
                ),
                fix="call requires_grad_(True) on those that are meant to learn",
                severity=Severity.WARNING if learns_nothing else self.severity,
                params=tuple(e.name for e in frozen),
                modules=tuple(dict.fromkeys(e.module for e in frozen)),
                step_first=min(since, default=None),
                evidence={"frozen": len(frozen), "parameters": len(run.parameters)},
            )
        ]


class NothingToTrain(Rule):
    """GS108 nothing-to-train: every parameter that the optimizer holds is frozen.

    ## What it finds

    An optimizer that steps while all of its parameters have `requires_grad=False`, from the start
    or for most of the run.

    ## Why it matters

    It changes nothing.

    ## How it is found

    No parameter of it requires grad at the end, and none had a gradient at any of its steps, or at
    the later half of them; or the backward raised because nothing requires grad.

    ## Example

        for p in model.fc.parameters():
            p.requires_grad = False
        optimizer = Adam(model.fc.parameters())

    ## Fix

        for p in model.fc.parameters():
            p.requires_grad = True

    ## When it is wrong

    Not known.
    """

    code = "GS108"
    name = "nothing-to-train"
    severity = Severity.ERROR
    tables = ("params", "steps", "events", "backwards")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer without anything to train."""
        steps = run.frame("steps")
        counts = [name for name in steps.columns if name.startswith("n_")]
        live = [
            n for n in counts if n in ("n_fresh", "n_accumulated", "n_compounded", "n_assigned")
        ]
        last = run.frame("backwards").tail(1)
        raised = bool(((last["error"] != "") & ~last["root_requires_grad"]).any())
        findings = []
        for number, known in enumerate(run.optimizers):
            held = [e for e in run.parameters if any(n == number for n, _ in e.holders)]
            own = steps.loc[steps["optimizer"] == known.name]
            if not held or any(e.requires_grad for e in held):
                continue
            has_gradient = own[live].to_numpy().sum(axis=1) > 0
            n_before = int(np.flatnonzero(has_gradient)[-1]) + 1 if has_gradient.any() else 0
            if raised:
                n_before = 0
            elif len(own) - n_before < max(_FEWEST_STEPS, _LEAST_SHARE * len(own)):
                continue
            own = own.iloc[n_before:]
            what = f"its {len(own)} {'last ' if n_before else ''}steps change nothing"
            if raised:
                what = "nothing is left to compute a gradient for, and backward raised"
            findings.append(
                self.finding(
                    severity=Severity.WARNING if n_before else Severity.ERROR,
                    message=(
                        f"all {len(held)} parameters of {known.name} are frozen (requires_grad is "
                        f"False): {listed(e.name for e in held)}; {what}"
                    ),
                    fix=f"call requires_grad_(True) on what {known.name} is to train",
                    params=tuple(e.name for e in held),
                    optimizer=known.name,
                    **(span(own) if len(own) else {}),
                    **made_at(run, known.name),
                    evidence={"frozen": len(held), "steps": len(own)},
                )
            )
        return findings
