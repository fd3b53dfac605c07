"""GS607: inputs of hundreds or thousands go straight into the first layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradscope.rules.facts import in_phase, phases, span, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.learning.uninformed_loss_mismatch import UninformedLossMismatch
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import pandas as pd

_LARGE = 100.0
"""Greatest magnitude of an input. Standardised data rarely exceed 10; pixels go to 255."""

_PASSED_ON = 10.0
"""Standard deviation of what the first layer gives for it. Layers are initialised to keep the
scale of their input below one; an input that is normalised inside of the model gives that."""

_LEAST_LOOKS = 2
"""At a training that is not the first; a late one may have had a single look, with an outlier."""

_FIRST_LAYERS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "LazyLinear")

_RECURRENT = ("LSTM", "GRU", "RNN")

_GATED = ("LSTM", "GRU")

_CLOSED = 0.01
"""Share of what a gated layer gives that is exactly zero: a sigmoid is, below -104."""

_SATURATED = 1 - 5e-7
"""Greatest magnitude of what a recurrent layer gives, which is never above one. It takes sums of
more than seven before a tanh, where inputs of about one give about one, and inputs three times as
large 0.999999 at most, in 10 layers of 128 units."""


class UnnormalizedInput(Rule):
    """GS607 unnormalized-input: inputs of hundreds or more go into a layer as they are.

    ## What it finds

    The floating point input of the model reaches magnitudes above 100, and the first layer passes
    that on.

    ## Why it matters

    Weights are initialised for inputs of about one. Larger ones give huge activations and
    gradients, columns of large values drown the others, and no learning rate suits all of them.

    ## How it is found

    At closer looks gradscope reads the model's inputs and what modules give. The finding is raised
    when the input exceeds 100 and, before any update, the output of the first Linear or convolution
    has a standard deviation above 10, or that of a first recurrent layer is saturated. It is an
    error where the first loss is far from that of guessing as well. Inputs that are scaled or
    normalised first in the model are silent.

    ## Example

        x = torch.tensor(features, dtype=torch.float32)       # columns up to 1680
        loss = criterion(model(x), y)

    ## Fix

        x = (x - x.mean(0)) / x.std(0)
        loss = criterion(model(x), y)

    ## When it is wrong

    When the first layer was initialised for just such inputs.
    """

    code = "GS607"
    name = "unnormalized-input"
    severity = Severity.WARNING
    tables = ("batches", "activations", "steps", "events")

    def check(self, run: Recording) -> list[Finding]:
        """Return at most one finding."""
        batches, activations, steps = (
            run.frame("batches"),
            run.frame("activations"),
            stepped(run),
        )
        if batches.empty or activations.empty or steps.empty:
            return []
        for phase in phases(run):
            of_inputs, of_outputs = (in_phase(rows, phase) for rows in (batches, activations))
            if of_inputs["step"].nunique() >= (_LEAST_LOOKS if phase[0] else 1):
                found = self._in_phase(run, of_inputs, of_outputs, steps)
                if found:
                    return found
        return []

    def _in_phase(
        self, run: Recording, batches: pd.DataFrame, activations: pd.DataFrame, steps: pd.DataFrame
    ) -> list[Finding]:
        look = int(batches["step"].min())
        inputs = batches.loc[
            (batches["role"] == "input") & batches["dtype"].str.contains("float")
        ].copy()
        inputs["size"] = inputs[["min", "max"]].abs().max(axis=1)
        # Large at every look: an outlier is in one batch.
        large = inputs.groupby("owner", sort=False)["size"].min()
        large = large[large > _LARGE]
        first = activations.loc[activations["step"] == look].head(1)
        if large.empty or first.empty:
            return []
        kind, std = str(first["module_type"].iloc[0]), float(first["std"].iloc[0])
        largest = float(first["abs_max"].iloc[0])
        is_saturated = kind in _RECURRENT and _SATURATED <= largest <= 1
        zeros = float(first["zero_fraction"].iloc[0])
        is_closed = kind in _GATED and zeros >= _CLOSED
        is_saturated = is_saturated or is_closed
        is_passed_on = kind in (*_FIRST_LAYERS, *_RECURRENT) and std > _PASSED_ON
        if not is_passed_on and not is_saturated:
            return []
        module = str(first["module"].iloc[0])
        layer = f"{module} (the first {kind})" if module else f"the first {kind}"
        owner = str(large.index[0])
        row = inputs.loc[inputs["owner"] == owner].iloc[0]
        ratio = float(row["scale_ratio"])
        # What comes out at the other end is far off as well: nothing in between makes up for it.
        far_off = bool(UninformedLossMismatch().check(run))
        severity = Severity.ERROR if far_off else Severity.WARNING
        columns = f", columns differ by a factor of {ratio:.3g}" if ratio > _LARGE else ""
        return [
            self.finding(
                message=(
                    f"the input x of {owner} goes from {row['min']:.4g} to {row['max']:.4g}"
                    f"{columns}, and goes as it is into {layer}, which "
                    + (
                        "is saturated: "
                        + (
                            f"{zeros:.0%} of its values are exactly zero"
                            if is_closed
                            else f"it gives values up to {largest:.5g}"
                        )
                        if is_saturated
                        else f"gives values with a standard deviation of {std:.3g}"
                    )
                ),
                fix=(
                    "standardise the inputs, (x - mean) / std for each column, or divide pixels by "
                    f"255, before {layer}"
                ),
                severity=severity,
                modules=(module,) if module else (),
                **span(steps),
                evidence={
                    "input_min": float(row["min"]),
                    "input_max": float(row["max"]),
                    "scale_ratio": ratio,
                    "first_output_std": std,
                },
            )
        ]
