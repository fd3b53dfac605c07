"""One chart: a Bokeh figure without a word of the user's program in it.

Bokeh takes a text between dollar signs for mathematics and can fetch MathJax to set it. So every
name and message stands beside the charts, in HTML; inside there are numbers and codes of rules.
Colours are names of CSS variables, kept in the ``tags`` of each model as a mapping by property, so
that the page can paint itself light or dark.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from bokeh.models import Range1d
    from bokeh.plotting import figure

    from gradscope.rules import Findings

SERIES = ("--series-1", "--series-2", "--series-3", "--series-4", "--series-5", "--series-6")
"""CSS variables of lines; told apart by the colour-blind too."""

_MOST_MARKS = 6


@dataclass(slots=True)
class Line:
    """One line of a chart.

    Attributes:
        label: what it is called beside the chart; may hold a name of the user's program.
        x, y: real[n] each.
        colour: a CSS variable.
        dash: ``solid``, ``dashed`` or ``dotted``.
    """

    label: str
    x: Any
    y: Any
    colour: str
    dash: str = "solid"


@dataclass(slots=True)
class Chart:
    """A figure, and what the page needs to know to put it in its place.

    Attributes:
        key: where on the page it goes.
        title: its heading.
        figure: of Bokeh.
        lines: for the legend and the readout: label, colour, dash, and the name of the source.
        notes: sentences below it.
        pad: of the readout.
    """

    key: str
    title: str
    figure: figure
    lines: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    help: str = ""

    @property
    def spec(self) -> dict[str, Any]:
        """What the page's script reads."""
        return {"key": self.key, "figure": self.figure.id, "lines": self.lines}


def themed(model: Any, **colours: str) -> Any:
    """Let properties of a model follow CSS variables, and return it."""
    known = model.tags[0] if model.tags else {}
    model.tags = [{**known, **colours}]
    return model


def step_range(n_steps: int) -> Range1d:
    """Return the x-range that charts over steps share."""
    from bokeh.models import Range1d

    margin = max(0.5, 0.01 * n_steps)
    ends = (-margin, max(n_steps - 1, 1) + margin)
    return Range1d(*ends, bounds=ends)


def value_range(values: Any, *, log: bool, zero: bool = False) -> tuple[float, float]:
    """Return the ends of a y-axis on which these values have room.

    Args:
        values: what is drawn; at least one is finite.
        log: whether the axis is logarithmic.
        zero: whether it begins at zero.
    """
    known = np.asarray(values, np.float64)
    known = known[np.isfinite(known)]
    low, high = float(known.min()), float(known.max())
    if log:
        # Two powers of ten at least, or their marks would have to be crooked numbers.
        room = max((high / low) ** 0.06, (100 * low / high) ** 0.5)
        return low / room, high * room
    if zero and low >= 0:
        return (0.0, high * 1.15) if high > 0 else (0.0, 1.0)
    room = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    return low - room, high + room


def new_figure(
    x_range: Range1d, y_range: tuple[float, float], *, height: int = 220, log: bool = False
) -> figure:
    """Return an empty figure over steps."""
    from bokeh.models import BoxAnnotation, BoxZoomTool, NumeralTickFormatter, Range1d
    from bokeh.plotting import figure

    box = BoxAnnotation(fill_alpha=0.15, line_alpha=0.6, line_dash="dashed", level="overlay")
    box.visible = False  # until somebody drags
    themed(box, fill_color="--accent", line_color="--accent")
    zoom = BoxZoomTool(dimensions="width", overlay=box)
    drawn = figure(
        x_range=x_range,
        y_axis_type="log" if log else "linear",
        height=height,
        sizing_mode="stretch_width",
        tools=[zoom],
        toolbar_location=None,
        min_border_left=64,
        min_border_right=14,
        min_border_top=8,
        min_border_bottom=30,
        y_range=Range1d(*y_range),
    )
    drawn.toolbar.active_drag = zoom
    themed(
        drawn,
        background_fill_color="--paper",
        border_fill_color="--paper",
        outline_line_color="--rule",
    )
    for axis in drawn.axis:
        axis.minor_tick_line_color = None
        axis.axis_line_color = None
        axis.major_label_text_font = "system-ui, sans-serif"
        axis.major_label_text_font_size = "12px"
        themed(axis, major_label_text_color="--faint", major_tick_line_color="--rule")
    for grid in drawn.grid:
        themed(grid, grid_line_color="--grid")
    drawn.xgrid.visible = False
    drawn.xaxis.formatter = NumeralTickFormatter(format="0,0")
    drawn.xaxis.ticker.min_interval = 1  # there is no half of a step
    drawn.xaxis.ticker.desired_num_ticks = 8
    if not log:
        drawn.yaxis.ticker.desired_num_ticks = 5
    return drawn


