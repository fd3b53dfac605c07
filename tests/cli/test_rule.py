"""``gradscope rule``, and what every rule must have."""

from __future__ import annotations

import re

import pytest

from gradscope.cli import main
from gradscope.rules import RULES, Rule, find_rule
from gradscope.rules.rule import HEADINGS
from gradscope.run.recording import Recording
from gradscope.run.schema import TABLES


def test_a_rule_is_explained_by_code_and_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    for asked in ("GS201", "gs201", "missing-zero-grad"):
        assert main(["rule", asked]) == 0
        assert "When it is wrong" in capsys.readouterr().out


def test_all_rules_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rule", "--all"]) == 0
    out = capsys.readouterr().out
    for rule in RULES:
        assert f"{rule.code}  {rule.name}" in out


def test_an_unknown_rule_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rule", "GS999"]) == 2
    assert "no rule is called 'GS999'" in capsys.readouterr().err


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_every_rule_is_complete(rule: type[Rule]) -> None:
    assert re.fullmatch(r"GS\d\d\d", rule.code)
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", rule.name)
    headings = re.findall(r"^## (.*)$", rule.documentation(), flags=re.MULTILINE)
    assert tuple(headings) == HEADINGS
    assert set(rule.tables) <= set(TABLES)
    assert find_rule(rule.code) is find_rule(rule.name) is rule
    assert rule().check(Recording()) == []


def test_codes_and_names_are_unique() -> None:
    assert len({rule.code for rule in RULES}) == len({rule.name for rule in RULES}) == len(RULES)
