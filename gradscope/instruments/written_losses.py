"""Cross-entropies that a program writes out itself, recognised where a backward starts.

During a closer look the calls are noted that pick log-probabilities, or weigh them with labels. At
the backward its graph is followed from the root. Only where nothing but signs, scaling, means and
sums lies between is the root such a loss: weights of single examples, such as the advantages of a
policy gradient, and terms of any other kind make it something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from gradscope.instruments.graph_nodes import RESHAPES, described, node_of, operation_of
from gradscope.instruments.late import Late, Numbers
from gradscope.instruments.tensor_summary import is_readable
from gradscope.taps.user_frame import Location, columns_of, user_location

MadeAtOf: TypeAlias = Callable[[int], Location | None]

_PICKS = frozenset({"getitem", "gather", "take_along_dim"})
_PRODUCTS = frozenset({"mul", "rmul", "multiply"})
_QUOTIENTS = frozenset({"div", "truediv", "divide", "true_divide"})
_PICKED_BY = ("Index", "Gather")

_VIEWS = RESHAPES | {"ToCopy"}
_LIMITED = _VIEWS | {"Add", "Clamp", "ClampMin", "ClampMax"}
"""Between a probability and its logarithm: a small number that keeps it away from zero."""

_COMPLEMENT = _LIMITED | {"Rsub", "Sub", "Neg"}
"""Between a probability and the logarithm of one minus it."""

_SCALED = ("Mul", "Div")
_SUMS = ("Add", "Stack", "Cat")

_MOST_NOTED = 1024
_MOST_NODES = 1024
_LONGEST_CHAIN = 12

_ROUNDING = 1e-3
"""How far weights of the classes of one example, perhaps in half precision, may be from one."""


@dataclass(slots=True)
class _Term:
    """Log-probabilities of labels."""

    facts: dict[str, Any]
    # The mean of them, and whether the labels are what they have to be, as 0 or 1.
    mean: torch.Tensor
    fits: torch.Tensor
    # Of what the call gave: -1 for negated log-probabilities.
    sign: int = 1
    # Of one of two classes: the node of the probability, and the weights.
    of_two: tuple[Any, torch.Tensor] | None = None


@dataclass(slots=True)
class _Found:
    facts: dict[str, Any]
    numbers: Late[Any]


class WrittenLosses:
    """Follows the calls that cross-entropies consist of.

    Args:
        made_at_of: where the softmax was made whose node has a sequence number.
    """

    def __init__(self, made_at_of: MadeAtOf) -> None:
        self._made_at_of = made_at_of
        self._terms: dict[int, _Term] = {}
        # What products and quotients with a single number multiply by.
        self._scales: dict[int, float] = {}
        # Probabilities that were picked: their softmax, their shape and the place.
        self._picked: dict[int, tuple[Any, torch.Size, Location | None]] = {}
        self._found: list[_Found] = []

    def called(self, name: str, args: Any, result: Any) -> None:
        """Take one call of a torch function into account."""
        if (
            not isinstance(result, torch.Tensor)
            or node_of(result) is None
            or not is_readable(result)
        ):
            return
        if len(self._terms) + len(self._scales) + len(self._picked) >= _MOST_NOTED:
            return
        if name in _PICKS and args and _has_graph(args[0]):
            self._note_picks(args[0], result)
        elif name == "log" and args and _has_graph(args[0]):
            self._note_logarithm(args[0], result)
        elif len(args) == 2 and (name in _PRODUCTS or (name in _QUOTIENTS and _has_graph(args[0]))):
            first, second = args if _has_graph(args[0]) else reversed(args)
            scale = _constant(second)
            if scale:
                number = _number(node_of(result))
                self._scales[number] = 1 / scale if name in _QUOTIENTS else scale
            elif name in _PRODUCTS and isinstance(second, torch.Tensor):
                self._note_product(first, second, result)

    def backward_started(self, roots: Sequence[torch.Tensor]) -> None:
        """See whether the root of a backward is such a loss."""
        if self._terms and len(roots) == 1 and node_of(roots[0]) is not None:
            terms = self._terms_of(node_of(roots[0]))
            signs = {sign for sign, _ in terms}
            if len(signs) == 1:
                self._note_loss(signs.pop(), [term for _, term in terms])
        self._terms.clear()
        self._scales.clear()
        self._picked.clear()

    def scale_of(self, logits: Any) -> float:
        """Return what a program has multiplied logits by: one over a temperature.

        Args:
            logits: the node that gave them, or their softmax.
        """
        scale, node = 1.0, logits
        for _ in range(_LONGEST_CHAIN):
            name, number = "" if node is None else operation_of(node), _number(node)
            if number in self._scales:
                scale *= abs(self._scales[number])
            elif name not in _VIEWS | {"Slice", "Select", "Neg", "Softmax", "LogSoftmax"}:
                break
            givers = _givers(node)
            if len(givers) != 1:
                break
            node = givers[0]
        return scale

    @property
    def awaited(self) -> list[Late[Any]]:
        """What may still be on its way."""
        return [found.numbers for found in self._found]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Give the rows of ``losses``, without their step."""
        for found in self._found:
            value, fits = found.numbers.value().tolist()
            if fits:
                yield found.facts | {"value": value, "reached": True}

    # -- what calls leave -------------------------------------------------------------------

    def _note_picks(self, values: torch.Tensor, result: torch.Tensor) -> None:
        if operation_of(node_of(result)) not in _PICKED_BY:
            return  # a slice: the same class of every example
        softmax, _ = _behind(node_of(values), _LIMITED)
        if _is_softmax(softmax):
            self._picked[_number(node_of(result))] = (softmax, values.shape, user_location())
            return
        softmax, sign = _log_softmax_behind(node_of(values))
        if softmax is not None:
            self._note_picked(softmax, values.shape, result, sign, user_location())

    def _note_logarithm(self, values: torch.Tensor, result: torch.Tensor) -> None:
        pick = node_of(values)
        for _ in range(_LONGEST_CHAIN):
            known = self._picked.get(_number(pick))
            if known is not None:
                softmax, shape, location = known
                self._note_picked(softmax, shape, result, 1, location)
                return
            givers = _givers(pick)
            if operation_of(pick) not in _LIMITED or len(givers) != 1:
                return
            pick = givers[0]

    def _note_picked(
        self,
        softmax: Any,
        shape: torch.Size,
        result: torch.Tensor,
        sign: int,
        location: Location | None,
    ) -> None:
        dim = _dim_with(shape, shape.numel() // result.numel(), result.numel())
        if dim is not None:
            facts = self._facts("written_cross_entropy", softmax, shape, result.shape, location)
            facts |= {"n_classes": shape[dim], "class_dim": dim}
            mean = sign * result.detach().float().mean()
            term = _Term(facts, mean, torch.ones_like(mean), sign)
            self._terms[_number(node_of(result))] = term

    def _note_product(
        self, values: torch.Tensor, weights: torch.Tensor, result: torch.Tensor
    ) -> None:
        if weights.requires_grad or not is_readable(weights) or not values.dim():
            return
        softmax, sign = _log_softmax_behind(node_of(values))
        location = user_location()
        if softmax is not None and values.dim() > 1 and values.shape == weights.shape:
            made_over = described(softmax)[1]
            dim = made_over if values.dim() > 2 and made_over is not None else values.dim() - 1
            facts = self._facts(
                "written_cross_entropy", softmax, values.shape, weights.shape, location
            )
            facts |= {"n_classes": values.shape[dim], "class_dim": dim}
            weights = weights.detach().float()
            sums = weights.sum(dim=dim)
            # The minus sign may be at the labels.
            alike = (weights >= 0).all() | (weights <= 0).all()
            fits = alike & ((sums.abs() - 1).abs() < _ROUNDING).all()
            mean = sign * result.detach().float().sum() / sums.numel()
            self._terms[_number(node_of(result))] = _Term(facts, mean, fits, sign)
            return
        logarithm, sign = _behind(node_of(values), _VIEWS | {"Neg"})
        if operation_of(logarithm) in ("Log", "LogSigmoid"):
            probability, _ = _behind(_givers(logarithm)[0], _COMPLEMENT)
            facts = self._facts(
                "written_binary_cross_entropy", probability, values.shape, weights.shape, location
            )
            mean = sign * result.detach().float().mean()
            self._terms[_number(node_of(result))] = _Term(
                facts, mean, torch.ones_like(mean), sign, (probability, weights.detach())
            )

    def _facts(
        self,
        function: str,
        origin: Any,
        prediction: torch.Size,
        target: torch.Size,
        location: Location | None,
    ) -> dict[str, Any]:
        made_by, dim = described(origin)
        facts: dict[str, Any] = {
            "function": function,
            "reduction": "mean",
            "input_scale": self.scale_of(origin),
            "input_shape": str(tuple(prediction)),
            "target_shape": str(tuple(target)),
            "input_made_by": made_by,
            **columns_of(location),
            **columns_of(None if origin is None else self._made_at_of(_number(origin)), "made_at_"),
        }
        return facts if dim is None else facts | {"input_dim": dim}

    # -- what a backward tells --------------------------------------------------------------

    def _terms_of(self, root: Any) -> list[tuple[int, _Term]]:
        """The terms that a root is the sum of, each with its sign; nothing if it has others."""
        terms: list[tuple[int, _Term]] = []
        pending = [(root, 1)]
        for _ in range(_MOST_NODES):
            if not pending:
                return terms
            node, sign = pending.pop()
            name, number, givers = operation_of(node), _number(node), _givers(node)
            if number in self._terms:
                term = self._terms[number]
                terms.append((sign * term.sign, term))
            elif name in _SCALED and number in self._scales and len(givers) == 1:
                pending.append((givers[0], sign if self._scales[number] > 0 else -sign))
            elif name == "Neg":
                pending.append((givers[0], -sign))
            elif name in ("Mean", "Sum") or name in _VIEWS or (name in _SUMS and _is_plain(node)):
                pending += [(giver, sign) for giver in givers]
            elif name == "Sub" and len(givers) == 2 and _is_plain(node):
                pending += [(givers[0], sign), (givers[1], -sign)]
            else:
                return []
        return []

    def _note_loss(self, sign: int, terms: list[_Term]) -> None:
        first = terms[0]
        means = torch.stack([term.mean for term in terms])
        if all(term.of_two is None for term in terms):
            if len({term.facts["n_classes"] for term in terms}) != 1:
                return
            value = sign * means.mean()
            fits = torch.stack([term.fits.to(value.dtype) for term in terms]).amin()
        elif len(terms) == 2 and first.of_two is not None and terms[1].of_two is not None:
            (base, weights), (other, others) = first.of_two, terms[1].of_two
            if base is None or base is not other or weights.shape != others.shape:
                return
            value = sign * means.sum()
            both = torch.stack([weights.float(), others.float()])
            fits = (both >= 0).all() & ((both.sum(dim=0) - 1).abs() < _ROUNDING).all()
        else:
            return
        numbers = Numbers(torch.stack([value, fits.to(value.dtype)]))
        self._found.append(_Found(first.facts, numbers))


def _has_graph(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and node_of(value) is not None


def _constant(value: Any) -> float | None:
    """A number that is known without waiting for a device."""
    if isinstance(value, torch.Tensor):
        if value.requires_grad or value.numel() != 1 or value.device.type != "cpu":
            return None
        return float(value) if is_readable(value) else None
    return float(value) if isinstance(value, int | float) else None


def _number(node: Any) -> int:
    return -1 if node is None else int(node._sequence_nr())


def _givers(node: Any) -> list[Any]:
    return [giver for giver, _ in node.next_functions if giver is not None]


def _is_plain(node: Any) -> bool:
    """Whether no factor goes into a sum."""
    return bool(getattr(node, "_saved_alpha", 1) == 1)


def _is_softmax(node: Any) -> bool:
    return node is not None and operation_of(node) == "Softmax"


def _behind(node: Any, passed_over: frozenset[str]) -> tuple[Any, int]:
    """The node behind some that are passed over, and the sign that they give it."""
    sign = 1
    for _ in range(_LONGEST_CHAIN):
        if node is None or operation_of(node) not in passed_over:
            break
        givers = _givers(node)
        if len(givers) != 1:
            break
        sign *= -1 if operation_of(node) == "Neg" else 1
        node = givers[0]
    return node, sign


def _log_softmax_behind(node: Any) -> tuple[Any, int]:
    """The softmax that log-probabilities come from, and their sign; None if they are none."""
    node, sign = _behind(node, _VIEWS | {"Neg", "Clamp", "ClampMin", "ClampMax"})
    if node is None or operation_of(node) == "LogSoftmax":
        return node, sign
    if operation_of(node) == "Log":
        softmax, _ = _behind(_givers(node)[0], _LIMITED)
        if _is_softmax(softmax):
            return softmax, sign
    return None, sign


def _dim_with(shape: torch.Size, n_classes: int, n_examples: int) -> int | None:
    """The dimension of the classes, if one was picked for each example."""
    if len(shape) < 2 or n_classes < 2 or n_classes * n_examples != shape.numel():
        return None
    return next((dim for dim in (len(shape) - 1, 1) if shape[dim] == n_classes), None)
