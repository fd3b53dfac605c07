"""Where NaN or infinity came from: read off what the nodes of a graph keep for the backward.

Everything is read before the backward frees it, and in its raw form: unpacking would run the hooks
of ``saved_tensors_hooks``, which under activation checkpointing is the user's forward once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gradscope.instruments.tensor_summary import is_readable

_RAW = "_raw_saved_"
_IS_INFINITE_ITSELF = frozenset(
    {"Log", "Log2", "Log10", "Log1P", "Div", "Reciprocal", "Rsqrt", "Atanh", "Xlogy"}
)
"""Of the operations below those whose value, too, is infinite at such a point."""

_SOFTMAXES = ("Softmax", "LogSoftmax")
_MASKED = "as for a row that is -inf throughout, which an attention mask can make"

_RESULTS = ("result", "output", "result0", "result1")
_MOST_NODES = 50_000

_Test = Callable[[torch.Tensor], torch.Tensor]

_SINGULAR: dict[str, tuple[str, _Test, str]] = {
    "Sqrt": ("result", lambda value: value == 0, "the square root of 0"),
    "Rsqrt": ("result", torch.isinf, "1 / the square root of 0"),
    "Log": ("self", lambda value: value == 0, "the logarithm of 0"),
    "Log2": ("self", lambda value: value == 0, "the logarithm of 0"),
    "Log10": ("self", lambda value: value == 0, "the logarithm of 0"),
    "Log1P": ("self", lambda value: value == -1, "the logarithm of 0"),
    "Div": ("other", lambda value: value == 0, "a division by 0"),
    "Reciprocal": ("result", torch.isinf, "1 / 0"),
    "Pow": ("self", lambda value: value == 0, "a power of 0"),
    "PowTensorTensor": ("self", lambda value: value == 0, "a power of 0"),
    "Acos": ("self", lambda value: value.abs() == 1, "the arc cosine of ±1"),
    "Asin": ("self", lambda value: value.abs() == 1, "the arc sine of ±1"),
    "Std": ("result", lambda value: value == 0, "a standard deviation of 0"),
    "Atanh": ("self", lambda value: value.abs() == 1, "atanh of ±1"),
    "Xlogy": ("other", lambda value: value == 0, "the logarithm of 0"),
}
"""Operations whose derivative is infinite somewhere: what they save, where, and in words."""


@dataclass(frozen=True, slots=True)
class Origin:
    """An operation from which something non-finite comes.

    Attributes:
        operation: as in ``Log``.
        rank: how many nodes of that operation were made before it in the same graph.
        of: how many there are in all.
        what: in words.
        count: how many elements.
    """

    operation: str
    rank: int
    of: int
    what: str
    count: int


def first_nonfinite(roots: Sequence[torch.Tensor]) -> Origin | None:
    """Return the operation that gave the first non-finite value.

    Returns:
        Its origin; with an empty name for the operation if a weight was not finite before the
        forward began; None for roots without a graph.
    """
    nodes = _nodes_in_order(roots)
    n_bad = _n_bad_weights(nodes)
    if n_bad:
        return Origin("", 0, 0, "weights were not finite any more before the forward", n_bad)
    for node in nodes:
        name = _operation(node)
        if name in _IS_INFINITE_ITSELF:
            count = _n_singular(node, _SINGULAR[name])
            if count:
                return _origin(node, nodes, _SINGULAR[name][2], count)
        for saved, value in _saved(node):
            bad = int((~torch.isfinite(value)).sum()) if value.is_floating_point() else 0
            if not bad:
                continue
            guilty = node if saved in _RESULTS else _giver(node)
            if guilty is None:
                words = f"what goes into {name} is not finite already"
                return _origin(node, nodes, words, bad)
            kind = "NaN" if bool(torch.isnan(value).any()) else "infinity"
            at = _MASKED if _operation(guilty) in _SOFTMAXES else _singularity_of(guilty)
            words = f"{_operation(guilty)} gave {kind}"
            return _origin(guilty, nodes, f"{words}: {at}" if at else words, bad)
    if not nodes:
        return None
    return _origin(nodes[-1], nodes, "it gave a value that is not finite", 1)


def first_singular(roots: Sequence[torch.Tensor]) -> Origin | None:
    """Return the operation, first in order, at a point where its derivative is infinite."""
    nodes = _nodes_in_order(roots)
    for node in nodes:
        known = _SINGULAR.get(_operation(node))
        if known is None:
            continue
        count = _n_singular(node, known)
        if count:
            return _origin(node, nodes, known[2], count)
    return None


def has_singular(roots: Sequence[torch.Tensor]) -> bool:
    """Whether a graph has an operation whose derivative is infinite somewhere."""
    return any(
        known[0] == name and _can_be_singular(node)
        for node in _nodes_in_order(roots)
        if (known := _SINGULAR.get(_operation(node))) is not None
        for name, _ in _saved(node)
    )


def _can_be_singular(node: Any) -> bool:
    if _operation(node) != "Pow":
        return True
    exponent = getattr(node, "_saved_exponent", 1)
    return not isinstance(exponent, torch.Tensor) and exponent < 1 and exponent != 0


def _n_bad_weights(nodes: Sequence[Any]) -> int:
    leaves = {
        used.variable
        for node in nodes
        for used, _ in node.next_functions
        if type(used).__name__ == "AccumulateGrad"
    }
    return sum(int((~torch.isfinite(leaf)).sum()) for leaf in leaves if is_readable(leaf))


def _n_singular(node: Any, known: tuple[str, _Test, str]) -> int:
    wanted, is_singular, _ = known
    if not _can_be_singular(node):
        return 0
    return sum(
        int((is_singular(value) | torch.isnan(value)).sum())
        for name, value in _saved(node)
        if name == wanted and value.is_floating_point()
    )


def _singularity_of(node: Any) -> str:
    known = _SINGULAR.get(_operation(node))
    return known[2] if known is not None and _n_singular(node, known) else ""


def _giver(node: Any) -> Any:
    """The last operation before a node that gave it something."""
    givers = [
        used
        for used, _ in node.next_functions
        if used is not None and type(used).__name__ != "AccumulateGrad"
    ]
    return max(givers, key=lambda used: used._sequence_nr(), default=None)


def _origin(node: Any, nodes: list[Any], what: str, count: int) -> Origin:
    alike = [other for other in nodes if type(other) is type(node)]
    rank = alike.index(node) if node in alike else 0
    return Origin(_operation(node), rank, len(alike), what, count)


def _nodes_in_order(roots: Sequence[torch.Tensor]) -> list[Any]:
    pending = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen = set(pending)
    nodes: list[Any] = []
    while pending and len(nodes) < _MOST_NODES:
        node: Any = pending.pop()
        nodes.append(node)
        for used, _ in node.next_functions:
            if used is not None and used not in seen and type(used).__name__ != "AccumulateGrad":
                seen.add(used)
                pending.append(used)
    nodes.sort(key=lambda node: int(node._sequence_nr()))
    return nodes


_attributes: dict[type, list[str]] = {}


def _saved(node: Any) -> list[tuple[str, torch.Tensor]]:
    kind = type(node)
    names = _attributes.get(kind)
    if names is None:
        names = _attributes[kind] = [name for name in dir(kind) if name.startswith(_RAW)]
    found: list[tuple[str, torch.Tensor]] = []
    for name in names:
        try:
            raw = getattr(node, name)
        except RuntimeError:  # a custom Function's, after the backward
            continue
        for each in raw if type(raw) is tuple else (raw,):
            value = each.data
            if isinstance(value, torch.Tensor) and is_readable(value):
                found.append((name[len(_RAW) :], value.detach()))
    return found


def _operation(node: Any) -> str:
    return _stem(type(node).__name__)


def _stem(name: str) -> str:
    return name.rstrip("0123456789").removesuffix("Backward")
