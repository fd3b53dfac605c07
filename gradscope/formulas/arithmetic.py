"""The few functions that update rules need beyond ``+ - * / **``, for every kind of quantity.

Arrays of NumPy and Python's numbers go through NumPy; torch's tensors, and terms that are being
traced, bring the operation as a method of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def sqrt(x: Any) -> Any:
    """Return the square root."""
    return x.sqrt() if hasattr(x, "sqrt") else np.sqrt(x)


def absolute(x: Any) -> Any:
    """Return the magnitude."""
    return abs(x)


def sign(x: Any) -> Any:
    """Return -1, 0 or 1."""
    return x.sign() if hasattr(x, "sign") else np.sign(x)


def maximum(x: Any, y: Any) -> Any:
    """Return the greater of two quantities of the same kind, element by element."""
    return x.maximum(y) if hasattr(x, "maximum") else np.maximum(x, y)


def where(condition: Any, x: Any, y: Any) -> Any:
    """Return ``x`` where the condition holds, else ``y``; numbers do for arrays of one value."""
    if isinstance(condition, bool):
        return x if condition else y
    if isinstance(condition, np.ndarray | np.generic):
        return np.where(condition, x, y)
    return condition.where_(x, y) if hasattr(condition, "where_") else _torch_where(condition, x, y)


def _torch_where(condition: Any, x: Any, y: Any) -> Any:
    import torch

    return torch.where(condition, x, y)
