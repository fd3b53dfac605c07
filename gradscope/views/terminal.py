"""One screen for a terminal."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from gradscope.rules import Finding, Findings, Severity
from gradscope.rules.wording import shortened
from gradscope.run.recording import Recording
from gradscope.views.loop import LoopSummary, evidence_text, severity_mark, summarize

if TYPE_CHECKING:
    from rich.console import RenderableType

_WIDTH = 100

_MOST_EVIDENCE = 6
"""How many facts stand under a finding; all of them are in ``evidence``."""


def plain_text(run: Recording, findings: Findings | None = None) -> str:
    """Return the screen as text without colours, at most 100 columns wide."""
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=_WIDTH, no_color=True, highlight=False, legacy_windows=False).print(
        screen(run, findings)
    )
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def screen(
    run: Recording, findings: Findings | None = None, shows: Severity = Severity.WARNING
) -> RenderableType:
    """Return the screen for a rich console.

    Args:
        run: what was recorded.
        findings: of it; those of all rules by default.
        shows: the least severity that is shown.
    """
    from rich.console import Group
    from rich.text import Text

    summary = summarize(run, findings, shows)
    parts: list[RenderableType] = [
        Text.assemble(("gradscope ", "bold"), summary.title),
        _verdict(summary),
        *_findings(summary),
        Text(""),
        _lines(summary),
        Text(""),
    ]
    footer = [summary.hidden, *summary.checked, summary.cost]
    parts += [Text(line, style="dim") for line in footer if line]
    return Group(*parts)


def _verdict(summary: LoopSummary) -> RenderableType:
    from rich.text import Text

    style = {"✓": "bold green", "–": "bold", "✗": "bold red"}[summary.mark]
    return Text(f"{summary.mark} {summary.verdict}", style=style)


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
        if finding.evidence:
            shown.append(Padding(_evidence(finding), (0, 0, 0, 4)))
        if finding.symptoms:
            # What it explains is told by its code alone: one cause, one text to read.
            codes = ", ".join(dict.fromkeys(each.split(":")[0] for each in finding.symptoms))
            shown.append(Padding(Text(f"explains: {codes}", style="dim"), (0, 0, 0, 4)))
    return shown


def _evidence(finding: Finding) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    facts = list(finding.evidence.items())[:_MOST_EVIDENCE]
    labels = [Text(str(name).replace("_", " "), style="dim") for name, _ in facts]
    table = Table.grid(padding=(0, 2))
    # Without a least width, a long value takes the room of the labels in a narrow window.
    table.add_column(no_wrap=True, min_width=max(label.cell_len for label in labels))
    table.add_column(no_wrap=True, overflow="ellipsis")
    for label, (_, value) in zip(labels, facts, strict=True):
        table.add_row(label, Text(evidence_text(value), style="dim"))
    return table


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
