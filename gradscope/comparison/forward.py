"""From the inputs to the loss: batches, the autograd graph, what modules gave, the loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from gradscope.comparison.difference import Difference, Fact
from gradscope.comparison.numbers import in_digits
from gradscope.comparison.pair import Pair
from gradscope.comparison.rows import fact_of, first_apart
from gradscope.graphs.comparison import difference
from gradscope.graphs.fingerprint import fingerprint

_MOST_FACTS = 6


def inputs(pair: Pair, rtol: float) -> Iterator[Difference]:
    """Give the first look at which a model's input or a loss function's target differs."""
    joined = pair.joined("batches", ("role",))
    std = np.fmax(*joined.column("std"))
    models = {model.kind for run in (pair.a, pair.b) for model in run.models}
    # What modules inside of a model take depends on its weights.
    roles, owners = joined.column("role")[0], joined.column("owner")[0]
    outermost = (roles == "target") | np.isin(owners, list(models))
    pair.compared["inputs"] += 4 * int(outermost.sum())
    apart = first_apart(
        joined,
        {"min": std, "max": std, "mean": std, "std": None, "nonfinite": None},
        rtol,
        within=outermost,
        texts=("shape", "dtype"),
    )
    if apart is None:
        return
    row = int(apart.rows[0])
    columns = apart.columns(row)
    lead = next((name for name in ("shape", "dtype", "mean") if name in columns), columns[0])
    what = f"the {roles[row]} of {owners[row]}"
    fact = fact_of(joined, lead, row, lead, apart.relative[lead][row])
    shown = _both(fact)
    rounding = _like_rounding(pair, apart)
    yield Difference(
        apart.step,
        "inputs",
        lead,
        f"{what} differs ({lead} {shown[0]} against {shown[1]})",
        fact.a,
        fact.b,
        fact.relative,
        rounding,
        "another batch, another order of batches, or another preparation of the data",
        n_different=len(apart.rows),
        n_compared=apart.n_compared,
        facts=tuple(
            fact
            for each in apart.rows[:2].tolist()
            for fact in apart.facts(joined, each, f"{roles[each]}")
        )[:_MOST_FACTS],
    )


def graph(pair: Pair) -> Iterator[Difference]:
    """Give the first step whose autograd graph is another one."""
    found: list[Difference] = []
    common = [step for step in pair.a.graphs if step in pair.b.graphs and step in pair.steps]
    for step in sorted(common):
        a, b = pair.a.graphs[step], pair.b.graphs[step]
        pair.compared["graph"] += 1
        if fingerprint(a) == fingerprint(b):
            continue
        changes = difference(a, b).changes
        if not changes:
            continue
        facts = tuple(_change(each) for each in changes[:_MOST_FACTS])
        found.append(
            Difference(
                step,
                "graph",
                "graph",
                f"the autograd graph differs: {_summed(changes)}",
                len(a),
                len(b),
                module=changes[0].module,
                n_different=len(changes),
                n_compared=max(len(a), len(b)),
                facts=facts,
            )
        )
        break
    joined = pair.joined("steps")
    pair.compared["graph"] += len(joined)
    apart = first_apart(joined, {"graph_nodes": None}, 0.0)
    if apart is not None and not (found and found[0].step <= apart.step):  # type: ignore[operator]
        fact = fact_of(joined, "graph_nodes", int(apart.rows[0]), "autograd nodes")
        without, facts_of_gradients = _without_gradient(pair, apart.step)
        last = max((step for step in common if step < apart.step), default=None)
        hint = "watch(graph='changed') captures the graphs of such steps, so that they are compared"
        if last is not None:
            hint = f"the graphs of step {last} are equal; {hint}"
        found.insert(
            0,
            Difference(
                apart.step,
                "graph",
                "graph_nodes",
                f"the autograd graph has {fact.a} nodes in A and {fact.b} in B{without}",
                fact.a,
                fact.b,
                hint=hint,
                facts=(fact, *facts_of_gradients),
            ),
        )
    yield from found[:1]


def forward(pair: Pair, rtol: float) -> Iterator[Difference]:
    """Give the first look at which a module ran otherwise, or gave something else."""
    yield from _calls(pair)
    joined = pair.joined("activations", ("module",))
    scale = np.fmax(*joined.column("abs_max"))
    one = np.ones(len(joined))
    pair.compared["forward"] += 5 * len(joined)
    apart = first_apart(
        joined,
        {"mean": scale, "std": None, "abs_max": None, "zero_fraction": one, "nonfinite": None},
        rtol,
        texts=("shape",),
    )
    if apart is None:
        return
    row = int(apart.rows[0])
    module, kind = joined.column("module")[0][row], joined.column("module_type")[0][row]
    name = f"{module or 'the model'} ({kind})"
    facts = apart.facts(joined, row, module)
    hint = "what it is given is equal, and so are all outputs before it"
    if _like_rounding(pair, apart):
        hint = f"{hint}; a sum in another order is enough for that, also of the mean told here"
    elif "Dropout" in kind:
        hint = f"{hint}: another dropout probability, or another random number"
    else:
        hint = f"{hint}: another computation, other weights, or another random number"
    yield Difference(
        apart.step,
        "forward",
        facts[0].what.rpartition(" ")[2] if facts else "output",
        f"the first output that differs is that of {name}",
        facts[0].a,
        facts[0].b,
        facts[0].relative,
        _like_rounding(pair, apart),
        hint,
        module=module,
        n_different=len(apart.rows),
        n_compared=apart.n_compared,
        facts=tuple(facts),
    )


def loss(pair: Pair, rtol: float) -> Iterator[Difference]:
    """Give the first step whose loss is another one, and the first loss function that is."""
    functions = pair.joined("losses")
    pair.compared["loss"] += len(functions)
    other = (
        first_apart(functions, {}, 0.0, texts=("function", "reduction")) if len(functions) else None
    )
    joined = pair.joined("steps")
    pair.compared["loss"] += len(joined)
    apart = first_apart(joined, {"loss": None}, rtol)
    if other is not None and (apart is None or other.step <= apart.step):
        row = int(other.rows[0])
        facts = other.facts(functions, row)
        yield Difference(
            other.step,
            "loss",
            facts[0].what,
            f"the loss {facts[0].what} is {facts[0].a} in A and {facts[0].b} in B",
            facts[0].a,
            facts[0].b,
            facts=tuple(facts),
        )
        return
    if apart is None:
        return
    row = int(apart.rows[0])
    fact = fact_of(joined, "loss", row, "loss", apart.relative["loss"][row])
    shown = _both(fact)
    yield Difference(
        apart.step,
        "loss",
        "loss",
        f"the loss differs ({shown[0]} against {shown[1]})",
        fact.a,
        fact.b,
        fact.relative,
        _like_rounding(pair, apart),
        facts=(fact,),
    )


def _calls(pair: Pair) -> Iterator[Difference]:
    joined = pair.joined("calls", ("module",))
    pair.compared["forward"] += 3 * len(joined)
    apart = first_apart(
        joined, {"runs": None, "training": None, "with_grad": None}, 0.0, texts=("settings",)
    )
    if apart is None:
        return
    row = int(apart.rows[0])
    module = joined.column("module")[0][row]
    name = f"{module or 'the model'} ({joined.column('module_type')[0][row]})"
    lead = apart.columns(row)[0]
    a, b = (side[row] for side in joined.column(lead))
    said = {
        "runs": f"is called {a} times in A and {b} times in B",
        "training": f"is in {_mode(a)} mode in A and in {_mode(b)} mode in B",
        "with_grad": f"runs {_with(a)} gradients in A and {_with(b)} in B",
        "settings": f"is set to {a or 'nothing'} in A and to {b or 'nothing'} in B",
    }[lead]
    others = f", and {len(apart.rows) - 1} more modules" if len(apart.rows) > 1 else ""
    yield Difference(
        apart.step,
        "forward",
        lead,
        f"{name} {said}{others}",
        _plain(a),
        _plain(b),
        module=module,
        n_different=len(apart.rows),
        n_compared=apart.n_compared,
        facts=(Fact(f"{module} {lead.replace('_', ' ')}".strip(), _plain(a), _plain(b)),),
    )


def _change(change: Any) -> Fact:
    if change.kind == "module":
        where = f"module {change.module}"
        if change.how == "changed":
            return Fact(where, change.before or "nothing", change.after or "nothing")
    else:
        where = change.owner or change.module
    what = change.what if change.n == 1 else f"{change.what} ×{change.n}"
    if change.how == "appeared":
        return Fact(where, None, what)
    if change.how == "vanished":
        return Fact(where, what, None)
    return Fact(f"{where}: {what}", change.before or "nothing", change.after or "nothing")


def _summed(changes: Any) -> str:
    modules = [each for each in changes if each.kind == "module" and each.how == "changed"]
    if modules:
        more = f", and {len(modules) - 1} more" if len(modules) > 1 else ""
        first = modules[0]
        return f"module {first.module} {first.before} in A and {first.after} in B{more}"
    said = []
    for how, verb in (("vanished", "is missing in B"), ("appeared", "is in B only")):
        own = [each for each in changes if each.how == how]
        if own:
            more = f" (and {len(own) - 1} more)" if len(own) > 1 else ""
            place = f" in {own[0].module}" if own[0].module and own[0].kind != "module" else ""
            name = own[0].what.partition("  ")[0]
            said.append(f"{name}{place}{more} {verb}")
    if not said:
        first = changes[0]
        more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
        said.append(f"{first.what}{more} is not the same")
    return ", ".join(said)


def _without_gradient(pair: Pair, step: int) -> tuple[str, list[Fact]]:
    """Parameters that have a gradient at a step in one of the runs only."""
    joined = pair.joined("grads", ("param",))
    a, b = (side == "none" for side in joined.column("status"))
    at = np.flatnonzero((joined.step == step) & (a != b))
    if not len(at):
        return "", []
    names = [pair.param(int(number)) for number in joined.column("param")[0][at]]
    more = f" and {len(at) - 1} more" if len(at) > 1 else ""
    verb = "have" if len(at) > 1 else "has"
    said = f"; {names[0]}{more} {verb} no gradient in {'A' if a[at[0]] else 'B'}"
    return said, [
        fact_of(joined, "status", row, f"gradient of {name}")
        for row, name in zip(at[:3].tolist(), names, strict=False)
    ]


def _like_rounding(pair: Pair, apart: Any) -> bool:
    return bool(all(apart.furthest(int(row)) <= pair.rounding for row in apart.rows))


def _both(fact: Fact) -> tuple[str, str]:
    if isinstance(fact.a, float):
        return in_digits(fact.a, fact.b)
    return str(fact.a), str(fact.b)


def _mode(training: Any) -> str:
    return "training" if training else "eval"


def _with(grad: Any) -> str:
    return "with" if grad else "without"


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return ("yes" if value else "no") if isinstance(value, bool) else value
