"""GS314: a module ran once, and its result is used over and over."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradscope.rules.facts import (
    belongs_to,
    has_moved,
    in_phase,
    is_compiled,
    listed,
    phases,
    stepped,
)
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import pandas as pd

_LEAST_LOOKS = 3
"""The look at which the module ran, and two without."""

_LEAST_STEPS = 5


class CachedActivation(Rule):
    """GS314 cached-activation: a module that is to be trained ran in the first step only.

    ## What it finds

    A module was called in the first step and never again, while the rest of the model goes on, and
    since then its parameters have had no gradient: its result is kept and used again.

    ## Why it matters

    The module is no longer trained, and what the rest is given does not depend on the input of this
    step. If the kept result still has its graph, the second backward raises.

    ## How it is found

    At closer looks gradscope notes which modules are called. The finding is raised when a module
    that an optimizer trains was called at the first look of a training and at none of the later
    ones, and no step after the first found a gradient of its parameters, or backwards go through
    the graph of that first call for ever. One among numbered siblings that are called, such as a
    block that is skipped or an expert, is silent. A program may train several times, one after the
    other.

    ## Example

        if self.features is None:
            self.features = self.encoder(x)
        return self.head(self.features)

    ## Fix

        features = self.encoder(x)
        return self.head(features)

    ## When it is wrong

    When a module is used in the first step alone on purpose, to initialise others.
    """

    code = "GS314"
    name = "cached-activation"
    severity = Severity.ERROR
    tables = ("calls", "grads", "steps", "params", "backwards", "events")

    def check(self, run: Recording) -> list[Finding]:
        """Return at most one finding."""
        for span in _spans(run):
            calls, steps = (in_phase(rows, span) for rows in (run.frame("calls"), stepped(run)))
            found = self._in_phase(run, calls, steps)
            if found:
                return found
        return []

    def _in_phase(self, run: Recording, calls: pd.DataFrame, steps: pd.DataFrame) -> list[Finding]:
        looks = sorted(calls["step"].unique().tolist())
        raised = bool((run.frame("backwards")["error"].tail(1) != "").any())
        if len(looks) < (2 if raised else _LEAST_LOOKS):
            return []
        first = calls.loc[calls["step"] == looks[0], "module"]
        later = set(calls.loc[calls["step"] > looks[0], "module"])
        if not raised and len(steps) < _LEAST_STEPS:
            return []
        # A model that is found later than the first look changes the paths of all: comparable is a
        # module whose parent is called under the same path at later looks, and a whole model.
        models = {model.name for model in run.models} if len(run.models) > 1 else set()
        gone = [
            str(path)
            for path in first
            if path
            and path not in later
            and not is_compiled(run, path)
            and (path.rpartition(".")[0] in later or (path in models and later & models))
        ]
        has_old_graph = _goes_through_old_nodes(run, looks)
        silent = (
            [entry.name for entry in run.parameters if entry.holders and entry.reached]
            if has_old_graph
            else _without_later_gradients(run, steps)
        )
        modules: list[str] = []
        params: list[str] = []
        for path in gone:
            if any(belongs_to(path, other) for other in modules) or _has_siblings(path, later):
                continue
            own = [name for name in silent if belongs_to(name, path)]
            if own and (path not in models or _trains_others(run, own, later & models)):
                modules.append(path)
                params += own
        if not modules or not later:
            return []
        shown = listed(modules)
        return [
            self.finding(
                message=(
                    f"{shown} was called at step {looks[0]} and never again at {len(looks) - 1} "
                    f"later looks, although the model is: its result is kept and used again, and "
                    f"{listed(params)} "
                    + (
                        "get gradients of that first call's graph"
                        if has_old_graph
                        else "no longer get a gradient"
                    )
                ),
                fix=(
                    f"call {shown} in every forward; keep its result only under torch.no_grad(), "
                    "and then leave its parameters out of the optimizer"
                ),
                params=tuple(params),
                modules=tuple(modules),
                step_first=int(looks[1]),
                step_last=int(steps["step"].max()) if len(steps) else int(looks[1]),
                count=max(0, len(steps) - 1),
                evidence={"looks": len(looks), "parameters": len(params)},
            )
        ]


def _spans(run: Recording) -> list[tuple[int, int]]:
    """The trainings of a run; and all of it, if the first one shows what is not called again."""
    found = phases(run)
    looks = sorted(run.frame("calls")["step"].unique().tolist())
    is_seen = len(looks) > 1 and looks[1] < found[0][1]
    return [(0, found[-1][1]), *found] if is_seen and len(found) > 1 else found


def _goes_through_old_nodes(run: Recording, looks: list[int]) -> bool:
    """Whether at every later look a backward went through operations of earlier steps."""
    backwards = run.frame("backwards")
    old = backwards.loc[backwards["n_old_nodes"].fillna(0) > 0, "step"]
    return len(looks) >= _LEAST_LOOKS and set(looks[1:]) <= set(old.dropna())


def _without_later_gradients(run: Recording, steps: pd.DataFrame) -> list[str]:
    """Parameters that an optimizer trains, of which no step after the first found a gradient."""
    grads = run.frame("grads")
    grads = grads.loc[grads["step"].isin(steps["step"]) & (grads["step"] > steps["step"].min())]
    got = set(
        grads.loc[
            grads["status"].isin(["fresh", "accumulated", "compounded", "assigned"])
            & (grads["norm"] != 0),
            "param",
        ]
    )
    stepping = set(steps["optimizer"])
    return [
        entry.name
        for entry in run.parameters
        if entry.requires_grad
        and any(run.optimizers[number].name in stepping for number, _ in entry.holders)
        and entry.name not in got
        and (entry.reached or not has_moved(entry))
    ]


def _trains_others(run: Recording, params: list[str], models: set[str]) -> bool:
    """Whether an optimizer that holds parameters also trains other models."""
    holders = {n for entry in run.parameters if entry.name in params for n, _ in entry.holders}
    return any(
        belongs_to(entry.name, model) and entry.reached and holders & {n for n, _ in entry.holders}
        for entry in run.parameters
        for model in models
    )


def _has_siblings(path: str, called: set[str]) -> bool:
    """Whether a module is one of several of a list, others of which are called."""
    parts = path.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            around = ".".join(parts[:place])
            prefix = f"{around}." if around else ""
            if any(
                other.startswith(prefix) and other[len(prefix) :].split(".")[0].isdigit()
                for other in called
            ):
                return True
    return False
