"""GS401: the optimizer steps, and nothing ever computed a gradient."""

from __future__ import annotations

from gradscope.rules.facts import at, place_of, span, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording

_LEAST_STEPS = 2
"""One step without a gradient may be somebody trying whether the optimizer works at all."""


class MissingBackward(Rule):
    """GS401 missing-backward: the optimizer steps although `backward()` was never called.

    ## What it finds

    The model is called and the optimizer steps, and in the whole run there is neither a
    `loss.backward()` nor a `torch.autograd.grad`.

    ## Why it matters

    `optimizer.step()` skips parameters whose `.grad` is None, without a word. The model stays as it
    was initialised, however long the loop runs.

    ## How it is found

    gradscope sees every call of autograd's engine. The finding is raised when there was none, the
    optimizer stepped at least twice, and all gradients were None at every step. A program that puts
    gradients into `.grad` by itself is silent.

    ## Example

        optimizer.zero_grad()
        loss = criterion(model(xb), yb)
        optimizer.step()

    ## Fix

        optimizer.zero_grad()
        loss = criterion(model(xb), yb)
        loss.backward()
        optimizer.step()

    ## When it is wrong

    When gradients are computed in another process or by another library that also moves the
    weights itself, and the optimizer's step is only called for its side effects.
    """

    code = "GS401"
    name = "missing-backward"
    severity = Severity.ERROR
    tables = ("steps", "backwards", "losses")
    symptom_of = ("GS803",)

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer, if nothing was ever propagated back."""
        if len(run.frame("backwards")):
            return []
        losses = run.frame("losses")
        file, line = place_of(losses.iloc[0]) if len(losses) else (None, None)
        findings = []
        for optimizer, own in stepped(run).groupby("optimizer", sort=False):
            found = own.filter(regex=r"^n_(fresh|accumulated|compounded|stale|assigned)$")
            if len(own) < _LEAST_STEPS or found.to_numpy().any() or not own["n_none"].any():
                continue
            params = tuple(
                entry.name
                for entry in run.parameters
                if entry.requires_grad
                and any(run.optimizers[number].name == optimizer for number, _ in entry.holders)
            )
            if not params:
                continue
            findings.append(
                self.finding(
                    message=(
                        f"{optimizer}.step() ran {len(own)} times without a single "
                        f"loss.backward(): no parameter has ever had a gradient"
                    ),
                    fix=(
                        f"call loss.backward() on the loss{at(file, line)}, before "
                        f"{optimizer}.step()"
                    ),
                    params=params,
                    optimizer=str(optimizer),
                    **span(own),
                    file=file,
                    line=line,
                    evidence={
                        "backwards": 0,
                        "steps": len(own),
                        "forwards": int(own["n_forward"].sum()),
                    },
                )
            )
        return findings
