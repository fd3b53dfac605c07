"""What happened in a step, and in which order: zero_grad, forward, backward, clip, step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from gradscope.comparison.difference import Difference, Fact
from gradscope.comparison.pair import Pair, events_of
from gradscope.run.columns import MISSING
from gradscope.run.recording import Recording

_OF_STEP = (
    "order",
    "outcome",
    "n_forward",
    "n_backward",
    "zeroed",
    "zeroed_by",
    "train_mode",
    "through_scaler",
    "in_closure",
    "scaled",
)
_OF_THE_PROGRAM = (
    "zero_grad",
    "clip",
    "unscale",
    "scale_update",
    "scheduler",
    "parameters_changed",
)
"""Events that the program causes; the others tell what gradscope did."""


def order_of_events(pair: Pair) -> Iterator[Difference]:
    """Give the first step in which other things happened, or in another order."""
    joined = pair.joined("steps")
    pair.compared["order"] += len(joined) * len(_OF_STEP)
    differ = {name: _unlike(*joined.column(name)) for name in ("optimizer", *_OF_STEP)}
    anywhere = np.logical_or.reduce(list(differ.values()))
    # Steps of two optimizers that changed their places have nothing else in common.
    first = int(joined.step[anywhere][0]) if anywhere.any() else None
    if first is None:
        yield from _goes_on_without_step(pair)
    details = _details(pair, first)
    if details is not None and (first is None or details.step < first):  # type: ignore[operator]
        yield details
        return
    if first is None:
        return
    row = int(np.flatnonzero(joined.step == first)[0])
    values = {name: tuple(side[row] for side in joined.column(name)) for name in differ}
    named = {name: pair_of for name, pair_of in values.items() if differ[name][row]}
    if "optimizer" in named:
        named["optimizer"] = tuple(
            run.optimizers[number].name
            for run, number in zip((pair.a, pair.b), values["optimizer"], strict=True)
        )
    lead, message = _in_words(named)
    hint = _HINTS.get(lead, "")
    if lead == "optimizer":
        new = [
            letter
            for letter, number, seen in zip(
                "AB", values["optimizer"], joined.column("optimizer"), strict=True
            )
            if number not in seen[:row]
        ]
        if new and row:
            hint = f"it is new in {' and '.join(new)}: made anew, or another variable"
    a, b = named[lead]
    facts = [Fact(name.replace("_", " "), _plain(x), _plain(y)) for name, (x, y) in named.items()]
    yield Difference(
        first,
        "order",
        lead,
        message,
        _plain(a),
        _plain(b),
        hint=hint,
        optimizer=pair.optimizer(int(values["optimizer"][0])),
        facts=tuple([*facts, *(details.facts if details and details.step == first else ())][:6]),
    )


def _goes_on_without_step(pair: Pair) -> Iterator[Difference]:
    """The shorter run has no more steps, but more backwards than a step that was cut short has."""
    n_a, n_b = pair.n_steps
    if n_a == n_b or not min(n_a, n_b):
        return
    name, run = ("A", pair.a) if n_a < n_b else ("B", pair.b)
    backwards = run.rows("backwards")
    is_backward = backwards.texts("function") == "backward"
    claimed = np.flatnonzero(backwards.array("step") != MISSING)
    after = int(claimed[-1]) + 1 if len(claimed) else 0
    left = int(is_backward[after:].sum())
    usual = int(run.rows("steps").array("n_backward").max(initial=0))
    if left <= usual:
        return
    n = min(n_a, n_b)
    yield Difference(
        n,
        "order",
        "step",
        f"no watched optimizer steps any more in {name}, although {left} backwards follow",
        n_a - n,
        n_b - n,
        hint="another optimizer took its place (made anew, or another variable), or its step is "
        "missing",
        facts=(
            Fact("steps from here on", n_a - n, n_b - n),
            Fact("optimizer steps in all", n_a, n_b),
        ),
    )


def _in_words(named: dict[str, tuple[Any, Any]]) -> tuple[str, str]:
    """Return the column that says most, and a sentence."""
    if "optimizer" in named:
        a, b = named["optimizer"]
        return "optimizer", f"this is a step of {a} in A and of {b} in B"
    if "outcome" in named and "open" in named["outcome"]:
        which = "B" if named["outcome"][1] == "open" else "A"
        return "outcome", (
            f"the optimizer is not stepped any more in {which}, although forward and backward go "
            "on: another one took its place, or its step is missing"
        )
    if "order" in named:
        return "order", f"the order of events differs: {_order_in_words(*named['order'])}"
    if "train_mode" in named:
        which = "A" if named["train_mode"][1] else "B"
        return "train_mode", f"the model is in eval mode in {which}"
    if "zeroed" in named:
        a, b = (_ZEROED.get(str(each), str(each)) for each in named["zeroed"])
        return "zeroed", f"before its first backward gradients were {a} in A and {b} in B"
    lead = next(iter(named))
    a, b = (_plain(each) for each in named[lead])
    return lead, f"{lead.replace('_', ' ')} is {a} in A and {b} in B"


_HINTS = {
    "train_mode": "model.eval() was left on there, or model.train() is missing",
    "zeroed": "something else than zero_grad clears them, or leaves some",
}
_ZEROED = {"none": "None", "zero": "zero", "partly": "cleared in part", "never": "not cleared"}


def _order_in_words(a: str, b: str) -> str:
    events = Counter(events_of(a)), Counter(events_of(b))
    only = events[0] - events[1], events[1] - events[0]
    said = [
        f"{_counted(what)} {'is' if sum(what.values()) == 1 else 'are'} {where}"
        for what, where in ((only[0], "missing in B"), (only[1], "in B only"))
        if what
    ]
    return " and ".join(said) or "the same events, but not in the same order"


def _counted(events: Counter[str]) -> str:
    return ", ".join(f"{name} ×{n}" if n > 1 else name for name, n in events.items())


def _details(pair: Pair, until: int | None) -> Difference | None:
    """The first step whose calls were the same, but with other arguments; None if there is none."""
    told = [_told(run, pair) for run in (pair.a, pair.b)]
    pair.compared["order"] += sum(map(len, told[0].values()))
    for step in sorted({*told[0], *told[1]}):
        if until is not None and step > until:
            break
        a, b = told[0].get(step, []), told[1].get(step, [])
        if a == b:
            continue
        changed = [(x, y) for x, y in zip(a, b, strict=False) if x != y]
        x, y = changed[0] if changed else (a[len(b)] if len(a) > len(b) else ("", ""), ("", ""))
        if not changed:
            longer = a if len(a) > len(b) else b
            more = longer[min(len(a), len(b))]
            x, y = (more, ("", "")) if len(a) > len(b) else (("", ""), more)
        word = (x[0] or y[0]).replace("_", " ")
        return Difference(
            step,
            "order",
            x[0] or y[0],
            f"{word} is another call: {x[1] or 'none'} in A and {y[1] or 'none'} in B",
            x[1] or None,
            y[1] or None,
            facts=tuple(
                Fact(p[0] or q[0], p[1] or None, q[1] or None) for p, q in (changed or [(x, y)])
            ),
        )
    return None


def _told(run: Recording, pair: Pair) -> dict[int, list[tuple[str, str]]]:
    """(event, detail) of what the program called, by step."""
    rows = run.rows("events")
    steps, events, details = rows.array("step"), rows.texts("event"), rows.texts("detail")
    found: dict[int, list[tuple[str, str]]] = {}
    for row in np.flatnonzero(
        np.isin(steps, pair.steps) & np.isin(events, _OF_THE_PROGRAM)
    ).tolist():
        found.setdefault(int(steps[row]), []).append((events[row], details[row]))
    return found


def _unlike(a: Any, b: Any) -> Any:
    return np.asarray(a != b, np.bool_)


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return ("yes" if value else "no") if isinstance(value, bool) else value
