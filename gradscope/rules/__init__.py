"""Every diagnosis, and how a recording is judged by them.

One rule is one file, in the folder of the line of the loop that it is about. A new rule is added to
``RULES`` of its folder and is then documented, tested and listed with the others.
"""

from __future__ import annotations

from collections.abc import Sequence

from gradscope.errors import UnknownRuleError
from gradscope.rules import (
    backward,
    distributed,
    forward,
    learning,
    ourselves,
    parameters,
    step,
    zero_grad,
)
from gradscope.rules.causes import causes_first
from gradscope.rules.facts import listed
from gradscope.rules.finding import UNREAD, Finding, Findings, Severity
from gradscope.rules.ranks import of_all_ranks
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording

__all__ = ["RULES", "Finding", "Findings", "Rule", "Severity", "diagnose", "find_rule"]

RULES: tuple[type[Rule], ...] = tuple(
    sorted(
        (
            *parameters.RULES,
            *zero_grad.RULES,
            *forward.RULES,
            *backward.RULES,
            *step.RULES,
            *learning.RULES,
            *distributed.RULES,
            *ourselves.RULES,
        ),
        key=lambda rule: rule.code,
    )
)


def diagnose(run: Recording, rules: Sequence[type[Rule]] = RULES) -> Findings:
    """Judge a recording; causes come before their symptoms, and errors before warnings.

    A rule that raises takes nothing but itself out; ``Findings.unchecked`` names it. So it does
    rules about tables that cannot be read as a whole: what is missing in them was not amiss.

    Args:
        run: the recording.
        rules: by which it is judged; all by default.
    """
    found: list[Finding] = []
    unchecked: dict[str, str] = {}
    for rule in rules:
        try:
            unread = run.unreadable(rule.tables or ("steps",))
            if unread:
                unchecked[rule.code] = f"{UNREAD} {listed(unread, len(unread))} can be read"
                continue
            found += rule().check(run) if rule.compares_ranks else of_all_ranks(rule(), run)
        except Exception as error:
            unchecked[rule.code] = f"{type(error).__name__}: {error}"
    return Findings(causes_first(found, rules), unchecked)


def find_rule(code_or_name: str) -> type[Rule]:
    """Return the rule with a code such as ``GS201`` or a name such as ``missing-zero-grad``.

    Raises:
        UnknownRuleError: naming the rules there are.
    """
    for rule in RULES:
        if code_or_name.upper() == rule.code or code_or_name.lower() == rule.name:
            return rule
    known = ", ".join(f"{rule.code} {rule.name}" for rule in RULES)
    raise UnknownRuleError(f"no rule is called {code_or_name!r}; there are: {known}")
