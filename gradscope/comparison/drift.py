"""How two runs drift apart once they differ: slowly, as rounding does, or at once."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from gradscope.comparison.difference import Difference, Fact, Growth
from gradscope.comparison.numbers import relative
from gradscope.comparison.pair import Pair

_SHOWN: Final = 6

_JUMP: Final = 1000.0
"""By what factor rounding does not grow within a step."""

_OF_STEP: Final = ("loss", "grad_norm", "weight_norm")


def growth(pair: Pair, first: int, weights_from: float) -> tuple[Growth, ...]:
    """Return how far the runs are apart at a few steps, the first and the last among them.

    Args:
        pair: the runs.
        first: the step of the first difference.
        weights_from: the first step before which weights differed; infinite if none did. Until
            then their norms differ by the order in which they were added up, if at all.
    """
    steps, apart = _apart(pair)
    weights = apart["weight_norm"]
    weights[(steps < weights_from) & ~np.isnan(weights)] = 0.0
    at = np.flatnonzero(steps >= first)
    if len(at) > _SHOWN:
        # Each time about as many times later: what grows, grows by factors.
        places = np.unique(np.round(np.geomspace(1, len(at), _SHOWN)).astype(int)) - 1
        at = at[places]
    return tuple(
        Growth(int(steps[row]), *(float(apart[name][row]) for name in _OF_STEP))
        for row in at.tolist()
    )


def jump(pair: Pair, first: int) -> Difference | None:
    """Return the step at which runs that differ by rounding suddenly part; None if there is none.

    Args:
        pair: the runs.
        first: the step of the first difference.
    """
    steps, apart = _apart(pair)
    found: list[Difference] = []
    for name, stage in (("loss", "loss"), ("grad_norm", "gradients")):
        far = np.nan_to_num(apart[name], nan=0.0, posinf=math.inf)
        before = np.maximum.accumulate(np.concatenate([[pair.rounding], far[:-1]]))
        at = np.flatnonzero((far > _JUMP * before) & (steps > first))
        if not len(at):
            continue
        row = int(at[0])
        a, b = (float(side[row]) for side in pair.joined("steps").column(name))
        word = name.replace("_", " ")
        found.append(
            Difference(
                int(steps[row]),
                stage,
                name,
                f"the {word} is suddenly {far[row]:.1g} apart, after at most "
                f"{max(float(far[:row].max(initial=0.0)), 0.0):.1g} before",
                a,
                b,
                float(far[row]),
                facts=(Fact(word, a, b, float(far[row])),),
            )
        )
    return min(found, key=lambda each: each.order, default=None)


def _apart(pair: Pair) -> tuple[Any, dict[str, Any]]:
    joined = pair.joined("steps")
    apart = {}
    for name in _OF_STEP:
        a, b = joined.column(name)
        unknown = np.isnan(a) & np.isnan(b) | (name == "weight_norm") & (np.isnan(a) | np.isnan(b))
        apart[name] = np.where(unknown, math.nan, relative(a, b))
    return joined.step, apart
