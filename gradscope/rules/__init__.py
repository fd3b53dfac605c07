"""Every diagnosis, and how a recording is judged by them.

One rule is one file, in the folder of the line of the loop that it is about. A new rule is added to
:data:`RULES` and is then documented, tested and listed with the others.
"""

from __future__ import annotations

from gradscope.errors import UnknownRuleError
from gradscope.rules.finding import Finding, Findings, Severity
from gradscope.rules.forward.detached_loss import DetachedLoss
from gradscope.rules.rule import Rule
from gradscope.rules.zero_grad.missing_zero_grad import MissingZeroGrad
from gradscope.run.recording import Recording

__all__ = ["RULES", "Finding", "Findings", "Rule", "Severity", "diagnose", "find_rule"]

RULES: tuple[type[Rule], ...] = (MissingZeroGrad, DetachedLoss)


def diagnose(run: Recording) -> Findings:
    """Judge a recording by every rule; errors come first, then what began first.

    A rule that raises takes nothing but itself out; ``Findings.unchecked`` names it.
    """
    found: list[Finding] = []
    unchecked: dict[str, str] = {}
    for rule in RULES:
        try:
            found += rule().check(run)
        except Exception as error:
            unchecked[rule.code] = f"{type(error).__name__}: {error}"
    found.sort(key=lambda f: (-f.severity, -1 if f.step_first is None else f.step_first, f.code))
    return Findings(found, unchecked)


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
