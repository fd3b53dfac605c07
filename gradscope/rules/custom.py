"""Rules of the program's own, and numbers in place of a rule's own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from gradscope.errors import UnknownRuleError, UsageError
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.rules.thresholds import replaced_thresholds, thresholds_of
from gradscope.run.recording import Recording

_CODE = re.compile(r"[A-Z]{2,}[0-9]+")
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_OURS = "GS"


def own_rules(rules: object, known: Sequence[type[Rule]]) -> tuple[type[Rule], ...]:
    """Return the rules of a program's own, checked.

    Args:
        rules: what the program passed: a subclass of :class:`Rule`, or several.
        known: the rules there are.

    Raises:
        UsageError: naming the one that cannot be used, and why.
    """
    given = [rules] if isinstance(rules, type | Rule) else rules
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise UsageError(f"rules={given!r}: pass a list of subclasses of gradscope.Rule")
    checked: list[type[Rule]] = []
    for rule in given:
        if isinstance(rule, Rule):
            raise UsageError(
                f"rules: pass the class {type(rule).__name__} itself, without the parentheses"
            )
        if not (isinstance(rule, type) and issubclass(rule, Rule)):
            raise UsageError(f"rules: {rule!r} is no subclass of gradscope.Rule")
        _check_own_rule(rule, (*known, *checked))
        checked.append(rule)
    return tuple(checked)


def _check_own_rule(rule: type[Rule], others: Sequence[type[Rule]]) -> None:
    who = f"rules: {rule.__name__}"
    for attribute, pattern, example in (("code", _CODE, "MY001"), ("name", _NAME, "frozen-head")):
        value = getattr(rule, attribute, None)
        if not (isinstance(value, str) and pattern.fullmatch(value)):
            has = "has no" if value is None else f"has the {attribute} {value!r}, which is no"
            raise UsageError(f'{who} {has} {attribute} such as {attribute} = "{example}"')
    if getattr(rule.check, "__isabstractmethod__", False):
        raise UsageError(f"{who} has no method check(self, run) that returns a list of findings")
    if not isinstance(rule.severity, Severity):
        raise UsageError(f"{who}.severity = {rule.severity!r}: use one of gradscope.Severity")
    for other in others:
        if rule.code == other.code or rule.name == other.name:
            raise UsageError(
                f"{who} is called {rule.code} {rule.name}, but there is {other.code} {other.name} "
                "already: choose another code and name"
            )
    if rule.code.startswith(_OURS):
        raise UsageError(
            f"{who} has the code {rule.code}, but codes with {_OURS} are gradscope's own: choose "
            "another beginning, such as MY001"
        )


def with_thresholds(
    rules: Sequence[type[Rule]], thresholds: Mapping[str, Mapping[str, float]]
) -> tuple[type[Rule], ...]:
    """Return rules that compare with other numbers than their own.

    Args:
        rules: all of them; those for which nothing is asked are returned as they are.
        thresholds: numbers by the rule's code or name, and by the name of the threshold.

    Raises:
        UnknownRuleError: if there is no such rule.
        UsageError: if it has no such threshold, or what is given is no number.
    """
    if not isinstance(thresholds, Mapping):
        raise UsageError(f"thresholds={thresholds!r}: pass numbers by rule and name")
    asked: dict[type[Rule], dict[str, float]] = {}
    for of_rule, values in thresholds.items():
        found = next(
            (r for r in rules if str(of_rule).upper() == r.code or of_rule == r.name), None
        )
        if found is None:
            raise UnknownRuleError(f"thresholds: no rule is called {of_rule!r}")
        if not isinstance(values, Mapping):
            raise UsageError(f"thresholds: {of_rule}: {values!r} is no dict of numbers by name")
        for name, value in values.items():
            known = {**thresholds_of(found), **found.thresholds}
            if name not in known:
                there_are = ", ".join(known) or "none"
                raise UsageError(
                    f"thresholds: {found.code} {found.name} has no {name!r}; there are: {there_are}"
                )
            if type(value) not in (int, float):
                raise UsageError(f"thresholds: {of_rule}: {name}={value!r} is no number")
        asked[found] = asked.get(found, {}) | dict(values)
    return tuple(_adjusted(rule, asked[rule]) if rule in asked else rule for rule in rules)


def _adjusted(rule: type[Rule], values: Mapping[str, float]) -> type[Rule]:
    constants = {name: value for name, value in values.items() if name not in rule.thresholds}

    def check(self: Rule, run: Recording) -> list[Finding]:
        """Check with other numbers."""
        with replaced_thresholds({rule.code: constants} if constants else {}):
            return rule.check(self, run)

    own = {
        "check": check,
        "thresholds": {**rule.thresholds, **values},
        "__doc__": rule.__doc__,
        "__module__": rule.__module__,
    }
    return type(rule.__name__, (rule,), own)
