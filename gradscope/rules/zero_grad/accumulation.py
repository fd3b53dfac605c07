"""GS204 and GS205: gradient accumulation that does not add up."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gradscope.rules.facts import backwards_at, first_place, numbers_in, span, stepped, words_of
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.rules.step.learning_rate_too_high import LearningRateTooHigh
from gradscope.rules.wording import some_of
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import pandas as pd

_FEWEST_STEPS = 3
_NEARLY_ALL = 0.8

_WHOLE = 0.75
"""Share of the sum of undivided losses; batches differ."""


def _accumulates(run: Recording, own: pd.DataFrame) -> int:
    """How many backwards of one line each step usually has; 0 if it does not accumulate."""
    usual = int(own["n_backward"].median()) if len(own) >= _FEWEST_STEPS else 0
    if usual < 2 or own["in_closure"].any():
        return 0
    numbers = [numbers_in(text) for text in own["backwards"]]
    rows = backwards_at(run, [number for some in numbers for number in some])
    at = rows.set_index("backward")[["file", "line"]].astype(str).agg(":".join, axis=1)
    alike = [len({at.get(number) for number in some}) == 1 for some in numbers]
    return usual if sum(alike) >= _NEARLY_ALL * len(alike) else 0


def _adds_whole_losses(run: Recording, own: pd.DataFrame, usual: int) -> bool:
    """Whether a step descends a sum of losses just as the functions of the losses gave them."""
    losses = run.frame("losses")
    losses = losses.loc[losses["reached"].astype(bool) & losses["value"].notna()]
    of_one = losses.groupby("step")["value"].mean()
    of_step = own.set_index("step")["loss"]
    ratios = (of_step / of_one).dropna()
    return len(ratios) > 0 and float(ratios.median()) > _WHOLE * usual


def _are_given_up(order: str) -> bool:
    """Whether gradients were only cleared where one more forward had come, and no backward."""
    words, begin, ends = words_of(order), 0, []
    for place, word in enumerate(words):
        if word == "zero_grad":
            if "backward" in words[begin:place]:
                ends.append(words[place - 2 : place])
            begin = place
    return bool(ends) and all(end == ["backward", "forward"] for end in ends)


class UnscaledAccumulation(Rule):
    """GS204 unscaled-accumulation: micro-batches are added up and the loss is not divided.

    ## What it finds

    Steps on the sum of several backwards of the same line, whose loss was not divided by their
    number.

    ## Why it matters

    The gradient is that many times larger than with one batch of the same size; so is the step of
    SGD. A sum may be meant, so this is only a note, unless the steps are too large for the loss to
    fall.

    ## How it is found

    The last operation of the loss is neither a division nor a multiplication, and the program did
    not change the gradients before the step, other than by clipping. A loss under a gradient
    scaler always ends in a multiplication: there the sum is compared with what the loss functions
    gave.

    ## Example

        loss = criterion(model(xb), yb)
        loss.backward()

    ## Fix

        loss = criterion(model(xb), yb) / accumulation_steps
        loss.backward()

    ## When it is wrong

    A loss that is divided earlier, inside a sum of several terms; a learning rate chosen for it.
    """

    code = "GS204"
    name = "unscaled-accumulation"
    severity = Severity.INFO
    tables = ("steps", "backwards", "grads", "losses", "groups", "events")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer that adds up."""
        grads = run.frame("grads")
        by_clipping = grads["norm_before_clipping"].notna()
        edited = set(grads.loc[grads["edited"] & ~by_clipping, "step"])
        findings = []
        for optimizer, own in stepped(run).groupby("optimizer", sort=False):
            usual = _accumulates(run, own)
            rows = backwards_at(run, [n for text in own["backwards"] for n in numbers_in(text)])
            made_by = set(rows["root_grad_fn"])
            divided = any(name.startswith(("Div", "Mul")) for name in made_by)
            if rows["scaled"].any():  # the scale is multiplied onto it last
                divided = not _adds_whole_losses(run, own, usual)
            if not usual or divided or edited & set(own["step"]):
                continue
            jumps = {found.optimizer for found in LearningRateTooHigh().check(run)}
            findings.append(
                self.finding(
                    message=(
                        f"{optimizer}.step() uses the sum of {usual} backwards, and their loss "
                        f"({', '.join(sorted(made_by))}) is not divided by {usual}"
                    ),
                    fix=f"divide the loss by {usual} before backward, if a mean was meant",
                    severity=Severity.WARNING if str(optimizer) in jumps else self.severity,
                    optimizer=str(optimizer),
                    **span(own),
                    **first_place(rows),
                    evidence={"backwards_per_step": usual, "root_grad_fn": ", ".join(made_by)},
                )
            )
        return findings


