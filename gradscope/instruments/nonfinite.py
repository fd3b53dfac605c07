"""Where NaN or infinity came from: read off what the nodes of a graph keep for the backward.

Everything is read before the backward frees it, and in its raw form: unpacking would run the hooks
of ``saved_tensors_hooks``, which under activation checkpointing is the user's forward once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gradscope.instruments.graph_nodes import is_leaf, operation_of, operations_behind
from gradscope.instruments.saved_tensors import saved_tensors_of
from gradscope.instruments.tensor_summary import is_readable

_IS_INFINITE_ITSELF = frozenset(
    {"Log", "Log2", "Log10", "Log1P", "Div", "Reciprocal", "Rsqrt", "Atanh", "Xlogy"}
)
"""Of the operations below those whose value, too, is infinite at such a point."""

_SOFTMAXES = ("Softmax", "LogSoftmax")
_MASKED = "as for a row that is -inf throughout, which an attention mask can make"

_RESULTS = ("result", "output", "result0", "result1")

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
        name = operation_of(node)
        if name in _IS_INFINITE_ITSELF:
            count = _n_singular(node, _SINGULAR[name])
            if count:
                return _origin(node, nodes, _SINGULAR[name][2], count)
        for saved, value in saved_tensors_of(node):
            bad = int((~torch.isfinite(value)).sum()) if value.is_floating_point() else 0
            if not bad:
                continue
            guilty = node if saved in _RESULTS else _giver(node)
            if guilty is None:
                words = f"what goes into {name} is not finite already"
                return _origin(node, nodes, words, bad)
            kind = "NaN" if bool(torch.isnan(value).any()) else "infinity"
            at = _MASKED if operation_of(guilty) in _SOFTMAXES else _singularity_of(guilty)
            words = f"{operation_of(guilty)} gave {kind}"
            return _origin(guilty, nodes, f"{words}: {at}" if at else words, bad)
    if not nodes:
        return None
    return _origin(nodes[-1], nodes, "it gave a value that is not finite", 1)


def first_singular(roots: Sequence[torch.Tensor]) -> Origin | None:
    """Return the operation, first in order, at a point where its derivative is infinite."""
    nodes = operations_behind(roots)
    critical = [node for node in nodes if operation_of(node) in _SINGULAR]
    critical.sort(key=lambda node: int(node._sequence_nr()))
    for node in critical:
        known = _SINGULAR[operation_of(node)]
        count = _n_singular(node, known)
        if count:
            return _origin(node, critical, known[2], count)
    return None


def has_singular(roots: Sequence[torch.Tensor]) -> bool:
    """Whether a graph has an operation whose derivative is infinite somewhere."""
    return any(
        known[0] == name and _can_be_singular(node)
        for node in operations_behind(roots)
        if (known := _SINGULAR.get(operation_of(node))) is not None
        for name, _ in saved_tensors_of(node)
    )


def _can_be_singular(node: Any) -> bool:
    if operation_of(node) != "Pow":
        return True
    exponent = getattr(node, "_saved_exponent", 1)
    return not isinstance(exponent, torch.Tensor) and exponent < 1 and exponent != 0


def _n_bad_weights(nodes: Sequence[Any]) -> int:
    leaves = {
        used.variable
        for node in nodes
        for used, _ in node.next_functions
        if used is not None and is_leaf(used)
    }
    return sum(int((~torch.isfinite(leaf)).sum()) for leaf in leaves if is_readable(leaf))


def _n_singular(node: Any, known: tuple[str, _Test, str]) -> int:
    wanted, is_singular, _ = known
    if not _can_be_singular(node):
        return 0
    return sum(
        int((is_singular(value) | torch.isnan(value)).sum())
        for name, value in saved_tensors_of(node)
        if name == wanted and value.is_floating_point()
    )


def _singularity_of(node: Any) -> str:
    known = _SINGULAR.get(operation_of(node))
    return known[2] if known is not None and _n_singular(node, known) else ""


def _giver(node: Any) -> Any:
    """The last operation before a node that gave it something."""
    givers = [used for used, _ in node.next_functions if used is not None and not is_leaf(used)]
    return max(givers, key=lambda used: used._sequence_nr(), default=None)


def _origin(node: Any, nodes: list[Any], what: str, count: int) -> Origin:
    alike = [other for other in nodes if type(other) is type(node)]
    rank = alike.index(node) if node in alike else 0
    return Origin(operation_of(node), rank, len(alike), what, count)


def _nodes_in_order(roots: Sequence[torch.Tensor]) -> list[Any]:
    return sorted(operations_behind(roots), key=lambda node: int(node._sequence_nr()))
