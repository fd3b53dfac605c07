"""Models, optimizers and parameters as plain data and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from gradscope.run.entries import ModelEntry, OptimizerEntry, ParameterEntry
from gradscope.run.recording import Recording

_GREATEST = 2**62


class NameHistory:
    """The names that parameters have had.

    A parameter may get another name when a second model is found, or when it turns out where a
    tensor lies. What was written before bears the old names; each part says in which version.

    Attributes:
        versions: lists of names by number; the last is of today.
    """

    def __init__(self, versions: list[list[str]] | None = None) -> None:
        self.versions = versions or [[]]

    @property
    def latest(self) -> int:
        """The version of today."""
        return len(self.versions) - 1

    def update(self, names: Sequence[str]) -> None:
        """Take note of the names of today."""
        known = self.versions[-1]
        if known == list(names[: len(known)]):
            known += names[len(known) :]
        else:
            self.versions.append(list(names))

    def changed_since(self, version: int) -> dict[str, str]:
        """Return today's name of every parameter that was called otherwise in a version."""
        if not 0 <= version < self.latest:
            return {}
        then, now = self.versions[version], self.versions[-1]
        return {old: new for old, new in zip(then, now, strict=False) if old != new}


def people_of(recording: Recording) -> dict[str, Any]:
    """Return who took part, as JSON can hold it."""
    return {
        "models": [dataclasses.asdict(each) for each in list(recording.models)],
        "optimizers": [dataclasses.asdict(each) for each in list(recording.optimizers)],
        "parameters": [_plain(each) for each in list(recording.parameters)],
    }


def add_people(recording: Recording, people: Any) -> NameHistory:
    """Enter into a recording who took part.

    Raises:
        ValueError: if this is something else; the message says what is wrong.
    """
    try:
        recording.models = [_entry(ModelEntry, each) for each in people["models"]]
        recording.optimizers = [_entry(OptimizerEntry, each) for each in people["optimizers"]]
        parameters = [_entry(ParameterEntry, each) for each in people["parameters"]]
        versions = [[_checked(str, name) for name in names] for names in people["names"]]
        n_optimizers = len(recording.optimizers)
        for entry in parameters:
            if entry.numel > _GREATEST or min(entry.shape, default=0) < 0:
                raise ValueError("a parameter has a shape that none can have")
            if not all(0 <= holder < n_optimizers for holder, _ in entry.holders):
                raise ValueError("a parameter is held by an optimizer that there is not")
            if entry.copy_of is not None and not 0 <= entry.copy_of < len(parameters):
                raise ValueError("a parameter is a copy of one that there is not")
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{type(error).__name__}: {str(error)[:200]}") from None
    recording.parameters = parameters
    return NameHistory(versions)


def _plain(entry: ParameterEntry) -> dict[str, Any]:
    return {spec.name: _number(getattr(entry, spec.name)) for spec in dataclasses.fields(entry)}


def _number(value: Any) -> Any:
    """A value as JSON knows it, which has no NaN and nothing infinite."""
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


_READ: dict[str, Any] = {
    "str": lambda value: _checked(str, value),
    "bool": lambda value: _checked(bool, value),
    "int": lambda value: _checked(int, value),
    "float": lambda value: float(value),
    "int | None": lambda value: None if value is None else _checked(int, value),
    "tuple[str, ...]": lambda value: tuple([_checked(str, each) for each in value]),
    "tuple[int, ...]": lambda value: tuple([_checked(int, each) for each in value]),
    "list[tuple[int, int]]": lambda value: [(_checked(int, a), _checked(int, b)) for a, b in value],
}


def _entry(kind: Any, plain: Any) -> Any:
    return kind(
        **{
            spec.name: _READ[str(spec.type)](plain[spec.name])
            for spec in dataclasses.fields(kind)
            if spec.name in plain  # one that a newer gradscope added
        }
    )


def _checked(kind: type, value: Any) -> Any:
    if type(value) is not kind or (isinstance(value, int) and abs(value) > _GREATEST):
        raise ValueError(f"{ascii(value)[:60]} is no {kind.__name__}")
    return value
