"""The tensors around chosen steps that the program asked to keep, as NumPy arrays."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gradscope.formulas import FORMULAS
from gradscope.run.weight_step import GivenTogether, WeightStep

MOST_BYTES = 256 * 2**20
"""What kept tensors may take; beyond that the oldest steps are forgotten."""


class KeptTensors:
    """Kept tensors by step and parameter, bounded in memory.

    Args:
        n_last: how many of the latest steps are kept; None for as many as fit.

    Attributes:
        earlier: what was kept before the run was interrupted and went on.
        forgot: whether a step that was asked for had to make room.
    """

    def __init__(self, n_last: int | None = None) -> None:
        self.n_last = n_last
        self.forgot = False
        self.earlier: KeptTensors | None = None
        self._kept: OrderedDict[int, dict[int, tuple[Mapping[str, Any], GivenTogether]]]
        self._kept = OrderedDict()
        self._n_bytes = 0

    def keep(
        self,
        step: int,
        param: int,
        tensors: Mapping[str, npt.NDArray[Any]],
        common: GivenTogether,
    ) -> None:
        """Keep the tensors of one parameter around one step."""
        self._kept.setdefault(step, {})[param] = (tensors, common)
        self._n_bytes += _n_bytes(tensors)
        while self.n_last is not None and len(self._kept) > self.n_last:
            self._forget_oldest()
        while len(self._kept) > 1 and self._n_bytes > MOST_BYTES:
            self.forgot = True
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        _, gone = self._kept.popitem(last=False)
        self._n_bytes -= sum(_n_bytes(tensors) for tensors, _ in gone.values())

    def steps_of(self, param: int) -> list[int]:
        """Return the steps of which tensors of a parameter are there, in order."""
        earlier = [] if self.earlier is None else self.earlier.steps_of(param)
        return earlier + [step for step, params in self._kept.items() if param in params]

    def of_step(self, step: int) -> Mapping[int, tuple[Mapping[str, Any], GivenTogether]]:
        """Return what was kept of a step by parameter: tensors, and what else a rule is given."""
        if step not in self._kept and self.earlier is not None:
            return self.earlier.of_step(step)
        return self._kept.get(step, {})

    @property
    def steps(self) -> list[int]:
        """The steps of which anything is there, in order."""
        return ([] if self.earlier is None else self.earlier.steps) + list(self._kept)

    def tensors(self, step: int, param: int) -> dict[str, npt.NDArray[Any]] | None:
        """Return copies of what was kept, by name; None if nothing was."""
        kept = self.of_step(step).get(param)
        if kept is None:
            return None
        tensors, common = kept
        copies = {name: array.copy() for name, array in tensors.items()}
        if common.loss_scale != 1 and "gradient" in copies:
            copies["gradient"] /= common.loss_scale
        return copies

    def weight(
        self, step: int, param: int, position: int, index: tuple[int, ...]
    ) -> WeightStep | None:
        """Return one weight around a step; None if it was not kept.

        Args:
            step: the step.
            param: number of the parameter.
            position: of the weight in the flattened parameter, a complex number being two.
            index: of the weight in the parameter.
        """
        kept = self.of_step(step).get(param)
        if kept is None or "weight_after" not in kept[0]:
            return None
        tensors, common = kept
        formula = FORMULAS.get(common.formula or "")
        names = dict(formula.state) if formula is not None else {}
        given, stored = dict(common.given), {}
        is_whole = formula is not None and not formula.elementwise
        shape = tensors["weight_before"].shape

        def pick(array: npt.NDArray[Any]) -> Any:
            real = _real(array)
            if is_whole or not real.ndim or array.shape != shape:
                return np.float64(real) if not real.ndim else real
            return np.float64(real.reshape(-1)[position])

        given["weight_before"] = pick(tensors["weight_before"])
        if "gradient" in tensors:
            given["g"] = pick(tensors["gradient"]) / common.loss_scale
        if "touched" in tensors:
            given["touched"] = pick(tensors["touched"].astype(np.float64))
        for key in {name.rpartition("_")[0] for name in tensors} - {"weight", ""}:
            name = names.get(key, key)
            if f"{key}_before" in tensors:
                given[f"{name}_before"] = pick(tensors[f"{key}_before"])
            if f"{key}_after" in tensors:
                stored[name] = pick(tensors[f"{key}_after"])
        if formula is not None:
            # What the step was not asked for, because it was others' turn to be copied.
            arrays = [key for key, name in names.items() if name not in formula.scalars]
            given.setdefault("is_first", not any(f"{key}_before" in tensors for key in arrays))
            for name in names.values():
                given.setdefault(f"{name}_before", 0.0)
        after = _real(tensors["weight_after"])
        return WeightStep(
            common.formula,
            given,
            index,
            float(after[index] if is_whole else after.reshape(-1)[position]),
            stored,
        )


def _real(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Complex numbers as pairs of real ones."""
    if not np.iscomplexobj(array):
        return array
    return np.stack([array.real, array.imag], axis=-1)


def _n_bytes(tensors: Mapping[str, npt.NDArray[Any]]) -> int:
    return sum(array.nbytes for array in tensors.values())
