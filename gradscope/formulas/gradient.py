"""What most rules do to the gradient first."""

from __future__ import annotations

from typing import Any

from gradscope.formulas.worksheet import Worksheet


def ascending(sheet: Worksheet) -> Any:
    """Return the gradient, turned round where the optimizer maximizes."""
    return -sheet.g if sheet.get("maximize") else sheet.g


def regularized(sheet: Worksheet) -> Any:
    """Write ``g_total``, the gradient with an L2 penalty's, where there is one; returns it."""
    if not sheet.get("weight_decay") and not sheet.get("maximize"):
        return sheet.g
    if not sheet.get("weight_decay"):
        sheet.g_total = -sheet.g
    else:
        sheet.g_total = ascending(sheet) + sheet.weight_decay * sheet.weight_before
    return sheet.g_total
