"""Puts the page together: template, style, scripts, charts and data in one file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from gradscope._version import __version__
from gradscope.errors import GradscopeError, OutputExistsError, RenderError, UsageError
from gradscope.graphs.explorer import as_json, content_source, explorer_page, explorer_script
from gradscope.graphs.theme import THEMES
from gradscope.rules import Findings, Severity, diagnose
from gradscope.views import explanation_html
from gradscope.views.explain import explain
from gradscope.views.explanation import Explanation
from gradscope.views.graph_facts import graph_facts
from gradscope.views.loop import summarize
from gradscope.views.report import contents
from gradscope.views.report.chart import Chart, marks_of, step_range
from gradscope.views.report.flow_chart import flow_chart, flow_data
from gradscope.views.report.gradient_flow import MOST_COLUMNS, GradientFlow, gradient_flow
from gradscope.views.report.names import scientific, shown
from gradscope.views.report.step_charts import step_charts
from gradscope.views.report.update_charts import anatomy_charts, ratio_chart
from gradscope.views.report.updates import anatomy, update_ratios

if TYPE_CHECKING:
    from gradscope.run.recording import Recording

_ASSETS: Final = Path(__file__).with_name("assets")

_MOST_GRAPH = 1_000_000
"""How many characters the page of the graph may have to be a part of this one."""


def write_report(page: str, path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write a page, whole or not at all.

    Args:
        page: as :func:`report_page` makes it.
        path: where to.
        force: whether a file that is there is overwritten.

    Returns:
        The path of the file.

    Raises:
        OutputExistsError: if the file is there already, and ``force`` is not set.
        UsageError: if the path is a folder, or its folder is not there.
        OSError: if it cannot be written; what was there before stays.
    """
    path = checked_output(path, force=force)
    # A name of its own first: a disk that is full leaves no half of a page.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(page.encode("utf-8", "replace"))
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    return path


