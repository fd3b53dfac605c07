"""GS605: units that started alike and get the same gradient stay alike for ever."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradscope.rules.facts import listed, span, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.captured_graph import operation
from gradscope.run.entries import ParameterEntry
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import pandas as pd

    from gradscope.run.captured_graph import CapturedGraph

_LEAST_LOOKS = 3
"""A last layer that starts with zeros, or an adapter, breaks its symmetry at the first step."""

_LEAST_STEPS = 5
"""Weights of zero that wait for others to move have a gradient at the second step."""

_LAYERS = (
    "Linear",
    "Conv",
    "LSTM",
    "GRU",
    "RNN",
    "Bilinear",
    "MultiheadAttention",
    "NonDynamicallyQuantizableLinear",
)
"""Modules whose weights have one row for each unit. Rows of any other parameter may be used alike
on purpose, such as a bias for each position whose outputs are averaged."""


class SymmetricInitialization(Rule):
    """GS605 symmetric-initialization: all units of a layer are the same, and stay the same.

    ## What it finds

    All rows of a weight are equal, and so are all rows of its gradient, from the start and at every
    later look. Or a weight that began with zeros has a gradient of exactly zero at every step.

    ## Why it matters

    Units that compute the same get the same gradient, and go on to compute the same: a layer of 64
    units that start equal is a layer of one. Of two matrices that are multiplied and are both zero,
    neither gets a gradient: each is the other's derivative.

    ## How it is found

    At closer looks all rows of every weight and of its gradient are compared, those of each gate
    by themselves in a recurrent layer; of a matrix that a module of the program's own holds, and
    multiplies with something on its left, the columns. The finding is raised
    when they were equal at every look, at least three, the last ones long after the start. A layer
    that starts with zeros on purpose, such as the last one of a block, is different after one step.
    Zeros that get no gradient are told from the norms of all steps, at least five; where weights
    that did not begin with zeros get none either, that has another cause.

    ## Example

        nn.init.zeros_(layer.weight)

        self.A = nn.Parameter(torch.zeros(rank, n))     # LoRA: one of both must not be zero
        self.B = nn.Parameter(torch.zeros(m, rank))

    ## Fix

        nn.init.xavier_uniform_(layer.weight)

    ## When it is wrong

    When a layer's outputs are used in exactly the same way, such as only through their mean.
    """

    code = "GS605"
    name = "symmetric-initialization"
    severity = Severity.ERROR
    tables = ("params", "steps", "grads")
    symptom_of = ("GS405", "GS503", "GS601")

    def check(self, run: Recording) -> list[Finding]:
        """Return at most one finding, about all such weights."""
        looked = [
            entry
            for entry in run.parameters
            if entry.n_looks >= _LEAST_LOOKS
            and entry.requires_grad
            and entry.holders
            and len(entry.shape) >= 2
        ]
        by_rows = [
            entry
            for entry in looked
            if entry.n_symmetric_looks == entry.n_looks
            and any(kind in entry.module_type for kind in _LAYERS)
        ]
        by_columns = [
            entry
            for entry in looked
            if entry.n_symmetric_columns_looks == entry.n_looks
            and not any(kind in entry.module_type for kind in _LAYERS)
            and _is_on_the_right(run, entry)
        ]
        alike = by_rows or by_columns
        steps = stepped(run)
        if steps.empty:
            return []
        if not alike:
            return self._stuck_at_zero(run, steps)
        weights = tuple(entry.name for entry in alike)
        modules = tuple(dict.fromkeys(entry.module for entry in alike))
        # Their biases share their fate.
        params = tuple(entry.name for entry in run.parameters if entry.module in modules)
        units = "rows" if by_rows else "columns"
        zero = [entry.name for entry in alike if entry.norm_first == 0]
        began = "with zeros" if len(zero) == len(alike) else f"with equal {units}"
        return [
            self.finding(
                message=(
                    f"{listed(weights)} began {began}, and all {units} still are alike, gradients "
                    f"included, at all {alike[0].n_looks} looks: all units of these layers compute "
                    "the same"
                ),
                fix=(
                    "initialise these weights at random, with nn.init.xavier_uniform_ or "
                    "nn.init.kaiming_normal_; only biases may start with zeros"
                ),
                params=params,
                modules=tuple(module for module in modules if module),
                **span(steps),
                evidence={
                    "looks": alike[0].n_looks,
                    "began_with_zeros": len(zero),
                    "symmetric_weights": len(alike),
                },
            )
        ]

    def _stuck_at_zero(self, run: Recording, steps: pd.DataFrame) -> list[Finding]:
        """Find weights that began with zeros, and whose gradients are zeros at every step."""
        weights = {entry.name: entry for entry in run.parameters if len(entry.shape) >= 2}
        if not any(entry.norm_first == 0 and entry.holders for entry in weights.values()):
            return []
        grads = run.frame("grads")
        grads = grads.loc[grads["param"].isin(weights) & grads["step"].isin(steps["step"])]
        got = grads.loc[grads["status"].isin(("fresh", "accumulated"))]
        norms = got.groupby("param", sort=False)["norm"].agg(["max", "count"])
        none = norms.index[(norms["max"] == 0) & (norms["count"] >= _LEAST_STEPS)]
        stuck = [weights[str(name)] for name in none]
        if not stuck or any(entry.norm_first != 0 or entry.norm_last != 0 for entry in stuck):
            return []
        names = tuple(entry.name for entry in stuck)
        return [
            self.finding(
                message=(
                    f"{listed(names)} began with zeros and stay there: every gradient of theirs is "
                    f"exactly zero, at all {int(norms.loc[none, 'count'].min())} steps"
                ),
                fix=(
                    "where two of them are multiplied, as in an adapter, initialise one at random, "
                    "with nn.init.kaiming_uniform_, and leave only the other at zero"
                ),
                params=names,
                modules=tuple(dict.fromkeys(entry.module for entry in stuck if entry.module)),
                **span(steps),
                evidence={"weights_of_zero": len(stuck), "largest_gradient_norm": 0.0},
            )
        ]


def _is_on_the_right(run: Recording, entry: ParameterEntry) -> bool:
    """Whether a matrix is used as the right side of matrix products only: ``x @ W``."""
    if len(entry.shape) != 2 or not run.graphs:
        return False
    graph = run.graphs[min(run.graphs)]
    leaves = [number for number, names in enumerate(graph.params) if entry.name in names]
    nodes = np.flatnonzero(np.isin(graph.param, leaves))
    users = [int(user) for node in nodes for user in graph.target[graph.source == node]]
    return bool(users) and all(_has_on_the_right(graph, user, entry.shape) for user in users)


def _has_on_the_right(graph: CapturedGraph, user: int, shape: tuple[int, ...]) -> bool:
    if operation(graph.op_of(user)) not in ("Mm", "Addmm"):
        return False
    # On the left, it would give its number of rows to the result.
    return all(
        len(given) == 2 and given[1] == shape[1] and given[0] != shape[0]
        for given in graph.outputs_of(user).shapes
    )
