"""GS406: every unit behind an activation is zero for every input."""

from __future__ import annotations

import numpy as np

from gradscope.rules.facts import listed, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording

_CUT_OFF = frozenset({"ReLU", "relu", "relu_", "ReLU6", "relu6", "Threshold", "Hardtanh"})
"""Activations with a flat side, on which their derivative is exactly zero."""

_LEAST_LOOKS = 2
"""Two looks are two batches."""

_LEAST_SHARE = 0.5
"""How long units must have been dead, up to the end of the run: of the looks, of which there are
many at the beginning, or of the steps."""

_DEAD = 1.0
"""Share of units that are zero for the whole batch. Below all of them a network may still learn,
and sparse activations are wanted."""

_LEAST_STEPS = 5

_LEAST_SHARE_OF_STEPS = 0.95


class DeadUnits(Rule):
    """GS406 dead-units: all units of an activation are zero, for every input, to the end.

    ## What it finds

    A ReLU gives nothing but zeros, for the whole batch, at every look from some point on.

    ## Why it matters

    Where a ReLU is zero its derivative is zero. No gradient passes, so nothing in front of it can
    move, and it stays dead; what is behind it sees a constant.

    ## How it is found

    At closer looks gradscope reads what activations give. The finding is raised when all units of
    one were zero at every look from some look on to the end, two looks and half of them or for half
    of the run, and parameters in front of it had gradients of exactly zero. Units that died later
    have been killed by something, such as a step that was too large: that is a warning. A layer
    that starts with zeros and moves on is silent.

    ## Example

        nn.init.constant_(layer.bias, -10.0)
        x = torch.relu(layer(x))

    ## Fix

        nn.init.zeros_(layer.bias)
        x = torch.relu(layer(x))

    ## When it is wrong

    When a part of the network is switched off for the whole run on purpose.
    """

    code = "GS406"
    name = "dead-units"
    severity = Severity.ERROR
    tables = ("steps", "grads", "params", "activations")
    symptom_of = ("GS605", "GS505", "GS607", "GS512", "GS511", "GS405")

    def check(self, run: Recording) -> list[Finding]:
        """Return at most one finding, about all dead activations."""
        dead = _dead_activations(run)
        if not dead:
            return []
        params = _without_any_gradient(run, min(step for _, _, step in dead))
        if not params:
            return []
        modules = tuple(dict.fromkeys(path or kind for path, kind, _ in dead))
        first = min(step for _, _, step in dead)
        steps = stepped(run)
        kinds = listed(tuple(f"{path or 'the model'} ({kind})" for path, kind, _ in dead))
        after = steps.loc[steps["step"] >= first]
        # Dead from the start is how they were initialised; what died later has another cause.
        from_the_start = first in _first_looks(run, dead)
        return [
            self.finding(
                severity=Severity.ERROR if from_the_start else Severity.WARNING,
                message=(
                    f"all units of {kinds} are zero for every input since step {first}: no "
                    f"gradient passes, and that of {listed(params)} is exactly zero"
                ),
                fix=(
                    "let the units be active at the start: biases of zero, smaller weights, inputs "
                    "of ordinary size, a lower learning rate, or LeakyReLU or GELU in the place of "
                    "ReLU"
                ),
                params=params,
                modules=modules,
                step_first=first,
                step_last=int(steps["step"].max()),
                count=len(after),
                evidence={
                    "dead_activations": len(dead),
                    "parameters_without_gradient": len(params),
                },
            )
        ]


def _dead_activations(run: Recording) -> list[tuple[str, str, int]]:
    """Path, kind and first dead step of each activation that is dead to the end."""
    rows = run.frame("activations")
    rows = rows.loc[rows["module_type"].isin(_CUT_OFF) & rows["shape"].str.contains(r"\d, *\d")]
    dead: dict[tuple[str, str], int] = {}
    for (module, kind), own in rows.groupby(["module", "module_type"], sort=False):
        # The calls of a function, or of a module that is used twice, are told apart by their order.
        order = own.groupby("step").cumcount()
        if own.groupby("step").size().nunique() > 1:
            order = order * 0  # another number of them at every look: dead where all of them are
        for _, calls in own.groupby(order):
            looks = calls.groupby("step")["dead_fraction"].min().sort_index() >= _DEAD
            flags = looks.to_numpy()
            n_tail = len(flags) if flags.all() else int(np.argmin(flags[::-1]))
            if not n_tail:
                continue
            first = int(looks.index[-n_tail])
            of_looks = n_tail / len(flags) if n_tail >= _LEAST_LOOKS else 0.0
            of_steps = 1 - first / max(run.n_steps, 1)  # gradients tell of those between looks
            if max(of_looks, of_steps) >= _LEAST_SHARE:
                key = (str(module), str(kind))
                dead[key] = min(first, dead.get(key, first))
    return [(module, kind, first) for (module, kind), first in dead.items()]


def _first_looks(run: Recording, dead: list[tuple[str, str, int]]) -> set[int]:
    """The steps of the first looks at dead activations."""
    rows = run.frame("activations")
    first = rows.groupby(["module", "module_type"])["step"].min()
    return {int(first[path, kind]) for path, kind, _ in dead}


def _without_any_gradient(run: Recording, since: int) -> tuple[str, ...]:
    """The parameters whose computed gradients are exactly zero from a step on."""
    steps = stepped(run)
    grads = run.frame("grads")
    grads = grads.loc[
        grads["step"].isin(steps["step"])
        & (grads["step"] >= since)
        & grads["status"].isin(["fresh", "accumulated"])
    ]
    found = []
    for param, own in grads.groupby("param", sort=False):
        n_zero = int((own["norm"] == 0).sum())
        if n_zero >= max(_LEAST_STEPS, _LEAST_SHARE_OF_STEPS * len(own)):
            found.append(str(param))
    return tuple(found)
