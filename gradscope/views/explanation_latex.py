"""One weight's step in LaTeX."""

from __future__ import annotations

from gradscope.formulas.notation import latex_number
from gradscope.views.explanation import Explanation, Line


def latex(e: Explanation) -> str:
    r"""Return the lines as an ``aligned`` environment, without ``$$`` around it."""
    rows = " \\\\[4pt]\n".join(" \\\\\n".join(_rows(line)) for line in e.lines)
    return f"\\begin{{aligned}}\n{rows}\n\\end{{aligned}}"


def _rows(line: Line) -> list[str]:
    symbol, formula, numbers = line.latex
    value = r"\ldots" if line.value is None else latex_number(line.value)
    sides = [side for side in dict.fromkeys((formula, numbers)) if side not in (symbol, value)]
    rows = [f"{symbol if not i else ''} &= {side}" for i, side in enumerate(sides)]
    if not rows:
        return [f"{symbol} &= {value}"]
    return [*rows[:-1], f"{rows[-1]} = {value}"]
