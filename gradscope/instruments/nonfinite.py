"""Where NaN or infinity came from: read off what the nodes of a graph keep for the backward.

Everything is read before the backward frees it, and in its raw form: unpacking would run the hooks
of ``saved_tensors_hooks``, which under activation checkpointing is the user's forward once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gradscope.instruments.graph_nodes import RESHAPES, is_leaf, operation_of, operations_behind
from gradscope.instruments.saved_tensors import saved_tensors_of
from gradscope.instruments.tensor_summary import is_readable

_IS_INFINITE_ITSELF = frozenset(
    {"Log", "Log2", "Log10", "Log1P", "Div", "Reciprocal", "Rsqrt", "Atanh", "Xlogy"}
)
"""Of the operations below those whose value, too, is infinite at such a point."""

_PASS_ON = (
    RESHAPES
    | {"Expand", "AsStrided", "Slice", "Select", "Index", "IndexSelect", "Gather", "Narrow"}
    | {"Unbind", "Split", "SplitWithSizes", "Chunk", "Diagonal", "Unfold"}
    | {"Neg", "Relu", "Tanh", "Sigmoid"}
)
"""Operations whose value is finite where what goes into them is; a change of dtype can overflow."""

_LONGEST_CHAIN = 32

_SOFTMAXES = ("Softmax", "LogSoftmax")
_MASKED = "as for a row that is -inf throughout, which an attention mask can make"

_FROM_OUTSIDE = (
    "what goes into it is not finite already: an input, or something computed without gradients"
)

_EDGES = {
    ("Addmm", "mat1"): 1,
    ("Addmm", "mat2"): 2,
    ("Mm", "self"): 0,
    ("Mm", "mat2"): 1,
    ("Bmm", "self"): 0,
    ("Bmm", "mat2"): 1,
    ("Mul", "self"): 0,
    ("Mul", "other"): 1,
    ("Div", "self"): 0,
    ("Div", "other"): 1,
    ("Convolution", "input"): 0,
    ("Convolution", "weight"): 1,
}
"""Through which of its edges an operation got what it saves (torch 2.13)."""

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

_UNDEFINED = {
    "Sqrt": "the square root of a negative number, or of NaN",
    "Rsqrt": "1 / the square root of a negative number, or of NaN",
    "Log": "the logarithm of a negative number, or of NaN",
    "Log2": "the logarithm of a negative number, or of NaN",
    "Log10": "the logarithm of a negative number, or of NaN",
}
"""Where they have no value at all."""


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


@torch.no_grad()  # else what is looked at here would count as nodes of the program's
def first_nonfinite(roots: Sequence[torch.Tensor]) -> Origin | None:
    """Return the operation that gave the first non-finite value.

    Returns:
        Its origin; with an empty name for the operation if a weight was not finite before the
        forward began; None for roots without a graph.
    """
    nodes = _nodes_in_order(roots)
    n_bad = _n_bad_weights(nodes)
    if n_bad:
        return Origin("", 0, 0, "weights that were not finite any more before the forward", n_bad)
    for node in nodes:
        name = operation_of(node)
        if name in _IS_INFINITE_ITSELF and (found := _singularity(node)):
            return _origin(node, nodes, *found)
        for saved, value in saved_tensors_of(node):
            bad = int((~torch.isfinite(value)).sum()) if value.is_floating_point() else 0
            if not bad:
                continue
            guilty = node if saved in _RESULTS else _giver(node, saved)
            if guilty is None:
                return _origin(node, nodes, _FROM_OUTSIDE, bad)
            guilty = _maker(guilty)
            kind = "NaN" if bool(torch.isnan(value).any()) else "infinity"
            found = _singularity(guilty)
            at = _MASKED if operation_of(guilty) in _SOFTMAXES else found and found[0]
            words = f"{operation_of(guilty)} gave {kind}"
            return _origin(guilty, nodes, f"{words}: {at}" if at else words, bad)
    if not nodes:
        return None
    return _origin(nodes[-1], nodes, "it gave a value that is not finite", 1)


@torch.no_grad()
def first_singular(roots: Sequence[torch.Tensor]) -> Origin | None:
    """Return the operation, first in order, at a point where its derivative is infinite."""
    nodes = operations_behind(roots)
    critical = [node for node in nodes if operation_of(node) in _SINGULAR]
    critical.sort(key=lambda node: int(node._sequence_nr()))
    for node in critical:
        found = _singularity(node)
        if found:
            return _origin(node, critical, *found)
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


def _singularity(node: Any) -> tuple[str, int] | None:
    """At which point a node has an infinite or undefined derivative, in words, and how often."""
    known = _SINGULAR.get(operation_of(node))
    if known is None or not _can_be_singular(node):
        return None
    wanted, is_singular, words = known
    values = [
        value
        for name, value in saved_tensors_of(node)
        if name == wanted and value.is_floating_point()
    ]
    n_singular = sum(int(is_singular(value).sum()) for value in values)
    n_undefined = sum(int(_is_undefined(node, wanted, value).sum()) for value in values)
    if n_singular or not n_undefined:
        return (words, n_singular) if n_singular else None
    return _UNDEFINED.get(operation_of(node), "what goes into it is NaN already"), n_undefined


def _is_undefined(node: Any, saved: str, value: torch.Tensor) -> torch.Tensor:
    """Where an operation has no value: it gave NaN, or a negative number is under a logarithm."""
    if saved not in _RESULTS and operation_of(node) in _UNDEFINED:
        return torch.isnan(value) | (value < 0)
    return torch.isnan(value)


def _giver(node: Any, saved: str) -> Any:
    """The operation that gave a node what it saved, as far as that can be told; None for none."""
    place = _EDGES.get((operation_of(node), saved))
    if place is not None and place < len(node.next_functions):
        giver = node.next_functions[place][0]
        return None if giver is None or is_leaf(giver) else giver
    givers = [used for used, _ in node.next_functions if used is not None and not is_leaf(used)]
    return max(givers, key=lambda used: used._sequence_nr(), default=None)


def _maker(node: Any) -> Any:
    """The operation from which a value that is not finite came to one that gave it, or that one."""
    for _ in range(_LONGEST_CHAIN):
        givers = [used for used, _ in node.next_functions if used is not None]
        if operation_of(node) not in _PASS_ON or len(givers) != 1 or is_leaf(givers[0]):
            break
        node = givers[0]
    return node


def _origin(node: Any, nodes: list[Any], what: str, count: int) -> Origin:
    alike = [other for other in nodes if type(other) is type(node)]
    rank = alike.index(node) if node in alike else 0
    return Origin(operation_of(node), rank, len(alike), what, count)


def _nodes_in_order(roots: Sequence[torch.Tensor]) -> list[Any]:
    return sorted(operations_behind(roots), key=lambda node: int(node._sequence_nr()))
