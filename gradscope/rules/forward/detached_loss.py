"""GS301: backward starts from a loss that no parameter has a path to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.rules.wording import place, some_of
from gradscope.run.recording import Recording
from gradscope.run.schema import STATUSES

if TYPE_CHECKING:
    import pandas as pd

_REBUILT = (
    "tensor",
    "as_tensor",
    "full",
    "scalar_tensor",
    "item",
    "tolist",
    "numpy",
    "from_numpy",
    "float",
)


class DetachedLoss(Rule):
    """GS301 detached-loss: the loss given to backward has no path to any parameter.

    ## What it finds

    `backward()` started from a tensor whose graph reaches no parameter that is trained: it was
    detached, made anew from a number, computed under `torch.no_grad()`, or comes out of an
    operation that has no derivative. PyTorch raises for some of these ("element 0 of tensors does
    not require grad"); with `requires_grad=True` on the new tensor it says nothing at all.

    ## Why it matters

    No gradient is computed. The optimizer steps on nothing, or on gradients of long ago, and the
    model stays as it was.

    ## How it is found

    At every backward gradscope notes which parameters' gradients it wrote. When one wrote none, its
    graph is walked on the spot: without any parameter at its ends, its root is detached. In the
    first step (and in the step after one that reached nothing)
    every torch function is followed from its inputs to its outputs, so that the call that cut the
    graph can be named by file and line; later, or when the cut was not seen, the line of `backward`
    is named.

    The finding is raised when no backward of the run ever reached a parameter and the optimizer
    stepped without any gradient, or when the last backward raised. A loop that trains otherwise is
    silent: a batch without a single valid example may well have a constant loss.

    ## Example

        loss = criterion(model(xb), yb)
        loss = torch.tensor(loss.item(), requires_grad=True)   # a new tensor, without history
        loss.backward()

    ## Fix

        loss = criterion(model(xb), yb)
        loss.backward()

    ## When it is wrong

    A framework that computes gradients by itself, without autograd and without assigning `.grad`,
    and calls `backward` on a dummy tensor would be taken for a detached loss.
    """

    code = "GS301"
    name = "detached-loss"
    severity = Severity.ERROR
    tables = ("steps", "backwards", "params", "events")
    symptom_of = ("GS304",)

    def check(self, run: Recording) -> list[Finding]:
        """Return at most one finding."""
        backwards = run.frame("backwards")
        backwards = backwards.loc[backwards["function"] == "backward"]
        if not any(parameter.requires_grad for parameter in run.parameters):
            return []  # everything is frozen, which is a cause of its own
        detached = _detached(backwards)
        if detached.empty or not detached.any() or (~detached & (backwards["n_reached"] > 0)).any():
            # A loop that trains has batches without a valid example, whose loss is a constant, and
            # may catch what backward raises for them.
            last = detached.iloc[-1:]
            if not (last.any() and (backwards["error"].iloc[-1:] != "").any()):
                return []
        raised = backwards.loc[
            detached & ~backwards["root_requires_grad"] & (backwards["error"] != "")
        ]
        steps = run.frame("steps")
        own = backwards["step"].notna()
        with_gradient = set(backwards.loc[own & ~detached, "step"])
        some = [f"n_{status}" for status in STATUSES if status not in ("none", "zeroed")]
        lost = steps.loc[
            steps["step"].isin(set(backwards.loc[own & detached, "step"]) - with_gradient)
            & (steps[some].sum(axis=1) == 0)
        ]
        if lost.empty and raised.empty:
            return []
        return [self._finding_for(run, backwards.loc[detached], raised, lost)]

    def _finding_for(
        self,
        run: Recording,
        detached: pd.DataFrame,
        raised: pd.DataFrame,
        lost: pd.DataFrame,
    ) -> Finding:
        first = (raised if not raised.empty else detached).iloc[0]
        cut = _cut(run)
        called_at = place(first["file"], int(first["line"])) if first["file"] else ""
        message = "the loss given to backward" + (f" at {called_at}" if called_at else "")
        message += " has no path to any parameter"
        file = str(first["file"]) or None
        line = int(first["line"]) if file else None
        function = ""
        if cut is not None:
            function = str(cut["detail"])
            file, line = str(cut["file"]), int(cut["line"])
            message += f": the graph was cut at {place(file, line)} by {_spelled(function)}"
        elif not first["root_grad_fn"]:
            message += ": it is a tensor without a graph of its own (grad_fn is None)"
        if not raised.empty:
            message += f"; backward raised {raised['error'].iloc[0]}"
        else:
            message += f"; no gradient was computed at {some_of(len(lost), run.n_steps)} steps"
        where = place(file, line) if file and line else "the line that makes the loss"
        return self.finding(
            message=message,
            fix=_fix(function, where),
            params=tuple(p.name for p in run.parameters if p.requires_grad),
            optimizer=str(lost["optimizer"].iloc[0]) if len(lost) else None,
            step_first=int(lost["step"].min()) if len(lost) else None,
            step_last=int(lost["step"].max()) if len(lost) else None,
            count=len(lost),
            file=file,
            line=line,
            evidence={
                "detached_backwards": len(detached),
                "root_grad_fn": str(first["root_grad_fn"]),
                "root_requires_grad": bool(first["root_requires_grad"]),
                "parameters_reached": 0,
                "cut_by": function,
                "raised": str(first["error"]),
            },
        )


def _detached(backwards: pd.DataFrame) -> pd.Series[bool]:
    """Which backwards wrote no gradient from a graph without parameters: bool, one per row."""
    # A graph that does end in parameters, although no gradient was written, is in the hands of
    # something that moves gradients away. What wrote nothing has always been walked.
    return (backwards["n_reached"] == 0) & (backwards["n_in_graph"].fillna(0) == 0)


def _cut(run: Recording) -> pd.Series | None:
    events = run.frame("events")
    cuts = events.loc[(events["event"] == "cut") & (events["file"] != "")]
    return None if cuts.empty else cuts.iloc[0]


def _spelled(function: str) -> str:
    if function == "no_grad":
        return "torch.no_grad()"
    if function == "data":
        return ".data"
    if function in ("tensor", "as_tensor", "from_numpy"):
        return f"torch.{function}(), which makes a new tensor"
    return f"{function}()"


def _fix(function: str, where: str) -> str:
    if function == "no_grad":
        return f"compute the forward outside of torch.no_grad() ({where})"
    if function in ("detach", "detach_", "data"):
        return f"take {_spelled(function)} away at {where}"
    if function in _REBUILT:
        return (
            f"call backward() on the loss tensor itself, not on one made anew from its value "
            f"({where})"
        )
    if function:
        return f"{_spelled(function)} at {where} has no derivative: use a differentiable loss there"
    return f"look for .detach(), .data, .item(), torch.tensor() or torch.no_grad() before {where}"
