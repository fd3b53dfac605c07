"""The page of the documentation about the matrix: written from outcomes, and read again."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

import torch
from cell import AS_PROMISED, PARTLY_SEEN, REFUSED, UNDEFINED, Cell, Outcome
from cells import FEATURES
from optimizers import MODES, classes

PAGE = Path(__file__).resolve().parents[2] / "docs" / "matrix.md"

SYMBOLS = {AS_PROMISED: "●", PARTLY_SEEN: "◐", REFUSED: "–", UNDEFINED: "×"}
NOT_RUN = "?"

Outcomes = dict[Cell, Outcome]


def counts(outcomes: Outcomes) -> str:
    """How many cells there are of each kind, in one line."""
    n = defaultdict(int)
    for outcome in outcomes.values():
        n[outcome.verdict] += 1
    runs = n[AS_PROMISED] + n[PARTLY_SEEN]
    return (
        f"{len(outcomes)} cells: torch itself runs {runs}, and these are as promised, "
        f"{n[PARTLY_SEEN]} of them with a line that says what cannot be seen; torch refuses "
        f"{n[REFUSED]}"
        + (f", and in {n[UNDEFINED]} no two of its own runs agree." if n[UNDEFINED] else ".")
    )


def page(outcomes: Outcomes) -> str:
    """The text of the page."""
    names = [kind.__name__ for kind in classes()]
    lines = [
        "<!-- Written by tests/matrix (make matrix); change the program, not this page. -->",
        "",
        "# Where it works",
        "",
        "Every optimizer of `torch.optim`, in each of its implementations, in each of the loops "
        "below.",
        "A cell is a training that runs twice, once watched. It is as promised if",
        "",
        "- weights, gradients, state of the optimizer, schedulers and scalers, losses, outputs and",
        "  the generators of random numbers are the same to the last bit;",
        "- the tables are right: every gradient norm and status, loss, outcome and size of an",
        "  update is compared with what the twin has computed by hand at that moment, and the",
        "  update with the optimizer's formula;",
        "- nothing is left behind in torch, the model or the optimizer;",
        "- nothing is found that is not wrong;",
        "- where something is compiled, no frame, graph break or recompilation is added.",
        "",
        f"**{counts(outcomes)}**",
        f"Torch {torch.__version__.split('+')[0]} and Python "
        f"{sys.version_info.major}.{sys.version_info.minor} on the CPU.",
        "",
        "The three signs stand for "
        + ", ".join(f"`{mode}`" if mode != "plain" else "`foreach=False`" for mode in MODES)
        + ":",
        f"{SYMBOLS[AS_PROMISED]} as promised, {SYMBOLS[PARTLY_SEEN]} as promised, and "
        f"[GS902](rules/GS902.md) says what cannot be seen, {SYMBOLS[REFUSED]} refused by torch, "
        f"{SYMBOLS[UNDEFINED]} see the end of the page.",
        "",
        f"| loop | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    for feature in FEATURES:
        signs = [
            "".join(_sign(outcomes, feature.title, name, mode) for mode in MODES) for name in names
        ]
        lines.append(f"| {feature.title} | {' | '.join(signs)} |")
    lines += ["", "## The loops", ""]
    lines += [f"- **{f.title}**: {_first_line(f)}" for f in FEATURES]
    lines += ["", "## What cannot be seen", ""]
    unseen: dict[str, list[str]] = defaultdict(list)
    for cell, outcome in outcomes.items():
        if outcome.verdict == PARTLY_SEEN and str(cell.kind) == "AdamW-plain":
            unseen[outcome.detail].append(cell.feature.title)
    lines += ["In the loops of AdamW, and likewise in those of the others:", ""]
    lines += [f"- *{'; '.join(titles)}*: {detail}" for detail, titles in unseen.items()]
    lines += ["", *_ABOUT_TORCH, "", "## What torch refuses", ""]
    refused: dict[str, list[str]] = defaultdict(list)
    for cell, outcome in outcomes.items():
        if outcome.verdict == REFUSED:
            refused[_short(outcome.detail)].append(f"{cell.kind} in {cell.feature.title}")
    lines += [
        f"- `{reason}`: {cells[0]}" + (f" and {len(cells) - 1} more" if cells[1:] else "")
        for reason, cells in sorted(refused.items())
    ]
    return "\n".join(lines) + "\n"


def told(cell: Cell) -> str | None:
    """The sign that the page has for a cell; None if it was written with another torch."""
    text = PAGE.read_text("utf-8") if PAGE.exists() else ""
    if f"Torch {torch.__version__.split('+')[0]} " not in text:
        return None
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:2] == "| "]
    row = next((row for row in rows if row[0] == cell.feature.title), None)
    if row is None:
        return NOT_RUN
    return row[rows[0].index(cell.kind.name)][MODES.index(cell.kind.mode)]


def _sign(outcomes: Outcomes, title: str, name: str, mode: str) -> str:
    for cell, outcome in outcomes.items():
        if (cell.feature.title, cell.kind.name, cell.kind.mode) == (title, name, mode):
            return SYMBOLS[outcome.verdict]
    return NOT_RUN


def _first_line(feature: type) -> str:
    return " ".join((feature.__doc__ or "").split())


def _short(reason: str) -> str:
    first = next(line for line in reason.splitlines() if line.strip())
    first = re.sub(r"0x[0-9a-f]+", "…", first).replace("`", "").replace("|", "/")
    first = re.sub(r"^(TypeError: )\w+(\.__init__\(\))", r"\1…\2", first)
    return first if len(first) <= 120 else first[:119] + "…"


_ABOUT_TORCH = [
    "`torch.compile(optimizer.step)` is seen at the edges of what is compiled: torch itself breaks "
    "its graph once,",
    "and nothing is added to that. Where it has run before the watch began, its outermost frame is "
    "compiled once more,",
    "at the first watched step. Of a step inside of a compiled function nothing is told but that "
    "it moves weights.",
    "Of parameters that FSDP2 has sharded gradients and updates are measured, each process its own "
    "shards.",
    "",
    "## What was found on the way",
    "",
    "- `SGD(fused=True)` on bfloat16 parameters updates only the last elements of each parameter, "
    "those that do",
    "  not fill a vector of 16; the rest of its momentum is what memory held (torch 2.13 on the "
    "CPU). The table",
    "  `updates` shows it: `residual` is near 1.",
]
