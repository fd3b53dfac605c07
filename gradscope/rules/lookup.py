"""Questions that several rules ask of a recording."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import pandas as pd

_MOST_REPETITIONS = 64
"""No rule asks whether something happened more often than this in one step."""

_PART = re.compile(r"\(([^)]*)\) ×(\d+)|([^,()]+)")
_REPEATED = re.compile(r"(.+?) ×(\d+)")


def words_of(order: str) -> list[str]:
    """Spell out the column ``order`` of ``steps``, one word per event.

    >>> words_of("zero_grad, (forward, backward) ×2, step")
    ['zero_grad', 'forward', 'backward', 'forward', 'backward', 'step']
    """
    words: list[str] = []
    for sequence, times, single in _PART.findall(order):
        if sequence:
            words += words_of(sequence) * min(int(times), _MOST_REPETITIONS)
        elif word := single.strip():
            repeated = _REPEATED.fullmatch(word)
            if repeated:
                words += [repeated[1]] * min(int(repeated[2]), _MOST_REPETITIONS)
            else:
                words.append(word)
    return words


def numbers_in(text: str) -> list[int]:
    """The numbers in a column such as ``backwards`` of ``steps``: ``4, 5``."""
    return [int(number) for number in text.split(", ")] if text else []


def stepped(run: Recording) -> pd.DataFrame:
    """The attempts in which an optimizer really stepped."""
    steps = run.frame("steps")
    return steps.loc[steps["outcome"] == "stepped"]


def place_of(rows: pd.DataFrame) -> dict[str, Any]:
    """``file`` and ``line`` of the first of some rows that has any, as a finding takes them."""
    known = rows.loc[(rows["file"] != "") & rows["line"].notna()]
    if known.empty:
        return {"file": None, "line": None}
    return {"file": str(known["file"].iloc[0]), "line": int(known["line"].iloc[0])}


def events_of(run: Recording, event: str, subject: str | None = None) -> pd.DataFrame:
    """The events of a kind, of one optimizer if it is named."""
    events = run.frame("events")
    events = events.loc[events["event"] == event]
    return events if subject is None else events.loc[events["subject"] == subject]


def made_at(run: Recording, optimizer: str) -> dict[str, Any]:
    """Where the program made an optimizer, as a finding takes it; unknown if it was passed in."""
    return place_of(events_of(run, "optimizer_found", optimizer))


def backwards_at(run: Recording, numbers: Iterable[int]) -> pd.DataFrame:
    """The rows of ``backwards`` with these numbers."""
    backwards = run.frame("backwards")
    return backwards.loc[backwards["backward"].isin(list(numbers))]


def held_by(run: Recording, optimizer: str) -> list[int]:
    """Numbers of the parameters that an optimizer holds, or held when it was last seen."""
    numbers = [n for n, known in enumerate(run.optimizers) if known.name == optimizer]
    return [
        param
        for param, entry in enumerate(run.parameters)
        if any(holder in numbers for holder, _ in entry.holders)
    ]


def model_of(run: Recording, parameter: str) -> str:
    """The watched model that a parameter belongs to, by its name; empty if it cannot be told."""
    if len(run.models) == 1:
        return run.models[0].name
    owners = [model.name for model in run.models if parameter.startswith(f"{model.name}.")]
    return max(owners, key=len, default="")


def listed(names: Iterable[str], most: int = 3) -> str:
    """Some names within a sentence: ``a, b, c and 5 more``."""
    names = list(names)
    if len(names) <= most + 1:
        return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"
