"""A diagnosed defect, as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    import pandas as pd


class Severity(IntEnum):
    """How sure a finding is, and how much it harms; the greater is the worse."""

    INFO = 0
    WARNING = 1
    ERROR = 2

    def __str__(self) -> str:
        return self.name.lower()


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
        parts = [f"{self.code} {self.name} ({self.severity}): {self.message}", f"  fix: {self.fix}"]
        if self.location:
            parts.append(f"  at: {self.location}")
        return "\n".join(parts)


class Findings(Sequence[Finding]):
    """The findings of a run, the likeliest cause first.

    Attributes:
        unchecked: rules that could not be applied, by code, and why.
    """

    def __init__(
        self, findings: Sequence[Finding], unchecked: Mapping[str, str] | None = None
    ) -> None:
        self._findings = tuple(findings)
        self.unchecked = dict(unchecked or {})

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
            return Findings(self._findings[index])
        return self._findings[index]

    def __repr__(self) -> str:
        if not self._findings:
            return "no findings"
        return "\n".join(str(finding) for finding in self._findings)

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
