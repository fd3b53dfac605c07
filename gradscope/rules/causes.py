"""One finding for one cause: what another finding explains is folded under it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from gradscope.rules.finding import Finding

if TYPE_CHECKING:
    from gradscope.rules.rule import Rule


def causes_first(found: Sequence[Finding], rules: Sequence[type[Rule]]) -> list[Finding]:
    """Fold symptoms under their causes, and order what is left by severity and beginning.

    A finding is a symptom of another one if its rule names the other's as a cause
    (``symptom_of``) and the two are about the same thing: the same optimizer where both name one,
    and parameters that the cause covers where both name some.

    Args:
        found: every finding.
        rules: the rules that they came from.
    """
    symptom_of = {rule.code: rule.symptom_of for rule in rules}
    cause_of = {
        number: cause
        for number, finding in enumerate(found)
        for cause, other in enumerate(found)
        if other.severity >= finding.severity
        and other.code in symptom_of.get(finding.code, ())
        and _are_about_the_same(finding, other)
    }
    symptoms: dict[int, list[str]] = {}
    for number in cause_of:
        root, seen = number, {number}
        while root in cause_of and cause_of[root] not in seen:
            root = cause_of[root]
            seen.add(root)
        if root in cause_of:  # two that explain each other: neither is folded away
            continue
        symptoms.setdefault(root, []).append(f"{found[number].code}: {found[number].message}")
    folded = {number for number in cause_of if _leads_to_a_root(number, cause_of)}
    left = [
        replace(finding, symptoms=(*finding.symptoms, *symptoms.get(number, ())))
        for number, finding in enumerate(found)
        if number not in folded
    ]
    order = {rule.code: number for number, rule in enumerate(rules)}
    return sorted(
        left,
        key=lambda f: (
            -f.severity,
            -1 if f.step_first is None else f.step_first,
            order.get(f.code, len(order)),
        ),
    )


def _leads_to_a_root(number: int, cause_of: dict[int, int]) -> bool:
    seen = {number}
    while number in cause_of:
        number = cause_of[number]
        if number in seen:
            return False
        seen.add(number)
    return True


def _are_about_the_same(symptom: Finding, cause: Finding) -> bool:
    if symptom.optimizer and cause.optimizer and symptom.optimizer != cause.optimizer:
        return False
    return not (symptom.params and cause.params) or set(symptom.params) <= set(cause.params)
