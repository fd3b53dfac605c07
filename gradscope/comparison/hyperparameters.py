"""Which optimizers there are, what their groups hold, and every number that they were told."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from gradscope.comparison.difference import Difference, Fact
from gradscope.comparison.numbers import in_digits, relative
from gradscope.comparison.pair import Pair

_NUMBERS = ("lr", "weight_decay", "beta1", "beta2", "eps", "momentum")
_MOST_FACTS = 6
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def hyperparameters(pair: Pair, rtol: float) -> Iterator[Difference]:
    """Give the first differences of optimizers and of their groups."""
    yield from _optimizers(pair)
    yield from _groups(pair)
    joined = pair.joined("groups", ("optimizer", "group"))
    pair.compared["hyperparameters"] += len(joined) * (len(_NUMBERS) + 2)
    differ = {name: relative(*joined.column(name)) > rtol for name in ("n_params", *_NUMBERS)}
    options = [[_ADDRESS.sub("", text) for text in side] for side in joined.column("options")]
    differ["options"] = np.array([a != b for a, b in zip(*options, strict=True)], np.bool_)
    anywhere = np.logical_or.reduce(list(differ.values()))
    if not anywhere.any():
        return
    step = int(joined.step[anywhere][0])
    at = np.flatnonzero(anywhere & (joined.step == step))
    facts: list[tuple[int, Fact]] = []
    for row in at.tolist():
        for name in differ:
            if differ[name][row]:
                values = [side[row] for side in joined.column(name)]
                facts += [(row, fact) for fact in _facts(name, *values)]
    row, lead = facts[0]
    group = int(joined.column("group")[0][row])
    optimizer = pair.optimizer(int(joined.column("optimizer")[0][row]))
    others = ", ".join(dict.fromkeys(fact.what for _, fact in facts if fact.what != lead.what))
    where = f"group {group} of {optimizer}" if optimizer else f"group {group}"
    if len(at) > 1:
        where += f", and {len(at) - 1} more"
    yield Difference(
        step,
        "hyperparameters",
        lead.what,
        f"{lead.what} is {_shown(lead)[0]} in A and {_shown(lead)[1]} in B ({where})"
        + (f"; other too: {others}" if others else ""),
        lead.a,
        lead.b,
        lead.relative,
        optimizer=optimizer,
        n_different=len(at),
        n_compared=int((joined.step == step).sum()),
        hint=_before(pair, joined, step, lead.what),
        facts=tuple(
            Fact(
                f"{fact.what}, group {joined.column('group')[0][row]}",
                fact.a,
                fact.b,
                fact.relative,
            )
            for row, fact in facts[:_MOST_FACTS]
        ),
    )


def _before(pair: Pair, joined: Any, step: int, name: str) -> str:
    if not len(joined) or step == joined.step[0]:
        return ""
    changed = [
        side[joined.step < step][-1] != side[joined.step == step][0]
        for side in joined.column(name if name in (*_NUMBERS, "n_params") else "options")
    ]
    if changed == [True, False]:
        return "A changes it at this step, B does not: a schedule, or an assignment to the group"
    if changed == [False, True]:
        return "B changes it at this step, A does not: a schedule, or an assignment to the group"
    return "until then they were the same"


def _optimizers(pair: Pair) -> Iterator[Difference]:
    """Optimizers are matched by their place; a variable of another name is no difference."""
    steps = pair.joined("steps")
    by_step = steps.column("optimizer")
    for number, (a, b) in enumerate(zip(pair.a.optimizers, pair.b.optimizers, strict=False)):
        if a.kind != b.kind:
            own = steps.step[(by_step[0] == number) | (by_step[1] == number)]
            yield Difference(
                int(own[0]) if len(own) else None,
                "hyperparameters",
                "class",
                f"optimizer {a.name} is {a.kind} in A and {b.kind} in B",
                a.kind,
                b.kind,
                optimizer=a.name,
                n_compared=len(pair.a.optimizers),
                facts=(Fact(f"class of {a.name}", a.kind, b.kind),),
            )


def _groups(pair: Pair) -> Iterator[Difference]:
    """Which optimizer and group holds each parameter, as far as they are known at the end."""
    differ = []
    for i, j in enumerate(pair.b_params):
        if j < 0:
            continue
        a, b = pair.a.parameters[i], pair.b.parameters[j]
        if a.holders[:1] != b.holders[:1]:
            differ.append((a.name, _holder(pair.a, a), _holder(pair.b, b)))
    if not differ:
        return
    name, of_a, of_b = differ[0]
    joined = pair.joined("groups", ("optimizer", "group"))
    counts = joined.column("n_params")
    steps = joined.step[counts[0] != counts[1]]
    extra = [
        pair.a.rows("groups").array("step")[joined.only[0]],
        pair.b.rows("groups").array("step")[joined.only[1]],
    ]
    first = np.concatenate([steps, *extra])
    others = f", and {len(differ) - 1} more" if len(differ) > 1 else ""
    step = int(first.min()) if len(first) else (int(pair.steps[0]) if len(pair.steps) else None)
    yield Difference(
        step,
        "hyperparameters",
        "group",
        f"{name} is in {of_a} in A and in {of_b} in B{others}",
        of_a,
        of_b,
        param=name,
        n_different=len(differ),
        n_compared=len(pair.b_params),
        facts=tuple(Fact(name, a, b) for name, a, b in differ[:_MOST_FACTS]),
    )


def _holder(run: Any, entry: Any) -> str:
    if not entry.holders:
        return "no optimizer"
    optimizer, group = entry.holders[0]
    return f"group {group} of {run.optimizers[optimizer].name}"


def _facts(name: str, a: Any, b: Any) -> list[Fact]:
    if name == "options":
        sides = [dict(_option(each) for each in str(side).split(", ") if each) for side in (a, b)]
        return [
            Fact(key, sides[0].get(key, "not set"), sides[1].get(key, "not set"))
            for key in dict.fromkeys([*sides[0], *sides[1]])
            if sides[0].get(key) != sides[1].get(key)
        ] or [Fact(name, a, b)]
    if name == "n_params":
        return [Fact("n_params", int(a), int(b))]
    return [Fact(name, float(a), float(b), float(relative(a, b)))]


def _option(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name, _ADDRESS.sub("", value)


def _shown(fact: Fact) -> tuple[str, str]:
    if isinstance(fact.a, float):
        a, b = in_digits(fact.a, fact.b)
        return a.replace("nan", "not set"), b.replace("nan", "not set")
    return str(fact.a), str(fact.b)
