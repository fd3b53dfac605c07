"""GS517: updates smaller than the spacing of the numbers that hold the weights."""

from __future__ import annotations

from gradscope.rules.facts import listed, made_at, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording

_HALF = ("float16", "bfloat16")

_MOST = 0.9
"""Share of the elements that did not move. Half of them staying put is common in bfloat16, and the
others carry the training."""

_FEWEST_STEPS = 3
"""As many as are always recorded at the beginning."""


class LostToRounding(Rule):
    """GS517 lost-to-rounding: half precision weights are too coarse for their updates.

    ## What it finds

    Weights in float16 or bfloat16, nine tenths of which stay exactly as they are in every step,
    although the optimizer's formula moves them.

    ## Why it matters

    bfloat16 has 8 significant bits: next to a weight of 1.0 an update below 0.004 is rounded away.
    What is lost is lost; small updates do not add up.

    ## How it is found

    At recorded steps the weights after the step are compared with a copy from before it, and with
    what the formula asks for.

    ## Example

        model = model.to(torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    ## Fix

        with torch.autocast("cuda", dtype=torch.bfloat16):    # weights stay float32
            loss = criterion(model(xb), yb)

    ## When it is wrong

    The last, finest steps of a training in half precision that is finished anyway.
    """

    code = "GS517"
    name = "lost-to-rounding"
    severity = Severity.WARNING
    tables = ("steps", "groups", "updates", "params", "events")
    symptom_of = ("GS503", "GS504")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer whose updates vanish."""
        half = {entry.name: entry.numel for entry in run.parameters if entry.dtype in _HALF}
        if not half:
            return []
        steps, updates = stepped(run), run.frame("updates")
        updates = updates.loc[
            updates["step"].isin(steps["step"])
            & updates["param"].isin(half)
            & updates["unchanged_fraction"].notna()
        ]
        findings = []
        for optimizer, rows in updates.groupby("optimizer", sort=False):
            weights = rows["param"].map(half)
            sums = (rows["unchanged_fraction"] * weights).groupby(rows["step"]).sum()
            shares = sums / weights.groupby(rows["step"]).sum()
            if len(shares) < _FEWEST_STEPS or float((shares >= _MOST).mean()) < _MOST:
                continue
            params = tuple(str(name) for name in rows["param"].unique())
            dtypes = {entry.dtype for entry in run.parameters if entry.name in params}
            findings.append(
                self.finding(
                    message=(
                        f"{float(shares.median()):.0%} of the {' and '.join(sorted(dtypes))} "
                        f"weights of {optimizer} ({listed(params)}) stay as they are in a step: "
                        "their updates are smaller than the spacing of these numbers"
                    ),
                    fix="keep the weights in float32 and compute under torch.autocast",
                    params=params,
                    optimizer=str(optimizer),
                    step_first=int(shares.index[0]),
                    step_last=int(shares.index[-1]),
                    count=len(shares),
                    **made_at(run, str(optimizer)),
                    evidence={
                        "unchanged_fraction": float(shares.median()),
                        "recorded_steps": len(shares),
                    },
                )
            )
        return findings
