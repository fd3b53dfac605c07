"""GS502: the optimizer steps before this iteration's gradients are there."""

from __future__ import annotations

from gradscope.rules.facts import backwards_at, first_place, numbers_in, span, words_of
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording


class StepBeforeBackward(Rule):
    """GS502 step-before-backward: `optimizer.step()` stands between forward and backward.

    ## What it finds

    A loop in which each iteration computes the loss, steps, and only then calls `backward`. Every
    step uses the gradients of the iteration before, or none at all.

    ## Why it matters

    The weights change while the graph of the loss waits for its backward. With more than one layer
    PyTorch raises "one of the variables needed for gradient computation has been modified by an
    inplace operation" in the second iteration; with a single layer, or with cleared gradients, it
    says nothing and each update is one batch late, or does not happen.

    ## How it is found

    From the order of events in every step: the optimizer's first step came after a forward and
    without any backward, and in each later one the last backward came before the last forward.
    `optimizer.step()` at the top of the loop, before the forward, is a healthy loop and has no
    forward before its first step.

    ## Example

        loss = criterion(model(xb), yb)
        optimizer.step()
        optimizer.zero_grad()
        loss.backward()

    ## Fix

        loss = criterion(model(xb), yb)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    ## When it is wrong

    A program that applies gradients one iteration late on purpose, as some pipelines do.
    """

    code = "GS502"
    name = "step-before-backward"
    severity = Severity.ERROR
    tables = ("steps", "backwards", "events")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer that steps too early."""
        steps = run.frame("steps")
        steps = steps.loc[steps["outcome"].isin(("stepped", "abandoned"))]
        events = run.frame("events")
        texts = events.loc[events["event"].isin(("exception", "ended")), "detail"]
        raised = any("modified by an inplace operation" in text for text in texts)
        findings = []
        for optimizer, own in steps.groupby("optimizer", sort=False):
            orders = [words_of(order) for order in own["order"]]
            later = orders[1:]
            if (
                "forward" not in orders[0]
                or "backward" in orders[0]
                or int(own["n_none"].iloc[0] + own["n_zeroed"].iloc[0]) < _n_params(own)
                or not (later or raised)
                or not all(_is_early(words) for words in later)
            ):
                continue
            numbers = [n for text in own["backwards"] + own["discarded"] for n in numbers_in(text)]
            backwards = backwards_at(run, numbers)
            if backwards.empty:
                backwards = run.frame("backwards")
            then = (
                "; backward then raised that a variable was modified by an inplace operation, "
                "which is this step"
                if raised
                else ""
            )
            findings.append(
                self.finding(
                    message=(
                        f"{optimizer}.step() is called between forward and backward: its first "
                        f"step had no gradients, and each of its {len(later)} later ones came "
                        f"before the backward of its own iteration{then}"
                    ),
                    fix=f"move {optimizer}.step() behind loss.backward()",
                    optimizer=str(optimizer),
                    **span(own),
                    **first_place(backwards),
                    evidence={
                        "order_of_first_step": str(own["order"].iloc[0]),
                        "order_of_last_step": str(own["order"].iloc[-1]),
                        "steps_of_optimizer": len(own),
                        "raised": raised,
                    },
                )
            )
        return findings


def _is_early(words: list[str]) -> bool:
    """Whether the last backward of an attempt came before its last forward."""
    if "backward" not in words or "forward" not in words:
        return False
    return words[::-1].index("backward") > words[::-1].index("forward")


def _n_params(own: object) -> int:
    from gradscope.run.schema import STATUSES

    return int(sum(own[f"n_{status}"].iloc[0] for status in STATUSES))  # type: ignore[index]
