"""What was so before the first step: models, parameters, initial weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from gradscope.comparison.difference import Difference, Fact
from gradscope.comparison.numbers import in_digits, relative
from gradscope.comparison.pair import Pair
from gradscope.run.entries import ParameterEntry

_MOST_FACTS = 6

_MANY = 1 / 3
"""A seed changes most weights but no bias of zeros and no scale of ones."""


def models_and_parameters(pair: Pair) -> Iterator[Difference]:
    """Give what models and parameters differ in, by their declaration."""
    a, b = pair.a, pair.b
    kinds = [[model.kind for model in run.models] for run in (a, b)]
    pair.compared["parameters"] += len(kinds[0]) + len(a.parameters)
    if kinds[0] != kinds[1]:
        of_a, of_b = (", ".join(each) or "none" for each in kinds)
        yield Difference(
            None,
            "parameters",
            "model",
            f"the model is {of_a} in A and {of_b} in B",
            of_a,
            of_b,
            facts=(Fact("model", of_a, of_b),),
        )
    yield from _missing(pair)
    for quantity, value, word in (
        ("shape", lambda entry: str(entry.shape), "another shape"),
        ("dtype", lambda entry: entry.dtype, "another dtype"),
        ("module_type", lambda entry: entry.module_type, "another class of module"),
    ):
        yield from _of_parameters(pair, quantity, value, word)
    yield from _requires_grad(pair)


def initial_weights(pair: Pair, rtol: float) -> Iterator[Difference]:
    """Give the difference between the weights as they were first met."""
    both = [(i, j) for i, j in enumerate(pair.b_params) if j >= 0]
    if not both:
        return
    norms = np.array(
        [(pair.a.parameters[i].norm_first, pair.b.parameters[j].norm_first) for i, j in both]
    )
    apart = relative(norms[:, 0], norms[:, 1])
    # What one run has not read says nothing.
    known = ~np.isnan(norms).any(axis=1)
    pair.compared["initial_weights"] += int(known.sum())
    at = np.flatnonzero(known & (apart > rtol))
    if not len(at):
        return
    names = [pair.param(both[row][0]) for row in at]
    first = int(at[0])
    shown = in_digits(*norms[first])
    some = len(at) > _MANY * len(both)
    rounding = bool((apart[at] <= pair.rounding).all())
    verb = "begins with other values" if len(at) == 1 else "begin with other values, first"
    message = (
        f"{names[0]} {verb} (norm {shown[0]} against {shown[1]})"
        if len(at) == 1
        else f"{len(at)} of {len(both)} parameters {verb} {names[0]} "
        f"(norm {shown[0]} against {shown[1]})"
    )
    yield Difference(
        None,
        "initial_weights",
        "norm_first",
        message,
        float(norms[first, 0]),
        float(norms[first, 1]),
        float(apart[first]),
        rounding,
        "another seed, another initialisation or another checkpoint"
        if some
        else "the others begin alike: this was set, initialised or loaded in another way",
        names[0],
        n_different=len(at),
        n_compared=int(known.sum()),
        facts=tuple(
            Fact(f"{pair.param(both[row][0])} norm", norms[row, 0], norms[row, 1], apart[row])
            for row in at[:_MOST_FACTS].tolist()
        ),
    )


def _missing(pair: Pair) -> Iterator[Difference]:
    only_a = [pair.param(i) for i, j in enumerate(pair.b_params) if j < 0]
    known = {entry.name for entry in pair.a.parameters}
    only_b = [entry.name for entry in pair.b.parameters if entry.name not in known]
    if not only_a and not only_b:
        return
    said = []
    for names, where, run in ((only_a, "B", pair.b), (only_b, "A", pair.a)):
        if names:
            said.append(f"{_listed(names)} {'is' if len(names) == 1 else 'are'} missing in {where}")
            shared = {alias: entry.name for entry in run.parameters for alias in entry.aliases}
            if names[0] in shared:
                said[-1] += f", where it is the same as {shared[names[0]]}"
    facts = [Fact(name, _declared(pair.a.parameters, name), None) for name in only_a]
    facts += [Fact(name, None, _declared(pair.b.parameters, name)) for name in only_b]
    yield Difference(
        None,
        "parameters",
        "param",
        "; ".join(said),
        only_a[0] if only_a else None,
        only_b[0] if only_b else None,
        param=(only_a or only_b)[0],
        n_different=len(facts),
        n_compared=len({*known, *only_b}),
        facts=tuple(facts[:_MOST_FACTS]),
    )


def _of_parameters(pair: Pair, quantity: str, value: Any, word: str) -> Iterator[Difference]:
    both = [
        (pair.a.parameters[i], pair.b.parameters[j]) for i, j in enumerate(pair.b_params) if j >= 0
    ]
    differ = [(a.name, value(a), value(b)) for a, b in both if value(a) != value(b)]
    if not differ:
        return
    name, of_a, of_b = differ[0]
    others = f", and {len(differ) - 1} more" if len(differ) > 1 else ""
    yield Difference(
        None,
        "parameters",
        quantity,
        f"{name} has {word}: {of_a} in A and {of_b} in B{others}",
        of_a,
        of_b,
        param=name,
        n_different=len(differ),
        n_compared=len(both),
        facts=tuple(Fact(f"{name} {quantity}", a, b) for name, a, b in differ[:_MOST_FACTS]),
    )


def _requires_grad(pair: Pair) -> Iterator[Difference]:
    """Whether parameters are frozen, and since when."""
    differ: list[tuple[int, str, str, str]] = []
    for i, j in enumerate(pair.b_params):
        if j < 0:
            continue
        a, b = pair.a.parameters[i], pair.b.parameters[j]
        flips = [entry.requires_grad_changed for entry in (a, b)]
        if a.requires_grad == b.requires_grad and flips[0] == flips[1]:
            continue
        first = min((flip for flip in flips if flip is not None), default=-1)
        if first < pair.n_common:  # what only the longer run came to is no difference
            differ.append((first, a.name, _frozen(a), _frozen(b)))
    if not differ:
        return
    first = min(step for step, *_ in differ)
    then = [each for each in differ if each[0] == first]
    _, name, of_a, of_b = then[0]
    others = f", and {len(then) - 1} more likewise" if len(then) > 1 else ""
    yield Difference(
        None if first < 0 else first,
        "parameters",
        "requires_grad",
        f"{name} is {of_a} in A and {of_b} in B{others}",
        of_a,
        of_b,
        param=name,
        n_different=len(then),
        n_compared=len(pair.b_params),
        facts=tuple(Fact(name, a, b) for _, name, a, b in then[:_MOST_FACTS]),
    )


def _frozen(entry: ParameterEntry) -> str:
    state = "trained" if entry.requires_grad else "frozen"
    flip = entry.requires_grad_changed
    return state if flip is None else f"{state} since step {flip}"


def _declared(entries: list[ParameterEntry], name: str) -> str:
    entry = next(entry for entry in entries if entry.name == name)
    return f"{entry.shape} {entry.dtype}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
