"""The heat map of gradients: a figure of one picture, and what its colours say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from gradscope.graphs.theme import between
from gradscope.views.report.chart import Chart, new_figure, themed
from gradscope.views.report.gradient_flow import LEVELS, PLAIN, SCALES, GradientFlow
from gradscope.views.report.names import shown
from gradscope.views.report.packing import packed, packed_bytes

if TYPE_CHECKING:
    from bokeh.models import Range1d

_CLEAR = "#00000000"

# Told apart by the colour-blind: cividis for what is as it should be, and ramps of one hue that
# grow lighter likewise for what is not.
_RAMPS: Final = {
    "compounded": ("#5a1e00", "#d55e00", "#ffb366"),
    "stale": ("#4b0f45", "#c2569f", "#f5b6dd"),
    "assigned": ("#003d2b", "#009e73", "#8fe3c4"),
}
_COLOURS: Final = {"zeroed": "#56b4e9", "none": _CLEAR, "nonfinite": "#ff1744"}

WORDS: Final = {
    "fresh": "fresh: written once since the last step",
    "accumulated": "accumulated: written several times since",
    "compounded": "compounded: an earlier step has used a part of it already",
    "stale": "stale: an earlier step has used it, and nothing was written since",
    "assigned": "assigned: put there by the program",
    "zeroed": "zeroed: cleared to zero and not written since",
    "none": "none: no gradient, or no step of its optimizer",
    "nonfinite": "NaN or infinite elements",
}


def palette() -> list[str]:
    """Return the colour of each code: a scale for each of ``SCALES``, one for each of ``PLAIN``."""
    from bokeh.palettes import cividis

    colours: list[str] = []
    for status in SCALES:
        if status in _RAMPS:
            dark, middle, light = _RAMPS[status]
            half = LEVELS // 2
            colours += [between(dark, middle, at / (half - 1)) for at in range(half)]
            colours += [between(middle, light, at / (half - 1)) for at in range(half)]
        else:
            colours += cividis(LEVELS)
    return colours + [_COLOURS[status] for status in PLAIN]


def row_height(n_rows: int) -> int:
    """Return how many pixels a row is high: with a name of its own where there are few."""
    if n_rows <= 60:
        return 14
    return 7 if n_rows <= 110 else 5


def flow_chart(flow: GradientFlow, x_range: Range1d) -> Chart:
    """Make the figure; names of rows stand beside it, in HTML."""
    from bokeh.models import BoxAnnotation, LinearColorMapper

    n_rows = len(flow.rows)
    height = row_height(n_rows) * n_rows + 34
    drawn = new_figure(x_range, (n_rows - 0.5, -0.5), height=height)
    drawn.min_border_top, drawn.min_border_left = 2, 12
    drawn.min_border_right = 16
    drawn.yaxis.visible = drawn.ygrid.visible = False
    drawn.outline_line_color = None
    edges = flow.columns.astype(np.float64) - 0.5
    hatched = BoxAnnotation(
        left=edges[0],
        right=edges[-1],
        hatch_pattern="right_diagonal_line",
        hatch_scale=7,
        hatch_weight=0.7,
        fill_color=None,
        line_color=None,
        level="underlay",
    )
    drawn.add_layout(themed(hatched, hatch_color="--rule"))
    colours = palette()
    mapper = LinearColorMapper(palette=colours, low=-0.5, high=len(colours) - 0.5)
    drawn.image(
        image=[flow.code],
        x=edges[0],
        y=-0.5,
        dw=edges[-1] - edges[0],
        dh=n_rows,
        color_mapper=mapper,
        level="glyph",
    )
    return Chart("flow", "", drawn)


def flow_data(flow: GradientFlow) -> dict[str, Any]:
    """Return what the page's script tells of a cell, and the legend."""
    colours = palette()
    legend: list[dict[str, Any]] = []
    for status in flow.seen:
        words = WORDS[status]
        if status in SCALES:
            start = SCALES.index(status) * LEVELS
            scale = [*colours[start : start + LEVELS : 4], colours[start + LEVELS - 1]]
        else:
            scale = [_COLOURS[status]]
        # Two names of what is as it should be, in one line.
        if status == "accumulated" and "fresh" in flow.seen:
            legend[0]["words"] = f"{WORDS['fresh']}; {words}"
            continue
        legend.append({"status": status, "words": words, "scale": scale})
    height = row_height(len(flow.rows))
    return {
        "rows": [shown(name) for name in flow.rows],
        "labels": _labels(flow.rows, height),
        "row_height": height,
        "edges": flow.columns.tolist(),
        "norm": packed(flow.norm),
        "status": packed_bytes(flow.status),
        "statuses": [*SCALES, *PLAIN],
        "legend": legend,
        "low": flow.low,
        "high": flow.high,
    }


def _labels(rows: list[str], height: int) -> list[dict[str, Any]]:
    """Names of rows, or of stretches of rows that share the beginning of theirs."""
    if height >= 14:
        return [{"row": row, "rows": 1, "text": shown(name)} for row, name in enumerate(rows)]
    room = 14 / height
    for depth in range(6, 0, -1):
        stretches: list[dict[str, Any]] = []
        for row, name in enumerate(rows):
            text = ".".join(name.split(".")[:depth])
            if stretches and stretches[-1]["text"] == text:
                stretches[-1]["rows"] += 1
            else:
                stretches.append({"row": row, "rows": 1, "text": text})
        if sum(each["rows"] >= room for each in stretches) >= 0.5 * len(stretches):
            break
    if len(stretches) < len(rows) / 40:  # one name for nearly all says nothing
        stretches = [{"row": row, "rows": 1, "text": name} for row, name in enumerate(rows)]
    kept: list[dict[str, Any]] = []
    # A name needs its room: those of long stretches come first, the readout has the others.
    for each in sorted(stretches, key=lambda each: -each["rows"]):
        middle = each["row"] + each["rows"] / 2
        if all(abs(middle - other["row"] - other["rows"] / 2) >= room for other in kept):
            kept.append(each | {"text": shown(each["text"])})
    return sorted(kept, key=lambda each: int(each["row"]))
