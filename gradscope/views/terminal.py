"""One screen for a terminal."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from gradscope.rules.wording import shortened
from gradscope.run.recording import Recording
from gradscope.views.loop import LoopSummary, severity_mark, summarize

if TYPE_CHECKING:
    from rich.console import RenderableType

_WIDTH = 100


def plain_text(run: Recording) -> str:
    """Return the screen as text without colours, at most 100 columns wide."""
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=_WIDTH, no_color=True, highlight=False, legacy_windows=False).print(
        screen(run)
    )
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def screen(run: Recording) -> RenderableType:
    """Return the screen for a rich console."""
    from rich.console import Group
    from rich.text import Text

    summary = summarize(run)
    parts: list[RenderableType] = [
        Text.assemble(("gradscope ", "bold"), summary.title),
        _verdict(summary),
        *_findings(summary),
        Text(""),
        _lines(summary),
        Text(""),
    ]
    footer = [summary.cost, *summary.checked]
    parts += [Text(line, style="dim") for line in footer if line]
    return Group(*parts)


def _verdict(summary: LoopSummary) -> RenderableType:
    from rich.text import Text

    if summary.healthy:
        return Text(f"✓ {summary.verdict}", style="bold green")
    return Text(f"✗ {summary.verdict}", style="bold red")


def _findings(summary: LoopSummary) -> list[RenderableType]:
    from rich.padding import Padding
    from rich.text import Text

    shown: list[RenderableType] = []
    for finding in summary.findings:
        style = "red" if finding.severity == 2 else "yellow"
        head = Text.assemble(
            (f"{severity_mark(finding)} {finding.code} {finding.name}", f"bold {style}"),
            f"  {finding.severity}",
            f" · {finding.steps}" if finding.steps else "",
            f" · {shortened(finding.file)}:{finding.line}" if finding.file else "",
        )
        shown.append(Padding(head, (1, 0, 0, 2)))
        shown.append(Padding(Text(finding.message), (0, 0, 0, 4)))
        shown.append(Padding(Text.assemble(("fix: ", "bold"), finding.fix), (0, 0, 0, 4)))
    return shown


def _lines(summary: LoopSummary) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for line in summary.lines:
        style = "bold red" if line.findings else "bold cyan"
        purpose = Text(line.purpose, style="dim italic")
        if line.findings:
            purpose.append(f"  ← {', '.join(line.findings)}", style="bold red")
        table.add_row(Text(line.name, style=style), purpose)
        for fact in line.measured:
            table.add_row("", Text(fact))
    return table
