"""GS206 and GS203: a step uses gradients that were meant for another optimizer's step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradscope.rules.facts import backwards_at, first_place, held_by, numbers_in, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.rules.wording import place, some_of
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import pandas as pd

_NEARLY_ALL = 0.8
"""Share of an optimizer's steps; the first may be different."""

_FEWEST_STEPS = 3


@dataclass(frozen=True, slots=True)
class Leak:
    """An optimizer that uses another one's gradients.

    Attributes:
        optimizer: the one whose steps are polluted.
        owner: the one that the foreign backward was made for.
        rows: the polluted steps.
        n_steps: how many steps the optimizer made.
        foreign: rows of ``backwards`` that leaked.
        own: rows of ``backwards`` that these steps were made for.
        reaches_owner: whether the steps' own backwards write the owner's gradients, too.
        first_is_clean: whether the first step of the optimizer was free of it.
    """

    optimizer: str
    owner: str
    rows: pd.DataFrame
    n_steps: int
    foreign: pd.DataFrame
    own: pd.DataFrame
    reaches_owner: bool
    first_is_clean: bool


def leaks(run: Recording) -> list[Leak]:
    """Find optimizers that use, at nearly all steps, a backward that another optimizer answered.

    Two losses with two backwards before one step belong to that step. Two optimizers that step on
    one backward, or one that steps every second time, use backwards of a single line.
    """
    steps = stepped(run)
    if steps["optimizer"].nunique() < 2:
        return []
    owner_of = dict(zip(steps["step"], steps["optimizer"], strict=True))
    backwards = run.frame("backwards")
    belongs = {
        int(number): owner_of.get(int(step))
        for number, step in zip(backwards["backward"], backwards["step"].fillna(-1), strict=True)
    }
    lines = {
        int(number): (file, line)
        for number, file, line in zip(
            backwards["backward"], backwards["file"], backwards["line"].fillna(-1), strict=True
        )
    }
    found = []
    for optimizer, own in steps.groupby("optimizer", sort=False):
        polluted: list[tuple[int, int, int, str]] = []
        for step, text in zip(own["step"], own["backwards"], strict=True):
            numbers = numbers_in(text)
            if len(numbers) < 2 or belongs.get(numbers[-1]) != optimizer:
                continue
            for number in numbers[:-1]:
                other = belongs.get(number)
                if other not in (None, optimizer) and lines[number] != lines[numbers[-1]]:
                    polluted.append((int(step), number, numbers[-1], str(other)))
                    break
        if len(polluted) < max(_FEWEST_STEPS, _NEARLY_ALL * len(own)):
            continue
        owner = polluted[0][3]
        others = steps.loc[steps["optimizer"] == owner]
        written = {
            n for text in others["backwards"] + ", " + others["discarded"] for n in _numbers(text)
        }
        own_numbers = [last for _, _, last, _ in polluted]
        reaches = sum(number in written for number in own_numbers) >= len(own_numbers) / 2
        found.append(
            Leak(
                optimizer=str(optimizer),
                owner=owner,
                rows=own.loc[own["step"].isin([step for step, *_ in polluted])],
                n_steps=len(own),
                foreign=backwards_at(run, [number for _, number, _, _ in polluted]),
                own=backwards_at(run, own_numbers),
                reaches_owner=reaches,
                first_is_clean=len(numbers_in(str(own["backwards"].iloc[0]))) == 1,
            )
        )
    return found


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(", ") if part]


def details_of(run: Recording, leak: Leak) -> dict[str, Any]:
    """What findings of both rules say of a leak."""
    return {
        "params": tuple(run.parameters[n].name for n in held_by(run, leak.optimizer)),
        "optimizer": leak.optimizer,
        "step_first": int(leak.rows["step"].min()),
        "step_last": int(leak.rows["step"].max()),
        "count": len(leak.rows),
        "evidence": {
            "polluted_steps": len(leak.rows),
            "steps_of_optimizer": leak.n_steps,
            "foreign_optimizer": leak.owner,
            "foreign_line": first_place(leak.foreign)["line"],
            "own_line": first_place(leak.own)["line"],
        },
    }


def line_of(rows: pd.DataFrame) -> str:
    """Where a backward is, within a sentence."""
    at = first_place(rows)
    return f" at {place(at['file'], at['line'])}" if at["file"] else ""


class ForeignGradient(Rule):
    """GS206 foreign-gradient: a step uses gradients of a loss that another optimizer minimises.

    ## What it finds

    Two optimizers that take turns, as in a GAN, where the backward of the one's loss also writes
    the other's gradients, and the other's step uses them together with its own.

    ## Why it matters

    The generator is also trained to help the discriminator: one loss works against the other.

    ## How it is found

    At nearly every step of an optimizer its gradients come from two backwards in different lines,
    the first of which another optimizer has already stepped on, and its own backward reaches that
    other optimizer's parameters. When gradients are cleared in between, all is well.

    ## Example

        d_loss = bce(D(real), ones) + bce(D(fake), zeros)
        d_loss.backward()                                     # also reaches G
        opt_d.step()
        bce(D(fake), ones).backward()
        opt_g.step()                                          # uses both

    ## Fix

        d_loss = bce(D(real), ones) + bce(D(fake.detach()), zeros)

    ## When it is wrong

    Two models that are meant to learn from each other's losses.
    """

    code = "GS206"
    name = "foreign-gradient"
    severity = Severity.ERROR
    tables = ("steps", "backwards", "params")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per polluted optimizer."""
        return [
            self.finding(
                message=(
                    f"{leak.optimizer}.step() used gradients of the backward{line_of(leak.foreign)}"
                    f", which {leak.owner} had already stepped on, together with its own"
                    f"{line_of(leak.own)}, at {some_of(len(leak.rows), leak.n_steps)} steps"
                ),
                fix=(
                    f"detach what the loss of {leak.owner} takes from the parameters of "
                    f"{leak.optimizer}, or call {leak.optimizer}.zero_grad() between the two"
                ),
                **first_place(leak.foreign),
                **details_of(run, leak),
            )
            for leak in leaks(run)
            if leak.reaches_owner
        ]
