"""GS201: gradients that an earlier step has already used are used again."""

from __future__ import annotations

from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.rules.wording import place, some_of
from gradscope.run.recording import Recording


class MissingZeroGrad(Rule):
    """GS201 missing-zero-grad: a step uses gradients that an earlier step has already used.

    ## What it finds

    `.grad` was not cleared between one step of an optimizer and its next: `loss.backward()` added
    the new gradient onto the one that the last step had already used, and the next step used both.

    ## Why it matters

    Each update follows the sum of all gradients since training began. That acts like a momentum
    that never decays: the loss may fall for a while, then swings or diverges, and no learning rate
    is right.

    ## How it is found

    For every parameter gradscope follows what is inside `.grad`: each backward that wrote it, each
    clearing, each step that used it. The finding is raised when the optimizer *that holds the
    parameter* steps while its gradient contains something that an earlier step of the same
    optimizer used, plus something new (status `compounded` in the table `grads`). This is a fact,
    not a threshold, and needs no setting for gradient accumulation: micro-batches that no step has
    used yet are nobody's leftovers.

    ## Example

        for xb, yb in batches:
            loss = model(xb, yb)
            loss.backward()     # adds onto the gradients of all earlier iterations
            optimizer.step()

    ## Fix

        for xb, yb in batches:
            loss = model(xb, yb)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    ## When it is wrong

    A program that scales its used gradients down by hand instead of clearing them, as a kind of
    momentum, carries them over on purpose; gradscope sees the change and stays silent about such
    parameters. There is no other known case.
    """

    code = "GS201"
    name = "missing-zero-grad"
    severity = Severity.ERROR
    tables = ("steps", "grads", "backwards")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer that used gradients twice."""
        steps = run.frame("steps")
        grads = run.frame("grads")
        stepped = steps.loc[steps["outcome"] == "stepped"]
        compounded = grads.loc[
            (grads["status"] == "compounded")
            & ~grads["edited_after_use"]
            & grads["step"].isin(stepped["step"])
        ]
        findings = []
        for optimizer, rows in compounded.groupby("optimizer", sort=False):
            own = stepped.loc[stepped["optimizer"] == optimizer]
            held = grads.loc[grads["optimizer"] == optimizer, "param"].nunique()
            params = tuple(rows["param"].unique())
            first, last = int(rows["step"].min()), int(rows["step"].max())
            count = int(rows["step"].nunique())
            backwards = run.frame("backwards")
            # Of a step of several backwards, the last: when micro-batches are accumulated they
            # all stand in one line, and when not, an earlier one may be another optimizer's.
            at = backwards.loc[(backwards["step"] == first).fillna(False)].tail(1)
            file = str(at["file"].iloc[0]) if len(at) and at["file"].iloc[0] else None
            line = int(at["line"].iloc[0]) if file is not None else None
            where = f" ({place(file, line)})" if file is not None and line is not None else ""
            calls = int((own["zeroed_by"] != "").sum())
            in_closure = bool(own["in_closure"].any())
            although = ""
            if calls and in_closure:
                although = "; they were cleared, but not between two calls of its closure"
            elif calls:
                although = (
                    f"; the gradients were cleared before {calls} of its steps, but not these"
                )
            when = "at the beginning of the closure," if in_closure else "in every iteration"
            findings.append(
                self.finding(
                    message=(
                        f"{optimizer}.step() used gradients that still held what "
                        f"{'it' if in_closure else 'its earlier steps'} had already used: "
                        f"{some_of(len(params), held)} parameters, at "
                        f"{some_of(count, len(own))} steps{although}"
                    ),
                    fix=(
                        f"call {optimizer}.zero_grad() {when} before "
                        f"loss.backward(){where}; when several micro-batches are accumulated, once "
                        "before the first of them"
                    ),
                    params=params,
                    optimizer=str(optimizer),
                    step_first=first,
                    step_last=last,
                    count=count,
                    file=file,
                    line=line,
                    evidence={
                        "steps_of_optimizer": len(own),
                        "compounded_steps": count,
                        "compounded_parameters": len(params),
                        "parameters_of_optimizer": int(held),
                        "oldest_gradient_from_step": int(rows["carried_from"].min()),
                        "grad_norm_first": float(own["grad_norm"].iloc[0]),
                        "grad_norm_last": float(own["grad_norm"].iloc[-1]),
                    },
                )
            )
        return findings
