"""What a rule is: one diagnosis, a pure function of a recording."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from gradscope.rules.finding import Finding, Severity
from gradscope.run.recording import Recording

HEADINGS = (
    "What it finds",
    "Why it matters",
    "How it is found",
    "Example",
    "Fix",
    "When it is wrong",
)
"""The headings that the documentation of every rule has, in this order."""


class Rule(ABC):
    """One diagnosis.

    A subclass documents itself in its docstring under :data:`HEADINGS`; the pages of the
    documentation and ``gradscope rule`` are made from it.

    Attributes:
        code: as in ``GS201``; the family is its first digit.
        name: kebab-case, to be read as "allow ‹name›".
        severity: of its findings, unless one says otherwise.
        tables: the tables it reads.
        symptom_of: codes of the rules whose findings explain this one's; see
            :mod:`gradscope.rules.causes`.
        thresholds: the numbers that it compares with, by name, for :meth:`threshold`. A watch, or
            a project, may put others in their place.
        compares_ranks: whether it looks at all processes of a run at once (``run.ranks``). Any
            other rule judges each by itself, and what several have in common is told once.
    """

    code: ClassVar[str]
    name: ClassVar[str]
    severity: ClassVar[Severity] = Severity.WARNING
    tables: ClassVar[tuple[str, ...]] = ()
    symptom_of: ClassVar[tuple[str, ...]] = ()
    thresholds: ClassVar[Mapping[str, float]] = {}
    compares_ranks: ClassVar[bool] = False

    @abstractmethod
    def check(self, run: Recording) -> list[Finding]:
        """Return what is wrong in ``run``; nothing for a healthy one."""

    def threshold(self, name: str) -> float:
        """Return a number to compare with: the rule's own, or the one asked for in its place."""
        return self.thresholds[name]

    def finding(self, message: str, fix: str, **details: Any) -> Finding:
        """Return a finding that bears this rule's code, name and severity."""
        return Finding(
            **{
                "code": self.code,
                "name": self.name,
                "severity": self.severity,
                "message": message,
                "fix": fix,
                **details,
            }
        )

    @classmethod
    def documentation(cls) -> str:
        """Return the rule's page in Markdown."""
        return inspect.cleandoc(cls.__doc__ or "")
