"""What a program does with findings: while the loop runs, after it, and with rules of its own."""

from __future__ import annotations

import re
import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradscope
from gradscope.errors import UnknownRuleError, UsageError
from gradscope.rules.finding import Finding, Findings, Severity
from gradscope.scope import Scope

PAGE = Path(__file__).resolve().parents[2] / "docs" / "writing-rules.md"


def made() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    return model, torch.optim.SGD(model.parameters(), lr=1e-3)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, *, clear: bool) -> None:
    x, y = torch.randn(8, 4), torch.randn(8, 1)
    for _ in range(steps):
        if clear:
            optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def watched(steps: int = 20, *, clear: bool = False, **options: Any) -> Scope:
    """A watched loop, judged by the one rule that matters here and those asked for."""
    model, optimizer = made()
    own = [rule.code for rule in options.get("rules", ())]
    options = {"select": ["GS201", *own], "on_error": "raise", **options}
    with gradscope.watch(model, optimizer, **options) as scope:
        train(model, optimizer, steps, clear=clear)
    return scope


class SteppedOften(gradscope.Rule):
    """MY001 stepped-often: a rule for these tests."""

    code, name = "MY001", "stepped-often"
    severity = Severity.WARNING
    thresholds = {"steps": 5.0}  # noqa: RUF012

    def check(self, run: Any) -> list[Finding]:
        if run.n_steps <= self.threshold("steps"):
            return []
        return [self.finding(f"there were {run.n_steps} steps", "make fewer", params=("0.bias",))]


OWN = {"rules": [SteppedOften], "select": ["MY001"]}


# -- while the loop runs --------------------------------------------------------------------


def test_nothing_is_told_unless_it_is_asked_for() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scope = watched()
    assert [finding.code for finding in scope.findings.errors] == ["GS201"]


def test_a_finding_is_warned_of_once_at_the_line_that_matters() -> None:
    with pytest.warns(gradscope.GradscopeWarning) as caught:
        watched(40, on_finding="warn")
    ours = [each for each in caught if each.message.slug == "missing-zero-grad"]  # type: ignore[union-attr]
    assert len(ours) == 1
    assert ours[0].filename == __file__
    assert "GS201 optimizer.step() used gradients" in str(ours[0].message)
    assert "fix: call optimizer.zero_grad()" in str(ours[0].message)
    assert "at 7 of 8 steps" in str(ours[0].message)


