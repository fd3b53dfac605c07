"""What a page says about each box when it is selected, and how overlays colour it."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from gradscope.graphs.insides import edges_of
from gradscope.graphs.labels import with_glyphs
from gradscope.graphs.overlay import saved_bytes_of_nodes
from gradscope.graphs.wording import bytes_text, counted, operation_name, shape_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from gradscope.graphs.diagram import Box
    from gradscope.graphs.fold import Block
    from gradscope.graphs.insides import Inside, Insides
    from gradscope.graphs.overlay import OverlayName, StepFacts
    from gradscope.graphs.unreached import Unreached
    from gradscope.run.captured_graph import Outputs

Row = tuple[str, "str | list[str]"]
"""What a line of a card is about, and what it says; a list has a line for each entry."""

_MOST_LINES: Final = 12
_MOST_PARAMETERS: Final = 40
_LONGEST: Final = 600
_USUAL: Final = frozenset({"fresh", "accumulated"})

ALARM: Final = -1.0
"""In place of a share between 0 and 1: something is wrong."""

OVERLAYS: Final[dict[OverlayName, tuple[str, str]]] = {
    "grad_norm": ("gradient norm", "L2 norm of the gradient, the greatest in a box"),
    "grad_status": ("gradient status", "gradients that are neither fresh nor accumulated"),
    "nonfinite": ("non-finite gradients", "gradients with elements that are not finite"),
    "update_ratio": ("update ratio", "norm of the update / norm of the weight, the greatest"),
    "saved_bytes": (
        "saved bytes",
        "kept for the backward, all copies of a repetition together; shared memory counts where it "
        "is kept first",
    ),
    "findings": ("findings", "parameters that a finding names"),
}

_WHY: Final = {
    "cut off": "cut off: it made {} and none of them leads to the loss",
    "no grad": "it ran while gradients were switched off (no_grad, or inputs without grad)",
    "not called": "it was never called",
    "frozen": "frozen: it does not require grad",
    "unused": "its module leads to the loss, but not by way of this parameter",
}


def shown_text(text: str, longest: int = _LONGEST) -> str:
    """``text`` with characters that cannot be seen written out, and cut if it is very long."""
    text = with_glyphs(text[: longest + 1])
    return text if len(text) <= longest else text[:longest] + "…"


class Cards:
    """Makes the cards and marks of the boxes of a graph.

    Args:
        insides: the boxes.
        facts: what is known of the parameters at the step.
    """

    def __init__(self, insides: Insides, facts: StepFacts) -> None:
        self._insides = insides
        self._folded = insides.folded
        self._captured = insides.folded.captured
        self._edges = insides.folded.execution
        self._facts = facts
        node = self._edges.node
        per_place = saved_bytes_of_nodes(self._folded)[node] if len(node) else np.zeros(0, np.int64)
        self._saved_before = np.concatenate([[0], np.cumsum(per_place)])
        saved = self._captured.saved
        self._saved_order = np.argsort(saved.node, kind="stable")
        self._saved_first = np.searchsorted(
            saved.node[self._saved_order], np.arange(len(self._captured) + 1)
        )
        self._keepers = Counter(saved.storage.tolist())
        self._call_number = _numbered(self._captured.calls.module.tolist())
        self._n_calls = Counter(self._captured.calls.module.tolist())
        self._roots = set(self._captured.roots.tolist())

    # -- which parameters -------------------------------------------------------------------

    def leaves(self, inside: Inside, box: Box) -> list[int]:
        """Return the leaves of a box, those of all copies for which it stands included."""
        if box.missing is not None:
            return []
        if box.block is not None:
            if not box.block.can_open:
                return []  # an operation's parameters have boxes of their own
            at = edges_of(self._edges, box.block.start, box.block.stop, inside.copies)
            leaf = self._edges.leaf[at]
            return list(dict.fromkeys(leaf[leaf >= 0].tolist()))
        shown = [box.leaf] if box.leaf >= 0 else box.leaves
        wanted = [other for leaf in shown for other in (leaf, *inside.alike.get(leaf, ()))]
        start, stop = inside.block.start, inside.block.start + inside.block.period
        leaf = self._edges.leaf[edges_of(self._edges, start, stop, inside.copies)]
        if len(inside.copies) > 1 and len(leaf) % len(inside.copies) == 0:
            of_copy = leaf.reshape(len(inside.copies), -1)
            at = np.flatnonzero(np.isin(of_copy[0], wanted))
            wanted += of_copy[:, at].ravel().tolist()
        return list(dict.fromkeys(wanted))

    def parameter_row(self, leaf: int) -> list[Any]:
        """Return names, shape and facts of a leaf, for the table in a card."""
        names = self._captured.params[leaf]
        row: list[Any] = [
            [shown_text(name) for name in names],
            shape_text(self._captured.param_shape[leaf]),
        ]
        for known in (
            self._facts.grad_norm,
            self._facts.grad_status,
            self._facts.nonfinite,
            self._facts.update_ratio,
            self._facts.findings or {},
        ):
            value = _first_known(known, names)
            row.append(_value_text(value))
        while row[-1] == "":
            row.pop()
        return row

    # -- cards ------------------------------------------------------------------------------

    def rows(self, inside: Inside, box: Box) -> list[Row]:
        """Return the lines of the card of a box, apart from its parameters."""
        if box.missing is not None:
            return list(_of_missing(box.missing))
        if box.block is None:
            return []
        if box.block.can_open:
            return list(self._of_block(inside, box.block))
        return list(self._of_operation(inside, box.block))

    def path(self, inside: Inside, box: Box) -> tuple[str, str]:
        """Return path and class of the module that a box is, or lies in; empty if in none."""
        call = -1
        if box.block is not None:
            call = inside.call() if box.block.call < 0 else box.block.call
            if box.block.kind == "operation":
                call = int(self._captured.call[self._edges.node[box.block.start]])
        if call < 0:
            return "", ""
        calls = self._captured.calls
        return shown_text(calls.path(call)), shown_text(calls.kind(call))

    def _of_operation(self, inside: Inside, block: Block) -> Iterator[Row]:
        captured = self._captured
        node = int(self._edges.node[block.start])
        yield "autograd node", shown_text(captured.op_of(node))
        if captured.call[node] >= 0:
            yield from self._of_call(int(captured.call[node]))
        if captured.line[node] >= 0:
            file, line = captured.lines[captured.line[node]]
            yield "made in", shown_text(f"{file}:{line}")
        yield "outputs", _outputs(captured.outputs_of(node))
        n_copies = len(inside.copies) * block.count
        if n_copies > 1:
            yield "stands for", f"{n_copies:,} operations; the first is described"
        saved = list(self._saved(node))
        if saved or len(captured.saved):
            yield "saved for the backward", saved or "nothing"
        if captured.sequence_nr[node] >= 0:
            yield "sequence number", f"{int(captured.sequence_nr[node]):,}"

    def _of_block(self, inside: Inside, block: Block) -> Iterator[Row]:
        captured = self._captured
        if block.kind == "module":
            yield from self._of_call(block.call)
        n_copies = len(inside.copies) * block.count
        inner = counted(block.period, "operation")
        if n_copies > 1:
            inner += f" ({block.period * n_copies:,} in all {n_copies:,} copies)"
        yield "inside", inner
        if block.count > 1:
            yield "repeated", f"×{block.count:,}; the first is shown"
        yield "mostly", self._mostly(block)
        yield "gives", self._given(block)
        if len(captured.saved):
            yield "keeps for the backward", bytes_text(self.saved_bytes(inside, block))
        numbers = captured.sequence_nr[self._edges.node[block.start : block.start + block.period]]
        if len(numbers) and numbers.min() >= 0:
            yield "sequence numbers", f"{int(numbers.min()):,} … {int(numbers.max()):,}"

    def _of_call(self, call: int) -> Iterator[Row]:
        calls = self._captured.calls
        n_calls = self._n_calls[int(calls.module[call])]
        if n_calls > 1:
            yield "module call", f"{self._call_number[call]:,} of {n_calls:,}"

    def _mostly(self, block: Block) -> str:
        ops = self._captured.op[self._edges.node[block.start : block.start + block.period]]
        common = Counter(ops.tolist()).most_common(4)
        return ", ".join(
            shown_text(operation_name(self._captured.ops[op]), 60) + (f" ×{n:,}" if n > 1 else "")
            for op, n in common
        )

    def _given(self, block: Block) -> list[str]:
        """What others use of a block's results (of its first copy), or backward starts from."""
        captured, edges, stop = self._captured, self._edges, block.start + block.period
        first_use = self._insides.first_use
        uses = self._insides.uses[first_use[block.start] : first_use[stop]]
        uses = uses[edges.target[uses] >= stop]
        pairs = set(
            zip(edges.source[uses].tolist(), edges.source_output[uses].tolist(), strict=True)
        )
        roots = (place for place in self._root_places() if block.start <= place < stop)
        pairs |= {(place, 0) for place in roots}
        texts: Counter[str] = Counter()
        for place, output in sorted(pairs):
            of = captured.outputs_of(int(edges.node[place]))
            if output < len(of.shapes):
                texts[f"{shape_text(of.shapes[output])}  {of.dtypes[output]}"] += 1
        lines = [text + (f"  ({n:,} of them)" if n > 1 else "") for text, n in texts.items()]
        return _few(lines, len(lines)) or ["nothing that leads to the loss"]

    def _root_places(self) -> list[int]:
        return [int(self._edges.place[root]) for root in self._roots]

    def _saved(self, node: int) -> Iterator[str]:
        saved = self._captured.saved
        which = self._saved_order[self._saved_first[node] : self._saved_first[node + 1]].tolist()
        for at in which[:_MOST_LINES]:
            name, shape = saved.names[saved.name[at]], saved.shapes[at]
            text = f"{shown_text(name, 80)}: "
            if shape is None:
                text += "packed by a hook"
            else:
                text += f"{shape_text(shape)}, {bytes_text(int(saved.n_bytes[at]))}"
                storage = int(saved.storage[at])
                if storage < 0:
                    text += " (a parameter or other leaf)"
                elif self._keepers[storage] > 1:
                    text += " (others keep this memory, too)"
            yield text
        if len(which) > _MOST_LINES:
            yield f"… {len(which) - _MOST_LINES:,} more"

    # -- overlays ---------------------------------------------------------------------------

    def overlays(self) -> list[OverlayName]:
        """Return the overlays for which there is something to show."""
        known = {
            "grad_norm": self._facts.grad_norm,
            "grad_status": self._facts.grad_status,
            "nonfinite": self._facts.nonfinite,
            "update_ratio": self._facts.update_ratio,
            "saved_bytes": len(self._captured.saved),
            "findings": self._facts.findings is not None,
        }
        return [name for name in OVERLAYS if known[name]]

    def marks(
        self, name: OverlayName, boxes: list[tuple[Inside, Box]], leaves: list[list[int]]
    ) -> list[tuple[float, str] | None]:
        """Return how strongly each box is marked, 0 to 1 or :data:`ALARM`, and what it says."""
        if name == "saved_bytes":
            sizes = [
                self.saved_bytes(inside, box.block) if box.block is not None else 0
                for inside, box in boxes
            ]
            return _on_scale([bytes_text(of) for of in sizes], [s or None for s in sizes])
        known: Mapping[str, Any] = getattr(self._facts, name) or {}
        params = self._captured.params
        values = [
            [v for leaf in of if (v := _first_known(known, params[leaf])) is not None]
            for of in leaves
        ]
        if name in ("grad_norm", "update_ratio"):
            return _on_scale([_range(of) for of in values], [_greatest(of) for of in values])
        return [_mark_of_words(name, of) for of in values]

    def saved_bytes(self, inside: Inside, block: Block) -> int:
        """What a block keeps for the backward, in bytes, all its copies together."""
        before = self._saved_before
        kept = before[block.stop + inside.copies] - before[block.start + inside.copies]
        return int(kept.sum())


