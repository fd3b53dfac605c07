"""One screen for a notebook: the same facts as in the terminal, as a small piece of HTML."""

from __future__ import annotations

from html import escape

from gradscope.rules import Findings
from gradscope.rules.wording import shortened
from gradscope.run.recording import Recording
from gradscope.views.loop import summarize

# Colours that read on light and on dark backgrounds; the rest is the notebook's own.
_GOOD, _BAD = "#2e9e5b", "#d9534f"


def html(run: Recording, findings: Findings | None = None) -> str:
    """Return a self-contained fragment; everything from the user's program is escaped.

    Args:
        run: what was recorded.
        findings: of it; those of all rules by default.
    """
    summary = summarize(run, findings)
    colour = {"✓": _GOOD, "✗": _BAD}.get(summary.mark, "inherit")
    verdict = escape(f"{summary.mark} {summary.verdict}")
    parts = [
        "<div style='font-size:90%;line-height:1.5;max-width:70em'>",
        f"<div><b>gradscope</b> {escape(summary.title)}</div>",
        f"<div style='color:{colour};font-weight:bold'>{verdict}</div>",
    ]
    for finding in summary.findings:
        where = f" · {shortened(finding.file)}:{finding.line}" if finding.file else ""
        steps = f" · {finding.steps}" if finding.steps else ""
        parts.append(
            f"<div style='border-left:3px solid {_BAD};padding-left:.7em;margin:.5em 0'>"
            f"<b>{escape(finding.code)} {escape(finding.name)}</b> "
            f"{escape(str(finding.severity))}{escape(steps)}{escape(where)}<br>"
            f"{escape(finding.message)}<br><b>fix:</b> {escape(finding.fix)}</div>"
        )
    parts.append("<table style='border-collapse:collapse;margin:.5em 0;font-size:inherit'>")
    for line in summary.lines:
        about = (
            f" <b style='color:{_BAD}'>← {', '.join(line.findings)}</b>" if line.findings else ""
        )
        facts = "<br>".join(escape(fact) for fact in line.measured)
        parts.append(
            "<tr style='background:none'>"
            "<td style='vertical-align:top;text-align:left;padding-right:1em'>"
            f"<b>{escape(line.name)}</b></td>"
            f"<td style='text-align:left'><i style='opacity:.7'>{escape(line.purpose)}</i>{about}"
            f"<br>{facts}</td></tr>"
        )
    parts.append("</table>")
    footer = "<br>".join(escape(text) for text in (summary.cost, *summary.checked) if text)
    parts.append(f"<div style='opacity:.7'>{footer}</div></div>")
    return "".join(parts)
