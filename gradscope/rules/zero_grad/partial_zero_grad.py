"""GS203: gradients that another optimizer's loss left behind are not cleared."""

from __future__ import annotations

from gradscope.rules.facts import first_place
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.rules.wording import some_of
from gradscope.rules.zero_grad.foreign_gradient import details_of, leaks, line_of
from gradscope.run.recording import Recording


class PartialZeroGrad(Rule):
    """GS203 partial-zero-grad: what another loss left in `.grad` is not cleared before the step.

    ## What it finds

    An optimizer whose parameters lie on the way of another optimizer's loss, as a discriminator's
    do on the way of the generator's, and whose gradients are cleared too early or by nobody: each
    step also uses what that other loss left.

    ## Why it matters

    The discriminator is also trained to be fooled.

    ## How it is found

    At nearly every step the optimizer's gradients come from two backwards in different lines, the
    first of which another optimizer has already stepped on. If its very first step was clean, that
    is an error; if not, its gradients were cleared too early, or it is meant to learn from both,
    and this is a warning.

    ## Example

        d_loss.backward()
        opt_d.step()
        opt_d.zero_grad()
        g_loss.backward()        # passes through D and fills its gradients again
        opt_g.step()

    ## Fix

        opt_d.zero_grad()        # right before its own backward
        d_loss.backward()
        opt_d.step()

    ## When it is wrong

    A shared part that is meant to learn from both losses, whose first step saw only one of them.
    """

    code = "GS203"
    name = "partial-zero-grad"
    severity = Severity.ERROR
    tables = ("steps", "backwards", "params")
    symptom_of = ("GS201",)

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer with leftovers."""
        return [
            self.finding(
                message=(
                    f"{leak.optimizer}.step() also used what the backward{line_of(leak.foreign)} "
                    f"of {leak.owner} had left in its gradients, at "
                    f"{some_of(len(leak.rows), leak.n_steps)} steps"
                ),
                severity=Severity.ERROR if leak.first_is_clean else Severity.WARNING,
                fix=f"call {leak.optimizer}.zero_grad() right before its own backward"
                f"{line_of(leak.own)}",
                **first_place(leak.own),
                **details_of(run, leak),
            )
            for leak in leaks(run)
            if not leak.reaches_owner
        ]
