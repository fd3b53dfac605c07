"""Findings of several processes that trained together, told once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gradscope.run.recording import Recording

if TYPE_CHECKING:
    from gradscope.rules.finding import Finding
    from gradscope.rules.rule import Rule


def of_all_ranks(rule: Rule, run: Recording) -> list[Finding]:
    """Return what a rule finds in each process of a run, each cause once."""
    if len(run.ranks) == 1:
        return rule.check(run)
    together: dict[Any, dict[int, Finding]] = {}
    for rank, recording in run.ranks.items():
        for finding in rule.check(recording):
            together.setdefault(_cause(finding), {}).setdefault(rank, finding)
    noun = "rank" if is_one_training(run) else "process"
    return [_joined(found, len(run.ranks), noun) for found in together.values()]


def is_one_training(run: Recording) -> bool:
    """Whether the processes of a run are ranks of one group."""
    return any(each.world_size > 1 for each in run.ranks.values())


def listed_ranks(ranks: Iterable[int], noun: str = "rank") -> str:
    """Return ranks in words: ``rank 3``, ``ranks 0–3 and 7``."""
    numbers = sorted(ranks)
    stretches: list[list[int]] = []
    for number in numbers:
        if stretches and number == stretches[-1][-1] + 1:
            stretches[-1].append(number)
        else:
            stretches.append([number])
    words = []
    for stretch in stretches:
        if len(stretch) > 2:
            words.append(f"{stretch[0]}–{stretch[-1]}")
        else:
            words += map(str, stretch)
    plural = noun if len(numbers) == 1 else "processes" if noun == "process" else f"{noun}s"
    text = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
    return f"{plural} {text}"


def _cause(finding: Finding) -> Any:
    # Numbers in the message differ from rank to rank; what it is about does not.
    return (
        finding.code,
        finding.severity,
        finding.optimizer,
        finding.params,
        finding.modules,
        finding.file,
        finding.line,
    )


def _joined(found: dict[int, Finding], n_ranks: int, noun: str) -> Finding:
    first = next(iter(found.values()))
    where = listed_ranks(found, noun)
    steps = [f for f in found.values() if f.step_first is not None and f.step_last is not None]
    message = first.message
    if len(found) < n_ranks:
        message = f"{message} (on {where} of {n_ranks})"
    return replace(
        first,
        message=message,
        step_first=min((f.step_first or 0 for f in steps), default=first.step_first),
        step_last=max((f.step_last or 0 for f in steps), default=first.step_last),
        count=max(f.count for f in found.values()),
        evidence={**first.evidence, "ranks": where},
    )
