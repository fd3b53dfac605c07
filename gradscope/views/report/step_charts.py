"""Loss, learning rate and gradient norm over steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gradscope.views.report.chart import (
    SERIES,
    Chart,
    Line,
    add_lines,
    add_marks,
    mark_steps,
    new_figure,
    value_range,
    wants_log,
)
from gradscope.views.report.names import shown
from gradscope.views.report.thinning import thinned_rows

if TYPE_CHECKING:
    import pandas as pd
    from bokeh.models import Range1d

    from gradscope.run.recording import Recording

MOST_POINTS = 1200
"""About how many points a line has: more than a screen has columns."""


def step_charts(
    run: Recording, x_range: Range1d, marks: Sequence[dict[str, Any]]
) -> tuple[list[Chart], list[str]]:
    """Make the charts for which something is known.

    Returns:
        the charts, and a sentence for each that there is not.
    """
    steps = run.frame("steps")
    if steps.empty:
        return [], []
    charts, missing = [], []
    for made in (_loss(steps, x_range), _rates(run, x_range), _norms(steps, x_range)):
        if isinstance(made, str):
            missing.append(made)
        else:
            add_marks(made.figure, marks)
            charts.append(made)
    return charts, missing


def _loss(steps: pd.DataFrame, x_range: Range1d) -> Chart | str:
    rows = steps.loc[steps["n_backward"] > 0]
    finite = np.isfinite(rows["loss"].to_numpy(np.float64))
    if not finite.any():
        return (
            "No loss to draw: it was NaN, infinite or no single number at every step."
            if len(rows)
            else "No loss to draw: no step had a backward of its own."
        )
    lines = [
        _thinned(Line(_label("loss", name, steps), own["step"], own["loss"], colour))
        for name, own, colour in _by_optimizer(rows)
    ]
    chart = _drawn("loss", "Loss", lines, x_range)
    unknown = rows.loc[~finite, "step"].to_numpy()
    if len(unknown):
        mark_steps(chart.figure, unknown[:2000], "--bad")
        chart.notes.append(
            f"NaN, infinite or no single number at {len(unknown):,} of {len(rows):,} steps, "
            f"the first of them {unknown[0]:,}: marked in red."
        )
    return chart


def _rates(run: Recording, x_range: Range1d) -> Chart | str:
    from bokeh.models import BasicTickFormatter

    groups = run.frame("groups")
    if not np.isfinite(groups["lr"].to_numpy(np.float64)).any():
        return "No learning rate to draw: no parameter group has one."
    courses: dict[bytes, tuple[list[str], Any, Any]] = {}
    several = groups["optimizer"].nunique() > 1
    for (name, group), own in groups.groupby(["optimizer", "group"], sort=False):
        label = f"group {group}" + (f" of {shown(name, 40)}" if several else "")
        x, y = own["step"].to_numpy(np.float64), own["lr"].to_numpy(np.float64)
        # Groups that share a schedule are one line.
        courses.setdefault(x.tobytes() + y.tobytes(), ([], x, y))[0].append(label)
    lines = []
    for place, (labels, x, y) in enumerate(list(courses.values())[:12]):
        alone = len(courses) == 1
        name = "learning rate" if alone else _listed(labels)
        dash = ("solid", "dashed")[place // len(SERIES) % 2]
        lines.append(_thinned(Line(name, x, y, SERIES[place % len(SERIES)], dash)))
    chart = _drawn("lr", "Learning rate", lines, x_range, height=150)
    if chart.figure.yaxis.ticker.__class__.__name__ != "LogTicker":
        chart.figure.yaxis.formatter = BasicTickFormatter(power_limit_low=-6)
        chart.figure.yaxis.ticker.desired_num_ticks = 3
    if len(courses) > 12:
        chart.notes.append(
            f"12 of {len(courses)} different schedules are drawn; all are in `groups`."
        )
    return chart


def _norms(steps: pd.DataFrame, x_range: Range1d) -> Chart | str:
    finite = np.isfinite(steps["grad_norm"].to_numpy(np.float64))
    if not (finite & (steps["grad_norm"] > 0)).any():
        return "No gradient norm to draw: it was never a positive number."
    lines = []
    for name, own, colour in _by_optimizer(steps):
        before = own["grad_norm_before_clipping"].to_numpy(np.float64)
        after = _label("gradient norm", name, steps)
        if np.isfinite(before).any():
            lines.append(
                _thinned(Line(f"{after}, before clipping", own["step"], before, colour, "dashed"))
            )
            after = f"{after}, after clipping"
        lines.append(_thinned(Line(after, own["step"], own["grad_norm"], colour)))
    chart = _drawn("norm", "Gradient norm", lines, x_range)
    unknown = steps.loc[~finite, "step"].to_numpy()
    if len(unknown):
        mark_steps(chart.figure, unknown[:2000], "--bad")
        chart.notes.append(
            f"Not finite at {len(unknown):,} of {len(steps):,} steps, the first of them "
            f"{unknown[0]:,}: marked in red."
        )
    return chart


def _drawn(key: str, title: str, lines: list[Line], x_range: Range1d, height: int = 220) -> Chart:
    # A schedule that ends at nearly zero is no reason for logarithms; groups far apart are one.
    log = wants_log(*(np.nanmax(line.y) if key == "lr" else line.y for line in lines))
    log = log and wants_log(*(line.y for line in lines))
    values = np.concatenate([line.y for line in lines])
    ends = value_range(values, log=log, zero=key == "lr")
    chart = Chart(key, title, new_figure(x_range, ends, height=height, log=log))
    if log:
        chart.notes.append("Logarithmic scale.")
    add_lines(chart, lines)
    return chart


def _thinned(line: Line) -> Line:
    x, y = np.asarray(line.x, np.float64), np.asarray(line.y, np.float64)
    rows = thinned_rows([y], MOST_POINTS)
    return Line(line.label, x[rows], y[rows], line.colour, line.dash)


def _by_optimizer(steps: pd.DataFrame) -> list[tuple[str, pd.DataFrame, str]]:
    return [
        (str(name), own, SERIES[place % len(SERIES)])
        for place, (name, own) in enumerate(steps.groupby("optimizer", sort=False))
    ]


def _label(what: str, optimizer: str, steps: pd.DataFrame) -> str:
    return f"{what} of {shown(optimizer, 40)}" if steps["optimizer"].nunique() > 1 else what


def _listed(labels: list[str]) -> str:
    return ", ".join(labels[:4]) + (f" and {len(labels) - 4} more" if len(labels) > 4 else "")
