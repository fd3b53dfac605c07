"""One weight's step for a notebook.

The formulas are plain HTML with sub- and superscripts, so that they read the same with and without
MathJax. Their LaTeX is folded below: a notebook sets it, any other viewer shows its source.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from html import escape

from gradscope.views.explanation import Explanation, Line
from gradscope.views.explanation_text import TELLING_APART, off, setting, value_of

# Colours that read on light and on dark backgrounds; the rest is the notebook's own.
_VERDICTS = {True: ("✓", "color:#2e9e5b"), False: ("✗", "color:#d9534f"), None: ("", "")}

_CELL = "text-align:left;vertical-align:baseline;padding:.1em 1.2em .1em 0"
_LINE = f"{_CELL};padding-top:.4em"
# Outside notebooks a table may inherit neither size nor height.
_TABLE = "border-collapse:collapse;margin:.6em 0;font-size:inherit;line-height:1.6"
_NUMBER = "font-variant-numeric:tabular-nums;white-space:nowrap"
_ASIDE = "opacity:.7"

_LETTER = r"[A-Za-z\u03b1-\u03c9]"  # Latin and Greek
_IN_PARENTHESES = r"\(((?:[^()]|\([^()]*\))*)\)"


def html(e: Explanation) -> str:
    """Return a self-contained fragment; everything from the user's program is escaped."""
    parts = [
        "<div style='font-size:90%;line-height:1.5;max-width:70em'>",
        # Names may hold what MathJax would take for mathematics.
        "<div class='tex2jax_ignore mathjax_ignore'>",
        f"<div><b>{escape(e.optimizer_kind)}, step {e.step} of {escape(e.where)}</b> "
        f"<span style='{_ASIDE}'>{escape(' · '.join(e.context))}</span></div>",
        *_remarks(e),
        *(_of_lines(e) if e.lines else _measured(e)),
        f"<div style='{_ASIDE}'>{escape(e.source)}</div>" if e.source else "",
        "</div>",
        _latex(e) if e.lines else "",
        "</div>",
    ]
    return "".join(parts)


def _remarks(e: Explanation) -> Iterable[str]:
    mark, colour = _VERDICTS[e.agrees]
    for remark in e.remarks:
        is_verdict = remark == e.verdict
        style = f"font-weight:bold;{colour}" if is_verdict else ""
        yield f"<div style='{style}'>{mark if is_verdict else ''} {escape(remark)}</div>"


def _of_lines(e: Explanation) -> Iterable[str]:
    yield _table([(each.symbol, each.what, value_of(each.value)) for each in e.used if each.what])
    settings = [_marked(setting(each)) for each in e.used if not each.what]
    yield f"<div>{' · '.join([*settings, *map(escape, e.options)])}</div>"
    yield f"<table style='{_TABLE}'>{''.join(map(_rows, e.lines))}</table>"
    yield f"<div>after the step, as stored in {escape(e.dtype)}</div>"
    yield _table(
        [
            (line.symbol, line.key, value_of(line.stored, TELLING_APART), off(line))
            for line in e.compared
        ],
        [_VERDICTS[line.agrees] for line in e.compared],
    )


def _measured(e: Explanation) -> Iterable[str]:
    yield _table([(each.name, value_of(each.value)) for each in e.used])
    after = {**e.stored, "weight": e.quantities["weight_stored"]}
    yield _table([(f"{name} after", value_of(x, TELLING_APART)) for name, x in after.items()])


def _rows(line: Line) -> str:
    value = value_of(line.value)
    sides = [side for side in dict.fromkeys((line.formula, line.numbers)) if side != value]
    shown = "<br>".join(f"= {_marked(side)}" for side in sides)
    return _row(
        f"<td style='{_LINE}'>{_marked(line.symbol)}</td><td style='{_LINE}'>{shown}</td>"
        f"<td style='{_LINE};{_NUMBER};vertical-align:bottom'>= {_marked(value)}</td>"
    )


def _table(
    rows: Sequence[tuple[str, ...]], verdicts: Sequence[tuple[str, str]] | None = None
) -> str:
    """A table of texts; the last one of a row may have a verdict, which is a mark and a colour."""
    if not rows:
        return ""
    inside = []
    for row, (mark, colour) in zip(rows, verdicts or [("", "")] * len(rows), strict=True):
        *cells, last = map(_marked, row)
        filled = "".join(f"<td style='{_CELL}'>{cell}</td>" for cell in cells)
        inside.append(_row(f"{filled}<td style='{_CELL};{colour}'>{mark} {last}</td>"))
    return f"<table style='{_TABLE};{_NUMBER}'>{''.join(inside)}</table>"


def _row(cells: str) -> str:
    # Notebooks shade every second row of a table.
    return f"<tr style='background:none'>{cells}</tr>"


def _latex(e: Explanation) -> str:
    return (
        "<details style='margin-top:.6em'><summary>LaTeX</summary>"
        "<div style='white-space:pre-wrap;overflow-x:auto;font-family:monospace'>"
        f"$$\n{escape(e.to_latex())}\n$$</div>"
        "</details>"
    )


def _marked(text: str) -> str:
    """Escape a text, with real sub- and superscripts, and letters that stand alone in italics."""
    marked = escape(text)
    marked = re.sub(rf"(?<![\w&])({_LETTER})(?![A-Za-z_\d])", r"<i>\1</i>", marked)
    marked = re.sub("[₀-₉ₜ₋]+", lambda found: _script("sub", found[0]), marked)
    marked = re.sub("[⁰¹²³⁴-⁹ᵗ⁻]+", lambda found: _script("sup", found[0]), marked)
    marked = re.sub(rf"\^{_IN_PARENTHESES}", lambda found: _script("sup", found[1]), marked)
    return re.sub(r"\^(<i>\w</i>|[\w.]+)", lambda found: _script("sup", found[1]), marked)


def _script(tag: str, characters: str) -> str:
    plain = unicodedata.normalize("NFKC", characters)
    return f"<{tag} style='line-height:0'>{plain}</{tag}>"
