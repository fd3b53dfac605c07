"""What explains what: one finding for one cause."""

from __future__ import annotations

from gradscope.rules import Finding, Rule, Severity
from gradscope.rules.causes import causes_first
from gradscope.run.recording import Recording


class _Silent(Rule):
    tables = ()

    def check(self, run: Recording) -> list[Finding]:
        return []


class Cause(_Silent):
    code, name, severity = "GS001", "cause", Severity.ERROR


class Symptom(_Silent):
    code, name, severity = "GS002", "symptom", Severity.ERROR
    symptom_of = ("GS001",)


class Further(_Silent):
    code, name, severity = "GS003", "further", Severity.WARNING
    symptom_of = ("GS002",)


class Mutual(_Silent):
    code, name, severity = "GS004", "mutual", Severity.ERROR
    symptom_of = ("GS005",)


class MutualToo(_Silent):
    code, name, severity = "GS005", "mutual-too", Severity.ERROR
    symptom_of = ("GS004",)


RULES = (Cause, Symptom, Further, Mutual, MutualToo)


def found(rule: type[Rule], **details: object) -> Finding:
    return rule().finding(f"{rule.name} is there", "mend it", **details)


def codes(*findings: Finding) -> list[str]:
    return [finding.code for finding in causes_first(findings, RULES)]


def test_a_symptom_is_folded_under_its_cause_and_told_there() -> None:
    (left,) = causes_first([found(Symptom), found(Cause)], RULES)
    assert left.code == "GS001"
    assert left.symptoms == ("GS002: symptom is there",)


def test_a_symptom_of_a_symptom_is_folded_under_the_root() -> None:
    (left,) = causes_first([found(Further), found(Symptom), found(Cause)], RULES)
    assert {text[:5] for text in left.symptoms} == {"GS002", "GS003"}


def test_a_symptom_without_its_cause_stands_by_itself() -> None:
    assert codes(found(Symptom)) == ["GS002"]


def test_what_is_worse_is_no_symptom_of_a_note() -> None:
    cause = found(Cause, severity=Severity.INFO)
    assert codes(cause, found(Symptom)) == ["GS002", "GS001"]


def test_another_optimizer_or_other_parameters_are_another_matter() -> None:
    cause = found(Cause, optimizer="a", params=("w", "b"))
    assert codes(cause, found(Symptom, optimizer="b")) == ["GS001", "GS002"]
    assert codes(cause, found(Symptom, params=("w", "v"))) == ["GS001", "GS002"]
    assert codes(cause, found(Symptom, optimizer="a", params=("w",))) == ["GS001"]


def test_two_that_explain_each_other_both_stay() -> None:
    assert codes(found(Mutual), found(MutualToo)) == ["GS004", "GS005"]


def test_errors_come_first_and_then_what_began_first() -> None:
    late, early = found(Cause, step_first=5), found(Mutual, step_first=2)
    assert codes(found(Further, step_first=0), late, early) == ["GS004", "GS001", "GS003"]
