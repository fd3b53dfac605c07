"""What is known of the parameters at the step of a captured graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gradscope.graphs.overlay import StepFacts
from gradscope.rules import Finding
from gradscope.run.recording import Recording


def steps_of_backward(run: Recording, step: int) -> list[int]:
    """Return a step, and those after it that used gradients of the same backward."""
    with_backward = set(run.rows("backwards").array("step").tolist())
    held = set(run.rows("steps").array("step").tolist())
    without = held - with_backward
    steps = [step]
    while steps[-1] + 1 in without:
        steps.append(steps[-1] + 1)
    return steps


def graph_facts(run: Recording, findings: Iterable[Finding], step: int) -> StepFacts:
    """Gather facts to colour a graph by, each by the parameter's name.

    Args:
        run: what was recorded.
        findings: of it.
        step: of the graph. Steps after it that had no backward of their own used its gradients;
            of them all, what is known of the earliest counts.
    """
    steps = steps_of_backward(run, step)

    def by_param(table: str, column: str) -> dict[str, Any]:
        known: dict[str, Any] = {}
        for each in reversed(steps):
            rows = run.rows_of(table, step=each).dropna(subset=[column])
            known |= dict(zip(rows["param"], rows[column], strict=True))
        return known

    named: dict[str, list[str]] = {}
    for finding in findings:
        for param in finding.params:
            named.setdefault(param, []).append(finding.code)
    return StepFacts(
        grad_norm=by_param("grads", "norm"),
        grad_status=by_param("grads", "status"),
        nonfinite=by_param("grads", "nonfinite"),
        update_ratio=by_param("updates", "update_ratio"),
        findings={param: ", ".join(codes) for param, codes in named.items()},
    )
