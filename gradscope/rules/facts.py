"""Facts of a recording that several rules ask for."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from gradscope.rules.wording import place

if TYPE_CHECKING:
    import pandas as pd

    from gradscope.run.entries import ParameterEntry
    from gradscope.run.recording import Recording

_MOST_REPETITIONS = 64
"""No rule asks whether something happened more often than this in one step."""

_PART = re.compile(r"\(([^)]*)\) ×(\d+)|([^,()]+)")
_REPEATED = re.compile(r"(.+?) ×(\d+)")


def stepped(run: Recording) -> pd.DataFrame:
    """Return the rows of ``steps`` in which an optimizer did update."""
    steps = run.frame("steps")
    return steps.loc[steps["outcome"] == "stepped"]


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
    """Return the numbers of a list such as the column ``backwards`` of ``steps``."""
    return [int(number) for number in text.split(", ") if number]


def shape_of(text: str) -> tuple[int, ...] | None:
    """Return a shape as tables spell it; None for something else."""
    try:
        shape = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None
    return shape if isinstance(shape, tuple) else None


def without_gradient(run: Recording, least_steps: int = 2) -> list[ParameterEntry]:
    """Return the parameters that an optimizer is to train and that never get a gradient.

    They require grad, no backward of the whole run reached them, and no step of their optimizer,
    of at least ``least_steps``, found anything in ``.grad``. One whose values have changed all the
    same is moved by something else, such as the average of a teacher.
    """
    steps = stepped(run)
    grads = run.frame("grads")
    grads = grads.loc[grads["step"].isin(steps["step"])]
    n_steps = grads.groupby("param")["step"].nunique()
    got = set(grads.loc[~grads["status"].isin(["none", "zeroed"]), "param"])
    return [
        entry
        for entry in run.parameters
        if entry.requires_grad
        and entry.holders
        and not entry.reached
        and entry.name not in got
        and n_steps.get(entry.name, 0) >= least_steps
        and not has_moved(entry)
    ]


def has_moved(entry: ParameterEntry) -> bool:
    """Whether the values of a parameter are not what they were when it was met."""
    first, last = entry.norm_first, entry.norm_last
    if math.isnan(first) or math.isnan(last):
        return False
    return not math.isclose(first, last, rel_tol=1e-9, abs_tol=0.0)


def holder_of(run: Recording, entry: ParameterEntry) -> str:
    """Return the name of the first optimizer that holds a parameter; nothing if none does."""
    return run.optimizers[entry.holders[0][0]].name if entry.holders else ""


def reached_losses(run: Recording) -> pd.DataFrame:
    """Return the rows of ``losses`` that a backward came past; the others train nothing."""
    losses = run.frame("losses")
    return losses.loc[losses["reached"].astype(bool)]


def phases(run: Recording) -> list[tuple[int, int]]:
    """Return first step and end of each training of a run, by when closer looks began anew.

    A program may train a teacher and then its student, one model per fold, or first a new head and
    then all of a model.
    """
    begins = sorted({0, *events_of(run, "phase")["step"].tolist()})
    return list(zip(begins, [*begins[1:], max(run.n_steps, begins[-1]) + 1], strict=True))


def in_phase(rows: pd.DataFrame, phase: tuple[int, int]) -> pd.DataFrame:
    """Return the rows of a table that are of one phase."""
    begin, end = phase
    return rows.loc[(rows["step"] >= begin) & (rows["step"] < end)]


def in_phases(run: Recording, rows: pd.DataFrame) -> list[pd.DataFrame]:
    """Return rows of a table, and after all together those of each phase if they lie in several.

    What is so in one training only is no less so for another that goes through the same line.
    """
    own = [each for phase in phases(run) if len(each := in_phase(rows, phase))]
    return [rows, *own] if len(own) > 1 else [rows]


def place_of(row: pd.Series, kind: str = "") -> tuple[str | None, int | None]:
    """Return file and line of a row; None twice where they are not known.

    Args:
        row: a row of any table with such columns.
        kind: what stands before ``file`` and ``line`` in the columns' names, such as ``owner_``;
            where that place is not known it is the row's plain one.
    """
    file, number = str(row[f"{kind}file"]) or None, row[f"{kind}line"]
    if kind and file is None:
        return place_of(row)
    if file is None or number is None or number != number:
        return None, None
    try:
        return file, int(number)
    except TypeError:  # pandas' own missing value
        return None, None


def at(file: str | None, line: int | None) -> str:
    """Return `` at train.py:17`` to go into a sentence; nothing where it is not known."""
    return f" at {place(file, line)}" if file is not None and line is not None else ""


def belongs_to(parameter: str, module: str) -> bool:
    """Whether a parameter lies in a module or below it, by their paths."""
    return not module or parameter.startswith(module + ".")


def is_compiled(run: Recording, module: str) -> bool:
    """Whether a module lies in a compiled part of a model, where no calls are seen."""
    several = len(run.models) > 1
    for model in run.models:
        for part in model.compiled:
            path = f"{model.name}.{part}".rstrip(".") if several else part
            if module == path or belongs_to(module, path):
                return True
    return False


def module_around(path: str, params: tuple[str, ...]) -> str:
    """Return the path of a module by today's names.

    The only model found so far is called by an empty path; once there are several, its parameters
    bear its name.

    Args:
        path: as it was when the module was called.
        params: names of parameters inside of it.
    """
    if path:
        return path
    tops = {name.split(".")[0] for name in params if "." in name}
    return tops.pop() if len(tops) == 1 else ""


def span(rows: pd.DataFrame) -> dict[str, int]:
    """Return the first and last of some steps and how many there are, as a finding takes them."""
    return {
        "step_first": int(rows["step"].min()),
        "step_last": int(rows["step"].max()),
        "count": len(rows),
    }


def first_place(rows: pd.DataFrame) -> dict[str, Any]:
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


def first_unread(run: Recording) -> int:
    """Return the step from which on no norms of gradients were read, far off if they always were.

    A norm that is NaN says nothing there. Before, it is that of a gradient that is not finite.
    """
    failed = events_of(run, "instrument_failed")
    failed = failed.loc[failed["detail"].str.startswith("gradient_norms:")]
    return int(failed["step"].min()) if len(failed) else 2**62


def made_at(run: Recording, optimizer: str) -> dict[str, Any]:
    """Where the program made an optimizer, as a finding takes it; unknown if it was passed in."""
    return first_place(events_of(run, "optimizer_found", optimizer))


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
