"""GS202: gradients are cleared before any step has used them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gradscope.rules.facts import backwards_at, events_of, first_place, numbers_in, span, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.rules.wording import some_of
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import pandas as pd

_FEWEST = 2
_MOST_STEPS = 0.5
"""Share of the steps: now and then a program drops a batch on purpose, after a loss of NaN."""


class ZeroGradBeforeStep(Rule):
    """GS202 zero-grad-before-step: gradients are cleared between `backward()` and `step()`.

    ## What it finds

    Steps without any gradient although a backward had computed them: they were cleared in between.
    And accumulation that clears in front of every micro-batch, so that only the last one counts.

    ## Why it matters

    In the first case nothing is learned at all, in the second all micro-batches but one are
    computed for nothing.

    ## How it is found

    gradscope notes which backwards were cleared before any step used them. In the first case the
    step then read nothing. In the second, the backward that the step did use and those that were
    cleared stand in the same line; attacks, sharpness-aware steps and line searches call backward
    elsewhere or in a closure, and per-sample gradients are put back by hand.

    ## Example

        loss.backward()
        optimizer.zero_grad()
        optimizer.step()

    ## Fix

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    ## When it is wrong

    A program that reads gradients for another purpose, clears them, and steps all the same.
    """

    code = "GS202"
    name = "zero-grad-before-step"
    severity = Severity.ERROR
    tables = ("steps", "backwards", "events", "grads")
    symptom_of = ("GS502",)

    def check(self, run: Recording) -> list[Finding]:
        """Return at most one finding per optimizer."""
        findings = []
        grads = run.frame("grads")
        edited = grads["edited"] & grads["norm_before_clipping"].isna()  # and not by clipping
        by_hand = set(grads.loc[edited | (grads["status"] == "assigned"), "step"])
        unused, lines = _unused(run), _lines(run)
        for optimizer, own in stepped(run).groupby("optimizer", sort=False):
            live = own[["n_fresh", "n_accumulated", "n_compounded", "n_stale", "n_assigned"]].sum(
                axis=1
            )
            lost = own["discarded"].map(lambda text: bool(set(numbers_in(text)) & unused))
            empty = own.loc[(live == 0) & lost]
            inside = own.loc[
                (live > 0)
                & lost
                & (own["n_backward"] == 1)
                & ~own["in_closure"]
                & ~(own["written_between"] > 0)  # a gradient taken elsewhere, as by SAM
                & ~own["step"].isin(by_hand)
                & np.array(
                    [
                        _same_line(lines, held, gone, unused)
                        for held, gone in zip(own["backwards"], own["discarded"], strict=True)
                    ],
                    np.bool_,
                )
            ]
            for rows, found in ((empty, self._empty), (inside, self._inside)):
                if len(rows) >= _FEWEST and len(rows) >= _MOST_STEPS * len(own):
                    findings.append(found(run, str(optimizer), own, rows))
                    break
        return findings

    def _empty(
        self, run: Recording, optimizer: str, own: pd.DataFrame, rows: pd.DataFrame
    ) -> Finding:
        return self.finding(
            message=(
                f"{optimizer}.step() found no gradients at {some_of(len(rows), len(own))} steps: "
                "loss.backward() had computed them, and they were cleared before the step"
            ),
            fix=f"clear the gradients of {optimizer} before loss.backward(), not after it",
            optimizer=optimizer,
            **span(rows),
            **_cleared_at(run, optimizer, own, rows),
            evidence={
                "steps_without_gradient": len(rows),
                "steps_of_optimizer": len(own),
                "order": str(rows["order"].iloc[-1]),
            },
        )

    def _inside(
        self, run: Recording, optimizer: str, own: pd.DataFrame, rows: pd.DataFrame
    ) -> Finding:
        dropped = int(rows["discarded"].map(lambda text: len(numbers_in(text))).median())
        return self.finding(
            message=(
                f"before each step of {optimizer} the gradients of about {dropped} of "
                f"{dropped + 1} micro-batches are cleared by the next one: only the last backward "
                f"is used, at {some_of(len(rows), len(own))} steps"
            ),
            fix=(
                f"call {optimizer}.zero_grad() once after {optimizer}.step(), not in front of "
                "every micro-batch"
            ),
            optimizer=optimizer,
            **span(rows),
            **_cleared_at(run, optimizer, own, rows),
            evidence={
                "backwards_cleared_per_step": dropped,
                "steps": len(rows),
                "order": str(rows["order"].iloc[-1]),
            },
        )


def _lines(run: Recording) -> dict[int, tuple[str, int]]:
    """File and line of every backward that has some."""
    rows = run.frame("backwards")
    rows = rows.loc[(rows["file"] != "") & rows["line"].notna()]
    places = zip(rows["backward"], rows["file"], rows["line"], strict=True)
    return {int(number): (str(file), int(line)) for number, file, line in places}


def _unused(run: Recording) -> set[int]:
    """Backwards with a finite root whose gradients no step of any optimizer used."""
    backwards, steps = run.frame("backwards"), run.frame("steps")
    used = {
        number
        for held, gone in zip(steps["backwards"], steps["discarded"], strict=True)
        # An attempt that read nothing still names the backwards it was about.
        for number in set(numbers_in(held)) - set(numbers_in(gone))
    }
    finite = np.isfinite(backwards["root"]) | (backwards["root_shape"] != "()")
    rows = backwards.loc[finite & (backwards["error"] == "")]
    return set(rows["backward"]) - used


def _same_line(lines: dict[int, tuple[str, int]], held: str, gone: str, unused: set[int]) -> bool:
    """Whether a discarded backward stands in the line of the one that was used."""
    here = lines.get(next(reversed(numbers_in(held)), -1))
    return here is not None and any(
        number in unused and lines.get(number) == here for number in numbers_in(gone)
    )


def _cleared_at(
    run: Recording, optimizer: str, own: pd.DataFrame, rows: pd.DataFrame
) -> dict[str, Any]:
    """The last clearing before one of these steps, or its backward where none was called."""
    step = int(rows["step"].iloc[-1])
    earlier = own.loc[own["step"] < step, "step"]
    previous = int(earlier.max()) if len(earlier) else -1
    calls = events_of(run, "zero_grad")
    calls = calls.loc[
        calls["subject"].isin((optimizer, ""))
        & (calls["step"] > previous)
        & (calls["step"] <= step)
    ]
    if len(calls):
        return first_place(calls.iloc[::-1])
    return first_place(backwards_at(run, numbers_in(str(rows["discarded"].iloc[-1]))))
