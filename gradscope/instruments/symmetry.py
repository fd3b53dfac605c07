"""Whether the units of a weight are alike in it and in its gradient: units that stay alike.

Units have a row each, in each of the weights that lie one below the other in a recurrent layer, or
a column each in a matrix that stands on the right of a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gradscope.instruments.late import Known, Late, Numbers
from gradscope.instruments.tensor_summary import is_readable

_ROUNDING = 1e-4
"""Two rows that began equal and get equal gradients stay within this of each other in float32."""

_GATES = {"LSTM": 4, "LSTMCell": 4, "GRU": 3, "GRUCell": 3}
_IN_PROJ = "in_proj_weight"


@dataclass(frozen=True, slots=True)
class SymmetryReading:
    """What was read of several parameters.

    Attributes:
        places: which of the tensors are matrices with a gradient.
        flags: float64, two for each of these: 1 where all rows of the weight are equal to one
            another, and all rows of the gradient; and 1 where all columns are.
    """

    places: tuple[int, ...]
    flags: Late[Any]


def n_stacked(kind: str, name: str) -> int:
    """Return how many weights lie one below the other in a parameter.

    >>> n_stacked("LSTM", "rnn.weight_ih_l0")
    4

    Args:
        kind: class of the module that holds it.
        name: of the parameter.
    """
    if kind == "MultiheadAttention" and name.rsplit(".", 1)[-1] == _IN_PROJ:
        return 3
    return _GATES.get(kind, 1)


def read_symmetry(tensors: Sequence[Any], stacked: Sequence[int] = ()) -> SymmetryReading:
    """Read whether the units of weights with a gradient, of two dimensions or more, are alike.

    Args:
        tensors: the weights; None for one that is gone.
        stacked: for each how many weights lie one below the other in it; one if not given.
    """
    places, flags = [], []
    for place, weight in enumerate(tensors):
        if weight is None or weight.dim() < 2 or not weight.is_leaf:
            continue
        gradient = weight.grad
        if gradient is None or not (is_readable(weight) and is_readable(gradient)):
            continue
        weight, gradient = weight.detach(), gradient.detach()
        n = stacked[place] if stacked else 1
        n = n if weight.shape[0] % n == 0 else 1
        rows = [_alike(one, of) for one, of in zip(weight.chunk(n), gradient.chunk(n), strict=True)]
        columns = weight.dim() == 2 and _alike(weight.T, gradient.T)
        both = (torch.stack(rows).all(), columns if columns is not False else _no(weight))
        flags.append(torch.stack(both))
        places.append(place)
    if not places:
        return SymmetryReading((), Known(None))
    devices = {flag.device for flag in flags}
    if len(devices) > 1:
        flags = [flag.cpu() for flag in flags]
    return SymmetryReading(tuple(places), Numbers(torch.stack(flags)))


def _alike(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Whether all rows of a weight are alike, and all of its gradient."""
    if weight.shape[0] < 2:
        return _no(weight)
    # The first rows tell of nearly every weight that it is none, without reading the others.
    if weight.device.type == "cpu" and not torch.allclose(
        weight[0], weight[1], rtol=_ROUNDING, atol=0.0
    ):
        return _no(weight)
    # Gradients of equal rows differ by what a matrix product rounds.
    spread = (gradient - gradient[:1]).abs().amax()
    alike = spread <= _ROUNDING * gradient.abs().amax()
    same = (weight - weight[:1]).abs().amax() <= _ROUNDING * weight.abs().amax()
    return same & alike


def _no(weight: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=torch.bool, device=weight.device)
