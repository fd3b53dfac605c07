"""GS516: the update is not what the optimizer's formula gives."""

from __future__ import annotations

from gradscope.rules.facts import events_of, listed, made_at, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording
from gradscope.run.schema import STEP_PRE_HOOKS

_FEWEST_STEPS = 3
"""As many as are always recorded at the beginning."""

_DIFFERENT = 1e-2
"""Relative; arithmetic in single precision stays below 1e-4."""

_BEYOND_ROUNDING = 100.0
"""In units of what storing the weight may add."""

_NEARLY_ALL = 0.9


class FormulaMismatch(Rule):
    """GS516 formula-mismatch: weights moved in a step differently from the optimizer's formula.

    ## What it finds

    Parameters whose change in `optimizer.step()` differs, at nearly every recorded step, by more
    than a percent from what the update rule gives for their gradient, state and hyper-parameters.

    ## Why it matters

    Something else acts inside the step: a hook that changes weights, a patched optimizer, a defect
    of an accelerated kernel.

    ## How it is found

    The formula is worked out on copies from before the step and compared with the weights after it;
    what rounding can do is known. Only optimizers of `torch.optim` have a formula; one with step
    pre-hooks, which may change the gradients that were read before, is silent.

    ## Example

        @optimizer.register_step_post_hook
        def shrink(optimizer, args, kwargs):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.data.mul_(0.9)

    ## Fix

    Take the hook away, or do what it does through the optimizer's own options.

    ## When it is wrong

    A hook that changes weights on purpose.
    """

    code = "GS516"
    name = "formula-mismatch"
    severity = Severity.WARNING
    tables = ("steps", "updates", "events")
    symptom_of = ("GS103",)

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer."""
        steps, updates = stepped(run), run.frame("updates")
        updates = updates.loc[updates["step"].isin(steps["step"]) & updates["residual"].notna()]
        is_off = (updates["residual"] > _DIFFERENT) & (
            updates["residual"] > _BEYOND_ROUNDING * updates["rounding"].fillna(0)
        )
        unseen = events_of(run, "unobserved")
        hooked = set(unseen.loc[unseen["detail"].str.contains(STEP_PRE_HOOKS), "subject"])
        updates = updates.loc[~updates["optimizer"].isin(hooked)]
        findings = []
        for optimizer, rows in updates.groupby("optimizer", sort=False):
            by_param = is_off.loc[rows.index].groupby(rows["param"], sort=False)
            share, count = by_param.mean(), by_param.count()
            params = tuple(
                str(name) for name in share.index[(share >= _NEARLY_ALL) & (count >= _FEWEST_STEPS)]
            )
            if not params:
                continue
            off = rows.loc[rows["param"].isin(params)]
            residual = float(off["residual"].median())
            findings.append(
                self.finding(
                    message=(
                        f"{optimizer}.step() moved {listed(params)} differently from its formula, "
                        f"by {residual:.1%} of the update, at {off['step'].nunique()} steps"
                    ),
                    fix=f"look for hooks on {optimizer}, and what else moves weights in a step",
                    params=params,
                    optimizer=str(optimizer),
                    step_first=int(off["step"].min()),
                    step_last=int(off["step"].max()),
                    count=int(off["step"].nunique()),
                    **made_at(run, str(optimizer)),
                    evidence={
                        "residual": residual,
                        "rounding": float(off["rounding"].median()),
                        "parameters": len(params),
                    },
                )
            )
        return findings
