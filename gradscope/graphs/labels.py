"""What stands in the boxes of a picture: names and shapes as text, escaped for Graphviz.

Labels are Graphviz's HTML-like ones (https://graphviz.org/doc/info/shapes.html#html), so that name
and shape may differ in size. A parameter's name may hold any character.
"""

from __future__ import annotations

import re
from collections import Counter
from html import escape
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from gradscope.run.captured_graph import Shape

INK: Final = "#1f2933"
FAINT: Final = "#52606d"

# A line is as high as its largest character; a blank of full size keeps a small one off the others.
_SMALL: Final = '<FONT POINT-SIZE="14">\u200a</FONT><FONT POINT-SIZE="9">'
_BACKWARD_STARTS: Final = f"{_SMALL}▲ backward starts here</FONT>"
_TIMES: Final = " \N{MULTIPLICATION SIGN} "
_LONGEST_LINE: Final = 28
_LONGEST_NAME: Final = 120
_MOST_NAMES: Final = 6
_MOST_SHAPES: Final = 3
_BUILT_IN: Final = re.compile(r"(?P<op>.+)Backward\d+")
_WORD_START: Final = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z0-9])(?=[A-Z][a-z])")


def operation_name(op: str) -> str:
    """What an operation is called in a picture, from the name of its autograd node.

    Built-in operations get the name they have in torch (``"NllLossBackward0"`` → ``"nll_loss"``),
    a custom Function keeps its class's (``"MyClipBackward"`` → ``"MyClip"``), anything else stays.
    """
    built_in = _BUILT_IN.fullmatch(op)
    if built_in is None:
        return op.removesuffix("Backward") or op
    name = _WORD_START.sub("_", built_in["op"]).lower()
    return "t (transpose)" if name == "t" else name


def shape_text(shape: Shape) -> str:
    """A shape as it is written in a picture: its extents with crosses between, or ``"scalar"``."""
    return _TIMES.join(map(str, shape)) if shape else "scalar"


def operation_label(op: str, shapes: tuple[Shape, ...], *, is_root: bool) -> str:
    """The label of an operation: its name above the shapes of its outputs."""
    lines = _lines(operation_name(op), "_")
    shown = [
        shape_text(shape) + (f" ({n} outputs)" if n > 1 else "")
        for shape, n in Counter(shapes).most_common(_MOST_SHAPES)
    ]
    if len(set(shapes)) > _MOST_SHAPES:
        shown.append(f"… {len(shapes)} outputs")
    return _label([_bold(line) for line in lines] if is_root else lines, shown, is_root)


def leaf_label(names: tuple[str, ...], shape: Shape, *, is_root: bool) -> str:
    """The label of a parameter, with all names of a tied one, or of another leaf without names."""
    lines = []
    for position, name in enumerate(names[:_MOST_NAMES]):
        first, *others = _lines(name, ".")
        lines += [_bold(f"= {first}" if position else first), *map(_bold, others)]
    if len(names) > _MOST_NAMES:
        lines.append(f"… {len(names)} names")
    return _label(lines or ["leaf tensor"], [shape_text(shape)], is_root)


def as_tooltip(text: str) -> str:
    """``text`` as it has to be written in a Graphviz tooltip."""
    # Graphviz resolves the backslashes of a tooltip twice (seen in 2.43 and 14.1).
    return _escaped(_with_glyphs(text)).replace("\\", "\\\\")


def _escaped(text: str) -> str:
    # Entities are read in plain attributes, too, and backslashes in HTML-like labels, too.
    return escape(text).replace("\\", "\\\\")


def _with_glyphs(text: str) -> str:
    """Write out line ends, NUL, lone surrogates and the like, which an SVG may not contain."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def _lines(name: str, separator: str) -> list[str]:
    """Break a name after separators, so that a long one cannot stretch the whole picture."""
    name = _with_glyphs(name)
    if len(name) > _LONGEST_NAME:
        name = name[: _LONGEST_NAME - 1] + "…"
    lines = [""]
    for part in re.split(f"(?<={re.escape(separator)})", name):
        if lines[-1] and len(lines[-1]) + len(part) > _LONGEST_LINE:
            lines.append("")
        lines[-1] += part
    return [_escaped(line) for line in lines]


def _label(lines: list[str], small: list[str], is_root: bool) -> str:
    lines = lines + [f'{_SMALL}<FONT COLOR="{FAINT}">{text}</FONT></FONT>' for text in small]
    return f"<{'<BR/>'.join(lines + [_BACKWARD_STARTS] * is_root)}>"


def _bold(html: str) -> str:
    return f"<B>{html}</B>"
