"""GS302: a module runs and its result reaches the loss without its graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradscope.graphs.unreached import operations_made, unreached
from gradscope.rules.facts import (
    at,
    belongs_to,
    events_of,
    first_place,
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
    import pandas as pd

    from gradscope.run.captured_graph import CapturedGraph
    from gradscope.run.entries import ParameterEntry


class DetachedModule(Rule):
    """GS302 detached-module: a module's result is detached, and it never gets a gradient.

    ## What it finds

    A module that is to be trained runs with gradients enabled, what it computes is used, but its
    graph is cut before the loss: by `detach()`, `.data`, a way through NumPy, or an operation
    without a derivative. Other parts of the model are trained.

    ## Why it matters

    The parameters of this module stay as they were initialised. The others learn to live with it,
    so the loss falls all the same, and ends too high.

    ## How it is found

    Parameters that an optimizer holds, that no backward of the whole run reached and that nothing
    else moves, are looked up in the graph of the optimizer's first step: their module made
    operations, and none of them leads to the loss. It is an error where the module's result was
    handed to another module without a graph, where it is part of the loss without one, where the
    module comes first in the model, or where the optimizer has nothing else to train. A module
    whose result just leads nowhere is a note.

    ## Example

        code = self.encoder(x)
        return self.decoder(code.detach())

    ## Fix

        code = self.encoder(x)
        return self.decoder(code)

    ## When it is wrong

    When a module is given to the optimizer although it is meant to stay as it is; leave it out, or
    set `requires_grad_(False)`.
    """

    code = "GS302"
    name = "detached-module"
    severity = Severity.ERROR
    tables = ("steps", "grads", "params", "calls", "events")
    symptom_of = ("GS301", "GS303", "GS304", "GS312", "GS313", "GS314", "GS102", "GS106")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer."""
        by_holder: dict[str, list[ParameterEntry]] = {}
        for entry in without_gradient(run):
            by_holder.setdefault(holder_of(run, entry), []).append(entry)
        backwards = run.frame("backwards")
        if not (backwards["n_reached"] > 0).any():
            return []  # nothing is reached at all, which is another matter
        findings = []
        for optimizer, missing in by_holder.items():
            finding = self._of_optimizer(run, optimizer, missing)
            if finding is not None:
                findings.append(finding)
        return findings

    def _of_optimizer(
        self, run: Recording, optimizer: str, missing: list[ParameterEntry]
    ) -> Finding | None:
        steps = stepped(run)
        own = steps.loc[steps["optimizer"] == optimizer]
        names_missing = {entry.name for entry in missing}
        has_nothing_else = not any(
            entry.requires_grad
            and entry.name not in names_missing
            and any(run.optimizers[number].name == optimizer for number, _ in entry.holders)
            for entry in run.parameters
        )
        graph = next((run.graphs[step] for step in own["step"] if step in run.graphs), None)
        spelled = _names_by_spelling(run, names_missing)
        cut: dict[str, tuple[tuple[str, ...], bool]] = {}
        places: list[pd.DataFrame] = []
        params: set[str] = set()
        if graph is not None and len(graph.calls):
            for each in unreached(graph):
                found = {
                    spelled[name]
                    for param in each.params
                    for name in param.names
                    if name in spelled
                }
                if each.why != "cut off" or not found:
                    continue
                in_loss = _cuts_in_loss(run, each.path)
                is_used = bool(each.taken_by or len(in_loss)) or _comes_first(graph, each.call)
                cut[each.path] = (each.taken_by, is_used)
                places += [] if each.taken_by else [in_loss]
                params |= found
        elif has_nothing_else:
            calls = run.frame("calls")
            calls = calls.loc[calls["with_grad"].astype(bool) & calls["has_graph"].astype(bool)]
            for module in calls["module"]:
                found = {name for name in names_missing if belongs_to(name, module)}
                if found and not params >= found:
                    cut[str(module)] = ((), False)
                    params |= found
        if not cut:
            return None
        is_sure = has_nothing_else or any(used for _, used in cut.values())
        takers = list(dict.fromkeys(taker for taken, _ in cut.values() for taker in taken))
        given = f": its result goes to {listed(takers)} without a graph" if takers else ""
        used = next((rows for rows in places if len(rows)), None)
        place = {"file": None, "line": None} if used is None else first_place(used)
        if used is not None:
            function = str(used["detail"].iloc[0]).rpartition(", ")[2]
            here = at(place["file"], place["line"])
            given += f", although the loss is computed from its result, cut by {function}{here}"
        alone = f"; {optimizer} has nothing else to train" if has_nothing_else else ""
        ordered = tuple(entry.name for entry in missing if entry.name in params)
        modules = tuple(module_around(path, ordered) for path in cut)
        paths = [path or "the model" for path in modules]
        return self.finding(
            severity=Severity.ERROR if is_sure else Severity.INFO,
            message=(
                f"{listed(paths)} {'run' if len(paths) > 1 else 'runs'}, but the graph does not "
                f"lead from there to the loss{given}: "
                f"{len(ordered)} parameters ({listed(ordered)}) have never had a gradient in "
                f"{len(own)} steps of {optimizer}{alone}"
            ),
            fix=(
                f"look at what happens to the output of {listed(paths)}"
                + (f" before {listed(takers)} takes it" if takers else "")
                + ": take away .detach(), .data, .numpy() or argmax there, or, if it is not to "
                f"be trained, leave its parameters out of {optimizer}"
            ),
            params=ordered,
            modules=modules,
            optimizer=optimizer,
            **span(own),
            **place,
            evidence={
                "taken_by": ", ".join(takers),
                "parameters": len(ordered),
                "nothing_else_to_train": has_nothing_else,
            },
        )


def _cuts_in_loss(run: Recording, path: str) -> pd.DataFrame:
    """The events of cuts after which a module's result went into a loss."""
    told = events_of(run, "cut_in_loss")
    modules = told["detail"].str.rpartition(", ")[0] if len(told) else told["detail"]
    return told.loc[(modules == path) | modules.str.startswith(f"{path}.")]


def _names_by_spelling(run: Recording, names: set[str]) -> dict[str, str]:
    """Today's names by all that a graph may have for them.

    In one that is older than the second model, the first one's parameters lack its name.
    """
    first = f"{run.models[0].name}." if len(run.models) > 1 else ""
    return {name.removeprefix(first): name for name in names} | {name: name for name in names}


def _comes_first(graph: CapturedGraph, call: int) -> bool:
    """Whether nothing that leads to the loss ran before a call, and something did after it.

    An output that nobody wants, such as the pooler of a language model, comes after what it is
    computed from, which does lead to the loss.
    """
    calls = graph.calls
    _, got = operations_made(graph)
    begin = int(calls.first[call])
    before = any(got[other] and int(calls.last[other]) <= begin for other in range(call))
    after = any(
        got[other] and not calls.is_inside(other, call) for other in range(call + 1, len(calls))
    )
    return after and not before
