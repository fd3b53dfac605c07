"""The gradients of all parameters at all steps, as a picture of few rows and columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from gradscope.rules.facts import first_unread
from gradscope.views.report.forward_order import forward_order
from gradscope.views.report.texts import coded_texts
from gradscope.views.report.thinning import bins_of

if TYPE_CHECKING:
    from gradscope.run.recording import Recording

MOST_ROWS = 160
MOST_COLUMNS = 480
LEVELS = 32
"""How many colours a scale of norms has."""

SCALES: Final = ("fresh", "accumulated", "compounded", "stale", "assigned")
"""Statuses whose norm is told by a scale of colours of their own."""

PLAIN: Final = ("zeroed", "none", "nonfinite")
"""What has one colour, whatever the norm."""

# Of several in one cell the one is told that a reader should know of.
_RANK: Final = (
    "none",
    "fresh",
    "accumulated",
    "zeroed",
    "assigned",
    "stale",
    "compounded",
    "nonfinite",
)


@dataclass(slots=True)
class GradientFlow:
    """The picture, from the input (row 0) to the loss, and from the first step to the last.

    Attributes:
        rows: what each row stands for: the name of a parameter, or a module and how many.
        columns: int64[c + 1], the steps of column i go from entry i up to before entry i + 1.
        norm: real[r, c], the greatest norm in the cell, of a module that of all its parameters
            together; NaN where there is none.
        status: uint8[r, c], index into ``SCALES + PLAIN``; 255 where no step read a gradient.
        code: uint8[r, c], number of the colour.
        low, high: ends of the scale of colours, as logarithms to the base 10.
        seen: the statuses that occur.
        in_forward_order: whether a captured graph told the order of the rows.
        bundled: how many parameters were drawn together by module; 0 if each has its own row.
    """

    rows: list[str]
    columns: npt.NDArray[np.int64]
    norm: npt.NDArray[np.float64]
    status: npt.NDArray[np.uint8]
    code: npt.NDArray[np.uint8]
    low: float
    high: float
    seen: tuple[str, ...]
    in_forward_order: bool
    bundled: int


def gradient_flow(run: Recording) -> GradientFlow | None:
    """Sum up the table ``grads``; None if it has no row."""
    grads = run.rows("grads")
    if not grads.n_rows:
        return None
    order, told = forward_order(run)
    read = np.unique(grads.array("param"))
    order = [number for number in order if number in set(read.tolist())]
    rows, row_of = _rows(run, order)
    columns = bins_of(run.n_steps, MOST_COLUMNS)
    step = grads.array("step")
    cell_row = row_of[grads.array("param")]
    cell_column = np.searchsorted(columns, step, side="right") - 1
    rank = _ranks(grads, first_unread(run))
    shape = (len(rows), len(columns) - 1)
    worst = np.full(shape, -1, np.int16)
    np.maximum.at(worst, (cell_row, cell_column), rank)
    norm = _norms(cell_row, step, cell_column, grads.array("norm"), len(rows), run.n_steps, shape)
    names = SCALES + PLAIN
    as_status = np.array([names.index(name) for name in _RANK] + [255], np.uint8)
    status = as_status[worst]
    low, high = _ends(norm)
    seen = tuple(name for number, name in enumerate(names) if (status == number).any())
    bundled = len(order) if len(rows) < len(order) else 0
    code = _codes(status, norm, low, high)
    return GradientFlow(rows, columns, norm, status, code, low, high, seen, told, bundled)


def _ranks(grads: Any, unread: int) -> npt.NDArray[np.int16]:
    codes, texts = coded_texts(grads, "status")
    rank_of = np.array([_RANK.index(text) if text in _RANK else 0 for text in texts], np.int16)
    ranks: npt.NDArray[np.int16] = rank_of[codes]
    nonfinite = (grads.array("nonfinite") > 0) | np.isinf(grads.array("norm"))
    was_read = grads.array("step") < unread
    nonfinite |= np.isnan(grads.array("norm")) & was_read & (ranks != _RANK.index("none"))
    ranks[nonfinite] = _RANK.index("nonfinite")
    return ranks


def _norms(
    row: Any, step: Any, column: Any, norm: Any, n_rows: int, n_steps: int, shape: tuple[int, int]
) -> npt.NDArray[np.float64]:
    """The norm of a row's parameters together at each step, and of these the greatest."""
    known = np.isfinite(norm)
    place = row[known] * n_steps + step[known]
    cells, first, inverse = np.unique(place, return_index=True, return_inverse=True)
    together = np.sqrt(np.bincount(inverse, norm[known].astype(np.float64) ** 2, len(cells)))
    greatest = np.full(shape, -1.0)
    np.maximum.at(greatest, (row[known][first], column[known][first]), together)
    greatest[greatest < 0] = np.nan
    return greatest


def _ends(norm: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The ends of the scale: all but the outermost thousandth of the norms lie between them."""
    positive = norm[norm > 0]
    if not len(positive):
        return -1.0, 0.0
    low, high = np.quantile(np.log10(positive), (0.001, 0.999))
    return (float(low), float(high)) if high > low else (float(low) - 0.5, float(low) + 0.5)


def _codes(
    status: npt.NDArray[np.uint8], norm: npt.NDArray[np.float64], low: float, high: float
) -> npt.NDArray[np.uint8]:
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (np.log10(norm) - low) / (high - low)
    share = np.nan_to_num(share, nan=0.0, posinf=1.0, neginf=0.0)
    level = np.clip(np.rint(share * (LEVELS - 1)), 0, LEVELS - 1).astype(np.int64)
    code = status.astype(np.int64) * LEVELS + level
    for place, name in enumerate(PLAIN):
        code[status == len(SCALES) + place] = len(SCALES) * LEVELS + PLAIN.index(name)
    # No step of its optimizer read it there: the same colour as no gradient.
    code[status == 255] = len(SCALES) * LEVELS + PLAIN.index("none")
    return code.astype(np.uint8)


def _rows(run: Recording, order: list[int]) -> tuple[list[str], npt.NDArray[np.int64]]:
    """What each row is called, and the row of each parameter."""
    labels = [run.parameters[number].name for number in order]
    depth = max((run.parameters[number].module.count(".") for number in order), default=0) + 1
    if len(order) > MOST_ROWS:
        for levels in range(depth, -1, -1):
            labels = [_bundle(run.parameters[number].module, levels) for number in order]
            if len(set(labels)) <= MOST_ROWS:
                break
    row_of = np.zeros(len(run.parameters), np.int64)
    if len(order) <= MOST_ROWS:
        row_of[order] = np.arange(len(order))
        return labels, row_of
    places: dict[str, int] = {}
    counts: dict[str, int] = {}
    for number, label in zip(order, labels, strict=True):
        row_of[number] = places.setdefault(label, len(places))
        counts[label] = counts.get(label, 0) + 1
    return [f"{label or 'the model'} ({counts[label]})" for label in places], row_of


def _bundle(module: str, levels: int) -> str:
    return ".".join(module.split(".")[:levels])