def test_warnings_that_are_errors_do_not_stop_the_training(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scope = watched(on_finding="warn")
    assert len(scope.steps) == 20
    assert "GS201" in capsys.readouterr().err


def test_the_first_error_ends_the_loop_when_its_step_has_returned() -> None:
    model, optimizer = made()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with (
        pytest.raises(gradscope.FindingsError, match="GS201 missing-zero-grad") as caught,
        gradscope.watch(model, optimizer, on_finding="raise", select="GS201") as scope,
    ):
        train(model, optimizer, 100, clear=False)
    assert len(scope.steps) == 8
    assert set(scope.steps["outcome"]) == {"stepped"}
    assert [finding.code for finding in caught.value.findings] == ["GS201"]
    assert "fix: call optimizer.zero_grad()" in str(caught.value)
    now = list(model.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    assert isinstance(caught.value, gradscope.GradscopeError)


def test_a_short_loop_is_judged_when_its_block_is_left() -> None:
    with pytest.raises(gradscope.FindingsError, match="GS201"):
        watched(5, on_finding="raise")


def test_stop_raises_too_and_leaves_nothing_behind() -> None:
    model, optimizer = made()
    scope = gradscope.watch(model, optimizer, on_finding="raise", select="GS201").start()
    train(model, optimizer, 5, clear=False)
    with pytest.raises(gradscope.FindingsError):
        scope.stop()
    train(model, optimizer, 20, clear=False)
    assert len(scope.steps) == 5


def test_an_exception_of_the_program_is_not_replaced() -> None:
    model, optimizer = made()
    scope = gradscope.watch(model, optimizer, on_finding="raise", select="GS201")

    @scope
    def loop() -> None:
        train(model, optimizer, 5, clear=False)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        loop()


def test_a_program_that_goes_on_is_not_stopped_by_the_same_again() -> None:
    model, optimizer = made()
    with gradscope.watch(model, optimizer, on_finding="raise", select="GS201") as scope:
        with pytest.raises(gradscope.FindingsError):
            train(model, optimizer, 100, clear=False)
        train(model, optimizer, 100, clear=False)
    assert len(scope.steps) == 108


def test_a_healthy_loop_is_neither_warned_of_nor_ended() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(watched(20, clear=True, on_finding="warn", select=()).steps) == 20
        assert len(watched(70, clear=True, on_finding="raise").steps) == 70


def test_a_function_is_called_with_each_finding_once() -> None:
    told: list[Finding] = []
    watched(70, on_finding=told.append)
    assert [finding.code for finding in told if finding.severity == Severity.ERROR] == ["GS201"]


def test_a_warning_is_told_when_it_is_found_a_second_time() -> None:
    told: list[Finding] = []
    watched(20, clear=True, on_finding=told.append, **OWN)
    assert [finding.message for finding in told] == ["there were 16 steps"]
    told.clear()
    watched(10, clear=True, on_finding=told.append, **OWN)
    assert [finding.message for finding in told] == ["there were 10 steps"]


def test_a_function_that_raises_is_told_once_and_stops_nothing() -> None:
    def refuses(finding: Finding) -> None:
        raise ValueError("no")

    with pytest.warns(gradscope.GradscopeWarning, match="ValueError: no") as caught:
        scope = watched(40, on_finding=refuses)
    assert len(caught) == 1
    assert len(scope.steps) == 40
    assert scope.findings


def test_a_function_that_stops_the_watch_is_told_that_it_cannot() -> None:
    model, optimizer = made()
    scope = gradscope.watch(
        model, optimizer, on_finding=lambda finding: scope.stop(), select="GS201"
    )
    with pytest.warns(gradscope.GradscopeWarning, match=r"stop\(\) cannot be called"), scope:
        train(model, optimizer, 12, clear=False)
    assert len(scope.steps) == 12


def test_no_judging_while_paused() -> None:
    model, optimizer = made()
    with gradscope.watch(model, optimizer, on_finding="raise", select="GS201") as scope:
        optimizer.zero_grad()
        with scope.pause():
            train(model, optimizer, 40, clear=False)
        train(model, optimizer, 3, clear=True)
    assert len(scope.steps) == 3


# -- what is looked for ---------------------------------------------------------------------


def test_select_ignore_and_ignored_parameters() -> None:
    assert [f.code for f in watched(select="missing-zero-grad").findings] == ["GS201"]
    assert "GS201" not in [f.code for f in watched(select="GS2", ignore=["GS201"]).findings]
    assert not watched(ignore_params={"GS201": "*"}).findings
    assert [f.code for f in watched(select="GS2").findings] == ["GS201"]
    left = watched(ignore_params={"GS201": ["0.*"]}).findings
    assert left[0].params == ("2.weight", "2.bias")


def test_the_screen_shows_what_was_asked_for() -> None:
    scope = watched(select=["GS201", "GS601"], ignore=["GS201"])
    assert "GS201 missing-zero-grad" not in str(scope)
    assert "MY001 stepped-often" in str(watched(clear=True, **OWN))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"select": ["GS999"]}, UnknownRuleError, "select: no rule is meant by 'GS999'"),
        ({"ignore": "forgotten"}, UnknownRuleError, "ignore: no rule is meant by 'forgotten'"),
        ({"ignore": [7]}, UsageError, "ignore: 7 is no code"),
        ({"ignore_params": {"GS999": "*"}}, UnknownRuleError, "ignore_params"),
        ({"ignore_params": "GS105"}, UsageError, "ignore_params='GS105'"),
        ({"thresholds": {"GS999": {}}}, UnknownRuleError, "thresholds: no rule is called 'GS999'"),
        ({"thresholds": {"GS201": {"x": 1.0}}}, UsageError, "GS201 missing-zero-grad has no 'x'"),
        ({"thresholds": {"GS201": 3}}, UsageError, "no dict of numbers"),
        ({"on_finding": "stop"}, UsageError, "on_finding='stop': pass 'collect', 'warn', 'raise'"),
        ({"rules": [SteppedOften()]}, UsageError, "pass the class SteppedOften itself"),
        ({"rules": [int]}, UsageError, "is no subclass of gradscope.Rule"),
        ({"rules": "mine"}, UsageError, "pass a list of subclasses"),
        (
            {"rules": [SteppedOften, SteppedOften]},
            UsageError,
            "there is MY001 stepped-often already",
        ),
    ],
)
def test_what_cannot_be_asked_for_is_named(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    model, optimizer = made()
    with pytest.raises(error) as caught:
        gradscope.watch(model, optimizer, **options)
    assert words in str(caught.value)


# -- rules of the program's own -------------------------------------------------------------


def test_an_own_rule_is_selected_and_ignored_by_code_and_name() -> None:
    for how in ("MY001", "my001", "stepped-often"):
        assert [f.code for f in watched(clear=True, rules=[SteppedOften], select=how).findings] == [
            "MY001"
        ]
        ignored = watched(rules=[SteppedOften], ignore=how).findings
        assert "MY001" not in [f.code for f in ignored]


def test_thresholds_are_put_in_place_of_a_rules_own() -> None:
    assert not watched(clear=True, thresholds={"MY001": {"steps": 50}}, **OWN).findings
    assert watched(clear=True, thresholds={"stepped-often": {"steps": 19}}, **OWN).findings
    assert SteppedOften.thresholds == {"steps": 5.0}


def test_an_own_rule_that_raises_takes_only_itself_out() -> None:
    class Broken(SteppedOften):
        code, name = "MY002", "broken"

        def check(self, run: Any) -> list[Finding]:
            raise RuntimeError("oh")

    findings = watched(rules=[Broken]).findings
    assert findings.unchecked["MY002"] == "RuntimeError: oh"
    assert "not checked: MY002 (RuntimeError: oh)" in repr(findings)
    assert findings.errors


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"name": "a-name"}, 'has no code such as code = "MY001"'),
        ({"code": "MY001"}, "has no name such as"),
        ({"code": "my1", "name": "a"}, "has the code 'my1', which is no code such as"),
        ({"code": "MY001", "name": "A Name"}, "has the name 'A Name'"),
        ({"code": "GS201", "name": "a"}, "there is GS201 missing-zero-grad already"),
        ({"code": "MY001", "name": "missing-zero-grad"}, "there is GS201"),
        ({"code": "GS999", "name": "a"}, "codes with GS are gradscope's own"),
        ({"code": "MY001", "name": "a", "severity": 1}, "use one of gradscope.Severity"),
        ({"code": "MY001", "name": "a", "check": gradscope.Rule.check}, "has no method check"),
    ],
)
def test_an_own_rule_that_cannot_be_used_is_named(attributes: dict[str, Any], words: str) -> None:
    rule = type("Mine", (gradscope.Rule,), {"check": lambda self, run: [], **attributes})
    model, optimizer = made()
    with pytest.raises(UsageError) as caught:
        gradscope.watch(model, optimizer, rules=[rule])
    assert words in str(caught.value)
    assert "Mine" in str(caught.value)


