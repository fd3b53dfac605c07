"""GS402: the same loss is propagated back twice before a step."""

from __future__ import annotations

from gradscope.rules.facts import at, numbers_in, place_of, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.rules.wording import some_of
from gradscope.run.recording import Recording

_LEAST_SHARE = 0.5
"""A loop does it at every step, or in every second iteration; a debugging aid does it once."""


class RepeatedBackward(Rule):
    """GS402 repeated-backward: two backwards of one step start from the very same loss.

    ## What it finds

    `backward()` was called twice on the same tensor, usually once in a helper and once in the loop,
    and the step used the sum of both.

    ## Why it matters

    Every gradient is doubled, which doubles the learning rate of SGD, and every backward is paid
    for twice. `retain_graph=True`, which is needed for it, keeps PyTorch from complaining.

    ## How it is found

    gradscope remembers the tensor each backward starts from. The finding is raised when two
    backwards of one step started from the same scalar tensor, both wrote gradients, and this
    happened at half of the steps or more.

    ## Example

        def compute_loss(x, y):
            loss = criterion(model(x), y)
            loss.backward(retain_graph=True)
            return loss

        loss = compute_loss(xb, yb)
        loss.backward()

    ## Fix

        def compute_loss(x, y):
            return criterion(model(x), y)

        loss = compute_loss(xb, yb)
        loss.backward()

    ## When it is wrong

    When a method needs the gradient of one loss twice in one step, and does not clear in between.
    """

    code = "GS402"
    name = "repeated-backward"
    severity = Severity.ERROR
    tables = ("steps", "backwards")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer."""
        backwards = run.frame("backwards").set_index("backward")
        again = backwards.loc[
            backwards["repeats"].notna()
            & (backwards["n_reached"] > 0)
            & (backwards["error"] == "")
            & backwards["root_shape"].isin(["()", "(1,)"])
        ]
        if again.empty:
            return []
        findings = []
        for optimizer, own in stepped(run).groupby("optimizer", sort=False):
            doubled = []
            for step, text in zip(own["step"], own["backwards"], strict=True):
                taken = set(numbers_in(text))
                twice = [n for n in again.index if n in taken and again["repeats"][n] in taken]
                if twice:
                    doubled.append((int(step), int(twice[0])))
            if len(doubled) < max(1, _LEAST_SHARE * len(own)):
                continue
            second = again.loc[[doubled[0][1]]].iloc[0]
            first = backwards.loc[[int(second["repeats"])]].iloc[0]
            file, line = place_of(first)
            other = at(*place_of(second))
            findings.append(
                self.finding(
                    message=(
                        f"the same loss was propagated back twice{at(file, line)} and again"
                        f"{other}, and {optimizer}.step() used the sum of both: every gradient "
                        f"is doubled, at {some_of(len(doubled), len(own))} steps"
                    ),
                    fix=f"take away one of the two backward() calls ({at(file, line).strip()})"
                    if file
                    else "take away one of the two backward() calls",
                    optimizer=str(optimizer),
                    step_first=doubled[0][0],
                    step_last=doubled[-1][0],
                    count=len(doubled),
                    file=file,
                    line=line,
                    evidence={
                        "doubled_steps": len(doubled),
                        "steps_of_optimizer": len(own),
                        "second_call": other.strip(),
                        "retain_graph": bool(first["retain_graph"]),
                    },
                )
            )
        return findings
