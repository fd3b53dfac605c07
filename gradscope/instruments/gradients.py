"""Every parameter's ``.grad`` at one moment: is it there, is it the same object, was it written?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gradscope.instruments.late import Late
from gradscope.instruments.statistics import Reals, Statistics, StatisticsReader

Gradients = Sequence[torch.Tensor | None]

_NO_GRADIENT = id(None)


class GradientReader:
    """Looks at the gradients of a fixed list of parameters.

    A look at identity and version reads no tensor. Whether gradients are zero, and their norms,
    are read only when asked for.

    Args:
        parameters: the parameters, None for one that is gone.
    """

    def __init__(self, parameters: Gradients) -> None:
        self._statistics = StatisticsReader(parameters)
        self._nothing = [0] * len(parameters)
        # Asking a tensor that is no leaf for its .grad makes torch warn.
        self._are_leaves = all(p is None or p.is_leaf for p in parameters)

    def gradients(self, parameters: Gradients) -> list[torch.Tensor | None]:
        """Return each ``.grad``; a kept one costs the next backward a copy, so keep none."""
        if self._are_leaves:
            try:
                return [p.grad for p in parameters]  # type: ignore[union-attr]
            except AttributeError:  # a parameter is gone
                pass
        return [p.grad if p is not None and p.is_leaf else None for p in parameters]

    def identities(self, gradients: Gradients) -> tuple[list[int], list[int], int]:
        """Return the token of each (0 for None), its version, and how many gradients there are.

        The token is the gradient object's id. It holds as long as the gradient is in its place:
        torch keeps the Python object of a tensor for as long as the tensor lives.
        """
        tokens = [id(gradient) for gradient in gradients]
        absent = tokens.count(_NO_GRADIENT)
        if absent == len(tokens):
            nothing = self._nothing[: len(tokens)]
            return nothing, nothing, 0
        if not absent:
            try:
                return tokens, [gradient._version for gradient in gradients], len(tokens)  # type: ignore[union-attr]
            except RuntimeError:  # a tensor made in inference mode counts no versions
                pass
        versions = [0 if g is None or g.is_inference() else g._version for g in gradients]
        tokens = [0 if token == _NO_GRADIENT else token for token in tokens]
        return tokens, versions, len(tokens) - absent

    def sums_of_squares(self, gradients: Gradients) -> Late[Reals]:
        """Return float64[n], NaN where there is no gradient."""
        return self._statistics.sums_of_squares(gradients)

    def statistics(self, gradients: Gradients) -> Late[Statistics]:
        """Return all statistics of each gradient."""
        return self._statistics.statistics(gradients)