def checked_output(path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Return the path if a page may be written there; raises as :func:`write_report`."""
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file in it, such as {path / 'report.html'}")
    if path.exists() and not force:
        raise OutputExistsError(
            f"the file {path} exists already; overwrite it with force=True, or name another"
        )
    if not path.parent.is_dir():
        raise UsageError(f"the folder {path.parent} does not exist; make it, or name another")
    return path


def report_page(
    run: Recording, findings: Findings | None = None, about: Mapping[str, str] | None = None
) -> str:
    """Make the page of a run.

    Args:
        run: what was recorded.
        findings: of it; those of all rules by default.
        about: what else to say of where it was recorded, by name: versions, the device.

    Returns:
        HTML that asks nothing of any other file or machine.
    """
    import jinja2
    from markupsafe import Markup

    findings = diagnose(run) if findings is None else findings
    summary = summarize(run, findings)
    charts, data = _charts_and_data(run, findings)
    graph = _graph(run, findings)
    data["graph"] = graph["page"]
    rows, n_more = contents.parameter_rows(run)
    scripts = [_bokeh(), _asset("report.js")]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_asset("report.html")).render(
        summary=summary,
        title=shown(summary.title, 200),
        verdict=shown(summary.verdict, 300),
        words=contents.verdict_in_words(run, summary, findings),
        lines=_lines(summary.lines),
        tiles=contents.tiles(run, summary),
        findings=contents.shown_findings(findings),
        counts=_counts(findings),
        charts=charts,
        data=Markup(as_json(data)),
        graph=graph,
        example=_worked_example(run),
        parameters=rows,
        one_dtype=rows[0]["dtype"] if len({row["dtype"] for row in rows}) == 1 else "",
        n_more_parameters=n_more,
        checked=contents.checked(run, findings),
        costs=contents.cost_rows(run),
        cost=summary.cost,
        about={"gradscope": __version__, "charts": f"Bokeh {_bokeh_version()}", **(about or {})},
        policy=_policy(scripts),
        style=Markup(_colours() + _asset("report.css")),
        scripts=[Markup(script) for script in scripts],
    )


def _charts_and_data(run: Recording, findings: Findings) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the template says about charts, and what the page's script draws them from."""
    from bokeh.document import Document

    x_range = step_range(run.n_steps)
    marks = marks_of(findings)
    over_steps, missing = step_charts(run, x_range, marks)
    flow, ratios, parts = gradient_flow(run), update_ratios(run), anatomy(run)
    told: dict[str, Any] = {
        "steps": over_steps,
        "missing": missing,
        "marks": marks,
        "n_steps": run.n_steps,
        "flow": None,
        "ratios": None,
        "anatomy": [],
        "params": [param["name"] for param in parts["params"]] if parts else [],
        "n_recorded": parts["n_recorded"] if parts else 0,
        "takes_turns": parts["takes_turns"] if parts else False,
        "n_shown": len(parts["steps"]) if parts else 0,
        "n_params": parts["n_params"] if parts else 0,
        "formula_missing": parts is not None and "residual" not in parts["values"],
    }
    data: dict[str, Any] = {"anatomy": parts, "ratios": ratios, "flow": None}
    if flow is not None:
        told["flow"] = _drawn(flow_chart(flow, x_range), notes=_about_flow(flow))
        data["flow"] = cells = flow_data(flow)
        told["legend"] = cells["legend"]
        told["ends"] = (scientific(10**flow.low), scientific(10**flow.high))
    if ratios is not None:
        told["ratios"] = ratio_chart(ratios, x_range)
    if parts is not None:
        told["anatomy"] = anatomy_charts(parts["values"], x_range)
    between = [chart for chart in (told["flow"], told["ratios"]) if chart is not None]
    charts = [*over_steps, *between, *told["anatomy"]]  # from top to bottom, as they are drawn
    document = Document()
    for chart in charts:
        document.add_root(chart.figure)
    data["document"] = document.to_json(deferred=False) if charts else None
    data["charts"] = [chart.spec for chart in charts]
    data["x_range"] = x_range.id
    return told, data


def _drawn(chart: Chart, notes: list[str]) -> Chart:
    chart.notes += notes
    return chart


def _about_flow(flow: GradientFlow) -> list[str]:
    notes = []
    length = int(flow.columns[1] - flow.columns[0])
    if length > 1:
        notes.append(
            f"Each column stands for {length} steps (more than {MOST_COLUMNS} columns could not be "
            "told apart): the greatest norm, and the status that matters most."
        )
    if flow.bundled:
        notes.append(
            f"{flow.bundled:,} parameters are too many for rows of their own: each row is a module "
            "with as many of them as stand in parentheses, its norm that of all together."
        )
    if not flow.in_forward_order:
        notes.append(
            "No graph was captured, so the rows are in the order in which the model registered "
            "its parameters."
        )
    return notes


def _graph(run: Recording, findings: Findings) -> dict[str, Any]:
    """The page of the last captured graph, or why there is none."""
    if not run.graphs:
        why = (
            "No graph was captured. That happens at the first step, once backward has run and the "
            "optimizer has stepped; watch(graph=…) asks for other steps."
        )
        return {"page": None, "why": why, "step": None}
    step = max(run.graphs)
    try:
        page = explorer_page(run.graphs[step], step=step, facts=graph_facts(run, findings, step))
    except RenderError as error:
        return {"page": None, "why": f"The graph could not be laid out: {error}", "step": step}
    if len(page) > _MOST_GRAPH:
        why = (
            f"The graph of step {step} is too large to be a part of this page: "
            f"scope.graph({step}).render('graph.html') writes a page of its own."
        )
        return {"page": None, "why": why, "step": step}
    return {"page": page, "why": "", "step": step}


def _worked_example(run: Recording) -> dict[str, Any] | None:
    """One weight's last recorded step with every number, if any weight is tracked."""
    from markupsafe import Markup

    for step in sorted(run.tracked, reverse=True):
        tracked = run.tracked[step]
        values = tracked.values
        has_moved = values.get("weight_before") != values.get("weight_after")
        has_moved = has_moved & (tracked.run >= 0)
        numels = np.array([run.parameters[param].numel for param in tracked.param.tolist()])
        # A weight from the middle of a large parameter moves as most weights do.
        for at in np.argsort(-numels * has_moved, kind="stable").tolist()[8:9] or [0]:
            if at >= len(tracked.param):
                continue
            entry = run.parameters[int(tracked.param[at])]
            shape = (*entry.shape, 2) if entry.dtype.startswith("complex") else entry.shape
            index = _index_of(int(tracked.position[at]), shape)
            try:
                told = explain(run, entry.name, index, step, lambda *_: None)
            except GradscopeError:
                continue
            if not isinstance(told, Explanation):
                continue
            told.param, told.optimizer, told.optimizer_kind = (
                shown(name, 60) for name in (told.param, told.optimizer, told.optimizer_kind)
            )
            place = ", ".join(map(str, index))
            return {
                "where": f"{shown(entry.name)}[{place}]",
                "step": step,
                "html": Markup(explanation_html.html(told)),
            }
    return None


def _index_of(position: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index: list[int] = []
    for size in reversed(shape):
        position, place = divmod(position, size)
        index.insert(0, place)
    return tuple(index)


def _lines(lines: Any) -> list[dict[str, Any]]:
    return [
        {
            "name": line.name,
            "purpose": line.purpose,
            "measured": [shown(fact, 1000) for fact in line.measured if fact],
            "findings": [shown(code, 20) for code in dict.fromkeys(line.findings)],
        }
        for line in lines
    ]


def _counts(findings: Findings) -> str:
    words = (("error", Severity.ERROR), ("warning", Severity.WARNING), ("note", Severity.INFO))
    counts = [(sum(f.severity == severity for f in findings), word) for word, severity in words]
    return ", ".join(f"{n} {word}{'' if n == 1 else 's'}" for n, word in counts if n)


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _bokeh() -> str:
    """The core of BokehJS: neither its widgets and tables nor its mathematics."""
    from bokeh.resources import Resources

    (script,) = Resources(mode="inline", components=["bokeh"]).js_raw[:1]
    return str(script).replace("</script", "<\\/script")


def _bokeh_version() -> str:
    import bokeh

    return str(bokeh.__version__)


def _policy(scripts: list[str]) -> str:
    """A Content-Security-Policy that lets these scripts run and the graph's, and nothing load.

    Bokeh writes styles of its own, and the styles of pictures that it carries are addresses of
    data; neither can reach anybody.
    """
    allowed = " ".join(content_source(script) for script in (*scripts, explorer_script()))
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _colours() -> str:
    """The colours that the page shares with pictures of graphs, as CSS variables."""
    light, dark = (
        f"--paper:{theme.paper};--ink:{theme.ink};--faint:{theme.faint};--edge:{theme.edge};"
        f"--raised:{theme.frames[0]};--sunken:{theme.frames[1]};--rule:{theme.frame_line};"
        f"--accent:{theme.parameter.line};--accent-fill:{theme.parameter.fill};--bad:{theme.cut};"
        f"--bad-fill:{theme.missing.fill};--good:{theme.root.line};--good-fill:{theme.root.fill};"
        f"--warn:{theme.leaf.line};--warn-fill:{theme.leaf.fill};"
        for theme in (THEMES["light"], THEMES["dark"])
    )
    light += (
        "--grid:#e6ebf0;--series-1:#0b66b0;--series-2:#c8500a;--series-3:#00805c;"
        "--series-4:#a8407f;--series-5:#7a6a00;--series-6:#4b5563;"
    )
    dark += (
        "--grid:#28323d;--series-1:#62b0f0;--series-2:#f09a4a;--series-3:#3fd1a4;"
        "--series-4:#e58fc6;--series-5:#e0cf5a;--series-6:#b6c0cc;"
    )
    return (
        f":root{{color-scheme:light;{light}}}\n"
        f":root[data-theme=dark]{{color-scheme:dark;{dark}}}\n"
        "@media (prefers-color-scheme:dark){"
        f":root:not([data-theme=light]){{color-scheme:dark;{dark}}}}}\n"
        f"@media print{{:root,:root[data-theme]{{color-scheme:light;{light}}}}}\n"
    )
