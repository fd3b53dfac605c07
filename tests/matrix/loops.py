"""All cells of one loop, in a process of its own."""

from __future__ import annotations

import traceback
import warnings

import torch
from cell import run
from cells import CELLS


def run_feature(title: str) -> list[list[str]]:
    """Run all cells of a loop.

    Returns:
        Of each cell its optimizer, its verdict and the detail: a traceback for ``failed``.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = []
    for cell in CELLS:
        if cell.feature.title != title:
            continue
        try:
            outcome = run(cell)
            results.append([str(cell.kind), outcome.verdict, outcome.detail])
        except Exception:
            results.append([str(cell.kind), "failed", traceback.format_exc()])
    return results