def test_the_rule_of_the_documentation_finds_what_it_says() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    torch.manual_seed(0)
    names: dict[str, Any] = {
        "model": nn.ModuleDict({"head": nn.Linear(2, 1)}),
        "train": lambda model, optimizer: grow(model["head"], optimizer),
    }
    names["optimizer"] = torch.optim.SGD(names["model"].parameters(), lr=10.0)

    def grow(head: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(5):
            optimizer.zero_grad()
            (-head(torch.ones(4, 2)).mean()).backward()
            optimizer.step()

    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    found = [f for f in names["scope"].findings if f.code == "MY001"]
    assert {param for finding in found for param in finding.params} == {"head.weight", "head.bias"}
    assert "has grown" in found[0].message
    assert found[0].severity == Severity.WARNING


# -- after the loop -------------------------------------------------------------------------


def test_raise_for_findings() -> None:
    scope = watched()
    with pytest.raises(gradscope.FindingsError, match="GS201 missing-zero-grad") as caught:
        scope.raise_for_findings()
    assert caught.value.findings[0].optimizer == "optimizer"
    own = watched(clear=True, **OWN)
    own.raise_for_findings()
    with pytest.raises(gradscope.FindingsError, match="MY001"):
        own.raise_for_findings("warning")
    with pytest.raises(UsageError, match="at_least='fatal'"):
        own.raise_for_findings("fatal")  # type: ignore[arg-type]
    watched(clear=True, select="GS201").raise_for_findings("warning")


def test_the_example_shows_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(PAGE.parents[1] / "examples" / "findings.py"), run_name="__main__")
    before, stopped, after = re.split("\nstopped .*:|\nafter it:", capsys.readouterr().out)
    assert "GS101 parameter-not-in-optimizer" in before
    assert "MY001 frozen-head" in stopped
    assert "GS201 missing-zero-grad" in stopped
    assert "missing-zero-grad" in after


