"""A page on which modules and repetitions of a graph open and close: one file, nothing fetched."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gradscope.graphs.draw import title
from gradscope.graphs.explorer_data import explorer_data
from gradscope.graphs.overlay import StepFacts
from gradscope.graphs.theme import THEMES, theme_named

if TYPE_CHECKING:
    from gradscope.graphs.likeness import Likeness
    from gradscope.graphs.theme import Look, ThemeName
    from gradscope.run.captured_graph import CapturedGraph

_NO_FACTS: Final = StepFacts()
_ASSETS: Final = Path(__file__).with_name("assets")


def explorer_page(
    captured: CapturedGraph,
    *,
    step: int | None = None,
    facts: StepFacts = _NO_FACTS,
    likeness: Likeness | None = "shape",
    theme: ThemeName | None = None,
) -> str:
    """Make a page to explore a graph with.

    Args:
        captured: the graph.
        step: the training step it belongs to, if known.
        facts: what is known of the parameters at that step.
        likeness: what must agree for a repetition to be drawn once; None draws every copy.
        theme: the colours that it begins with; by default those that the system asks for.

    Returns:
        HTML that asks nothing of any other file or machine.

    Raises:
        UsageError: if there is no such theme.
    """
    if theme is not None:
        theme_named(theme)
    import jinja2
    from markupsafe import Markup

    heading = title(captured, step)
    style = _theme_style() + _asset("explorer.css")
    script = explorer_script()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_asset("explorer.html")).render(
        title=heading,
        theme=theme or "",
        policy=_policy(style, script),
        style=Markup(style),
        script=Markup(script),
        data=Markup(as_json(explorer_data(captured, heading, facts, likeness))),
    )


def explorer_script() -> str:
    """Return the script of the page: who puts the page into another one has to allow it there."""
    return _asset("explorer.js")


def as_json(data: object) -> str:
    """Write data for a ``<script>`` element, which nothing in it can end or leave."""
    written = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # Outside of its strings JSON has none of these characters.
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda m: f"\\u{ord(m[0]):04x}", written)


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _theme_style() -> str:
    """Write the colours of both themes as CSS variables."""
    light, dark = (_variables(name) for name in ("light", "dark"))
    return (
        f":root{{color-scheme:light;{light}}}\n"
        f":root[data-theme=dark]{{color-scheme:dark;{dark}}}\n"
        "@media (prefers-color-scheme:dark){"
        f":root:not([data-theme=light]){{color-scheme:dark;{dark}}}}}\n"
    )


def _variables(name: str) -> str:
    theme = THEMES[name]
    colours = {key: value for key, value in asdict(theme).items() if isinstance(value, str)}
    looks: dict[str, Look] = {
        key: getattr(theme, key) for key, value in asdict(theme).items() if isinstance(value, dict)
    }
    for key, look in looks.items():
        colours |= {f"{key}-fill": look.fill, f"{key}-line": look.line}
    colours |= {f"frame-{at}": fill for at, fill in enumerate(theme.frames)}
    return "".join(f"--{key.replace('_', '-')}:{value};" for key, value in colours.items())


def _policy(style: str, script: str) -> str:
    """A Content-Security-Policy under which this style and this script are all that is obeyed."""
    return (
        f"default-src 'none'; style-src {content_source(style)}; "
        f"script-src {content_source(script)}; base-uri 'none'; form-action 'none'"
    )


def content_source(text: str) -> str:
    """Name a style or script, by its content, in a Content-Security-Policy."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
