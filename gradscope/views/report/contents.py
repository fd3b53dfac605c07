"""What stands on the page besides charts, as plain data for its template."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from gradscope.rules import RULES, Finding, Findings, Severity
from gradscope.rules.finding import NOT_SELECTED
from gradscope.rules.wording import shortened
from gradscope.views.loop import LoopSummary, evidence_text
from gradscope.views.report.forward_order import forward_order
from gradscope.views.report.names import shown
from gradscope.views.report.texts import coded_texts

if TYPE_CHECKING:
    from gradscope.run.recording import Recording

MOST_ROWS = 2000
"""Of how many parameters the table tells."""

_MOST_EVIDENCE = 6
_LONGEST = 1500


def shown_findings(findings: Findings) -> dict[str, list[dict[str, Any]]]:
    """Return what the page says of each finding: those that matter, and ``infos``."""
    told = [(finding, _finding(finding)) for finding in findings]
    return {
        "serious": [each for finding, each in told if finding.severity > Severity.INFO],
        "infos": [each for finding, each in told if finding.severity == Severity.INFO],
    }


def _finding(finding: Finding) -> dict[str, Any]:
    evidence = [
        (shown(str(name).replace("_", " "), 60), shown(evidence_text(value), 300))
        for name, value in finding.evidence.items()
    ]
    return {
        "code": shown(finding.code, 20),
        "name": shown(finding.name, 80),
        "severity": str(finding.severity),
        "steps": finding.steps,
        "place": f"{shown(shortened(finding.file), 300)}:{finding.line}" if finding.file else "",
        "message": shown(finding.message, _LONGEST),
        "fix": shown(finding.fix, _LONGEST),
        "evidence": evidence[:_MOST_EVIDENCE],
        "more_evidence": evidence[_MOST_EVIDENCE:],
        "symptoms": [shown(each, _LONGEST) for each in finding.symptoms],
    }


def verdict_in_words(run: Recording, summary: LoopSummary, findings: Findings) -> str:
    """Return a sentence that says what the verdict means to one who never saw such a page."""
    if summary.mark == "✗":
        worst = max(findings, key=lambda finding: finding.severity)
        return shown(worst.message, 400)
    if summary.mark == "–":
        return ""
    n_rules = len(RULES) - len(findings.unchecked)
    steps = "1 step" if run.n_steps == 1 else f"{run.n_steps:,} steps"
    return f"{n_rules} rules were applied to {steps} of training, and none found anything wrong."


def tiles(run: Recording, summary: LoopSummary) -> list[tuple[str, str, str]]:
    """Return the few numbers to see first: what, how much, and a word about it."""
    steps = run.frame("steps")
    found = []
    if len(steps):
        found.append(("steps", f"{len(steps):,}", _outcomes(steps)))
        losses = steps.loc[steps["n_backward"] > 0, "loss"].to_numpy(np.float64)
        known = losses[np.isfinite(losses)]
        if len(known) and steps["optimizer"].nunique() == 1:
            tail = known[-max(1, min(10, len(known) // 10)) :]
            last = "last" if len(tail) == 1 else f"mean of the last {len(tail)}"
            found.append(("loss", f"{known[0]:.4g} → {tail.mean():.4g}", f"first → {last}"))
    registered = [entry for entry in run.parameters if entry.in_model] or run.parameters
    if registered:
        numbers = sum(entry.numel for entry in registered)
        found.append(("parameters", _compact(numbers), f"in {len(registered):,} tensors"))
    spent = sum(run.observe_seconds.values())
    if run.seconds:
        found.append(("watching", f"{spent / run.seconds:.1%}", "of the time"))
    return found


def _outcomes(steps: Any) -> str:
    counts = steps["outcome"].value_counts()
    if set(counts.index) == {"stepped"}:
        return "all stepped"
    return ", ".join(f"{count:,} {outcome}" for outcome, count in counts.items())


def _compact(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{number:,}"


def parameter_rows(run: Recording) -> tuple[list[dict[str, Any]], int]:
    """Return a row for each parameter in forward order, and how many are left out."""
    order, _ = forward_order(run)
    optimizers = [shown(optimizer.name, 60) for optimizer in run.optimizers]
    several = [optimizer.n_groups > 1 for optimizer in run.optimizers]
    last_norm = _last(run, "grads", "norm")
    last_ratio = _last(run, "updates", "update_ratio")
    statuses = _statuses(run)
    rows = []
    for number in order[:MOST_ROWS]:
        entry = run.parameters[number]
        rows.append(
            {
                "name": shown(entry.name),
                "aliases": ", ".join(shown(alias) for alias in entry.aliases[:4]),
                "module_type": shown(entry.module_type, 60),
                "shape": " × ".join(map(str, entry.shape)) or "scalar",
                "numel": entry.numel,
                "dtype": shown(entry.dtype, 30),
                "optimizer": ", ".join(
                    optimizers[holder] + (f", group {group}" if several[holder] else "")
                    for holder, group in entry.holders[:3]
                )
                or ("frozen" if not entry.requires_grad else "none"),
                "trained": bool(entry.holders) and entry.requires_grad,
                "status": statuses.get(number, "–"),
                "norm": _number(last_norm.get(number)),
                "ratio": _number(last_ratio.get(number)),
            }
        )
    return rows, max(0, len(order) - MOST_ROWS)


def _last(run: Recording, table: str, column: str) -> dict[int, float]:
    rows = run.rows(table)
    params, values = rows.array("param"), rows.array(column)
    known = ~np.isnan(values)
    last = np.full(len(run.parameters), np.nan)
    last[params[known]] = values[known]  # later rows overwrite earlier ones
    return {number: float(last[number]) for number in np.flatnonzero(~np.isnan(last)).tolist()}


def _statuses(run: Recording) -> dict[int, str]:
    """The usual status of each parameter's gradient, and how many others there were."""
    rows = run.rows("grads")
    if not rows.n_rows:
        return {}
    codes, names = coded_texts(rows, "status")
    cells = rows.array("param") * np.int64(len(names)) + codes
    counts = np.bincount(cells, minlength=len(run.parameters) * len(names))
    counts = counts.reshape(len(run.parameters), len(names))
    told = {}
    for number in np.flatnonzero(counts.any(1)).tolist():
        usual = int(counts[number].argmax())
        others = int(counts[number].sum() - counts[number][usual])
        told[number] = names[usual] + (f" (but {others:,} times)" if others else "")
    return told


