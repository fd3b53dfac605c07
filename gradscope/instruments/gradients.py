"""Every parameter's ``.grad`` at one moment: is it there, is it the same object, was it written?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from gradscope.instruments.late import Late
from gradscope.instruments.statistics import Reals, Statistics, StatisticsReader

Integers = npt.NDArray[np.int64]

_NO_GRADIENT = id(None)


class GradientReader:
    """Looks at the gradients of a fixed list of parameters.

    A look at identity and version reads no tensor. Whether gradients are zero, and their norms,
    are read only when asked for.

    Args:
        parameters: the parameters, None for one that is gone.
    """

    def __init__(self, parameters: Sequence[torch.Tensor | None]) -> None:
        self._statistics = StatisticsReader(parameters)
        self._nothing = np.zeros(len(parameters), np.int64)

    def gradients(self, parameters: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Return each ``.grad``; a kept one costs the next backward a copy, so keep none."""
        # Asking a tensor that is no leaf for its .grad makes torch warn.
        return [p.grad if p is not None and p.is_leaf else None for p in parameters]

    def identities(
        self, gradients: Sequence[torch.Tensor | None]
    ) -> tuple[Integers, Integers, bool]:
        """Return token int64[n] (0 for None), version int64[n], and whether any gradient is there.

        The token is the gradient object's id. It holds as long as the gradient is in its place:
        torch keeps the Python object of a tensor for as long as the tensor lives.
        """
        tokens = [id(gradient) for gradient in gradients]
        if tokens.count(_NO_GRADIENT) == len(tokens):
            return self._nothing, self._nothing, False
        token = np.array(tokens, np.int64)
        token[token == _NO_GRADIENT] = 0
        versions = [0 if gradient is None else _version(gradient) for gradient in gradients]
        return token, np.array(versions, np.int64), True

    def sums_of_squares(self, gradients: Sequence[torch.Tensor | None]) -> Late[Reals]:
        """Return float64[n], NaN where there is no gradient."""
        return self._statistics.sums_of_squares(gradients)

    def statistics(self, gradients: Sequence[torch.Tensor | None]) -> Late[Statistics]:
        """Return all statistics of each gradient."""
        return self._statistics.statistics(gradients)


def _version(tensor: torch.Tensor) -> int:
    # A tensor made in inference mode counts no versions and raises.
    return 0 if tensor.is_inference() else tensor._version
