"""When numbers are equal, how far apart they are, and what rounding can do."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Reals = npt.NDArray[np.float64]

ROUNDING: Final = {
    "bfloat16": 1.6e-2,
    "float16": 1e-3,
    "complex32": 1e-3,
    "float32": 1.3e-6,
    "complex64": 1.3e-6,
    "float64": 1e-7,
    "complex128": 1e-7,
}
"""Relative differences between two computations of the same that rounding explains, by dtype: the
tolerances of ``torch.testing.assert_close``. Another number of threads moves the gradient norms of
a float32 step by 5e-8 to 1e-7."""


def rounding_of(dtypes: Iterable[str]) -> float:
    """Return the tolerance of the coarsest of some dtypes; that of float32 if none is known."""
    return max((ROUNDING[dtype] for dtype in dtypes if dtype in ROUNDING), default=1.3e-6)


def relative(a: Any, b: Any, scale: Any = None) -> Reals:
    """Return float64[n], how far numbers are apart; 0 if and only if they are the same.

    Args:
        a: real[n].
        b: real[n]; two NaNs are the same.
        scale: real[n], what they are a part of; the difference is relative to it if it is larger
            than both.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    with np.errstate(all="ignore"):
        size = np.maximum(np.abs(a), np.abs(b))
        if scale is not None:
            size = np.fmax(size, scale)
        apart = np.abs(a - b) / size
    apart = np.where(np.isfinite(apart), apart, math.inf)
    return np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, apart)


def in_digits(a: float, b: float) -> tuple[str, str]:
    """Return two numbers with as many digits as tell them apart, four at least."""
    for digits in (4, 6, 8, 10, 12, 17):
        texts = f"{a:.{digits}g}", f"{b:.{digits}g}"
        if texts[0] != texts[1] or a == b:
            break
    return texts
