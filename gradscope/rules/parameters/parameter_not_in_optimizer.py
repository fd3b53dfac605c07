"""GS101 and GS102: trained by backward, and in no optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gradscope.rules.facts import first_place, listed, made_at, model_of, stepped
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.entries import ParameterEntry
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import pandas as pd

_ROUNDING = {"float16": 2.0**-7, "bfloat16": 2.0**-4}
"""By how much of its norm a copy may be behind and still be the nearest to it; eight times the step
from one number to the next, for norms have the precision of what they are of."""

_ROUNDING_ELSE = 1e-5


def _lost(run: Recording) -> list[ParameterEntry]:
    """Parameters with gradients that no optimizer holds and that nothing moved.

    One whose master weight an optimizer trains is not lost.
    """
    lost = [
        entry
        for entry in run.parameters
        if entry.requires_grad
        and entry.reached
        and not entry.holders
        and (entry.in_model or entry.module_type)
        and entry.norm_first == entry.norm_last
    ]
    known = {e.shape for e in _masters(run)} - _left_behind(run, lost)
    return [entry for entry in lost if entry.shape not in known]


def _masters(run: Recording) -> list[ParameterEntry]:
    """What optimizers hold, no backward reaches, and the program itself gives gradients."""
    unreached = [
        e
        for e in run.parameters
        if e.holders and e.requires_grad and not e.reached and not e.in_model
    ]
    if not unreached:  # as nearly always, and there may be many rows
        return []
    grads = run.frame("grads")
    fed = set(grads.loc[grads["status"] == "assigned", "param"])
    return [e for e in unreached if e.name in fed]


def _left_behind(run: Recording, lost: list[ParameterEntry]) -> set[tuple[int, ...]]:
    """Shapes of which more masters moved far enough for a copy to show it than copies did move."""
    masters = _masters(run)
    shapes = set()
    for shape in {e.shape for e in masters} & {e.shape for e in lost}:
        hidden = max(_ROUNDING.get(e.dtype, _ROUNDING_ELSE) for e in lost if e.shape == shape)
        n_far = sum(
            abs(e.norm_last - e.norm_first) > hidden * max(e.norm_first, e.norm_last)
            for e in masters
            if e.shape == shape
        )
        n_moved = sum(
            e.in_model and e.shape == shape and e.norm_first != e.norm_last for e in run.parameters
        )
        if n_far > n_moved:
            shapes.add(shape)
    return shapes


def _stepping(run: Recording) -> set[int]:
    names = set(stepped(run)["optimizer"])
    return {number for number, known in enumerate(run.optimizers) if known.name in names}


def _fed_by(run: Recording, model: str, trained: Mapping[str, int]) -> str | None:
    """The trained model that a whole model without an optimizer comes before, or None.

    A critic, a teacher or a network that measures a loss comes after what is trained, or is put
    into eval mode; an encoder that was forgotten comes before it, and is in training mode.
    """
    calls = run.frame("calls")
    calls = calls.loc[calls["with_grad"] & (calls["step"] > calls["step"].min())]
    calls = _looks_at(run, calls, model)  # what a model comes before in one training
    first: dict[str, int] = {}
    is_training: dict[str, bool] = {}
    for place, (path, training) in enumerate(zip(calls["module"], calls["training"], strict=True)):
        for known in run.models:
            if path == known.name or path.startswith(f"{known.name}."):
                first.setdefault(known.name, place)
                is_training[known.name] = is_training.get(known.name, True) and bool(training)
    if model not in first or not is_training[model]:
        return None
    after = [name for name in trained if first.get(name, -1) > first[model]]
    return after[0] if after else None


def _looks_at(run: Recording, calls: pd.DataFrame, model: str) -> pd.DataFrame:
    """The calls of the looks at which a model ran, of several models."""
    is_own = (calls["module"] == model) | calls["module"].str.startswith(f"{model}.")
    return calls.loc[calls["step"].isin(calls.loc[is_own, "step"])]


def _of_a_loss(run: Recording, entries: list[ParameterEntry]) -> list[ParameterEntry]:
    """Those that are directly a module's which computes the loss itself, from its parameters.

    The classes of a margin loss, weights of several tasks, transitions of a random field: nothing
    else could have learnt them.
    """
    if not run.graphs:
        return []
    graph = run.graphs[min(run.graphs)]
    makers: set[str] = set()
    pending = [int(root) for root in graph.roots]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if graph.outputs_of(node).shapes != ((),):
            continue
        call = int(graph.call[node])
        while call >= 0:
            makers |= {graph.calls.path(call), f"<{graph.calls.kind(call)}>"}
            call = int(graph.calls.parent[call])
        new = set(graph.givers_of(node)) - seen
        pending += new
        seen |= new
    return [e for e in entries if e.module in makers or f"<{e.module_type}>" in makers]


def _module_made_at(run: Recording, entry: ParameterEntry) -> dict[str, Any]:
    """Where the module that holds an unregistered parameter was made, as a finding takes it."""
    calls = run.frame("calls")
    return first_place(calls.loc[calls["module_type"] == entry.module_type])


class ParameterNotInOptimizer(Rule):
    """GS101 parameter-not-in-optimizer: a parameter gets gradients and no optimizer holds it.

    ## What it finds

    Parameters that backward reaches, that no optimizer holds and nothing else changes, in a model
    whose other parameters are trained.

    ## Why it matters

    They stay as they were initialised.

    ## How it is found

    From what each optimizer holds, which gradients backward wrote, and the norms of the values at
    the beginning and the end. A whole model without an optimizer is reported only if it runs in
    training mode and before one that is trained, as an encoder does and a teacher or critic does
    not, or if the parameters are those of the very module that returns the loss. What a program
    updates by hand is not reported, nor what has a master weight of a wider dtype that an optimizer
    trains.

    ## Example

        self.hidden = [nn.Linear(8, 8), nn.Linear(8, 8)]     # a plain list registers nothing

    ## Fix

        self.hidden = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    ## When it is wrong

    A part that is meant to stay as it is; `requires_grad_(False)` says so and saves its backward.
    """

    code = "GS101"
    name = "parameter-not-in-optimizer"
    severity = Severity.WARNING
    tables = ("params", "steps", "events", "grads")
    symptom_of = ("GS102",)

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per model with such parameters."""
        stepping = _stepping(run)
        trained = {
            model_of(run, entry.name): holder
            for entry in run.parameters
            for holder, _ in entry.holders
            if holder in stepping and entry.in_model
        }
        by_model: dict[str, list[ParameterEntry]] = {}
        for entry in _lost(run):
            by_model.setdefault(model_of(run, entry.name), []).append(entry)
        findings = []
        for model, entries in by_model.items():
            if model not in trained:
                feeds = _fed_by(run, model, trained)
                if feeds is None:
                    entries = _of_a_loss(run, entries)
                if not entries or not trained:
                    continue
                trained[model] = trained[feeds or next(iter(trained))]
            optimizer = run.optimizers[trained[model]].name
            plain = [entry for entry in entries if not entry.in_model]
            how = ": they never change"
            gets, them = "get gradients and are", "them"
            if len(entries) == 1:
                gets, them, how = "gets gradients and is", "it", ": it never changes"
            if plain:
                how += "; what lies in a plain list or attribute is not registered"
            findings.append(
                self.finding(
                    message=(
                        f"{listed(entry.name for entry in entries)} {gets} in no optimizer "
                        f"({optimizer} trains what is used with {them}){how}"
                    ),
                    fix=(
                        "use nn.ModuleList or nn.ParameterList, so that model.parameters() has them"
                        if plain
                        else f"add {them} to {optimizer}, or set requires_grad_(False) on {them}"
                    ),
                    params=tuple(entry.name for entry in entries),
                    modules=tuple(dict.fromkeys(entry.module for entry in entries)),
                    **(_module_made_at(run, plain[0]) if plain else made_at(run, optimizer)),
                    evidence={
                        "parameters": len(entries),
                        "unregistered": len(plain),
                        "optimizer_of_others": optimizer,
                    },
                )
            )
        return findings


