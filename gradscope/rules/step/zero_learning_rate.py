"""GS503: the learning rate is exactly zero."""

from __future__ import annotations

from gradscope.rules.facts import events_of, first_place, held_by, made_at, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.rules.wording import some_of
from gradscope.run.recording import Recording

_FEWEST_STEPS = 5
"""Warm-ups from 0 and schedules that end at 0 have one or two steps at exactly 0."""

_LONG = 20
"""So many first steps at 0 are no warm-up by iteration."""


class ZeroLearningRate(Rule):
    """GS503 zero-learning-rate: the optimizer steps with a learning rate of exactly 0.

    ## What it finds

    An optimizer, or one of its parameter groups, whose learning rate was 0 at every step of the
    run, or for most of it from its beginning.

    ## Why it matters

    A step with a learning rate of 0 changes nothing: the parameters stay as they were initialised.

    ## How it is found

    From the learning rate that each group had when the optimizer stepped. A warm-up that begins at
    0 and a cosine that ends there have it at single steps only.

    ## Example

        LambdaLR(optimizer, lambda step: step // warmup)   # integer division: 0 until the end

    ## Fix

        LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))

    ## When it is wrong

    A group kept at 0 on purpose, to freeze it; `requires_grad_(False)` says that better and saves
    its backward.
    """

    code = "GS503"
    name = "zero-learning-rate"
    severity = Severity.ERROR
    tables = ("groups", "steps", "events")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer with such a group."""
        groups = run.frame("groups")
        groups = groups.loc[groups["step"].isin(stepped(run)["step"])]
        findings = []
        for optimizer, own in groups.groupby("optimizer", sort=False):
            n_steps = own["step"].nunique()
            own = own.loc[own["n_params"] > 0]
            if n_steps < _FEWEST_STEPS or own.empty:
                continue
            is_zero = own["lr"] == 0
            zero_groups = [
                int(str(group)) for group, lrs in own.groupby("group")["lr"] if (lrs == 0).all()
            ]
            n_groups = own["group"].nunique()
            everything = is_zero.groupby(own["step"]).all()
            n_first = int(everything.cumprod().sum())
            numbers = [n for n, known in enumerate(run.optimizers) if known.name == optimizer]
            if zero_groups:
                severity = Severity.ERROR if len(zero_groups) == n_groups else Severity.WARNING
                which = "" if n_groups == 1 else f" in {some_of(len(zero_groups), n_groups)} groups"
                message = f"the learning rate of {optimizer} was 0 at all {n_steps} steps{which}"
                count = int(n_steps)
                params = tuple(
                    run.parameters[number].name
                    for number in held_by(run, str(optimizer))
                    if any(
                        holder in numbers and group in zero_groups
                        for holder, group in run.parameters[number].holders
                    )
                )
            elif n_first >= _LONG and n_first >= n_steps / 2:
                severity = Severity.WARNING
                message = (
                    f"the learning rate of {optimizer} was 0 at the first {n_first} of {n_steps} "
                    "steps"
                )
                count, params = n_first, ()
            else:
                continue
            scheduled = events_of(run, "scheduler", str(optimizer))
            initial = _initial_lr(str(own["options"].iloc[0]))
            why = ""
            where = made_at(run, str(optimizer))
            fix = f"give {optimizer} a learning rate above 0"
            if initial and len(scheduled):
                kind = str(scheduled["detail"].iloc[0])
                where = first_place(scheduled)  # who sets the learning rate
                why = f"; its scheduler {kind} multiplies the initial {initial} by 0"
                fix = (
                    f"look at the function or the lengths that {kind} was given: it has to leave "
                    "more than 0 (an integer division gives 0)"
                )
            findings.append(
                self.finding(
                    message=message + why,
                    fix=fix,
                    severity=severity,
                    params=params,
                    optimizer=str(optimizer),
                    step_first=int(own["step"].min()),
                    step_last=int(own["step"].max()),
                    count=count,
                    **where,
                    evidence={
                        "steps_of_optimizer": int(n_steps),
                        "steps_at_zero": count,
                        "groups_at_zero": len(zero_groups),
                        "groups": int(n_groups),
                        "initial_lr": initial,
                        "scheduler_steps": len(scheduled),
                    },
                )
            )
        return findings


def _initial_lr(options: str) -> float | None:
    for option in options.split(", "):
        name, _, value = option.partition("=")
        if name == "initial_lr":
            try:
                return float(value)
            except ValueError:
                return None
    return None
