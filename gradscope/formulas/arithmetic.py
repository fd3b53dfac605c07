"""The few functions that update rules need beyond ``+ - * / **``, for every kind of quantity.

Arrays of NumPy and Python's numbers go through NumPy; torch's tensors, and terms that are being
traced, bring the operation as a method of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_SPACING_AT_ONE = {
    "float64": 2.0**-52,
    "float32": 2.0**-23,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
}


def sqrt(x: Any) -> Any:
    """Return the square root."""
    return x.sqrt() if hasattr(x, "sqrt") else _as_plain(np.sqrt(x), x)


def absolute(x: Any) -> Any:
    """Return the magnitude."""
    return abs(x)


def sign(x: Any) -> Any:
    """Return -1, 0 or 1; 0 for NaN, as torch does."""
    return x.sign() if hasattr(x, "sign") else _as_plain(np.where(np.isnan(x), 0, np.sign(x)), x)


def maximum(x: Any, y: Any) -> Any:
    """Return the greater of two quantities, element by element; NaN where one is."""
    return _extreme(x, y, "maximum", "min")


def minimum(x: Any, y: Any) -> Any:
    """Return the lesser of two quantities, element by element; NaN where one is."""
    return _extreme(x, y, "minimum", "max")


def where(condition: Any, x: Any, y: Any) -> Any:
    """Return ``x`` where the condition holds, else ``y``; numbers do for arrays of one value."""
    if isinstance(condition, bool | np.bool_):
        return x if condition else y
    if isinstance(condition, np.ndarray):
        return np.where(condition, x, y)
    return condition.where_(x, y) if hasattr(condition, "where_") else _torch_where(condition, x, y)


def is_ruled_out(condition: Any) -> bool:
    """Return whether a condition is a plain False.

    A tensor's value is not looked at: that would wait for the device.
    """
    return isinstance(condition, bool | np.bool_) and not condition


def mean(x: Any, axis: int) -> Any:
    """Return the mean over one axis, which is kept with length 1."""
    return x.mean(axis, keepdims=True) if isinstance(x, np.ndarray) else x.mean(axis, True)


def rms(x: Any) -> Any:
    """Return the root of the mean square of all elements."""
    if isinstance(x, np.ndarray | np.generic):
        return np.linalg.norm(x) / x.size**0.5
    return x.norm() / (x.numel() if hasattr(x, "numel") else x.size) ** 0.5


def machine_epsilon(dtype: str) -> float:
    """Return the distance from 1 to the next greater number of a dtype, as in ``torch.finfo``."""
    return _SPACING_AT_ONE[dtype]


def lerp(start: Any, end: Any, weight: Any, dtype: str) -> Any:
    """Return ``start + weight * (end - start)``, of arrays with every rounding of torch's own.

    A term needs a method of this name.

    Args:
        start: an array, or a number for an array of that value.
        end: an array.
        weight: a number.
        dtype: that in which torch does it, and rounds the result.
    """
    if not _is_array(end):
        return end.lerp(start, weight, dtype)
    import torch

    tensor, own = _tensor(end), getattr(torch, dtype)
    base = _tensor(start) if _is_array(start) else torch.full_like(tensor, start)
    return _like(end, base.to(own).lerp(tensor.to(own), float(weight)).to(tensor.dtype))


def newton_schulz(x: Any, coefficients: Sequence[Any], steps: Any, eps: Any) -> Any:
    """Return about the nearest semi-orthogonal matrix, by the iteration that Muon uses.

    The iteration, in bfloat16, amplifies: one element rounded otherwise, or a sum added up in
    another order, changes the result by 5e-3. So arrays go through the very operations of torch
    (2.13, ``torch/optim/_muon.py``), on their device. A term needs a method of this name.

    Args:
        x: a matrix.
        coefficients: of ``x``, of ``(x xᵀ) x``, and of ``(x xᵀ)² x``.
        steps: number of iterations.
        eps: the least norm by which the matrix is divided at the start.
    """
    if not _is_array(x):
        return x.newton_schulz(coefficients, steps, eps)
    import torch

    linear, cubic, quintic = (float(coefficient) for coefficient in coefficients)
    tensor = _tensor(x)
    is_tall = tensor.shape[0] > tensor.shape[1]
    y = tensor.to(torch.bfloat16)
    y = y.T if is_tall else y
    y = y / y.norm().clamp(min=float(eps))
    for _ in range(int(float(steps))):
        gram = y @ y.T
        gram = torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic)
        y = torch.addmm(y, gram, y, beta=linear)
    return _like(x, (y.T if is_tall else y).to(tensor.dtype))


def _extreme(x: Any, y: Any, name: str, bound: str) -> Any:
    # Only torch knows clamp, which takes a number where its maximum wants another tensor.
    if hasattr(x, "clamp") and hasattr(y, "clamp"):
        return getattr(x, name)(y)
    for one, other in ((x, y), (y, x)):
        if hasattr(one, "clamp"):
            return one.clamp(**{bound: other})
        if hasattr(one, name):
            return getattr(one, name)(other)
    return _as_plain(getattr(np, name)(x, y), x, y)


def _as_plain(result: Any, *operands: Any) -> Any:
    """A result of Python's numbers as one of them: NumPy's would make float32 arrays float64."""
    return float(result) if all(type(x) in (float, int) for x in operands) else result


def _torch_where(condition: Any, x: Any, y: Any) -> Any:
    import torch

    return torch.where(condition, x, y)


def _is_array(x: Any) -> bool:
    return isinstance(x, np.ndarray) or hasattr(x, "bfloat16")


def _tensor(x: Any) -> Any:
    import torch

    return torch.tensor(x) if isinstance(x, np.ndarray) else x


def _like(x: Any, tensor: Any) -> Any:
    return tensor.numpy() if isinstance(x, np.ndarray) else tensor
