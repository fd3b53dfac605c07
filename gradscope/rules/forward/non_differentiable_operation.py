"""GS304: an operation without a useful derivative lies between the parameters and the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradscope.rules.facts import at, listed, span, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.forward.detached_loss import DetachedLoss
from gradscope.rules.rule import Rule
from gradscope.run.captured_graph import operation
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    from gradscope.run.captured_graph import CapturedGraph

_WITHOUT_DERIVATIVE = frozenset(
    {
        *("argmax", "argmin", "argsort", "bincount", "histc", "histogram", "searchsorted"),
        *("bucketize", "multinomial", "bernoulli", "one_hot", "nonzero", "unique", "mode"),
        *("gt", "lt", "ge", "le", "eq", "ne", "greater", "less", "isclose", "logical_not"),
        *("__gt__", "__lt__", "__ge__", "__le__", "__eq__", "__ne__", "equal", "allclose"),
        *("long", "int", "bool", "short", "byte", "isin", "count_nonzero", "topk", "randint"),
    }
)
"""Functions that give integers, truth values or positions, in which no graph goes on."""

_FLAT = frozenset({"Round", "Floor", "Ceil", "Trunc", "Sign", "Sgn", "Heaviside", "FloorDivide"})
"""Operations that autograd does follow, with a derivative of zero everywhere."""

_LEAST_STEPS = 3

_LEAST_SHARE = 0.95


class NonDifferentiableOperation(Rule):
    """GS304 non-differentiable-operation: an operation without a derivative stops the gradient.

    ## What it finds

    On the only way from parameters to the loss lies `argmax`, a comparison, a cast to integers, or
    `round`, `floor`, `ceil` or `sign`.

    ## Why it matters

    Such functions are constant between their jumps, so their derivative is zero or not defined.
    With the former every gradient is zero, with the latter the graph ends; either way nothing in
    front of the operation learns.

    ## How it is found

    Where a graph ends before the parameters, gradscope has followed the first step from call to
    call and names the one that ended it. Where it goes on, the finding is raised when every path
    from some parameters to the loss leads through rounding or a sign, and their gradients are
    exactly zero. A straight-through estimator has another path, and is silent.

    ## Example

        predicted = model(x).argmax(1).float()
        loss = (predicted - y).abs().mean().requires_grad_()

    ## Fix

        loss = F.cross_entropy(model(x), y)

    ## When it is wrong

    When nothing in front of the operation is meant to learn.
    """

    code = "GS304"
    name = "non-differentiable-operation"
    severity = Severity.ERROR
    tables = ("steps", "grads", "backwards", "events", "params")

    def check(self, run: Recording) -> list[Finding]:
        """Return at most one finding."""
        for detached in DetachedLoss().check(run):
            function = str(detached.evidence["cut_by"])
            if function in _WITHOUT_DERIVATIVE:
                where = at(detached.file, detached.line)
                return [
                    self.finding(
                        message=(
                            f"{function}(){where} has no derivative: the graph of the loss ends "
                            "there, and no parameter ever gets a gradient"
                        ),
                        fix=f"use a differentiable loss in the place of {function}(){where}",
                        params=detached.params,
                        optimizer=detached.optimizer,
                        step_first=detached.step_first,
                        step_last=detached.step_last,
                        count=detached.count,
                        file=detached.file,
                        line=detached.line,
                        evidence={"operation": function, "parameters": len(detached.params)},
                    )
                ]
        return self._flattened(run)

    def _flattened(self, run: Recording) -> list[Finding]:
        for step in sorted(run.graphs):
            graph = run.graphs[step]
            flat = [n for n in range(len(graph)) if operation(graph.op_of(n)) in _FLAT]
            if not flat:
                continue
            behind = _only_behind(graph, flat)
            zero = tuple(name for name in _all_zero(run) if name in behind)
            if not zero:
                continue
            node = flat[0]
            line_number = int(graph.line[node])
            file, line = graph.lines[line_number] if line_number >= 0 else (None, None)
            module = graph.calls.path(int(graph.call[node])) if graph.call[node] >= 0 else ""
            steps = stepped(run)
            function = operation(graph.op_of(node)).lower()
            return [
                self.finding(
                    message=(
                        f"{function}(){at(file, line)} has a derivative of zero everywhere, and "
                        f"every path from {listed(zero)} to the loss leads through it: their "
                        "gradients are exactly zero"
                    ),
                    fix=(
                        f"leave {function}(){at(file, line)} out in training, or pass the gradient "
                        "straight through: x + (x.round() - x).detach()"
                    ),
                    params=zero,
                    modules=(module,) if module else (),
                    **span(steps),
                    file=file,
                    line=line,
                    evidence={"operation": function, "parameters": len(zero)},
                )
            ]
        return []


def _only_behind(graph: CapturedGraph, blocked: list[int]) -> set[str]:
    """Names of the parameters all of whose paths to the roots lead through blocked nodes."""
    seen = {int(root) for root in graph.roots} - set(blocked)
    pending = list(seen)
    while pending:
        for giver in graph.givers_of(pending.pop()):
            if giver not in seen and giver not in blocked:
                seen.add(giver)
                pending.append(giver)
    leaves = np.flatnonzero(graph.param >= 0).tolist()
    free = {name for node in leaves if node in seen for name in graph.params[graph.param[node]]}
    every = {name for names_of in graph.params for name in names_of}
    return every - free


def _all_zero(run: Recording) -> list[str]:
    """The parameters whose computed gradients are exactly zero at nearly every step."""
    grads = run.frame("grads")
    grads = grads.loc[grads["status"].isin(["fresh", "accumulated"])]
    return [
        str(param)
        for param, own in grads.groupby("param", sort=False)
        if len(own) >= _LEAST_STEPS and (own["norm"] == 0).sum() >= _LEAST_SHARE * len(own)
    ]
