"""GS103: one gradient, used twice."""

from __future__ import annotations

from gradscope.rules.facts import listed, made_at, span, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.rules.wording import some_of
from gradscope.run.recording import Recording

_FEWEST_STEPS = 3


class DuplicateParameter(Rule):
    """GS103 duplicate-parameter: the same gradient of a parameter is used twice.

    ## What it finds

    Parameters held by two optimizers, the second of which steps on gradients that the first has
    just used; and parameters that one optimizer was given twice.

    ## Why it matters

    These parameters move twice for one gradient, with two optimizers at two learning rates.

    ## How it is found

    gradscope notes which step used each gradient. Two optimizers that share parameters and have a
    backward each, in turn, are not reported, nor one that steps inside of the other's step, as the
    base of a wrapper does. What one optimizer holds twice stands in its groups.

    ## Example

        body_opt = SGD(model.parameters(), lr=0.05)          # has the head too
        head_opt = SGD(model.head.parameters(), lr=0.5)

    ## Fix

        body_opt = SGD(model.body.parameters(), lr=0.05)

    ## When it is wrong

    A method that combines two update rules on one gradient.
    """

    code = "GS103"
    name = "duplicate-parameter"
    severity = Severity.ERROR
    tables = ("grads", "steps", "params", "events")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer that comes second."""
        steps, grads = stepped(run), run.frame("grads")
        grads = grads.loc[grads["used_by_another"] & grads["step"].isin(steps["step"])]
        totals = steps.groupby("optimizer")["step"].count()
        findings = []
        for optimizer, rows in grads.groupby("optimizer", sort=False):
            count, total = int(rows["step"].nunique()), int(totals[optimizer])
            if count < max(_FEWEST_STEPS, total / 2):
                continue
            params = tuple(str(name) for name in rows["param"].unique())
            others = {
                run.optimizers[n].name
                for e in run.parameters
                if e.name in params
                for n, _ in e.holders
            } - {str(optimizer)}
            findings.append(
                self.finding(
                    message=(
                        f"{listed(params)} are in {optimizer} and in {listed(sorted(others))}: "
                        f"both stepped on the same gradient at {some_of(count, total)} steps"
                    ),
                    fix=f"leave {listed(params)} out of one of them",
                    params=params,
                    optimizer=str(optimizer),
                    step_first=int(rows["step"].min()),
                    step_last=int(rows["step"].max()),
                    count=count,
                    **made_at(run, str(optimizer)),
                    evidence={"steps": count, "other_optimizers": ", ".join(sorted(others))},
                )
            )
        return findings + self._held_twice(run)

    def _held_twice(self, run: Recording) -> list[Finding]:
        """Parameters that stand twice among the parameters of one optimizer."""
        steps = stepped(run)
        findings = []
        for number, known in enumerate(run.optimizers):
            twice = tuple(
                entry.name
                for entry in run.parameters
                if sum(holder == number for holder, _ in entry.holders) > 1
            )
            own = steps.loc[steps["optimizer"] == known.name]
            if not twice or len(own) < _FEWEST_STEPS:
                continue
            findings.append(
                self.finding(
                    message=(
                        f"{known.name} was given {listed(twice)} twice: each step moves them twice "
                        "by the same gradient"
                    ),
                    fix=f"pass every parameter to {known.name} once",
                    params=twice,
                    optimizer=known.name,
                    **span(own),
                    **made_at(run, known.name),
                    evidence={"steps": len(own), "other_optimizers": ""},
                )
            )
        return findings
