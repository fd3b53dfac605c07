"""GS405: the first NaN or infinity, and the operation that made it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradscope.rules.facts import at, listed, place_of
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.nonfinite_gradients import nonfinite_gradients, passed_over
from gradscope.rules.rule import Rule
from gradscope.rules.wording import some_of
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import pandas as pd

_SKIPS_OF_A_SCALER = 0.5
"""A scaler looks for its scale by skipping steps; one that skips half of a run does not find it."""

_LEAST_SKIPPED = 5
"""Halving its first scale of 65536 down to what fits takes a scaler a few steps."""


class NonFiniteGradient(Rule):
    """GS405 non-finite-gradient: gradients became NaN or infinite.

    ## What it finds

    The first step whose gradients, or whose loss, held a NaN or an infinity, and, where it was
    seen, the operation and the line of the program that made the first one: `log(0)`, the square
    root or a norm at zero, a division by zero, a softmax over a row that is masked entirely, an
    overflow of float16.

    ## Why it matters

    One step with a NaN gradient makes weights NaN, and from there everything. Replacing the NaN in
    the loss afterwards does not help: multiplied by zero, a NaN gradient is still NaN.

    ## How it is found

    gradscope counts non-finite elements of every gradient at every step. Steps that a gradient
    scaler skipped are its way to look for a scale, and silent unless they are half of the run. So
    are steps of an optimizer that passes such gradients over by itself: the weights they belong to
    are finite at the next recorded step, and nothing wrote them in between but its own steps.

    ## Example

        loss = -torch.log(torch.softmax(logits, dim=1)[rows, y]).mean()   # log(0) = -inf

    ## Fix

        loss = F.cross_entropy(logits, y)

    ## When it is wrong

    When the program replaces non-finite gradients itself in a way that gradscope does not see,
    such as inside of its own optimizer, and no later step is recorded.
    """

    code = "GS405"
    name = "non-finite-gradient"
    severity = Severity.ERROR
    tables = ("steps", "grads", "updates", "events", "activations", "batches")
    symptom_of = ("GS514", "GS515", "GS604", "GS607")

    def check(self, run: Recording) -> list[Finding]:
        """Return at most one finding per optimizer."""
        steps, bad = run.frame("steps"), nonfinite_gradients(run)
        bad_steps = set(bad["step"])
        findings = []
        for optimizer, own in steps.groupby("optimizer", sort=False):
            own = own.loc[own["outcome"].isin(["stepped", "skipped"])]
            used = own.loc[own["step"].isin(bad_steps) & (own["outcome"] == "stepped")]
            used = used.loc[~used["step"].isin(passed_over(run, own, bad))]
            skipped = own.loc[own["outcome"] == "skipped"]
            lost = len(skipped) >= max(_LEAST_SKIPPED, _SKIPS_OF_A_SCALER * len(own))
            if used.empty and not lost:
                continue
            rows = used if len(used) else skipped
            findings.append(self._finding_for(run, str(optimizer), own, rows, bad))
        return findings

    def _finding_for(
        self,
        run: Recording,
        optimizer: str,
        own: pd.DataFrame,
        rows: pd.DataFrame,
        bad: pd.DataFrame,
    ) -> Finding:
        first = rows.iloc[0]
        step = int(first["step"])
        params = tuple(bad.loc[bad["step"] == step, "param"])
        source, file, line, module = _source(run, step)
        what = listed(params) if params else "the gradients"
        message = (
            f"the gradients of {what} became NaN or infinite at step {step}"
            if params
            else f"the gradients of {optimizer} became NaN or infinite at step {step}"
        )
        if source:
            message += f"; the first value that is not finite came from {source}{at(file, line)}"
        if first["outcome"] == "skipped":
            message += f"; the gradient scaler skipped {some_of(len(rows), len(own))} steps"
        loss = float(first["loss"])
        return self.finding(
            message=message,
            fix=_fix(source, at(file, line)),
            params=params,
            modules=(module,) if module else (),
            optimizer=optimizer,
            step_first=step,
            step_last=int(rows["step"].max()),
            count=len(rows),
            file=file,
            line=line,
            evidence={
                "operation": source,
                "loss": loss,
                "nonfinite_parameters": len(params),
                "outcome": str(first["outcome"]),
            },
        )


def _source(run: Recording, step: int) -> tuple[str, str | None, int | None, str]:
    """Where the first non-finite value came from: words, file, line and module."""
    events = run.frame("events")
    told = events.loc[(events["event"] == "nonfinite") & (events["step"] <= step + 1)]
    # What is said of weights after the step that spoilt them is no news.
    told = told.loc[(told["step"] <= step) | ~told["detail"].str.startswith("weights")]
    if len(told):
        file, line = place_of(told.iloc[0])
        detail = str(told["detail"].iloc[0])
        return detail, file, line, str(told["subject"].iloc[0])
    batches = run.frame("batches")
    given = batches.loc[
        (batches["role"] == "input") & (batches["nonfinite"] > 0) & (batches["step"] <= step)
    ]
    if len(given):
        n_bad = int(given["nonfinite"].iloc[0])
        return f"the input of {given['owner'].iloc[0]} ({n_bad} values)", None, None, ""
    activations = run.frame("activations")
    seen = activations.loc[(activations["nonfinite"] > 0) & (activations["step"] <= step)]
    if len(seen):
        module = str(seen["module"].iloc[0])
        return f"module {module} ({seen['module_type'].iloc[0]})", None, None, module
    return "", None, None, ""


_ADVICE = {
    "log": "use log_softmax, cross_entropy or logsigmoid, or clamp what goes into the logarithm",
    "sqrt": "add a small number under the square root: its derivative at 0 is infinite",
    "norm": "add a small number under the norm: its derivative at 0 is not defined",
    "softmax": "let no row be masked entirely, or mask with a large finite number",
    "div": "add a small number to the divisor",
    "exp": "clamp what goes into exp, or subtract its maximum",
}


def _fix(source: str, where: str) -> str:
    if "input" in source:
        return "look at the data: leave such examples out, or fill in what is missing"
    if source.startswith("weights"):
        return "look at what wrote the weights before that step: a load, an initialisation"
    lowered = source.lower()
    for word in ("softmax", "log", "sqrt", "norm", "div", "exp"):
        if word in lowered:
            return _ADVICE[word] + where
    return (
        "look at log, sqrt, norm, division, exp and masked softmax on the way to the loss"
        f"{where}; torch.autograd.detect_anomaly() names the operation of the backward"
    )
