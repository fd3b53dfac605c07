"""By what a recording is judged. Free of torch, so that an opened run is judged likewise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gradscope.config import as_patterns
from gradscope.errors import UnknownRuleError, UsageError
from gradscope.rules import RULES, Findings, Rule, diagnose, find_rule
from gradscope.rules.custom import own_rules, with_thresholds
from gradscope.rules.selection import check_selectors, selected, selected_rules
from gradscope.run.recording import Recording


@dataclass(frozen=True, slots=True)
class Criteria:
    """By what a recording is judged.

    Attributes:
        rules: all rules that are applied, with the thresholds asked for.
        select, ignore: as the watch was told.
        ignore_params: patterns of parameter or module names to pass over, by rule.
    """

    rules: tuple[type[Rule], ...] = RULES
    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    ignore_params: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def as_plain(self) -> dict[str, Any]:
        """Return it as JSON can hold it; rules of the program's own by their names."""
        own = {rule.name for rule in self.rules} - {rule.name for rule in RULES}
        changed = {
            rule.code: dict(rule.thresholds)
            for rule in self.rules
            if rule.name not in own
            and dict(rule.thresholds) != dict(find_rule(rule.code).thresholds)
        }
        return {
            "select": [each for each in self.select if each not in own],
            "ignore": [each for each in self.ignore if each not in own],
            "ignore_params": {
                rule: list(patterns)
                for rule, patterns in self.ignore_params.items()
                if rule not in own
            },
            "thresholds": changed,
            "own_rules": sorted(own),
        }

    def judge(self, run: Recording) -> Findings:
        """Return what is wrong, as far as it is wanted."""
        # Rules that are not wanted are not applied: what one of them would explain stands by
        # itself.
        rules = selected_rules(self.select, self.ignore, self.rules)
        return selected(
            diagnose(run, rules),
            select=self.select,
            ignore=self.ignore,
            ignore_params=self.ignore_params,
            rules=self.rules,
        )


def criteria(
    select: object = (),
    ignore: object = (),
    ignore_params: Mapping[str, object] | None = None,
    thresholds: Mapping[str, Mapping[str, float]] | None = None,
    rules: object = (),
) -> Criteria:
    """Return what a watch was told, checked.

    Raises:
        UsageError: if a rule of the program's own, a threshold or a pattern cannot be used.
        UnknownRuleError: if something is said of a rule that there is not.
    """
    own = own_rules(rules, RULES)
    everything = with_thresholds((*RULES, *own), thresholds or {})
    if not isinstance(ignore_params or {}, Mapping):
        raise UsageError(f"ignore_params={ignore_params!r}: pass patterns by rule")
    patterns = {
        _as_selectors("ignore_params", rule, own)[0]: as_patterns(f"ignore_params[{rule!r}]", given)
        for rule, given in (ignore_params or {}).items()
    }
    return Criteria(
        everything,
        _as_selectors("select", select, own),
        _as_selectors("ignore", ignore, own),
        patterns,
    )


def _as_selectors(argument: str, selectors: object, own: tuple[type[Rule], ...]) -> tuple[str, ...]:
    """Selectors, each checked; an own rule's code becomes its name."""
    name_of = {rule.code: rule.name for rule in own}
    names = set(name_of.values())
    wanted = []
    for selector in as_patterns(argument, selectors):
        if not isinstance(selector, str):
            raise UsageError(f"{argument}: {selector!r} is no code or name of a rule")
        selector = name_of.get(selector.upper(), selector)
        if selector not in names:
            try:
                check_selectors([selector])
            except UnknownRuleError as error:
                raise UnknownRuleError(f"{argument}: {error}") from None
        wanted.append(selector)
    return tuple(wanted)
