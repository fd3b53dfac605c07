"""Facts of a training step on top of the picture of its graph: a colour and a line in each box."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

import numpy as np

from gradscope.errors import ScopeStateError, UsageError
from gradscope.graphs.theme import between
from gradscope.graphs.wording import bytes_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from gradscope.graphs.diagram import Diagram
    from gradscope.graphs.fold import Folded
    from gradscope.graphs.theme import Theme
    from gradscope.run.captured_graph import LongIntegers

OverlayName: TypeAlias = Literal[
    "grad_norm", "grad_status", "nonfinite", "update_ratio", "saved_bytes", "findings"
]

_WHEN_MISSING: Final = {
    "grad_norm": "the gradients of its step were not seen",
    "grad_status": "the gradients of its step were not seen",
    "nonfinite": "the gradients of its step were not recorded in full",
    "update_ratio": "the update of its step was not recorded in full",
    "saved_bytes": "what its nodes keep was not read, or was gone after the backward",
    "findings": "nothing was judged: take the graph from a scope",
}

_USUAL: Final = frozenset({"fresh", "accumulated"})
"""Statuses of gradients that need no attention."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What an overlay adds to one box.

    Attributes:
        text: a line of small print; empty for none.
        fill: the colour of the box; empty for its own.
    """

    text: str = ""
    fill: str = ""


NO_MARK: Final = Mark()


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What is known of the parameters at the step of a graph, each by the parameter's name.

    Attributes:
        grad_norm: L2 norm of the gradient that the optimizer read.
        grad_status: its status, as in ``scope.grads``.
        nonfinite: how many of its elements are not finite.
        update_ratio: norm of the update relative to that of the weight.
        findings: codes of the findings that name the parameter; None if nothing was judged.
    """

    grad_norm: Mapping[str, float] = field(default_factory=dict)
    grad_status: Mapping[str, str] = field(default_factory=dict)
    nonfinite: Mapping[str, float] = field(default_factory=dict)
    update_ratio: Mapping[str, float] = field(default_factory=dict)
    findings: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Overlay:
    """One kind of fact, ready to be laid over diagrams of a graph.

    Attributes:
        name: which.
        legend: what the colours mean.
        marks: gives the mark of each box of a diagram.
    """

    name: str
    legend: str
    marks: Callable[[Diagram], list[Mark]]


def overlay_named(name: object, facts: StepFacts, theme: Theme, *, has_saved: bool) -> Overlay:
    """Prepare an overlay.

    Args:
        name: which; see :data:`OverlayName`.
        facts: what is known of the step.
        theme: the colours.
        has_saved: whether the graph knows what its nodes keep.

    Raises:
        UsageError: if there is no such overlay.
        ScopeStateError: if the facts that it shows are not known.
    """
    if name not in get_args(OverlayName):
        allowed = ", ".join(get_args(OverlayName))
        raise UsageError(f"overlay={name!r}: pass one of {allowed}")
    known: Any = has_saved if name == "saved_bytes" else getattr(facts, str(name))
    if known is None or (not known and name != "findings"):
        raise ScopeStateError(
            f"the overlay {name!r} has nothing to show for this graph: {_WHEN_MISSING[str(name)]}"
        )
    if name == "saved_bytes":
        return _of_saved_bytes(theme)
    if name in ("grad_norm", "update_ratio"):
        return _of_numbers(str(name), known, theme)
    return _of_words(str(name), known, theme)


def leaves_of_boxes(diagram: Diagram) -> list[list[int]]:
    """Return the leaves that belong to each box, those of all copies of a repetition included."""
    edges = diagram.folded.execution
    box = diagram.box_of_place[edges.target]
    at = np.flatnonzero((edges.leaf >= 0) & (box >= 0))
    found: list[list[int]] = [[] for _ in diagram.boxes]
    for number, leaf in np.unique(np.stack([box[at], edges.leaf[at]], axis=1), axis=0).tolist():
        found[number].append(leaf)
    for number, each in enumerate(diagram.boxes):
        if each.leaf >= 0:
            found[number] = [each.leaf, *diagram.alike.get(each.leaf, ())]
        elif each.block is None:
            found[number] = list(each.leaves)
        elif not each.block.can_open:
            found[number] = []  # an operation has its parameters in boxes of their own
    return found


