"""A tensor that goes into a model or a loss function, in a few numbers."""

from __future__ import annotations

from typing import Any

import torch

from gradscope.instruments.late import Late, Numbers
from gradscope.instruments.local import is_spread

_MOST_READ = 1 << 22
"""Elements of a tensor that are looked at; of a larger one its first rows."""

_MOST_DISTINCT = 1 << 16


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether a tensor has elements that can be read as they lie."""
    return (
        not tensor.is_nested  # before anything is asked that it has not
        and tensor.layout is torch.strided
        and not tensor.is_meta
        and not tensor.is_complex()
        and tensor.numel() > 0
        and not is_spread(tensor)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


class TensorSummary:
    """The row of ``batches`` about one tensor, whose numbers may still be under way."""

    def __init__(self, role: str, owner: str, tensor: torch.Tensor) -> None:
        self._facts: dict[str, Any] = {
            "role": role,
            "owner": owner,
            "shape": str(tuple(tensor.shape)),
            "dtype": str(tensor.dtype).removeprefix("torch."),
        }
        values = tensor.detach()
        if values.numel() > _MOST_READ and values.dim():
            values = values[: max(1, _MOST_READ // (values.numel() // values.shape[0]))]
        self.numbers: Late[Any] = Numbers(_numbers_of(values))

    def row(self) -> dict[str, Any]:
        """Return the row, without its step."""
        low, high, mean, std, ratio, distinct, nonfinite = self.numbers.value().tolist()
        row = self._facts | {
            "min": low,
            "max": high,
            "mean": mean,
            "std": std,
            "scale_ratio": ratio,
            "nonfinite": int(nonfinite),
        }
        if distinct >= 0:
            row["distinct"] = int(distinct)
        return row


def _numbers_of(values: torch.Tensor) -> torch.Tensor:
    is_float = values.is_floating_point()
    # Integers up to 2**53 are exact in float64; class numbers are far below.
    real = values.to(torch.float32 if values.device.type == "mps" else torch.float64)
    nonfinite = (~torch.isfinite(real)).sum()
    real = torch.nan_to_num(real)
    low, high = real.amin(), real.amax()
    ratio = torch.full_like(low, float("nan"))
    if is_float and real.dim() == 2 and real.shape[0] > 1 and real.shape[1] > 1:
        spread = real.std(dim=0, correction=0)
        least = torch.where(spread > 0, spread, torch.inf).amin()
        ratio = torch.where(torch.isfinite(least), spread.amax() / least, ratio)
    if is_float:
        distinct = torch.where(low == high, 1.0, torch.where(_is_two(real, low, high), 2.0, -1.0))
    elif real.numel() <= _MOST_DISTINCT and real.device.type == "cpu":
        distinct = torch.tensor(float(torch.unique(real).numel()))
    else:
        distinct = torch.where(low == high, 1.0, -1.0)
    parts = (low, high, real.mean(), real.std(correction=0), ratio, distinct, nonfinite)
    return torch.stack([part.to(real.dtype) for part in parts])


def _is_two(values: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return ((values == low) | (values == high)).all()
