"""Which findings are wanted: selectors, patterns, comments, ``pyproject.toml``, thresholds."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradscope.config import ProjectConfig, project_config
from gradscope.errors import UnknownRuleError, UsageError
from gradscope.rules import RULES, Finding, Findings, Severity, find_rule
from gradscope.rules.selection import NOT_SELECTED, check_selectors, selected, selected_rules
from gradscope.rules.thresholds import check_thresholds, replaced_thresholds, thresholds_of
from gradscope.views.github import annotation_lines


def finding(code: str = "GS201", name: str = "missing-zero-grad", **details: object) -> Finding:
    return Finding(
        **{"code": code, "name": name, "severity": Severity.ERROR, "message": "m", "fix": "f"}
        | details
    )


FOUND = Findings([finding(), finding("GS301", "detached-loss")])


@pytest.mark.parametrize(
    ("select", "ignore", "left"),
    [
        ((), (), ["GS201", "GS301"]),
        (("GS2",), (), ["GS201"]),
        (("gs301",), (), ["GS301"]),
        (("detached-loss",), (), ["GS301"]),
        (("GS",), ("GS201",), ["GS301"]),
        ((), ("missing-zero-grad", "GS3"), []),
    ],
)
def test_rules_are_meant_by_code_name_or_family(
    select: tuple[str, ...], ignore: tuple[str, ...], left: list[str]
) -> None:
    chosen = selected(FOUND, select=select, ignore=ignore)
    assert [each.code for each in chosen] == left
    for code in ("GS201", "GS301"):
        assert (chosen.unchecked.get(code) == NOT_SELECTED) == (code not in left)
    assert {"GS201", "GS301"} & {rule.code for rule in selected_rules(select, ignore)} == set(left)


def test_a_selector_that_means_no_rule_is_named() -> None:
    check_selectors(["GS2", "detached-loss", "gs301"])
    for unknown in ("GS777", "detached", "E501"):
        with pytest.raises(UnknownRuleError, match=f"no rule is meant by '{unknown}'"):
            check_selectors(["GS2", unknown])


def test_parameters_are_passed_over_by_pattern() -> None:
    two = finding(params=("head.weight", "body.weight"))
    patterns = {"GS201": ["head.*"]}
    (left,) = selected(Findings([two]), ignore_params=patterns)
    assert left.params == ("body.weight",)
    assert len(selected(Findings([finding(params=("head.bias",))]), ignore_params=patterns)) == 0
    assert len(selected(Findings([finding(modules=("head.1",))]), ignore_params=patterns)) == 0
    # One without names, and one of another rule, are not about these parameters.
    assert len(selected(FOUND, ignore_params=patterns)) == 2
    other = finding("GS301", "detached-loss", params=("head.bias",))
    assert len(selected(Findings([other]), ignore_params=patterns)) == 1
    assert len(selected(Findings([other]), ignore_params={"GS3": ["*"]})) == 0


@pytest.mark.parametrize(
    ("lines", "allowed"),
    [
        (["", "loss.backward()  # gradscope: allow GS201"], True),
        (["", "loss.backward()  # gradscope: allow missing-zero-grad -- on purpose"], True),
        (["", "loss.backward()  # gradscope: allow GS105, GS2"], True),
        (["# gradscope: allow GS201", "loss.backward()"], True),
        (["x = 1  # gradscope: allow GS201", "loss.backward()"], False),
        (["", "loss.backward()  # gradscope: allow GS105"], False),
        (["", "loss.backward()  # allow GS201"], False),
    ],
)
def test_a_comment_at_the_line_allows_it(tmp_path: Path, lines: list[str], allowed: bool) -> None:
    script = tmp_path / "train.py"
    script.write_text("\n".join(lines), "utf-8")
    found = Findings([finding(file=str(script), line=2)])
    assert len(selected(found)) == (0 if allowed else 1)
    assert len(selected(found, allow_comments=False)) == 1


def test_a_line_that_cannot_be_read_allows_nothing() -> None:
    assert len(selected(Findings([finding(file="<string>", line=1), finding(file="gone.py")]))) == 2


def configured(tmp_path: Path, text: str) -> ProjectConfig:
    (tmp_path / "pyproject.toml").write_text(text, "utf-8")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    return project_config(tmp_path / "deep" / "er")


def test_the_nearest_pyproject_upwards_is_read(tmp_path: Path) -> None:
    config = configured(
        tmp_path,
        """
[tool.gradscope]
select = ["GS1", "GS2"]
ignore = ["GS111"]
fail-on = "warning"
ignore-params = {"GS105" = ["head.*"], "GS104" = "encoder.*"}
thresholds = {"GS404" = {"least-steps" = 20}}
""",
    )
    assert config == ProjectConfig(
        select=("GS1", "GS2"),
        ignore=("GS111",),
        fail_on="warning",
        ignore_params={"GS105": ("head.*",), "GS104": ("encoder.*",)},
        thresholds={"GS404": {"least-steps": 20}},
    )
    # One that does not mention gradscope is not the project's word on it.
    (tmp_path / "deep" / "pyproject.toml").write_text("[project]\nname = 'x'\n", "utf-8")
    assert project_config(tmp_path / "deep" / "er") == config


def test_without_a_table_everything_is_as_usual(tmp_path: Path) -> None:
    assert configured(tmp_path, "[tool.other]\n") == ProjectConfig()


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("selekt = []", "no key 'selekt'; there are: select, ignore"),
        ("fail-on = 'fatal'", "write one of info, warning, error"),
        ("select = 3", "write a list of texts"),
        ("ignore = [1]", "write a list of texts"),
        ("ignore-params = ['a']", "a table with a key for each rule"),
        ("ignore-params = {GS105 = 1}", "ignore-params.GS105 = 1: write a list of texts"),
        ("thresholds = {GS404 = 3}", "a table of numbers"),
        ("select = [", "pyproject.toml: "),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error(tmp_path: Path, table: str, said: str) -> None:
    with pytest.raises(UsageError, match=r"pyproject\.toml") as raised:
        configured(tmp_path, f"[tool.gradscope]\n{table}\n")
    assert said in str(raised.value)


def test_thresholds_are_replaced_for_the_length_of_a_block() -> None:
    rule = next(rule for rule in RULES if thresholds_of(rule))
    name, value = next(iter(thresholds_of(rule).items()))
    check_thresholds({rule.code: {name: 3}})
    with replaced_thresholds({rule.code: {name: value + 1}}):
        assert thresholds_of(rule)[name] == value + 1
    assert thresholds_of(rule)[name] == value
    with pytest.raises(UsageError, match=f"{rule.code} {rule.name} has no threshold 'patience'"):
        check_thresholds({rule.code: {"patience": 3}})
    with pytest.raises(UnknownRuleError):
        check_thresholds({"GS777": {}})
    assert thresholds_of(find_rule("GS201")) == {} or "patience" not in thresholds_of(rule)


def test_annotations_are_escaped() -> None:
    found = Findings(
        [
            finding(file="/elsewhere/a,b:c.py", line=3, message="100 %\nof ::error::", fix="x"),
            finding(severity=Severity.INFO),
        ]
    )
    assert annotation_lines(found) == (
        "::error file=/elsewhere/a%2Cb%3Ac.py,line=3,title=GS201 missing-zero-grad::"
        "100 %25%0Aof ::error::%0Afix: x\n"
        "::notice title=GS201 missing-zero-grad::m%0Afix: f\n"
    )
