"""Which findings are wanted: by rule, by parameter, and by comments in the program."""

from __future__ import annotations

import fnmatch
import linecache
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from gradscope.errors import UnknownRuleError
from gradscope.rules import RULES
from gradscope.rules.finding import NOT_SELECTED, Finding, Findings
from gradscope.rules.rule import Rule

_ALLOWED = re.compile(r"#\s*gradscope:\s*allow\s+([\w-]+(?:\s*,\s*[\w-]+)*)", re.IGNORECASE)


def selected(
    findings: Findings,
    *,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    ignore_params: Mapping[str, Sequence[str]] | None = None,
    allow_comments: bool = True,
    rules: Sequence[type[Rule]] = RULES,
) -> Findings:
    """Return the findings that are wanted, in their order; rules that are not are unchecked.

    A rule is meant by its code (``GS201``), its name (``missing-zero-grad``) or the beginning of
    its code (``GS2``).

    Args:
        findings: all of them.
        select: rules whose findings are wanted; empty for all.
        ignore: rules whose findings are not.
        ignore_params: patterns (as in ``fnmatch``) of parameter or module names, by rule. A finding
            about such parameters only is dropped; one about others too goes on without them.
        allow_comments: whether ``# gradscope: allow GS105`` at a finding's line, or in a comment
            of its own right above it, drops it.
        rules: every rule there is, those of the program's own with them.
    """
    wanted: list[Finding] = []
    for finding in findings:
        if not _is_wanted(finding.code, finding.name, select, ignore):
            continue
        if allow_comments and _is_allowed(finding):
            continue
        kept = _without_params(finding, ignore_params or {})
        if kept is not None:
            wanted.append(kept)
    unwanted = {
        rule.code: NOT_SELECTED
        for rule in rules
        if not _is_wanted(rule.code, rule.name, select, ignore)
    }
    return Findings(wanted, unwanted | findings.unchecked)


def selected_rules(
    select: Sequence[str], ignore: Sequence[str], rules: Sequence[type[Rule]] = RULES
) -> tuple[type[Rule], ...]:
    """Return the rules that are wanted; see :func:`selected`."""
    return tuple(rule for rule in rules if _is_wanted(rule.code, rule.name, select, ignore))


def check_selectors(selectors: Iterable[str], rules: Sequence[type[Rule]] = RULES) -> None:
    """Make sure that each selector means a rule.

    Raises:
        UnknownRuleError: naming the one that does not.
    """
    for selector in selectors:
        if not any(_means(selector, rule.code, rule.name) for rule in rules):
            raise UnknownRuleError(
                f"no rule is meant by {selector!r}: pass a code such as GS201, the beginning of "
                "one such as GS2, or a name such as missing-zero-grad (gradscope rule --all lists "
                "them)"
            )


def _is_wanted(code: str, name: str, select: Sequence[str], ignore: Sequence[str]) -> bool:
    if select and not any(_means(selector, code, name) for selector in select):
        return False
    return not any(_means(selector, code, name) for selector in ignore)


def _means(selector: str, code: str, name: str) -> bool:
    selector = selector.strip().lower()
    return selector == name or (len(selector) > 1 and code.lower().startswith(selector))


def _is_allowed(finding: Finding) -> bool:
    if finding.file is None or finding.line is None:
        return False
    above = linecache.getline(finding.file, finding.line - 1).strip()
    comments = [linecache.getline(finding.file, finding.line)]
    if above.startswith("#"):  # a comment behind code is about that code
        comments.append(above)
    return any(
        _means(selector, finding.code, finding.name)
        for comment in comments
        for allowed in _ALLOWED.findall(comment)
        for selector in allowed.split(",")
    )


def _without_params(finding: Finding, ignored: Mapping[str, Sequence[str]]) -> Finding | None:
    patterns = [
        pattern
        for selector, of_rule in ignored.items()
        if _means(selector, finding.code, finding.name)
        for pattern in of_rule
    ]
    if not patterns:
        return finding

    def left(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(
            name
            for name in names
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        )

    params, modules = left(finding.params), left(finding.modules)
    named = finding.params or finding.modules
    if named and not (params if finding.params else modules):
        return None
    return replace(finding, params=params, modules=modules)
