"""When two operations count as the same: as numbers that are equal where the operations are.

How strict that is, is the reader's choice. Wiring is compared by :mod:`gradscope.graphs.repeats`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, get_args

import numpy as np

from gradscope.errors import UsageError

if TYPE_CHECKING:
    from gradscope.graphs.execution import Execution
    from gradscope.run.captured_graph import CapturedGraph, LongIntegers

Likeness: TypeAlias = Literal["exact", "shape", "op"]
"""What must agree for two pieces of a graph to be drawn as one.

``op``: operations, wiring and classes of modules. ``shape``: shapes too, and the names of modules
but for the numbers in them. ``exact``: dtypes too. Which parameters they are never matters.
"""

_DIGITS: Final = re.compile(r"\d+")


def checked_likeness(fold: object) -> Likeness | None:
    """Return ``fold`` if it is one of the allowed values.

    Raises:
        UsageError: if it is not.
    """
    if fold is None or fold in get_args(Likeness):
        return fold  # type: ignore[return-value]
    allowed = ", ".join(map(repr, get_args(Likeness)))
    raise UsageError(f"fold={fold!r}: pass {allowed}, or None to fold nothing")


def likeness_of_operations(
    captured: CapturedGraph, execution: Execution, likeness: Likeness
) -> LongIntegers:
    """Return int64[m], numbers that agree where operations, taken by themselves, are the same."""
    node = execution.node
    n_inputs = np.diff(execution.first_input)
    features = [captured.op[node].astype(np.int64), n_inputs]
    if likeness != "op":
        seen: dict[object, int] = {}
        of_output = [
            seen.setdefault(outputs if likeness == "exact" else outputs.shapes, len(seen))
            for outputs in captured.outputs
        ]
        features.append(np.array(of_output, np.int64)[captured.output[node]])
    return _combined(features)


def likeness_of_leaves(captured: CapturedGraph, likeness: Likeness) -> LongIntegers:
    """Return int64[p], numbers that agree where leaves may stand for each other."""
    if likeness == "op":
        return np.zeros(len(captured.params), np.int64)
    seen: dict[object, int] = {}
    return np.array(
        [
            seen.setdefault((bool(names), shape), len(seen))
            for names, shape in zip(captured.params, captured.param_shape, strict=True)
        ],
        np.int64,
    )


def likeness_of_module(path: str, kind: str, likeness: Likeness) -> object:
    """Return what must agree of two modules, besides what happens inside of them."""
    return kind if likeness == "op" else (kind, without_numbers(path))


def without_numbers(path: str) -> str:
    """Return a path with every number in it replaced by ``#``."""
    return _DIGITS.sub("#", path)


def _combined(features: list[LongIntegers]) -> LongIntegers:
    combined = features[0]
    for feature in features[1:]:
        _, combined = np.unique(
            combined * (int(feature.max(initial=0)) + 1) + feature, return_inverse=True
        )
    return combined.astype(np.int64)
