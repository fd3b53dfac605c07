"""Captions as labels of Graphviz, escaped and broken into lines.

Labels are Graphviz's HTML-like ones (https://graphviz.org/doc/info/shapes.html#html), so that title
and small print may differ in size. A parameter's name may hold any character.
"""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from gradscope.graphs.wording import Caption

# A line is as high as its largest character; a blank of full size keeps a small one off the others.
_SMALL: Final = '<FONT POINT-SIZE="14">\u200a</FONT><FONT POINT-SIZE="9">'
_LONGEST_LINE: Final = 28
_LONGEST_NAME: Final = 120
_BACKWARD_STARTS: Final = "▲ backward starts here"


def label(caption: Caption, faint: str, *, bold: bool, is_root: bool = False) -> str:
    """The label of a box.

    Args:
        caption: what stands in it.
        faint: the colour of the small print.
        bold: whether the title is set in bold.
        is_root: whether to say that the backward starts here.
    """
    lines = [line for title in caption.title for line in _broken(title, caption.breaks_at)]
    if bold:
        lines = [f"<B>{line}</B>" for line in lines]
    if caption.kind:
        kind = f'<FONT POINT-SIZE="9" COLOR="{faint}">{as_text(caption.kind)}</FONT>'
        fits = sum(map(len, caption.title)) + len(caption.kind) <= _LONGEST_LINE
        lines = [*lines[:-1], f"{lines[-1]}  {kind}"] if fits else [*lines, kind]
    small = [line for text in caption.small for line in _broken(text, " ")]
    lines += [f'{_SMALL}<FONT COLOR="{faint}">{text}</FONT></FONT>' for text in small]
    if is_root:
        lines.append(f"{_SMALL}{_BACKWARD_STARTS}</FONT>")
    return f"<{'<BR/>'.join(lines)}>"


def frame_label(title: str, kind: str, faint: str) -> str:
    """The label of a frame: one line, cut where it is too long."""
    behind = f'  <FONT COLOR="{faint}">{as_text(kind)}</FONT>' if kind else ""
    return f"<<B>{_escaped(_shortened(with_glyphs(title)))}</B>{behind}>"


def as_text(text: str) -> str:
    """``text`` as it has to be written in a plain label, which ends up in small print."""
    return _escaped(with_glyphs(text))


def as_tooltip(text: str) -> str:
    """``text`` as it has to be written in a Graphviz tooltip."""
    # Graphviz resolves the backslashes of a tooltip twice (seen in 2.43 and 14.1).
    return _escaped(with_glyphs(text)).replace("\\", "\\\\")


def with_glyphs(text: str) -> str:
    """Write out line ends, NUL, lone surrogates and the like, which an SVG may not contain."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _escaped(text: str) -> str:
    # Entities are read in plain attributes, too, and backslashes in HTML-like labels, too.
    return escape(text).replace("\\", "\\\\")


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def _broken(name: str, separator: str) -> list[str]:
    """Break a name after separators, so that a long one cannot stretch the whole picture."""
    lines = [""]
    for part in re.split(f"(?<={re.escape(separator)})", _shortened(with_glyphs(name))):
        if lines[-1] and len(lines[-1]) + len(part) > _LONGEST_LINE:
            lines.append("")
        lines[-1] += part
    return [_escaped(line) for line in lines]
