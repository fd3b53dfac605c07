"""GS313: a reentrant checkpoint without an input that requires grad gives no gradients."""

from __future__ import annotations

from gradscope.rules.facts import belongs_to, listed, span, stepped, without_gradient
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording


class CheckpointDropsGradient(Rule):
    """GS313 checkpoint-drops-gradient: a checkpointed module gets no gradient at all.

    ## What it finds

    A module runs inside `torch.utils.checkpoint.checkpoint(..., use_reentrant=True)`, none of the
    tensors given to it requires grad, and so its result does not either.

    ## Why it matters

    The reentrant checkpoint runs its module under `no_grad` and attaches it to the graph by its
    inputs. When these do not require grad, as the raw data before the first block, there is
    nothing to attach it to: the parameters inside never get a gradient.

    ## How it is found

    At closer looks gradscope notes which modules run inside of a reentrant checkpoint. The finding
    is raised when parameters of such a module are held by an optimizer and no backward of the whole
    run reached them.

    ## Example

        x = checkpoint(self.block1, x, use_reentrant=True)

    ## Fix

        x = checkpoint(self.block1, x, use_reentrant=False)

    ## When it is wrong

    When the module's parameters are in the optimizer, but not meant to be trained.
    """

    code = "GS313"
    name = "checkpoint-drops-gradient"
    severity = Severity.ERROR
    tables = ("calls", "params", "grads", "steps")

    def check(self, run: Recording) -> list[Finding]:
        """Return at most one finding."""
        calls = run.frame("calls")
        inside = [str(path) for path in calls.loc[calls["checkpointed"].astype(bool), "module"]]
        inside = list(dict.fromkeys(path for path in inside if not path.startswith("<")))
        params = tuple(
            entry.name
            for entry in without_gradient(run)
            if any(belongs_to(entry.name, path) for path in inside)
        )
        steps = stepped(run)
        if not params or steps.empty:
            return []
        modules = tuple(
            path
            for path in inside
            if any(belongs_to(name, path) for name in params)
            and not any(path != other and belongs_to(path, other) for other in inside)
        )
        shown = listed([path or "the model" for path in modules])
        return [
            self.finding(
                message=(
                    f"{shown} runs in a reentrant checkpoint, and none of its inputs requires "
                    f"grad: {listed(params)} have never had a gradient"
                ),
                fix=(
                    f"checkpoint {shown} with use_reentrant=False, or give it an input that "
                    "requires grad"
                ),
                params=params,
                modules=modules,
                **span(steps),
                evidence={"checkpointed_modules": len(inside), "parameters": len(params)},
            )
        ]
