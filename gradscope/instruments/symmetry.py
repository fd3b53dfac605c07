"""Whether all rows of a weight and all rows of its gradient are equal: units that stay alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gradscope.instruments.late import Known, Late, Numbers
from gradscope.instruments.tensor_summary import is_readable

_ROUNDING = 1e-4
"""Two rows that began equal and get equal gradients stay within this of each other in float32."""


@dataclass(frozen=True, slots=True)
class SymmetryReading:
    """What was read of several parameters.

    Attributes:
        places: which of the tensors are matrices with a gradient.
        flags: float64, one for each of these: 1 where all rows of the weight are equal to one
            another, and all rows of the gradient.
    """

    places: tuple[int, ...]
    flags: Late[Any]


def read_symmetry(tensors: Sequence[Any]) -> SymmetryReading:
    """Read whether the units of weights with a gradient, of two dimensions or more, are alike."""
    places, flags = [], []
    for place, weight in enumerate(tensors):
        if weight is None or weight.dim() < 2 or weight.shape[0] < 2 or not weight.is_leaf:
            continue
        gradient = weight.grad
        if gradient is None or not (is_readable(weight) and is_readable(gradient)):
            continue
        weight, gradient = weight.detach(), gradient.detach()
        # The first rows tell of nearly every weight that it is none, without reading the others.
        if weight.device.type == "cpu" and not torch.allclose(
            weight[0], weight[1], rtol=_ROUNDING, atol=0.0
        ):
            flags.append(torch.zeros((), dtype=torch.bool))
        else:
            # Gradients of equal rows differ by what a matrix product rounds.
            spread = (gradient - gradient[:1]).abs().amax()
            alike = spread <= _ROUNDING * gradient.abs().amax()
            same = (weight - weight[:1]).abs().amax() <= _ROUNDING * weight.abs().amax()
            flags.append(same & alike)
        places.append(place)
    if not places:
        return SymmetryReading((), Known(None))
    devices = {flag.device for flag in flags}
    if len(devices) > 1:
        flags = [flag.cpu() for flag in flags]
    return SymmetryReading(tuple(places), Numbers(torch.stack(flags)))