def listed(leaves: list[int]) -> tuple[list[int], int]:
    """Return the leaves that the table in a card lists, and how many more there are."""
    return leaves[:_MOST_PARAMETERS], max(0, len(leaves) - _MOST_PARAMETERS)


def _of_missing(missing: Unreached) -> Iterator[Row]:
    if missing.what not in ("", "parameter"):
        yield "class", shown_text(missing.what)
    yield "why", _WHY[missing.why].format(counted(missing.n_operations, "operation"))
    if missing.taken_by:
        taken = [shown_text(path or "the model itself") for path in missing.taken_by[:_MOST_LINES]]
        yield "its result went to", _few(taken, len(missing.taken_by))
    if missing.params:
        names = [
            f"{shown_text(' = '.join(each.names))}  {shape_text(each.shape)}"
            for each in missing.params[:_MOST_LINES]
        ]
        yield "parameters", _few(names, len(missing.params))


def _few(texts: list[str], n_all: int) -> list[str]:
    kept = texts[:_MOST_LINES]
    return [*kept, f"… {n_all - len(kept):,} more"] if n_all > len(kept) and kept else kept


def _outputs(outputs: Outputs) -> str | list[str]:
    texts = [
        f"{shape_text(shape)}  {dtype}"
        for shape, dtype in zip(outputs.shapes, outputs.dtypes, strict=False)
    ]
    return _few(texts, len(texts)) or "torch does not tell"


