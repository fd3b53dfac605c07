"""Figures over recorded steps that the page's script fills: ratios, and the parts of an update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradscope.views.report.chart import SERIES, Chart, new_figure, themed

if TYPE_CHECKING:
    from bokeh.models import Range1d

USUAL_RATIO = 1e-3
"""The guide: about where ratios lie in trainings that go well, a rule of thumb of practice."""


def ratio_chart(data: dict[str, Any], x_range: Range1d) -> Chart:
    """Make the figure of the ratios of all parameters; its lines come from the page's script."""
    from bokeh.models import ColumnDataSource, Span

    low, high = min(data["low"], USUAL_RATIO / 3), max(data["high"], 3 * USUAL_RATIO)
    drawn = new_figure(x_range, (max(low, high * 1e-9) / 1.6, high * 1.6), height=320, log=True)
    lines = ColumnDataSource({"xs": [], "ys": [], "colour": []}, name="ratio-lines")
    drawn.multi_line("xs", "ys", source=lines, line_color="colour", line_width=1.1, line_alpha=0.75)
    one = ColumnDataSource({"x": [], "y": []}, name="ratio-one")
    line = drawn.line("x", "y", source=one, line_width=3)
    themed(line.glyph, line_color="--ink")
    dots = drawn.scatter("x", "y", source=one, size=5, line_color=None)
    themed(dots.glyph, fill_color="--ink")
    guide = Span(location=USUAL_RATIO, dimension="width", line_dash="dashed", line_width=2)
    drawn.add_layout(themed(guide, line_color="--accent"))
    return Chart("ratios", "", drawn)


_ANATOMY: tuple[tuple[str, str, str, tuple[tuple[str, str, str, str], ...]], ...] = (
    (
        "parts",
        "The parts of the update",
        "L2 norms: what weight decay, the momentum from before and this step's gradient each "
        "contribute, and what they come to together.",
        (
            ("update_norm", "update", "--ink", "solid"),
            ("fresh_norm", "fresh gradient", SERIES[0], "solid"),
            ("momentum_norm", "old momentum", SERIES[1], "solid"),
            ("decay_norm", "weight decay", SERIES[2], "solid"),
        ),
    ),
    (
        "state",
        "The optimizer's state, before and after",
        "L2 norms of what the optimizer keeps for this parameter.",
        tuple(
            (f"state{place}_{side}", "", SERIES[place], dash)
            for place in range(3)
            for side, dash in (("before", "dashed"), ("after", "solid"))
        ),
    ),
    (
        "effective",
        "Effective learning rate",
        "What the averaged gradient of each element is multiplied by, lr / (1 - β₁ᵗ) / "
        "(√v̂ + ε) in Adam: the least, mean and greatest over its elements.",
        (
            ("effective_lr_max", "greatest", SERIES[1], "dashed"),
            ("effective_lr_mean", "mean", SERIES[0], "solid"),
            ("effective_lr_min", "least", SERIES[2], "dashed"),
        ),
    ),
    (
        "residual",
        "Residual against the formula",
        "How far the weight moved from where the optimizer's formula says, relative to the "
        "update; storing the weight in its dtype alone may cause as much as the dashed line.",
        (
            ("residual", "residual", SERIES[0], "solid"),
            ("rounding", "rounding may cause", SERIES[1], "dashed"),
        ),
    ),
    (
        "cosine",
        "Directions",
        "Cosines: of the update with the downhill direction (-gradient), and of the momentum "
        "from before with the new gradient. Near 1 they agree, near -1 they oppose.",
        (
            ("update_gradient_cosine", "update with -gradient", SERIES[0], "solid"),
            ("momentum_gradient_cosine", "old momentum with gradient", SERIES[1], "solid"),
        ),
    ),
)


def anatomy_charts(values: dict[str, Any], x_range: Range1d) -> list[Chart]:
    """Make the figures of the anatomy, as far as something is known for them.

    Args:
        values: packed numbers by quantity, as :func:`anatomy` gives them.
        x_range: over the steps.
    """
    from bokeh.models import ColumnDataSource, Span

    charts = []
    for key, title, text, lines in _ANATOMY:
        known = [line for line in lines if line[0] in values]
        if not known:
            continue
        log = key != "cosine"
        ends = (0.1, 1.0) if log else (-1.08, 1.08)
        chart = Chart(
            f"anatomy-{key}",
            title,
            new_figure(x_range, ends, height=210, log=log),
            help=text,
        )
        if not log:
            zero = Span(location=0, dimension="width", line_width=1)
            chart.figure.add_layout(themed(zero, line_color="--edge"))
        for quantity, label, colour, dash in known:
            source = ColumnDataSource({"x": [], "y": []})
            line = chart.figure.line("x", "y", source=source, line_width=1.8, line_dash=dash)
            dots = chart.figure.scatter("x", "y", source=source, size=4.5, line_color=None)
            themed(line.glyph, line_color=colour)
            themed(dots.glyph, fill_color=colour)
            chart.lines.append(
                {
                    "label": label,
                    "colour": colour,
                    "dash": dash,
                    "source": source.id,
                    "quantity": quantity,
                }
            )
        charts.append(chart)
    return charts