class StaleOptimizerParameter(Rule):
    """GS102 stale-optimizer-parameter: the optimizer holds parameters that are in use nowhere.

    ## What it finds

    An optimizer with parameters that no model in use has and no backward ever reaches, while the
    model has parameters with gradients that no optimizer holds.

    ## Why it matters

    The optimizer trains what was thrown away; what replaced it stays as it was initialised.

    ## How it is found

    From what each optimizer holds, what models register, and which gradients backward wrote. Copies
    of a wider dtype that the program gives gradients, as a model in bfloat16 has its master
    weights, are in use, and weights of bfloat16 do not show their small steps at once. Only if such
    copies have moved by more than rounding hides, and the model has not, are they stale.

    ## Example

        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.fc = nn.Linear(32, 10)          # the optimizer still has the old one

    ## Fix

        model.fc = nn.Linear(32, 10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    ## When it is wrong

    Not known.
    """

    code = "GS102"
    name = "stale-optimizer-parameter"
    severity = Severity.ERROR
    tables = ("params", "steps", "events", "grads")

    def check(self, run: Recording) -> list[Finding]:
        """Return one finding per optimizer with stale parameters."""
        lost = [entry for entry in _lost(run) if entry.in_model]
        left = _left_behind(run, lost)
        in_use = {e.name for e in _masters(run) if e.shape not in left}
        findings = []
        for number in sorted(_stepping(run)):
            held = [e for e in run.parameters if any(n == number for n, _ in e.holders)]
            stale = [e for e in held if not e.reached and e.requires_grad]
            stale = [e for e in stale if e.name not in in_use]
            shapes = {e.shape for e in stale}
            ranks = {(len(e.shape), *e.shape[1:]) for e in stale}
            replaced = [
                e for e in lost if e.shape in shapes or (len(e.shape), *e.shape[1:]) in ranks
            ]
            modules = {e.module for e in replaced}
            known = {id(e) for e in replaced}
            replaced = [e for e in lost if id(e) in known or (e.module and e.module in modules)]
            if not stale or not replaced:
                continue
            if any(e.in_model for e in stale) and not any(not e.in_model for e in stale):
                names = {e.name for e in stale}
                if not any(e.name in names for e in replaced):
                    continue  # registered and unused: that is another matter
            optimizer = run.optimizers[number].name
            findings.append(
                self.finding(
                    message=(
                        f"{optimizer} holds {len(stale)} parameters that no model in use has; "
                        f"{listed(e.name for e in replaced)} get gradients and are in no optimizer"
                    ),
                    fix=(
                        f"make {optimizer} from the parameters of the model that is trained, after "
                        "its last layer was replaced or it was copied"
                    ),
                    params=tuple(dict.fromkeys(e.name for e in (*lost, *stale))),
                    modules=tuple(dict.fromkeys(e.module for e in replaced)),
                    optimizer=optimizer,
                    **made_at(run, optimizer),
                    evidence={"stale": len(stale), "unheld": len(lost)},
                )
            )
        return findings