def _number(value: float | None) -> dict[str, Any]:
    """A number for people, and the same to sort by."""
    if value is None:
        return {"text": "–", "sort": -1.0}
    if not math.isfinite(value):
        return {"text": str(value), "sort": 1e308}
    return {"text": f"{value:.3g}", "sort": value}


def checked(run: Recording, findings: Findings) -> dict[str, Any]:
    """Return which rules were applied, which were not and why, and what was not observed."""
    found: dict[str, int] = {}
    for finding in findings:
        found[finding.code] = found.get(finding.code, 0) + 1
    return {
        "rules": [
            {"code": rule.code, "name": rule.name, "found": found.get(rule.code, 0)}
            for rule in RULES
            if rule.code not in findings.unchecked
        ],
        "unselected": [code for code, why in findings.unchecked.items() if why == NOT_SELECTED],
        "failed": [(shown(who, 20), shown(why, _LONGEST)) for who, why in findings.failed()],
        "notes": [shown(note, _LONGEST) for note in dict.fromkeys(run.notes)],
    }


def cost_rows(run: Recording) -> list[dict[str, Any]]:
    """Return what watching cost, a row per instrument and one for all together."""
    return list(_costs(run))


def _costs(run: Recording) -> Iterator[dict[str, Any]]:
    if not run.observe_seconds:
        return
    for name, row in run.overhead(run.seconds).iterrows():
        yield {
            "name": shown(name, 60),
            "calls": f"{int(row['calls']):,}",
            "total": f"{row['total_ms']:,.1f}",
            "each": f"{row['ms_per_step']:.3f}",
            "share": "–" if math.isnan(row["share"]) else f"{row['share']:.2%}",
        }
