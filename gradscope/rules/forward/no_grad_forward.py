"""GS303: a module that is to be trained runs under `torch.no_grad()`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradscope.graphs.unreached import unreached
from gradscope.rules.facts import (
    belongs_to,
    holder_of,
    listed,
    module_around,
    span,
    stepped,
    without_gradient,
)
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    from gradscope.run.entries import ParameterEntry


class NoGradForward(Rule):
    """GS303 no-grad-forward: a module that an optimizer trains only runs without gradients.

    ## What it finds

    The forward of a module runs under `torch.no_grad()` or `inference_mode`, although its
    parameters are in the optimizer and require grad.

    ## Why it matters

    No graph is recorded there, so these parameters never get a gradient and stay as they were
    initialised, while the rest of the model is trained.

    ## How it is found

    At closer looks gradscope notes whether gradients were enabled in each module's call. The
    finding is raised when they never were for a module whose parameters an optimizer holds, no
    backward of the run reached them, and nothing else moves them. A module in evaluation mode
    beside others in training mode looks like a teacher or a fixed extractor: that is a note.

    ## Example

        with torch.no_grad():
            features = encoder(x)
        loss = criterion(head(features), y)

    ## Fix

        features = encoder(x)
        loss = criterion(head(features), y)

    ## When it is wrong

    When the module is meant to stay as it is; leave its parameters out of the optimizer, or set
    `requires_grad_(False)`, to say so.
    """

    code = "GS303"
    name = "no-grad-forward"
    severity = Severity.ERROR
    tables = ("calls", "steps", "grads", "params", "events")
    symptom_of = ("GS313",)

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer."""
        missing = without_gradient(run)
        if not missing or not (run.frame("backwards")["n_reached"] > 0).any():
            return []
        modules, are_aside = _without_gradients(run, missing)
        found: dict[str, list[ParameterEntry]] = {}
        for entry in missing:
            if any(belongs_to(entry.name, module) for module in modules):
                found.setdefault(holder_of(run, entry), []).append(entry)
        steps = stepped(run)
        findings = []
        for optimizer, entries in found.items():
            own = steps.loc[steps["optimizer"] == optimizer]
            params = tuple(entry.name for entry in entries)
            paths = tuple(m for m in modules if any(belongs_to(name, m) for name in params))
            paths = tuple(module_around(path, params) for path in paths)
            shown = listed([path or "the model" for path in paths])
            findings.append(
                self.finding(
                    severity=Severity.INFO if are_aside else Severity.ERROR,
                    message=(
                        f"{shown} only runs under torch.no_grad(), although {optimizer} is to "
                        f"train it: {listed(params)} never had a gradient in {len(own)} steps"
                    ),
                    fix=(
                        f"call {shown} outside of torch.no_grad(), or leave its parameters out of "
                        f"{optimizer}"
                    ),
                    params=params,
                    modules=paths,
                    optimizer=optimizer,
                    **span(own),
                    evidence={"parameters": len(params), "in_eval_mode": are_aside},
                )
            )
        return findings


def _without_gradients(
    run: Recording, missing: list[ParameterEntry]
) -> tuple[tuple[str, ...], bool]:
    """The outermost modules around parameters that ran without gradients at every look.

    Returns:
        Their paths, and whether they were in evaluation mode while others were not.
    """
    calls = run.frame("calls")
    if calls.empty:
        found = {
            each.path
            for graph in run.graphs.values()
            for each in unreached(graph)
            if each.why == "no grad"
        }
        return tuple(sorted(found)), False
    by_module = calls.groupby("module", sort=False)[["with_grad", "checkpointed", "training"]].any()
    paths = [
        str(module)
        for module, row in by_module.iterrows()
        if not row["with_grad"]
        and not row["checkpointed"]
        and not str(module).startswith("<")
        and any(belongs_to(entry.name, str(module)) for entry in missing)
    ]
    outermost = tuple(
        path
        for path in paths
        if not any(path != other and belongs_to(path, other) for other in paths)
    )
    in_eval = not any(bool(by_module["training"][path]) for path in outermost)
    others = by_module.loc[[name not in paths for name in by_module.index]]
    return outermost, bool(in_eval and others["training"].any())