class DroppedAccumulation(Rule):
    """GS205 dropped-accumulation: some accumulated micro-batches are thrown away.

    ## What it finds

    A loop that accumulates, in which now and then gradients are cleared that no step has used:
    those after the last full group of an epoch.

    ## Why it matters

    These batches are computed and not learned from, every epoch anew.

    ## How it is found

    Steps usually use several backwards of one line; at a few of them, backwards of the same line
    with a finite loss had been cleared before. What is left over at the very end is only a note. A
    group that is cleared right after a forward without a backward is silent: it was given up for a
    batch whose loss is of no use.

    ## Example

        for epoch in range(epochs):
            optimizer.zero_grad()
            for i, (xb, yb) in enumerate(loader):        # 10 batches, 4 to a step: 2 are lost
                (criterion(model(xb), yb) / 4).backward()
                if (i + 1) % 4 == 0:
                    optimizer.step()
                    optimizer.zero_grad()

    ## Fix

                if (i + 1) % 4 == 0 or i + 1 == len(loader):

    ## When it is wrong

    A program that drops an incomplete group on purpose.
    """

    code = "GS205"
    name = "dropped-accumulation"
    severity = Severity.WARNING
    tables = ("steps", "backwards")
    symptom_of = ("GS202",)

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer that drops some."""
        all_steps = run.frame("steps")
        findings = []
        for optimizer, own in stepped(run).groupby("optimizer", sort=False):
            usual = _accumulates(run, own)
            if not usual:
                continue
            here = first_place(backwards_at(run, numbers_in(str(own["backwards"].iloc[0]))))
            dropped: dict[int, int] = {}
            for step, text, order in zip(own["step"], own["discarded"], own["order"], strict=True):
                if not text or _are_given_up(order):
                    continue
                rows = backwards_at(run, numbers_in(text))
                n = sum(
                    row.file == here["file"]
                    and row.line == here["line"]
                    and math.isfinite(float(str(row.root)))
                    for row in rows.itertuples()
                )
                if n and n < usual:
                    dropped[int(step)] = int(n)
            left = all_steps.loc[
                (all_steps["optimizer"] == optimizer)
                & (all_steps["outcome"] == "open")
                & (all_steps["n_backward"] > 0)
                & (all_steps["n_backward"] < usual)
            ]
            if not dropped and left.empty:
                continue
            total = sum(dropped.values())
            if dropped:
                message = (
                    f"{total} micro-batches were cleared before {optimizer}.step() had used them, "
                    f"before {some_of(len(dropped), len(own))} steps; it usually steps on {usual}"
                )
            else:
                message = (
                    f"the last {int(left['n_backward'].iloc[0])} micro-batches are in no step of "
                    f"{optimizer}, which steps on {usual}"
                )
            findings.append(
                self.finding(
                    message=message,
                    fix=f"call {optimizer}.step() for the last, incomplete group as well",
                    severity=Severity.WARNING if dropped else Severity.INFO,
                    optimizer=str(optimizer),
                    step_first=min(dropped, default=int(own["step"].max())),
                    step_last=max(dropped, default=int(own["step"].max())),
                    count=max(1, len(dropped)),
                    **here,
                    evidence={
                        "micro_batches_dropped": total,
                        "steps_concerned": len(dropped),
                        "usual_backwards_per_step": usual,
                    },
                )
            )
        return findings
