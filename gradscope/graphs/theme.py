"""The colours of pictures of graphs, on light and on dark paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from gradscope.errors import UsageError

ThemeName: TypeAlias = Literal["light", "dark"]


@dataclass(frozen=True, slots=True)
class Look:
    """Fill and outline of a kind of box, with further attributes of Graphviz."""

    fill: str
    line: str
    style: str = "filled"


@dataclass(frozen=True, slots=True)
class Theme:
    """Every colour in a picture; the background too, so that no page shows through.

    Attributes:
        paper, ink, faint, edge: background, text, small text, arrows.
        frames: background of frames, by how deep they lie, over and over.
        frame_line: outline of frames.
        parameter, leaf, operation, module, root, missing, frozen: looks of boxes.
        cut: colour of what does not lead to the loss.
        low, high: ends of the scale of an overlay.
        alarm: what an overlay marks as wrong.
    """

    paper: str
    ink: str
    faint: str
    edge: str
    frames: tuple[str, ...]
    frame_line: str
    parameter: Look
    leaf: Look
    operation: Look
    module: Look
    root: Look
    missing: Look
    frozen: Look
    cut: str
    low: str
    high: str
    alarm: str


THEMES: Final[dict[str, Theme]] = {
    "light": Theme(
        paper="#ffffff",
        ink="#1f2933",
        faint="#52606d",
        edge="#7b8794",
        frames=("#f7f9fb", "#eef2f6"),
        frame_line="#c3ccd5",
        parameter=Look("#cfe3fb", "#2f6db5", "rounded,filled"),
        leaf=Look("#fde8c4", "#b7791f", "rounded,filled"),
        operation=Look("#f5f7fa", "#9aa5b1"),
        module=Look("#e6e1f7", "#7c6bc4", "rounded,filled"),
        root=Look("#c6efcd", "#2f855a"),
        missing=Look("#fff1f0", "#c53030", "rounded,filled,dashed"),
        frozen=Look("#f1f5f9", "#64748b", "rounded,filled,dashed"),
        cut="#c53030",
        low="#f3f6fa",
        high="#f59e0b",
        alarm="#f87171",
    ),
    "dark": Theme(
        paper="#12181f",
        ink="#e6ebf0",
        faint="#a3b1bf",
        edge="#8896a5",
        frames=("#19212a", "#202a35"),
        frame_line="#3d4b5a",
        parameter=Look("#1d3b5f", "#6ba5e7", "rounded,filled"),
        leaf=Look("#4d3b16", "#d9a441", "rounded,filled"),
        operation=Look("#28323d", "#657485"),
        module=Look("#352e57", "#9d8df0", "rounded,filled"),
        root=Look("#1d4a31", "#58c08b"),
        missing=Look("#3b1d1f", "#f08080", "rounded,filled,dashed"),
        frozen=Look("#1c2630", "#8896a5", "rounded,filled,dashed"),
        cut="#f08080",
        low="#28323d",
        high="#b45309",
        alarm="#b91c1c",
    ),
}


def theme_named(name: object) -> Theme:
    """Return a theme by its name.

    Raises:
        UsageError: if there is none of that name.
    """
    if name not in THEMES:
        raise UsageError(f"theme={name!r}: pass {' or '.join(map(repr, THEMES))}")
    return THEMES[str(name)]


def between(low: str, high: str, share: float) -> str:
    """Return the colour that lies so far (0 to 1) from one colour to another."""
    ends = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in (low, high)]
    mixed = [round(a + (b - a) * share) for a, b in zip(*ends, strict=True)]
    return "#" + "".join(f"{part:02x}" for part in mixed)
