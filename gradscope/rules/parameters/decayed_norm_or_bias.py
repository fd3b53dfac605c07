"""GS111: weight decay on what has nothing to shrink."""

from __future__ import annotations

from gradscope.rules.facts import listed, made_at, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.entries import ParameterEntry
from gradscope.run.recording import Recording

_FEWEST_STEPS = 3

_DEFAULT = 0.01
"""Weight decay of AdamW when none is asked for, which is not worth a note; nor is as much of it, in
any optimizer, for biases alone."""


class DecayedNormOrBias(Rule):
    """GS111 decayed-norm-or-bias: weight decay also shrinks norm layers and biases.

    ## What it finds

    Parameter groups with weight decay that hold scales and shifts of normalisation layers, or
    biases.

    ## Why it matters

    Decay is there to keep matrices small. It draws the scale of a normalisation towards 0, which
    regularises nothing and can slow training down; transformers are usually trained without it.
    Many programs do well all the same: this is only a note.

    ## How it is found

    From the weight decay of each group at its steps, and the one-dimensional parameters in it.
    Up to 0.01, the default of AdamW, nothing is reported of an AdamW, nor biases alone of others.

    ## Example

        torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)

    ## Fix

        decay = [p for p in model.parameters() if p.ndim > 1]
        rest = [p for p in model.parameters() if p.ndim <= 1]
        torch.optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}], lr=1e-3)

    ## When it is wrong

    A program that means to decay everything, as many for convolutional networks do.
    """

    code = "GS111"
    name = "decayed-norm-or-bias"
    severity = Severity.INFO
    tables = ("groups", "params", "steps", "events")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer that decays such parameters."""
        groups, steps = run.frame("groups"), stepped(run)
        groups = groups.loc[groups["step"].isin(steps["step"]) & (groups["weight_decay"] > 0)]
        findings = []
        for optimizer, own in groups.groupby("optimizer", sort=False):
            count = int(own["step"].nunique())
            if count < _FEWEST_STEPS:
                continue
            numbers = {n for n, known in enumerate(run.optimizers) if known.name == optimizer}
            decayed = {int(str(group)) for group in own["group"].unique()}
            held = [
                entry
                for entry in run.parameters
                if entry.requires_grad
                and len(entry.shape) == 1
                and any(n in numbers and group in decayed for n, group in entry.holders)
            ]
            norms = [entry for entry in held if _is_of_norm(entry)]
            biases = [entry for entry in held if entry not in norms and _is_bias(entry)]
            is_little = float(own["weight_decay"].max()) <= _DEFAULT
            is_adamw = any(run.optimizers[number].kind == "AdamW" for number in numbers)
            if not (norms or biases) or (is_little and (is_adamw or not norms)):
                continue
            found = norms + biases
            what = " and ".join(
                f"{len(entries)} {word}"
                for entries, word in ((norms, "of normalisation layers"), (biases, "biases"))
                if entries
            )
            decay = float(own["weight_decay"].max())
            findings.append(
                self.finding(
                    message=(
                        f"weight_decay={decay:g} of {optimizer} also shrinks one-dimensional "
                        f"parameters, {what}: "
                        f"{listed(entry.name for entry in found)}"
                    ),
                    fix=(
                        "put one-dimensional parameters into a group of their own with "
                        "weight_decay=0"
                    ),
                    params=tuple(entry.name for entry in found),
                    modules=tuple(dict.fromkeys(e.module for e in found if e.module)),
                    optimizer=str(optimizer),
                    step_first=int(own["step"].min()),
                    step_last=int(own["step"].max()),
                    count=count,
                    **made_at(run, str(optimizer)),
                    evidence={
                        "weight_decay": decay,
                        "of_normalisation": len(norms),
                        "biases": len(biases),
                    },
                )
            )
        return findings


def _is_of_norm(entry: ParameterEntry) -> bool:
    return "norm" in entry.module_type.lower()


def _is_bias(entry: ParameterEntry) -> bool:
    return "bias" in entry.name.rpartition(".")[2]
