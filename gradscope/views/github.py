"""Findings as annotations: lines that GitHub Actions shows beside the code of a change."""

from __future__ import annotations

from gradscope.rules import Finding, Findings, Severity
from gradscope.rules.wording import shortened

_COMMANDS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "notice"}


def annotation_lines(findings: Findings) -> str:
    """Return one workflow command a line, in the findings' order."""
    return "".join(f"{_annotation(finding)}\n" for finding in findings)


def _annotation(finding: Finding) -> str:
    properties = {"title": f"{finding.code} {finding.name}"}
    if finding.file is not None:
        # Relative to the working directory, which is the checkout's.
        properties = {"file": shortened(finding.file), "line": str(finding.line), **properties}
    shown = ",".join(f"{name}={_property(value)}" for name, value in properties.items())
    return f"::{_COMMANDS[finding.severity]} {shown}::{_data(_text(finding))}"


def _text(finding: Finding) -> str:
    return f"{finding.message}\nfix: {finding.fix}"


def _data(text: str) -> str:
    # As @actions/core escapes them: a line break would end the command.
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
