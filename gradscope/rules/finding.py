"""A diagnosed defect, as plain data."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from html import escape
from typing import TYPE_CHECKING, Any, overload

from gradscope.rules.wording import shortened

if TYPE_CHECKING:
    import pandas as pd

_WIDTH = 100


class Severity(IntEnum):
    """How sure a finding is, and how much it harms; the greater is the worse."""

    INFO = 0
    WARNING = 1
    ERROR = 2

    def __str__(self) -> str:
        return self.name.lower()


NOT_SELECTED = "not selected"
"""Why a rule that is not wanted is in :attr:`Findings.unchecked`."""

UNREAD = "not all of"
"""How it begins in :attr:`Findings.unchecked` why a rule was not applied to damaged files."""

_MARKS = {Severity.INFO: "i", Severity.WARNING: "!", Severity.ERROR: "✗"}
# As in the views: they read on light and on dark backgrounds.
_COLOURS = {Severity.INFO: "#888888", Severity.WARNING: "#d58b1d", Severity.ERROR: "#d9534f"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One defect of a run, told once for all steps and parameters that it covers.

    Attributes:
        code: as in ``GS201``.
        name: as in ``missing-zero-grad``.
        severity: ``error`` for a certain fact that harms training, ``warning`` for very likely
            harm, ``info`` for what is worth knowing.
        message: one sentence with the names of the user's program.
        fix: what to change.
        params: names of the parameters concerned.
        optimizer: name of the optimizer concerned, or None.
        step_first, step_last: the first and last step that it holds for, or None if none ended.
        count: at how many steps.
        file, line: the line of the program that matters, or None.
        evidence: the recorded facts behind it.
        modules: paths of the modules concerned.
        symptoms: messages of the findings that this one explains.
    """

    code: str
    name: str
    severity: Severity
    message: str
    fix: str
    params: tuple[str, ...] = ()
    optimizer: str | None = None
    step_first: int | None = None
    step_last: int | None = None
    count: int = 0
    file: str | None = None
    line: int | None = None
    evidence: dict[str, Any] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    symptoms: tuple[str, ...] = ()

    @property
    def location(self) -> str:
        """``file:line``, or nothing."""
        return "" if self.file is None else f"{self.file}:{self.line}"

    @property
    def steps(self) -> str:
        """The steps in words, as in ``steps 1–99``."""
        if self.step_first is None:
            return ""
        if self.step_first == self.step_last:
            return f"step {self.step_first}"
        return f"steps {self.step_first}–{self.step_last}"

    def __str__(self) -> str:
        where = " · ".join(part for part in (str(self.severity), self.steps, self._place) if part)
        parts = [
            f"{_MARKS[self.severity]} {self.code} {self.name}  {where}",
            _wrapped(self.message),
            _wrapped(f"fix: {self.fix}"),
        ]
        if self.symptoms:
            codes = ", ".join(dict.fromkeys(each.split(":")[0] for each in self.symptoms))
            parts.append(_wrapped(f"explains: {codes}"))
        return "\n".join(parts)

    @property
    def _place(self) -> str:
        return "" if self.file is None else f"{shortened(self.file)}:{self.line}"


class Findings(Sequence[Finding]):
    """The findings of a run, the likeliest cause first.

    Printed, each tells what is wrong, where, and what to change.

    Attributes:
        unchecked: rules that could not be applied, by code, and why.
    """

    def __init__(
        self, findings: Sequence[Finding], unchecked: Mapping[str, str] | None = None
    ) -> None:
        self._findings = tuple(findings)
        self.unchecked = dict(unchecked or {})

    @property
    def errors(self) -> Findings:
        """Those that are certain facts that harm training."""
        return self._of(Severity.ERROR)

    @property
    def warnings(self) -> Findings:
        """Those that very likely harm it."""
        return self._of(Severity.WARNING)

    @property
    def infos(self) -> Findings:
        """Those that are worth knowing, and are silent elsewhere."""
        return self._of(Severity.INFO)

    def at_least(self, severity: Severity) -> Findings:
        """Return those of a severity and above."""
        return Findings([f for f in self._findings if f.severity >= severity], self.unchecked)

    def _of(self, severity: Severity) -> Findings:
        return Findings([f for f in self._findings if f.severity == severity], self.unchecked)

    def __len__(self) -> int:
        return len(self._findings)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self._findings)

    @overload
    def __getitem__(self, index: int) -> Finding: ...

    @overload
    def __getitem__(self, index: slice) -> Findings: ...

    def __getitem__(self, index: int | slice) -> Finding | Findings:
        if isinstance(index, slice):
            return Findings(self._findings[index], self.unchecked)
        return self._findings[index]

    def __repr__(self) -> str:
        parts = [self._counted(), *map(str, self._findings)]
        parts += [_wrapped(f"not checked: {why}", 0) for why in self._not_checked()]
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        parts = [f"<div><b>{escape(self._counted())}</b></div>"]
        for finding in self._findings:
            steps = f" · {escape(finding.steps)}" if finding.steps else ""
            where = f" · {escape(finding._place)}" if finding.file else ""
            parts.append(
                f"<div style='border-left:3px solid {_COLOURS[finding.severity]};"
                "padding-left:.7em;margin:.5em 0'>"
                f"<b>{escape(finding.code)} {escape(finding.name)}</b> "
                f"{finding.severity}{steps}{where}<br>"
                f"{escape(finding.message)}<br><b>fix:</b> {escape(finding.fix)}</div>"
            )
        parts += [
            f"<div style='opacity:.7'>not checked: {escape(why)}</div>"
            for why in self._not_checked()
        ]
        return (
            "<div style='font-size:90%;line-height:1.5;max-width:70em'>" + "".join(parts) + "</div>"
        )

    def _counted(self) -> str:
        """How many there are of which severity, in words."""
        if not self._findings:
            return "no findings"
        counts = [
            (sum(f.severity == severity for f in self._findings), word)
            for severity, word in (
                (Severity.ERROR, "error"),
                (Severity.WARNING, "warning"),
                (Severity.INFO, "note"),
            )
        ]
        return ", ".join(f"{n} {word}{'s' if n > 1 else ''}" for n, word in counts if n)

    def _not_checked(self) -> list[str]:
        return [f"{who} ({why})" for who, why in self.failed()]

    def failed(self) -> list[tuple[str, str]]:
        """Return which rules could not be applied, and why; how many, where that is the same."""
        codes: dict[str, list[str]] = {}
        for code, why in self.unchecked.items():
            if why != NOT_SELECTED:
                codes.setdefault(why, []).append(code)
        return [
            (each[0] if len(each) == 1 else f"{len(each)} rules", why)
            for why, each in codes.items()
        ]

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per finding, with the attributes of :class:`Finding` as columns."""
        import dataclasses

        import pandas as pd

        columns = [spec.name for spec in dataclasses.fields(Finding)]
        rows = [
            [str(f.severity) if name == "severity" else getattr(f, name) for name in columns]
            for f in self._findings
        ]
        return pd.DataFrame(rows, columns=columns)


def _wrapped(text: str, indent: int = 4) -> str:
    """A sentence of a finding, in lines that fit a terminal; its names are not broken."""
    spaces = " " * indent
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=spaces,
        subsequent_indent=spaces,
        break_long_words=False,
        break_on_hyphens=False,
    )