def add_lines(chart: Chart, lines: Sequence[Line], *, width: float = 1.6) -> None:
    """Draw lines, and note them for the readout; one that is too short for a line has dots."""
    from bokeh.models import ColumnDataSource

    for line in lines:
        x, y = np.asarray(line.x, np.float64), np.asarray(line.y, np.float64)
        y = np.where(np.isfinite(y), y, np.nan)
        source = ColumnDataSource({"x": x, "y": y.astype(np.float64)})
        drawn = chart.figure.line(
            "x", "y", source=source, line_width=width, line_dash=line.dash, line_join="round"
        )
        themed(drawn.glyph, line_color=line.colour)
        if len(x) <= 40:
            dots = chart.figure.scatter("x", "y", source=source, size=4.5, line_color=None)
            themed(dots.glyph, fill_color=line.colour)
        chart.lines.append(
            {
                "label": line.label,
                "colour": line.colour,
                "dash": line.dash,
                "source": source.id,
            }
        )


def mark_steps(drawn: figure, steps: Sequence[float], colour: str) -> None:
    """Tint the steps at which a value is not finite."""
    if len(steps):
        spans = drawn.vspan(
            x=np.asarray(steps, np.float64), line_width=2, line_alpha=0.35, level="underlay"
        )
        themed(spans.glyph, line_color=colour)


def marks_of(findings: Findings) -> list[dict[str, Any]]:
    """Return the steps at which findings begin, at most six, each with its codes."""
    by_step: dict[int, list[str]] = {}
    for finding in findings:
        if finding.step_first is not None and finding.severity > 0:
            code = re.sub(r"[^A-Za-z0-9]", "", finding.code)[:10]
            by_step.setdefault(int(finding.step_first), []).append(code)
    return [
        {"step": step, "codes": list(dict.fromkeys(codes))}
        for step, codes in sorted(by_step.items())[:_MOST_MARKS]
    ]


def add_marks(drawn: figure, marks: Sequence[Mapping[str, Any]]) -> None:
    """Draw a line with its codes where findings begin."""
    from bokeh.models import Label, Span

    for place, mark in enumerate(marks):
        span = Span(location=mark["step"], dimension="height", line_dash="dashed", line_width=1)
        drawn.add_layout(themed(span, line_color="--bad"))
        codes = mark["codes"]
        label = Label(
            x=mark["step"],
            y=6 + 15 * (place % 4),
            y_units="screen",
            x_offset=4,
            text=codes[0] if len(codes) == 1 else f"{codes[0]} +{len(codes) - 1}",
            text_font="system-ui, sans-serif",
            text_font_size="11px",
            text_font_style="bold",
            background_fill_alpha=0.8,
        )
        drawn.add_layout(themed(label, text_color="--bad", background_fill_color="--paper"))


def wants_log(*values: Any) -> bool:
    """Whether numbers are positive and reach over more than a factor of 30."""
    known = np.concatenate(
        [np.zeros(0), *(np.asarray(each, np.float64).ravel() for each in values)]
    )
    known = known[np.isfinite(known)]
    return bool(len(known)) and bool(known.min() > 0) and bool(known.max() > 30 * known.min())