def some_findings() -> Findings:
    return Findings(
        [
            Finding("GS201", "a-b", Severity.ERROR, "long " * 40, "do <this>", step_first=1),
            Finding(
                "GS202", "c-d", Severity.WARNING, "w", "x", params=("p",), symptoms=("GS1: t",)
            ),
            Finding("GS204", "e-f", Severity.INFO, "i", "y", file="train.py", line=7),
        ],
        {"GS301": "KeyError: 'x'"},
    )


def test_findings_are_printed_for_a_terminal() -> None:
    text = repr(some_findings())
    assert text.startswith("1 error, 1 warning, 1 note\n\n✗ GS201 a-b  error")
    assert "\n! GS202 c-d  warning\n    w\n    fix: x\n    explains: GS1\n" in text
    assert "i GS204 e-f  info · train.py:7" in text
    assert "not checked: GS301 (KeyError: 'x')" in text
    assert max(map(len, text.splitlines())) <= 100
    assert repr(Findings([])) == "no findings"


def test_findings_are_shown_in_a_notebook_and_escaped() -> None:
    html = some_findings()._repr_html_()
    assert "do &lt;this&gt;" in html
    assert "<this>" not in html
    assert "train.py:7" in html


def test_findings_by_severity_and_as_a_frame() -> None:
    findings = some_findings()
    assert [f.code for f in findings.errors] == ["GS201"]
    assert [f.code for f in findings.warnings] == ["GS202"]
    assert [f.code for f in findings.infos] == ["GS204"]
    assert [f.code for f in findings.at_least(Severity.WARNING)] == ["GS201", "GS202"]
    frame = findings.to_pandas()
    assert frame["severity"].tolist() == ["error", "warning", "info"]
    assert frame["params"].tolist() == [(), ("p",), ()]
    assert findings[1:].unchecked == findings.unchecked


def test_every_screen_shows_what_is_wanted_only() -> None:
    scope = watched(clear=False, ignore=["GS201"])
    assert "GS201" not in repr(scope)
    assert "GS201" not in scope._repr_html_()


def test_rules_that_were_not_selected_are_not_said_to_be_checked() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradscope.watch(model, optimizer, select=["GS2"], on_error="raise") as scope:
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
    unchecked = scope.findings.unchecked
    assert "GS201" not in unchecked
    assert unchecked["GS101"] == "not selected"
    assert "checked: 6 rules" in repr(scope)
