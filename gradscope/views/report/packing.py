"""Numbers for a page in two bytes each, with about four digits: what a screen can show."""

from __future__ import annotations

import base64
from typing import Any, Final

import numpy as np
import numpy.typing as npt

_MISSING: Final = 65535
_INFINITE: Final = 65534
_ZERO: Final = 65533
_LEVELS: Final = 65532
"""The greatest code of a number."""


def packed(values: npt.NDArray[Any]) -> dict[str, Any]:
    """Pack numbers that are nowhere negative on a logarithmic scale, others on a linear one.

    Zero, infinity and NaN have codes of their own and come back as they are; minus infinity comes
    back as infinity.

    Args:
        values: real[...].

    Returns:
        For JSON: ``log``, whether the scale is logarithmic; ``low`` and ``high``, its ends, as
        logarithms to the base 10 there; ``codes``, uint16 little-endian in base64, in C order. The
        code c stands for low + c / 65532 · (high - low); 65533 for zero on a logarithmic scale,
        65534 for infinity, 65535 for NaN.
    """
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values)
    is_log = not (values[finite] < 0).any()
    codes = np.full(values.shape, _MISSING, np.uint16)
    codes[np.isinf(values)] = _INFINITE
    scaled = np.full(values.shape, np.nan)
    if is_log:
        codes[values == 0] = _ZERO
        known = finite & (values > 0)
        np.log10(values, out=scaled, where=known)
    else:
        known = finite
        scaled[known] = values[known]
    low, high = (scaled[known].min(), scaled[known].max()) if known.any() else (0.0, 0.0)
    if known.any():
        width = (high - low) or 1.0
        codes[known] = np.rint((scaled[known] - low) / width * _LEVELS).astype(np.uint16)
    return {
        "log": is_log,
        "low": float(low),
        "high": float(high),
        "codes": base64.b64encode(codes.astype("<u2").tobytes()).decode("ascii"),
    }


def unpacked(stored: dict[str, Any]) -> npt.NDArray[np.float64]:
    """Return the numbers that were packed, flattened: what the page's script does."""
    codes = np.frombuffer(base64.b64decode(stored["codes"]), "<u2")
    values = stored["low"] + codes / _LEVELS * (stored["high"] - stored["low"])
    if stored["log"]:
        values = 10.0**values
        values[codes == _ZERO] = 0.0
    values[codes == _INFINITE] = np.inf
    values[codes == _MISSING] = np.nan
    return np.asarray(values, np.float64)


def packed_bytes(values: npt.NDArray[Any]) -> str:
    """Return small whole numbers (0 to 255) in base64, one byte each."""
    return base64.b64encode(np.asarray(values, np.uint8).tobytes()).decode("ascii")


def rounded(values: npt.NDArray[Any], digits: int = 7) -> list[float | None]:
    """Return numbers for JSON with so many digits; what is not finite as None."""
    return [float(f"{x:.{digits}g}") if np.isfinite(x) else None for x in values.tolist()]
