"""GS901 and GS902: what gradscope says of itself."""

from __future__ import annotations

import pytest

from gradscope.rules import diagnose
from gradscope.run.recording import Recording


@pytest.mark.parametrize(
    ("event", "code"), [("instrument_failed", "GS901"), ("unobserved", "GS902")]
)
def test_what_failed_or_was_not_observed_is_a_note(event: str, code: str) -> None:
    run = Recording()
    for _ in range(2):
        run.rows("events").append({"step": 3, "event": event, "detail": "graph_cut: ValueError"})
    findings = diagnose(run)
    assert [f.code for f in findings] == [code]
    assert findings[0].severity == 0
    assert "graph_cut" in findings[0].message


def test_an_empty_recording_has_no_findings_and_no_rule_fails() -> None:
    findings = diagnose(Recording())
    assert not findings
    assert not findings.unchecked
