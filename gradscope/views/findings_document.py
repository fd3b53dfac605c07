"""The findings of a run as plain data for JSON: what CI and other tools read."""

from __future__ import annotations

import math
from typing import Any

from gradscope._version import __version__
from gradscope.rules import RULES, Finding, Findings
from gradscope.run.recording import Recording

VERSION = 1
"""Of the document's layout; raised when a key changes its meaning."""


def findings_document(
    run: Recording, findings: Findings, *, status: int | None = None, exception: str | None = None
) -> dict[str, Any]:
    """Return the document.

    Args:
        run: what was recorded.
        findings: of it, the likeliest cause first.
        status: the exit status of the program, if it has ended.
        exception: the uncaught exception that ended it, as in ``ValueError: no batch``.
    """
    observed = sum(run.observe_seconds.values())
    return {
        "version": VERSION,
        "gradscope": __version__,
        "findings": [_plain(finding) for finding in findings],
        "checked": [rule.code for rule in RULES if rule.code not in findings.unchecked],
        "unchecked": [
            *({"code": code, "why": why} for code, why in findings.unchecked.items()),
            *({"code": None, "why": note} for note in run.notes),
        ],
        "steps": run.n_steps,
        "exit": {"status": status, "exception": exception},
        "overhead": observed / run.seconds if run.seconds else None,
    }


def _plain(finding: Finding) -> dict[str, Any]:
    return {
        "code": finding.code,
        "name": finding.name,
        "severity": str(finding.severity),
        "message": finding.message,
        "fix": finding.fix,
        "params": list(finding.params),
        "modules": list(finding.modules),
        "optimizer": finding.optimizer,
        "step_first": _json(finding.step_first),
        "step_last": _json(finding.step_last),
        "count": _json(finding.count),
        "location": None
        if finding.file is None
        else {"file": finding.file, "line": _json(finding.line)},
        "evidence": _json(finding.evidence),
        "symptoms": list(finding.symptoms),
    }


def _json(value: Any) -> Any:
    """A value of some rule's evidence as JSON can say it; numbers that are not finite as texts."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, dict):
        return {str(key): _json(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_json(each) for each in value]
    if hasattr(value, "item") and not hasattr(value, "__len__"):
        value = value.item()  # NumPy's scalars
    if isinstance(value, int | bool | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value)
