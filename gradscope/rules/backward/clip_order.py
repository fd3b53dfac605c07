"""Where in the loop gradients are clipped."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from gradscope.rules.facts import at, place_of, span, words_of
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import pandas as pd

_LEAST_STEPS = 3
"""Of two steps one has no attempt before it: what lies between steps is seen only once."""

_LEAST_SHARE = 0.5
"""A loop clips at every step, or not."""

_MEASURES_ONLY = 1e6
"""A limit that is never exceeded: the program calls the function for the norm that it returns."""

_LIMIT = re.compile(r"limit ([^,]+)")


def misplaced_clips(
    run: Recording, where: Literal["after", "before"]
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Give the optimizers whose gradients are clipped, but never between backward and step.

    Args:
        run: the recording.
        where: ``after`` the step, or ``before`` the backward.
    """
    steps = run.frame("steps")
    for name, own in steps.groupby("optimizer", sort=False):
        own = own.loc[own["outcome"].isin(["stepped", "skipped"])]
        orders = [words_of(order) for order in own["order"]]
        # A closure computes its gradients inside the step: order tells nothing there.
        if len(own) < _LEAST_STEPS or own["in_closure"].any():
            continue
        if any(_is_in_time(words) for words in orders):
            continue
        too_early = [words for words in orders if "clip" in words and "backward" in words]
        if len(too_early) < _LEAST_SHARE * (len(own) - 1):
            continue
        if limit_of(run, str(name)) >= _MEASURES_ONLY:
            continue
        is_before = "clip" in orders[0] or all(_is_behind_clearing(words) for words in too_early)
        if is_before == (where == "before"):
            yield str(name), own


def clips_of(run: Recording, optimizer: str) -> tuple[str | None, int | None, str, int]:
    """Return file, line and detail of the first clipping of an optimizer, and how many there are.

    A clipping that finds no gradients is no particular optimizer's.
    """
    events = run.frame("events")
    clips = events.loc[(events["event"] == "clip") & events["subject"].isin([optimizer, ""])]
    if clips.empty:
        clips = events.loc[events["event"] == "clip"]
    if clips.empty:
        return None, None, "", 0
    file, line = place_of(clips.iloc[0])
    return file, line, str(clips["detail"].iloc[0]), len(clips)


def described(run: Recording, optimizer: str, own: pd.DataFrame) -> tuple[str, dict[str, Any]]:
    """Return a misplaced clipping in words, and what every finding about one has.

    Args:
        run: the recording.
        optimizer: whose gradients are clipped.
        own: its steps.
    """
    file, line, detail, n_clips = clips_of(run, optimizer)
    return f"{detail.split(',')[0] or 'clipping'}{at(file, line)}", {
        "fix": (
            f"move the clipping{at(file, line)} between loss.backward() and {optimizer}.step()"
        ),
        "optimizer": optimizer,
        **span(own),
        "file": file,
        "line": line,
        "evidence": {
            "clipping": detail,
            "clippings": n_clips,
            "order": str(own["order"].iloc[-1]),
        },
    }


def limit_of(run: Recording, optimizer: str) -> float:
    """Return the norm or value that an optimizer's gradients are clipped to; 0 if unknown."""
    found = _LIMIT.search(clips_of(run, optimizer)[2])
    try:
        return float(found.group(1)) if found else 0.0
    except ValueError:
        return 0.0


def _is_in_time(words: list[str]) -> bool:
    """Whether a clip follows a backward."""
    return "backward" in words and "clip" in words[words.index("backward") :]


def _is_behind_clearing(words: list[str]) -> bool:
    """Whether the gradients were cleared before they were clipped."""
    return "zero_grad" in words[: words.index("clip")]