def _first_known(known: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((known[name] for name in names if name in known), None)


def _value_text(value: Any) -> str:
    if value is None or isinstance(value, str):
        return shown_text(value or "")
    return f"{value:.4g}"


def _range(values: list[float]) -> str:
    if any(map(math.isnan, values)):
        return "nan"
    low, high = min(values, default=0.0), max(values, default=0.0)
    return f"{low:.2g}" + (f" … {high:.2g}" if low < high else "")


def _greatest(values: list[float]) -> float | None:
    if any(map(math.isnan, values)):
        return math.nan
    return max(values, default=None)


def _on_scale(
    texts: list[str], numbers: list[float | None] | list[int | None]
) -> list[tuple[float, str] | None]:
    """Place numbers on a logarithmic scale that is the same for all boxes."""
    known = [n for n in numbers if n is not None and 0 < n < math.inf]
    low, high = min(known, default=1.0), max(known, default=1.0)
    marks: list[tuple[float, str] | None] = []
    for text, number in zip(texts, numbers, strict=True):
        if number is None:
            marks.append(None)
        elif not math.isfinite(number):
            marks.append((ALARM, text))
        else:
            share = 0.0 if number <= 0 else 1.0
            if low < high and number > 0:
                share = math.log(number / low) / math.log(high / low)
            marks.append((round(share, 2), text))
    return marks


def _mark_of_words(name: OverlayName, values: list[Any]) -> tuple[float, str] | None:
    if not values:
        return None
    if name == "nonfinite":
        n_bad = sum(values)
        return (ALARM, f"{n_bad:,.0f} not finite") if n_bad else None
    words = dict.fromkeys(word for value in values for word in value.split(", "))
    text = shown_text(", ".join(words), 80)
    is_usual = name == "grad_status" and set(words) <= _USUAL
    return (0.0 if is_usual else ALARM, text)


def _numbered(modules: list[int]) -> list[int]:
    """Number the calls of each module from 1 on."""
    seen: Counter[int] = Counter()
    numbers = []
    for module in modules:
        seen[module] += 1
        numbers.append(seen[module])
    return numbers