def _values(diagram: Diagram, leaves: Iterable[int], facts: Mapping[str, Any]) -> list[Any]:
    params = diagram.folded.captured.params
    names = (next((name for name in params[leaf] if name in facts), None) for leaf in leaves)
    return [facts[name] for name in names if name is not None]


def saved_bytes_of_nodes(folded: Folded) -> LongIntegers:
    """Return int64[n], what each node keeps for the backward.

    Parameters are left out, and memory that several keep is counted at the first of them.
    """
    saved = folded.captured.saved
    order = np.argsort(folded.execution.place[saved.node], kind="stable")
    order = order[saved.storage[order] >= 0]
    _, first = np.unique(saved.storage[order], return_index=True)
    counted = order[first]
    return np.bincount(
        saved.node[counted], weights=saved.n_bytes[counted], minlength=len(folded.captured)
    ).astype(np.int64)


def _of_numbers(name: str, facts: Mapping[str, float], theme: Theme) -> Overlay:
    what = {"grad_norm": "gradient norm", "update_ratio": "update / weight"}[name]
    short = {"grad_norm": "|grad|", "update_ratio": "update / weight"}[name]

    def marks(diagram: Diagram) -> list[Mark]:
        values = [_values(diagram, leaves, facts) for leaves in leaves_of_boxes(diagram)]
        texts = []
        for of_box in values:
            low, high = min(of_box, default=0.0), max(of_box, default=0.0)
            texts.append(f"{short} {low:.3g}" + (f" … {high:.3g}" if low < high else ""))
        greatest = [
            math.nan if any(map(math.isnan, of_box)) else max(of_box, default=None)
            for of_box in values
        ]
        return _coloured(texts, greatest, theme)

    return Overlay(
        name,
        f"Colour: {what}, the greatest in a box, from pale (small) to orange (large), on a "
        "logarithmic scale; red is not finite.",
        marks,
    )


def _of_saved_bytes(theme: Theme) -> Overlay:
    def marks(diagram: Diagram) -> list[Mark]:
        place = diagram.folded.execution.place
        inner = place >= 0
        box = diagram.box_of_place[place[inner]]
        n_bytes = np.bincount(
            box[box >= 0],
            weights=saved_bytes_of_nodes(diagram.folded)[inner][box >= 0],
            minlength=len(diagram.boxes),
        ).tolist()
        texts = [f"keeps {bytes_text(of_box)}" for of_box in n_bytes]
        return _coloured(texts, [of_box or None for of_box in n_bytes], theme)

    return Overlay(
        "saved_bytes",
        "Colour: what is kept for the backward, parameters left out, shared memory counted where "
        "it is kept first, all copies of a repetition together.",
        marks,
    )


def _of_words(name: str, facts: Mapping[str, Any], theme: Theme) -> Overlay:
    legend = {
        "grad_status": "Colour: gradients that are neither fresh nor accumulated are marked.",
        "nonfinite": "Colour: gradients with elements that are not finite are marked.",
        "findings": "Colour: parameters named by a finding are marked.",
    }[name]

    def mark(values: list[Any]) -> Mark:
        if not values:
            return NO_MARK
        if name == "nonfinite":
            n_bad = sum(values)
            return Mark(f"{n_bad:,.0f} not finite", theme.alarm) if n_bad else NO_MARK
        words = dict.fromkeys(word for value in values for word in value.split(", "))
        is_usual = name == "grad_status" and set(words) <= _USUAL
        return Mark(", ".join(words), theme.low if is_usual else theme.alarm)

    def marks(diagram: Diagram) -> list[Mark]:
        return [mark(_values(diagram, leaves, facts)) for leaves in leaves_of_boxes(diagram)]

    return Overlay(name, legend, marks)


def _coloured(texts: list[str], numbers: Sequence[float | None], theme: Theme) -> list[Mark]:
    known = [n for n in numbers if n is not None and 0 < n < math.inf]
    low, high = min(known, default=1.0), max(known, default=1.0)
    marks = []
    for text, number in zip(texts, numbers, strict=True):
        if number is None:
            marks.append(NO_MARK)
        elif not math.isfinite(number):
            marks.append(Mark(text, theme.alarm))
        else:
            share = 0.0 if number <= 0 else 1.0
            if low < high and number > 0:
                share = math.log(number / low) / math.log(high / low)
            marks.append(Mark(text, between(theme.low, theme.high, share)))
    return marks
