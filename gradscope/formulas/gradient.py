"""What most rules do to the gradient first, and with the parts of the update last."""

from __future__ import annotations

from typing import Any

from gradscope.formulas.worksheet import Worksheet


def ascending(sheet: Worksheet) -> Any:
    """Return the gradient; where the optimizer maximizes ``g_negated``, which is written once."""
    if not sheet.get("maximize"):
        return sheet.g
    if "g_negated" not in sheet:
        sheet.g_negated = -sheet.g
    return sheet.g_negated


def regularized(sheet: Worksheet) -> Any:
    """Return the gradient, or ``g_total``, which is written, if an L2 penalty's is added to it."""
    g = ascending(sheet)
    if not sheet.get("weight_decay") or sheet.get("decoupled_weight_decay"):
        return g
    sheet.g_total = g + sheet.weight_decay * sheet.weight_before
    return sheet.g_total


def sum_of_parts(sheet: Worksheet) -> Any:
    """Return the sum of those parts of the update that the rule has written."""
    parts = [sheet.written[p] for p in ("decay", "momentum", "fresh") if p in sheet.written]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
