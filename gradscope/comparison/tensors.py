"""Weights, gradients, the optimizer's state and its update, parameter by parameter."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from gradscope.comparison.difference import Difference, Fact
from gradscope.comparison.numbers import in_digits, relative
from gradscope.comparison.pair import Joined, Pair
from gradscope.comparison.rows import Apart, fact_of, first_apart, word_of

_BY_PARAM = ("param",)
_MOST_FACTS = 5
_OF_COPIES = ("weights_before", "state_before", "state_after", "update", "weights_after")


def weights_before(pair: Pair, rtol: float) -> Iterator[Difference]:
    """Give the first recorded step that began with other weights."""
    joined = pair.joined("updates", _BY_PARAM)
    said = "the weights differ before the step"
    known = np.unique(joined.step)
    for each in (
        *_told(pair, "weights_before", joined, {"weight_norm_before": None}, rtol, said),
        *_single_weights(pair, "weights_before", "weight_before", rtol),
    ):
        earlier = known[known < (each.step or 0)]
        since = (
            f"since step {earlier[-1]}, after which they were equal"
            if len(earlier)
            else "after they were first met"
        )
        yield replace(each, hint=f"something changed them {since}")


def weights_after(pair: Pair, rtol: float) -> Iterator[Difference]:
    """Give the first recorded step that ended with other weights."""
    joined = pair.joined("updates", _BY_PARAM)
    said = "the weights differ after the step"
    yield from _told(pair, "weights_after", joined, {"weight_norm_after": None}, rtol, said)
    yield from _single_weights(pair, "weights_after", "weight_after", rtol)


def update(pair: Pair, rtol: float) -> Iterator[Difference]:
    """Give the first recorded step whose update is another one."""
    joined = pair.joined("updates", _BY_PARAM)
    size = np.fmax(*joined.column("update_norm"))
    columns = {"update_norm": None, "decay_norm": size, "momentum_norm": size, "fresh_norm": size}
    said = "the update differs"
    yield from _told(pair, "update", joined, columns, rtol, said, size=size)


def state_before(pair: Pair, rtol: float) -> Iterator[Difference]:
    """Give the first recorded step that began with another state of the optimizer."""
    hint = "the state was cleared, loaded, or the optimizer made anew since the step before"
    yield from _state(pair, "state_before", "before", rtol, hint)


def state_after(pair: Pair, rtol: float) -> Iterator[Difference]:
    """Give the first recorded step that left another state of the optimizer."""
    yield from _state(pair, "state_after", "after", rtol, "")


def gradients_before_clipping(pair: Pair, rtol: float) -> Iterator[Difference]:
    """Give the first step whose gradients differed already as clipping found them."""
    joined = pair.joined("grads", _BY_PARAM)
    norms = joined.column("norm_before_clipping")
    clipped = ~np.isnan(norms[0]) & ~np.isnan(norms[1])
    yield from _gradients(
        pair, "gradients_before_clipping", joined, {"norm_before_clipping": None}, rtol, clipped
    )


def gradients(pair: Pair, rtol: float) -> Iterator[Difference]:
    """Give the first step that read other gradients, or gradients of another kind."""
    joined = pair.joined("grads", _BY_PARAM)
    yield from _statuses(pair, joined)
    recorded = ~np.isnan(joined.column("abs_max")[0]) & ~np.isnan(joined.column("abs_max")[1])
    yield from _gradients(pair, "gradients", joined, {"norm": None}, rtol)
    # Means and extremes are there where a step was recorded; the norm is at every one.
    greatest = np.fmax(*joined.column("abs_max"))
    columns = dict.fromkeys(("mean", "min", "max", "abs_max"), greatest)
    yield from _gradients(pair, "gradients", joined, columns, rtol, recorded)
    yield from _single_weights(pair, "gradients", "g", rtol)


def weights_at_the_end(pair: Pair, rtol: float) -> Iterator[Difference]:
    """Give the difference between the weights when both had ended, after as many steps."""
    both = [(i, j) for i, j in enumerate(pair.b_params) if j >= 0]
    if not both or not len(pair.steps):
        return
    norms = np.array(
        [(pair.a.parameters[i].norm_last, pair.b.parameters[j].norm_last) for i, j in both]
    )
    known = ~np.isnan(norms).any(axis=1)
    apart = relative(norms[:, 0], norms[:, 1])
    pair.compared["weights_at_the_end"] += int(known.sum())
    at = np.flatnonzero(known & (apart > rtol))
    if not len(at):
        return
    row = int(at[0])
    name, shown = pair.param(both[row][0]), in_digits(*norms[row])
    yield Difference(
        int(pair.steps[-1]),
        "weights_at_the_end",
        "norm_last",
        f"the weights differ at the end, first {name} (norm {shown[0]} against {shown[1]})",
        float(norms[row, 0]),
        float(norms[row, 1]),
        float(apart[row]),
        bool((apart[at] <= pair.rounding).all()),
        param=name,
        n_different=len(at),
        n_compared=int(known.sum()),
        facts=tuple(
            Fact(f"{pair.param(both[each][0])} norm", norms[each, 0], norms[each, 1], apart[each])
            for each in at[:_MOST_FACTS].tolist()
        ),
    )


def _gradients(
    pair: Pair,
    stage: str,
    joined: Joined,
    columns: Mapping[str, Any],
    rtol: float,
    within: Any = None,
) -> Iterator[Difference]:
    if not len(joined):
        return
    # A bias before a normalisation has no gradient but rounding: it is noise beside all others.
    of_steps = pair.joined("steps")
    whole = np.fmax(*of_steps.column("grad_norm"))
    size = whole[np.searchsorted(of_steps.step, joined.step)]
    yield from _told(
        pair,
        stage,
        joined,
        columns,
        rtol,
        "gradients differ" if stage == "gradients" else "gradients differ before clipping",
        _between_backward_and_step(pair, joined),
        within=within,
        size=size,
        backwards=True,
    )


def _between_backward_and_step(pair: Pair, joined: Joined) -> str:
    """Whether one of the runs alone edits gradients in place."""
    edited = [bool(side.any()) for side in joined.column("edited")]
    if edited[0] != edited[1]:
        return f"{'A' if edited[0] else 'B'} changes gradients in place after backward"
    return ""


def _statuses(pair: Pair, joined: Joined) -> Iterator[Difference]:
    apart = first_apart(joined, {}, 0.0, texts=("status",)) if len(joined) else None
    pair.compared["gradients"] += len(joined)
    if apart is None:
        return
    row = int(apart.rows[0])
    name = pair.param(int(joined.column("param")[0][row]))
    a, b = (side[row] for side in joined.column("status"))
    others = f", and of {len(apart.rows) - 1} more parameters" if len(apart.rows) > 1 else ""
    yield Difference(
        apart.step,
        "gradients",
        "status",
        f"the gradient of {name} is {a} in A and {b} in B{others}",
        a,
        b,
        param=name,
        n_different=len(apart.rows),
        n_compared=apart.n_compared,
        facts=tuple(
            fact_of(joined, "status", each, pair.param(int(joined.column("param")[0][each])))
            for each in apart.rows[:_MOST_FACTS].tolist()
        ),
    )


def _state(pair: Pair, stage: str, when: str, rtol: float, hint: str) -> Iterator[Difference]:
    yield from _missing_state(pair, stage, when)
    joined = pair.joined("state", ("param", "when", "key"))
    within = joined.column("when")[0] == when
    size = np.fmax(*joined.column("abs_max"))
    columns = {"value": None, "norm": None, "mean": size}
    said = f"the optimizer's state differs {when} the step"
    yield from _told(pair, stage, joined, columns, rtol, said, hint, within=within, also="key")


def _missing_state(pair: Pair, stage: str, when: str) -> Iterator[Difference]:
    """A key that only one run has, of a parameter whose update both recorded."""
    joined = pair.joined("state", ("param", "when", "key"))
    updates = pair.joined("updates", _BY_PARAM)
    params = updates.column("param")[0]
    recorded = set(zip(updates.step.tolist(), params.tolist(), strict=True))
    in_full = np.unique(updates.step)
    found = []
    for side, (rows, table) in enumerate(zip(joined.only, joined.tables, strict=True)):
        whens, keys = table.texts("when"), table.texts("key")
        steps, numbers = table.array("step"), table.array("param")
        wanted = (whens[rows] == when) & np.isin(steps[rows], in_full)
        for row in rows[wanted].tolist():
            number = int(numbers[row])
            if side:
                number = int(pair.a_params[number])
            if (int(steps[row]), number) in recorded:
                found.append((int(steps[row]), number, side, str(keys[row])))
    if not found:
        return
    step = min(each[0] for each in found)
    then = [each for each in found if each[0] == step]
    _, number, side, key = then[0]
    lacks = "B" if side == 0 else "A"
    a, b = ("there", None) if side == 0 else (None, "there")
    spelled = ", ".join(dict.fromkeys(each[3] for each in then))
    n = len({each[1] for each in then})
    others = f" and {n - 1} more parameters" if n > 1 else ""
    yield Difference(
        step,
        stage,
        key,
        f"{when} the step the optimizer has no state ({spelled}) of {pair.param(number)}{others} "
        f"in {lacks}",
        a,
        b,
        hint="the state was cleared, or the optimizer made anew" if when == "before" else "",
        param=pair.param(number),
        n_different=n,
        n_compared=int((updates.step == step).sum()),
        facts=tuple(
            Fact(f"{pair.param(number)} {each[3]}", a, b) for each in then if each[1] == number
        )[:_MOST_FACTS],
    )


def _told(
    pair: Pair,
    stage: str,
    joined: Joined,
    columns: Mapping[str, Any],
    rtol: float,
    said: str,
    hint: str = "",
    *,
    within: Any = None,
    size: Any = None,
    backwards: bool = False,
    also: str = "",
) -> Iterator[Difference]:
    """Give the difference of the first step at which any of these columns differs."""
    pair.compared[stage] += len(columns) * (len(joined) if within is None else int(within.sum()))
    passed: Any = rtol
    if stage in _OF_COPIES and len(joined):
        passed = np.where(_copied_alike(pair)[joined.step], rtol, max(rtol, pair.rounding))
    apart = first_apart(joined, columns, passed, within=within)
    if apart is None:
        return
    params = joined.column("param")[0]
    touched = list(dict.fromkeys(params[apart.rows].tolist()))
    # Backward comes to the last parameters first.
    lead = touched[-1] if backwards else touched[0]
    rows = [row for row in apart.rows.tolist() if params[row] == lead]
    row = max(rows, key=apart.furthest)
    name = pair.param(int(lead))
    facts = apart.facts(joined, row, " ".join([name, *_key(joined, also, row)]))
    worst = max(apart.rows.tolist(), key=apart.furthest)
    if params[worst] != lead:
        of_worst = pair.param(int(params[worst]))
        facts += apart.facts(joined, worst, " ".join([of_worst, *_key(joined, also, worst)]))[:1]
    n_at_step = len(set(params[(joined.step == apart.step) & (True if within is None else within)]))
    which = (
        f"of {name}"
        if len(touched) == 1
        else f"of {len(touched)} of {n_at_step} parameters, first {name}"
        if len(touched) < n_at_step
        else f"of all {n_at_step} parameters, first {name}"
    )
    column = apart.columns(row)[0]
    yield Difference(
        apart.step,
        stage,
        column,
        f"{said}: {which} ({_by(word_of(column), facts[0])})",
        facts[0].a,
        facts[0].b,
        facts[0].relative,
        _like_rounding(pair, joined, apart, size),
        hint,
        name,
        n_different=len(touched),
        n_compared=n_at_step,
        facts=tuple(facts[:_MOST_FACTS]),
    )


def _copied_alike(pair: Pair) -> Any:
    """bool[step], whether weights and state were copied for the same parameters in both runs.

    Norms of copies are added up block by block, and blocks reach over parameters: where others lie
    beside it, the norm of a parameter comes out with another last digit.
    """
    n = pair.n_common
    signature = np.zeros((2, n), np.uint64)
    for table, column in (("updates", "weight_norm_before"), ("grads", "status")):
        for side, run in enumerate((pair.a, pair.b)):
            rows = run.rows(table)
            values = rows.texts(column) if column == "status" else rows.array(column)
            there = values != "none" if column == "status" else ~np.isnan(values)
            steps, params = rows.array("step"), rows.array("param")
            there &= steps < n
            marks = _marks([entry.name for entry in run.parameters], table)
            np.add.at(signature[side], steps[there], marks[params[there]])
    return signature[0] == signature[1]


def _marks(names: list[str], table: str) -> Any:
    """uint64[n], numbers whose sums tell sets of parameters apart."""
    digests = [hashlib.blake2b(f"{table} {name}".encode(), digest_size=8) for name in names]
    return np.array([int.from_bytes(each.digest(), "little") for each in digests], np.uint64)


def _key(joined: Joined, also: str, row: int) -> list[str]:
    return [str(joined.column(also)[0][row])] if also else []


def _by(column: str, fact: Fact) -> str:
    a, b = in_digits(float(fact.a), float(fact.b))
    return f"{column} {a} against {b}"


def _like_rounding(pair: Pair, joined: Joined, apart: Apart, size: Any) -> bool:
    for name, each in apart.relative.items():
        far = each[apart.rows]
        if size is not None:
            a, b = (side[apart.rows] for side in joined.column(name))
            far = np.fmin(far, relative(a, b, size[apart.rows]))
        if (far > pair.rounding).any():
            return False
    return True


def _single_weights(pair: Pair, stage: str, name: str, rtol: float) -> Iterator[Difference]:
    """Compare the few weights of each parameter that are kept at recorded steps, one by one."""
    a_runs, b_runs = pair.a.tracked, pair.b.tracked
    for step in sorted(set(a_runs) & set(b_runs) & set(pair.steps.tolist())):
        a, b = a_runs[step], b_runs[step]
        if name not in a.values or name not in b.values:
            continue
        code_a = (a.param.astype(np.int64) << 40) + a.position
        code_b = (pair.a_params[b.param] << 40) + b.position
        _, at_a, at_b = np.intersect1d(code_a, code_b, return_indices=True)
        rows = np.argsort(at_a)
        at_a, at_b = at_a[rows], at_b[rows]
        if not len(rows):
            continue
        x, y = np.asarray(a.values[name])[at_a], np.asarray(b.values[name])[at_b]
        if np.iscomplexobj(x) or np.iscomplexobj(y):
            continue
        pair.compared[stage] += len(rows)
        # A weight near zero is compared with its neighbours.
        size = np.zeros(len(pair.a.parameters))
        np.fmax.at(size, a.param[at_a], np.fmax(np.abs(x), np.abs(y)))
        apart = relative(x, y, size[a.param[at_a]])
        differ = np.flatnonzero(apart > rtol)
        if not len(differ):
            continue
        first = int(differ[0])
        number, position = int(a.param[at_a[first]]), int(a.position[at_a[first]])
        index = np.unravel_index(position, pair.a.parameters[number].shape or (1,))
        weight = f"{pair.param(number)}[{', '.join(str(int(each)) for each in index)}]"
        shown = in_digits(float(x[first]), float(y[first]))
        what = {"g": "the gradient of "}.get(name, "")
        yield Difference(
            step,
            stage,
            name,
            f"{what}{weight} is {shown[0]} in A and {shown[1]} in B",
            float(x[first]),
            float(y[first]),
            float(apart[first]),
            bool((apart[differ] <= pair.rounding).all()),
            param=pair.param(number),
            n_different=len(differ),
            n_compared=len(rows),
            facts=(Fact(weight, float(x[first]), float(y[first]), float(apart[first])),),
        )
        return
