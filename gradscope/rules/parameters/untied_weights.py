"""GS107 and GS109: what was meant to be tied, or frozen, and is not."""

from __future__ import annotations

from gradscope.rules.facts import listed
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording


class UntiedWeights(Rule):
    """GS107 untied-weights: two parameters began with the same values and went apart.

    ## What it finds

    An embedding and an output layer that started with the very same values, are two parameters, and
    are different at the end.

    ## Why it matters

    Copying values ties nothing: each is trained on its own, and the model is larger than meant.

    ## How it is found

    From the values that parameters of different kinds of modules began with, and their norms.

    ## Example

        self.head.weight.data = self.embedding.weight.data.clone()

    ## Fix

        self.head.weight = self.embedding.weight

    ## When it is wrong

    Weights that are only meant to begin alike.
    """

    code = "GS107"
    name = "untied-weights"
    severity = Severity.WARNING
    tables = ("params",)

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per pair."""
        findings = []
        for entry in run.parameters:
            if entry.copy_of is None:
                continue
            other = run.parameters[entry.copy_of]
            trained = all(e.reached and e.requires_grad and e.holders for e in (entry, other))
            apart = abs(entry.norm_last - other.norm_last) > 1e-6 * abs(other.norm_last)
            if not trained or not apart:
                continue
            findings.append(
                self.finding(
                    message=(
                        f"{entry.name} and {other.name} began with the very same values, but are "
                        "two parameters and went apart: they are not tied"
                    ),
                    fix=f"assign the parameter itself: {entry.name} = {other.name}",
                    params=(entry.name, other.name),
                    modules=(entry.module, other.module),
                    evidence={"norm_last": entry.norm_last, "norm_last_other": other.norm_last},
                )
            )
        return findings


class FreezeWithoutEffect(Rule):
    """GS109 freeze-without-effect: a freeze that freezes nothing.

    ## What it finds

    A module whose attribute `requires_grad` was set, which is no switch of it, and whose parameters
    get gradients all the same; or parameters that were frozen while training, and that their
    optimizer goes on to change.

    ## Why it matters

    What was to be kept is trained.

    ## How it is found

    From plain attributes of modules that look like a freeze, and from the gradients of their
    parameters.

    ## Example

        model.encoder.requires_grad = False

    ## Fix

        model.encoder.requires_grad_(False)

    ## When it is wrong

    A module that has a flag of that name for a purpose of its own.
    """

    code = "GS109"
    name = "freeze-without-effect"
    severity = Severity.WARNING
    tables = ("models", "params", "updates")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per model and attribute."""
        findings = []
        for model in run.models:
            prefix = f"{model.name}." if len(run.models) > 1 else ""
            paths_of: dict[str, list[str]] = {}
            for attribute in model.ineffective_freezes:
                path, _, name = attribute.rpartition(".")
                paths_of.setdefault(name, []).append((prefix + path).rstrip("."))
            for attribute, paths in paths_of.items():
                trained = tuple(
                    e.name
                    for e in run.parameters
                    if e.requires_grad
                    and e.reached
                    and e.holders
                    and any(not path or f"{e.name}.".startswith(f"{path}.") for path in paths)
                )
                if not trained:
                    continue
                whose = [path or model.name for path in paths]
                findings.append(
                    self.finding(
                        message=(
                            f"{attribute} of {listed(whose)} was set, which freezes nothing: "
                            f"{listed(trained)} still get gradients and are updated"
                        ),
                        fix=f"call {whose[0]}.requires_grad_(False)"
                        + (", and so for the others" if len(whose) > 1 else ""),
                        params=trained,
                        modules=tuple(paths),
                        evidence={"attribute": attribute, "trained": len(trained)},
                    )
                )
        return findings + self._still_moving(run)

    def _still_moving(self, run: Recording) -> list[Finding]:
        """Parameters that were frozen during the run, and that their optimizer moves on."""
        frozen = {
            e.name: e.requires_grad_changed
            for e in run.parameters
            if not e.requires_grad and e.requires_grad_changed is not None and e.holders
        }
        if not frozen:
            return []
        updates = run.frame("updates")
        since = updates["param"].map(frozen)
        moved = updates.loc[
            since.notna() & (updates["step"] >= since) & (updates["update_norm"] > 0)
        ]
        params = tuple(str(name) for name in moved["param"].unique())
        if not params:
            return []
        optimizer = str(moved["optimizer"].iloc[0])
        return [
            self.finding(
                message=(
                    f"requires_grad of {listed(params)} is False, but {optimizer} still changes "
                    "them: by gradients left from before, by momentum or by weight decay"
                ),
                fix=(
                    "set their .grad to None when freezing them, and take them out of "
                    f"{optimizer}, or give their group a learning rate of 0"
                ),
                params=params,
                optimizer=optimizer,
                step_first=int(moved["step"].min()),
                step_last=int(moved["step"].max()),
                count=int(moved["step"].nunique()),
                evidence={
                    "parameters": len(params),
                    "largest_update": float(moved["update_norm"].max()),
                },
            )
        ]
