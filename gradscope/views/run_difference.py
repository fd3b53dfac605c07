"""The comparison of two runs as one screen for a terminal."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gradscope.comparison.difference import STAGES, Comparison, Difference, Fact
from gradscope.comparison.numbers import in_digits

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_WIDTH = 100
_MOST_NOTES = 8


def plain_text(names: tuple[str, str], comparison: Comparison) -> str:
    """Return the screen as text without colours, at most 100 columns wide."""
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=_WIDTH, no_color=True, highlight=False, legacy_windows=False).print(
        screen(names, comparison)
    )
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def screen(names: tuple[str, str], comparison: Comparison) -> RenderableType:
    """Return the screen for a rich console.

    Args:
        names: what the two runs are called.
        comparison: what was found.
    """
    from rich.console import Group

    parts: list[RenderableType] = [*_verdict(comparison), *_title(names, comparison)]
    first = comparison.first
    if first is not None:
        parts += _evidence(first, f"First difference: {first.when} · {STAGES[first.stage]}")
        if first.like_rounding:
            parts += _rounding(comparison)
        beyond = comparison.beyond_rounding
        if beyond is not None:
            parts += _evidence(beyond, f"Not by rounding: {beyond.when} · {STAGES[beyond.stage]}")
        parts += _how_it_goes_on(comparison)
    parts += _surroundings(comparison)
    parts += _footer(comparison)
    return Group(*parts)


def verdict(comparison: Comparison) -> str:
    """Return the first line: whether the runs part, where, and in what."""
    first = comparison.first
    if first is None:
        within = f" within {comparison.rtol:g}" if comparison.rtol else ""
        steps = "step" if comparison.n_common == 1 else "steps"
        n = f"{comparison.n_common:,} {steps}"
        return f"equal{within}: nothing that both runs recorded differs, in {n}"
    said = f"{first.when}: {first.message}"
    beyond = comparison.beyond_rounding
    if first.like_rounding:
        said += "; that looks like rounding"
        if beyond is not None:
            said += f", but then, {beyond.when}: {beyond.message}"
        elif comparison.growth:
            last = comparison.growth[-1]
            far = max((x for x in (last.loss, last.grad_norm) if not math.isnan(x)), default=0.0)
            said += f" ({_apart(far)} apart at step {last.step:,})"
    return said


def _verdict(comparison: Comparison) -> Iterator[RenderableType]:
    from rich.text import Text

    first = comparison.first
    if first is None:
        yield Text(f"✓ {_line(verdict(comparison))}", style="bold green")
        return
    only_rounding = first.like_rounding and comparison.beyond_rounding is None
    style = "bold yellow" if only_rounding else "bold red"
    yield Text(f"{'≈' if only_rounding else '✗'} {_line(verdict(comparison))}", style=style)


def _title(names: tuple[str, str], comparison: Comparison) -> Iterator[RenderableType]:
    from rich.text import Text

    for letter, name, n in zip("AB", names, comparison.n_steps, strict=True):
        yield Text.assemble(
            (f"  {letter} ", "bold"),
            _line(name),
            (f"  {n:,} {'step' if n == 1 else 'steps'}", "dim"),
        )


def _evidence(difference: Difference, title: str) -> Iterator[RenderableType]:
    from rich.text import Text

    yield Text("")
    yield Text(title, style="bold")
    if difference.facts:
        yield _indented(_facts(difference.facts))
    if difference.hint:
        yield _indented(Text(_line(difference.hint)))


def _facts(facts: tuple[Fact, ...]) -> RenderableType:
    has_numbers = any(fact.relative is not None for fact in facts)
    table = _table("", "A", "B", *(("relative",) if has_numbers else ()))
    for fact in facts:
        cells = [_line(fact.what), *_values(fact)]
        table.add_row(*cells, *((_apart(fact.relative),) if has_numbers else ()))
    return table


def _how_it_goes_on(comparison: Comparison) -> Iterator[RenderableType]:
    from rich.text import Text

    drift = comparison.growth
    if not drift:
        return
    yield Text("")
    yield Text("How it goes on", style="bold")
    table = _table("relative difference at step", *(f"{each.step:,}" for each in drift))
    for name in ("loss", "grad_norm", "weight_norm"):
        values = [getattr(each, name) for each in drift]
        if not all(math.isnan(value) for value in values):
            table.add_row(name.replace("_", " "), *map(_apart, values))
    yield _indented(table)
    by_step: dict[int | None, list[str]] = {}
    for each in comparison.differences[1:]:
        by_step.setdefault(each.step, []).append(STAGES[each.stage])
    if by_step:
        said = [
            f"{'before the first step' if step is None else f'from step {step:,}'}: "
            f"{', '.join(stages)}"
            for step, stages in by_step.items()
        ]
        yield _indented(Text(f"also differ {'; '.join(said)}", style="dim"))


def _rounding(comparison: Comparison) -> Iterator[RenderableType]:
    from rich.text import Text

    told = (
        f"taken for rounding: what is at most {comparison.rounding:g} apart, the tolerance of "
        "torch.testing.assert_close for this dtype"
    )
    yield _indented(Text(told, style="dim"))


def _indented(what: RenderableType) -> RenderableType:
    from rich.padding import Padding

    return Padding(what, (0, 0, 0, 2), expand=False)


def _surroundings(comparison: Comparison) -> Iterator[RenderableType]:
    from rich.text import Text

    if comparison.surroundings:
        yield Text("")
        yield Text("What else is told of the two runs and differs", style="bold")
        yield _indented(_facts(comparison.surroundings))


def _footer(comparison: Comparison) -> Iterator[RenderableType]:
    from rich.text import Text

    n_values = sum(comparison.compared.values())
    yield Text("")
    yield Text(
        f"compared: {n_values:,} values of {comparison.n_common:,} "
        f"{'step' if comparison.n_common == 1 else 'steps'}"
        + (f", up to {comparison.rtol:g} apart" if comparison.rtol else ", to the last bit"),
        style="dim",
    )
    notes = comparison.not_compared
    for note in notes[:_MOST_NOTES]:
        yield Text(f"not compared: {_line(note, 160)}", style="dim")
    if len(notes) > _MOST_NOTES:
        yield Text(f"… and {len(notes) - _MOST_NOTES} more; --format json has all", style="dim")


def _table(*heads: str) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_edge=False)
    for head in heads:
        table.add_column(head, overflow="fold")
    return table


def _values(fact: Fact) -> tuple[str, str]:
    a, b = fact.a, fact.b
    if isinstance(a, float) and isinstance(b, float):
        texts = in_digits(a, b)
        return texts if fact.relative else (texts[0], "equal" if a == b else texts[1])
    return _value(a), _value(b)


def _value(value: Any) -> str:
    if value is None or value == "":
        return "–"
    return _line(f"{value:.6g}" if isinstance(value, float) else str(value))


def _apart(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    if value == 0:
        return "0"
    return "∞" if math.isinf(value) else f"{value:.1g}" if value < 0.1 else f"{value:.2f}"


def _line(text: str, most: int = 400) -> str:
    """A text of the program as one line that does nothing to a terminal."""
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 + 1 :]}"
