"""What is known of single weights around a step, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class WeightStep:
    """One weight around one step.

    Attributes:
        formula: name of the update rule in :data:`gradscope.formulas.FORMULAS`; None if unknown.
        given: what the rule's worksheet is given; where the rule needs the whole parameter, arrays.
        index: of the weight in these arrays.
        weight_stored: the weight after the step.
        stored: the optimizer's state after the step, under the names of the worksheet, as far as it
            was kept.
    """

    formula: str | None
    given: Mapping[str, Any]
    index: tuple[int, ...]
    weight_stored: float
    stored: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GivenTogether:
    """What neighbouring parameters have in common at a step.

    Attributes:
        formula: name of the update rule, or None.
        given: hyper-parameters and counters.
        arrays: name on the worksheet → name among the values kept of each weight.
        loss_scale: what the gradients are still multiplied by where they lie; the update divides by
            it.
    """

    formula: str | None
    given: Mapping[str, Any]
    arrays: Mapping[str, str]
    loss_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class TrackedWeights:
    """A few weights of every parameter around one step.

    Attributes:
        param: int64[k], number of the parameter of each weight.
        position: int64[k], its place in the flattened parameter.
        values: real[k] by name: ``weight_before``, ``weight_after``, ``g``, the state before.
        common: what else the rule is given, by run of parameters.
        run: int64[k], index into ``common``; -1 for a weight of which only the values before and
            after the step are known, because it was its parameter's turn neither to be taken apart
            nor to be explained.
    """

    param: Integers
    position: Integers
    values: Mapping[str, npt.NDArray[Any]]
    common: tuple[GivenTogether, ...]
    run: Integers

    def weight(self, param: int, position: int, index: tuple[int, ...]) -> WeightStep | None:
        """Return what is known of one weight, or None if it is not tracked."""
        at = np.flatnonzero((self.param == param) & (self.position == position))
        if not len(at) or self.run[at[0]] < 0:
            return None
        common = self.common[self.run[at[0]]]
        own = {name: np.float64(self.values[kept][at[0]]) for name, kept in common.arrays.items()}
        own["weight_before"] = np.float64(self.values["weight_before"][at[0]])
        return WeightStep(
            common.formula,
            {**common.given, **own},
            index,
            float(self.values["weight_after"][at[0]]),
        )

    @property
    def n_bytes(self) -> int:
        """What the values take in memory."""
        return sum(values.nbytes for values in self.values.values())
