"""GS403: gradients shrink from layer to layer until nothing is left for the first ones."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from gradscope.rules.facts import listed, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import pandas as pd

_VANISHED = 1e-4
"""Gradient per weight of a first layer relative to that of the last. In networks that train, of
whatever depth and with normalisation or without, layers stay within a factor of a few hundred."""

_LEAST_LAYERS = 5
"""Fewer layers than this cannot make gradients vanish: each saturated sigmoid takes a factor of
four to a few dozen."""

_LEAST_VANISHED = 2
"""One layer alone has a reason of its own."""

_LEAST_SHARE = 0.8
"""It is a state of the network, not of a batch."""

_LEAST_STEPS = 5

_STEADY = 0.75
"""The share of steps from layer to layer at which the gradient must become smaller."""


class VanishingGradient(Rule):
    """GS403 vanishing-gradient: the first layers get next to no gradient, the last ones do.

    ## What it finds

    From the last layer to the first the gradients become smaller layer by layer, down to less than
    a ten-thousandth, at nearly every step.

    ## Why it matters

    The first layers stay as they were initialised, and everything behind them has to live with
    what they happen to compute.

    ## How it is found

    The gradient per weight (its norm, divided by the root of how many numbers it has) of every
    weight matrix is compared, in the order of the model, as the median over the steps. The finding
    is raised when at least two layers in a row from the beginning have less than 0.0001 of the last
    one's, decline is steady, and this holds at four steps out of five. Gradients of exactly zero
    have another cause.

    ## Example

        layers = []
        for _ in range(12):
            layers += [nn.Linear(48, 48), nn.Sigmoid()]

    ## Fix

        layers = []
        for _ in range(12):
            layers += [nn.Linear(48, 48), nn.ReLU()]    # or residual connections, or normalisation

    ## When it is wrong

    When the first layers are almost switched off on purpose and for the whole run.
    """

    code = "GS403"
    name = "vanishing-gradient"
    severity = Severity.WARNING
    tables = ("steps", "grads", "params", "activations")
    symptom_of = ("GS307", "GS309", "GS505", "GS605")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer."""
        steps = stepped(run)
        grads = run.frame("grads")
        numel = {entry.name: entry.numel for entry in run.parameters}
        order = {
            entry.name: number
            for number, entry in enumerate(run.parameters)
            if len(entry.shape) >= 2 and entry.module_type != "Embedding" and entry.in_model
        }
        grads = grads.loc[
            grads["step"].isin(steps["step"])
            & grads["status"].isin(["fresh", "accumulated"])
            & grads["param"].isin(order)
        ]
        findings = []
        for optimizer, rows in grads.groupby("optimizer", sort=False):
            size = rows["norm"] / rows["param"].map(numel).pow(0.5)
            table = rows.assign(size=size).pivot_table(
                index="step", columns="param", values="size", aggfunc="first"
            )
            table = table[sorted(table.columns, key=lambda name: order[str(name)])]
            finding = self._judged(run, str(optimizer), table)
            if finding is not None:
                findings.append(finding)
        return findings

    def _judged(self, run: Recording, optimizer: str, table: pd.DataFrame) -> Finding | None:
        if table.shape[1] < _LEAST_LAYERS or len(table) < _LEAST_STEPS:
            return None
        table = table.loc[np.isfinite(table.to_numpy()).all(axis=1)]
        if len(table) < _LEAST_STEPS:
            return None
        typical = table.median().to_numpy()
        last = float(typical[-1])
        if not last > 0 or not (typical > 0).all():
            return None
        small = typical < _VANISHED * last
        n_small = int(np.argmin(small)) if not small.all() else 0
        if n_small < _LEAST_VANISHED:
            return None
        grows = np.diff(typical) > 0
        if grows.mean() < _STEADY:
            return None
        first = table.iloc[:, 0]
        holds = table.loc[(first > 0) & (first < _VANISHED * table.iloc[:, -1])]
        if len(holds) < _LEAST_SHARE * len(table):
            return None
        params = tuple(str(name) for name in table.columns[:n_small])
        ratio = float(typical[0]) / last
        per_layer = math.exp(math.log(1 / ratio) / (len(typical) - 1))
        saturated = _saturating(run)
        return self.finding(
            message=(
                f"the gradient of {params[0]} is {ratio:.1e} of that of {table.columns[-1]}, per "
                f"weight: it shrinks by about {per_layer:.3g} from layer to layer, and nothing is "
                f"left for {listed(params)}"
            ),
            fix=(
                (f"replace {saturated} by ReLU or GELU, " if saturated else "use ReLU or GELU, ")
                + "add residual connections or normalisation between the layers, or initialise "
                "the weights larger"
            ),
            params=params,
            modules=tuple(dict.fromkeys(name.rpartition(".")[0] for name in params)),
            optimizer=optimizer,
            step_first=int(holds.index.min()),
            step_last=int(holds.index.max()),
            count=len(holds),
            evidence={
                "ratio": ratio,
                "first_per_weight": float(typical[0]),
                "last_per_weight": last,
                "layers": int(table.shape[1]),
                "factor_per_layer": per_layer,
            },
        )


def _saturating(run: Recording) -> str:
    """The kind of activation that makes gradients vanish, if one was seen."""
    kinds = set(run.frame("activations")["module_type"])
    return next((kind for kind in ("Sigmoid", "sigmoid", "Tanh", "tanh") if kind in kinds), "")
