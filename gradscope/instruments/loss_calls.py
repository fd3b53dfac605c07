"""The loss functions that are called during one closer look: what they are given, and by what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from gradscope.instruments.autograd_graph import NamesOf, capture_graph
from gradscope.instruments.dimensions import dimension_after
from gradscope.instruments.graph_nodes import RESHAPES, described, node_of, operation_of
from gradscope.instruments.late import Known, Late, Numbers, scalar_of
from gradscope.instruments.module_survey import ModuleSurvey
from gradscope.instruments.tensor_summary import TensorSummary, is_readable
from gradscope.instruments.written_losses import WrittenLosses
from gradscope.taps.user_frame import Location, columns_of, user_location

_LOSSES = frozenset(
    {
        "cross_entropy",
        "nll_loss",
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
        "mse_loss",
        "l1_loss",
        "smooth_l1_loss",
        "huber_loss",
        "kl_div",
        "gaussian_nll_loss",
        "poisson_nll_loss",
    }
)
_OF_CLASSES = frozenset({"cross_entropy", "nll_loss"})

_BY_HAND = frozenset({"getitem", "gather", "mul"})
"""How a negative log-likelihood is written by hand: picking, or multiplying with a one-hot."""

_MATRIX_PRODUCTS = frozenset({"matmul", "bmm"})

_SCORES = frozenset({"Mul", "Div", "Add", "Sub", "MaskedFill", "Where", "View", "UnsafeView"})
"""Between the product of queries and keys and its softmax."""

_DROPOUT = frozenset({"Mul", "NativeDropout"})
"""By a mask that has no graph, as weights of attention go through on their way to the values."""

_LOGARITHMS = frozenset({"LogSoftmax", "Log", "LogSigmoid", "Logsumexp"})

_WEIGHTED = frozenset({"Mul", "Div"})

_OF_LOGARITHMS = frozenset({"nll_loss", "kl_div"})

_PICKED = frozenset({"getitem", "gather"})

_NORMALISED = frozenset({"Log", "Div"})
"""What ``torch.distributions.Categorical(probs)`` does before it picks log-probabilities."""

_SUBTRACTIONS = frozenset({"sub", "rsub", "subtract"})

_SQUASHING = frozenset({"softmax", "log_softmax", "sigmoid", "logsigmoid"})
_SQUASHING_KINDS = frozenset({"softmax", "logsoftmax", "sigmoid", "logsigmoid", "softmax2d"})

_PASSED_OVER = RESHAPES | {
    "ToCopy",
    "Expand",
    "Slice",
    "Identity",
    # What keeps probabilities away from 0 and 1 leaves them probabilities.
    "Clamp",
    "ClampMin",
    "ClampMax",
}

_MOST_CALLS = 1000
_MOST_NODES = 20_000
_LONGEST_CHAIN = 12


@dataclass(slots=True)
class _LossCall:
    facts: dict[str, Any]
    sequence_nr: int
    leads_to: frozenset[str]
    is_loss: bool
    value: Late[Any] = field(default_factory=lambda: Known(float("nan")))
    range: Late[Any] = field(default_factory=lambda: Known(None))


class LossCalls:
    """Follows calls of loss functions.

    Args:
        names_of: the names of a parameter; nothing for a stranger.
        survey: knows the modules that are running, and is told of all other functions.
    """

    def __init__(self, names_of: NamesOf, survey: ModuleSurvey) -> None:
        self._names_of = names_of
        self._survey = survey
        # Where the softmaxes and sigmoids were made, by the sequence number of their node.
        self._made_at: dict[int, Location] = {}
        self._calls: list[_LossCall] = []
        self._written = WrittenLosses(self._made_at.get)
        self.targets: list[TensorSummary] = []
        self._n_nodes = 0

    def torch_function_called(
        self, function: Callable[..., Any], args: Any, kwargs: Any, result: Any, first_node: int
    ) -> None:
        """Take one call into account."""
        name = getattr(function, "__name__", "").strip("_")
        if torch.is_grad_enabled():
            self._written.called(name, args, result)
        if name in _LOSSES and function is getattr(functional, name, None):
            self._note_loss(name, args, kwargs, result)
        elif name in _BY_HAND or name in _SUBTRACTIONS:
            self._note_by_hand(name, args, result)
        elif name in _MATRIX_PRODUCTS:
            self._note_attention(args, result)
        else:
            if name in _SQUASHING and isinstance(result, torch.Tensor):
                self._note_squashing(result)
            self._survey.function_called(name, result)

    def backward_started(self, roots: Sequence[torch.Tensor]) -> None:
        """Look for a loss that is written out, before a backward."""
        self._written.backward_started(roots)

    @property
    def awaited(self) -> list[Late[Any]]:
        """What may still be on its way."""
        waiting = [late for call in self._calls for late in (call.value, call.range)]
        targets = [target.numbers for target in self.targets]
        return [*waiting, *targets, *self._written.awaited]

    def rows(self, reached: set[int], reached_params: set[str]) -> Iterator[dict[str, Any]]:
        """Give the rows of ``losses``, without their step.

        Args:
            reached: autograd sequence numbers of the nodes that backwards came past.
            reached_params: names of the parameters that they reached.
        """
        for call in self._calls:
            is_reached = call.sequence_nr in reached
            row = call.facts | {"value": float(call.value.value()), "reached": is_reached}
            numbers = call.range.value()
            if numbers is not None:
                low, high, row_sum = numbers.tolist()
                row |= {"input_min": low, "input_max": high, "input_row_sum": row_sum}
            if call.is_loss and not is_reached:
                row["left_out"] = ", ".join(sorted(call.leads_to - reached_params))
            yield row
        yield from self._written.rows()

    def _note_squashing(self, result: torch.Tensor) -> None:
        kind, made = self._survey.innermost
        node: Any = node_of(result)
        location = made if made is not None and kind.lower() in _SQUASHING_KINDS else None
        location = location or user_location()
        if node is not None and location is not None:
            self._made_at[node._sequence_nr()] = location

    def _note_loss(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        prediction = args[0] if args else kwargs.get("input")
        target = args[1] if len(args) > 1 else kwargs.get("target")
        if not _are_tensors(prediction, target, result) or not torch.is_grad_enabled():
            return
        if prediction.is_nested or not prediction.dim():
            return
        facts: dict[str, Any] = {"reduction": str(kwargs.get("reduction", "mean"))}
        class_dim = min(1, prediction.dim() - 1)
        if name in _OF_CLASSES:
            facts |= {"n_classes": prediction.shape[class_dim], "class_dim": class_dim}
        call = self._note(name, prediction, target, result, facts)
        if call is None:
            return
        if result.numel() == 1:
            call.value = scalar_of(result)
        if is_readable(prediction):
            call.range = Numbers(_range_of(prediction, class_dim))
        if is_readable(target):
            self.targets.append(TensorSummary("target", name, target))

    def _note_by_hand(self, name: str, args: Any, result: Any) -> None:
        if len(args) < 2 or not torch.is_grad_enabled() or not isinstance(result, torch.Tensor):
            return
        if result.is_nested:
            return
        first, second = args[0], args[1]
        if name in _SUBTRACTIONS:
            if not _are_tensors(first, second) or first.requires_grad == second.requires_grad:
                return
            if _blows_up(first, second, result):
                prediction, target = (first, second) if first.requires_grad else (second, first)
                if operation_of(node_of(prediction)) == "Unsqueeze":
                    return  # x[:, None] - y asks for all pairs
                self._note("sub", prediction, target, result, {})
            return
        if name == "mul" and isinstance(second, torch.Tensor) and second.requires_grad:
            first, second = second, first
        if not isinstance(first, torch.Tensor) or node_of(first) is None or first.dim() < 2:
            return
        passed_over = _PASSED_OVER | (_NORMALISED if name in _PICKED else set())
        origin = _origin(first, passed_over)
        made_by, dim = described(origin[0])
        if dim is not None and made_by in ("Softmax", "LogSoftmax") and _is_plain_index(second):
            target = second if isinstance(second, torch.Tensor) else result
            self._note(name, first, target, result, {}, origin)

    def _note_attention(self, args: Any, result: Any) -> None:
        """Note the product of attention weights with values, if their softmax runs over a batch.

        Every dimension but the last two, of examples or of heads, is a batch in both products, and
        neither sums over it.
        """
        if len(args) < 2 or not _are_tensors(*args[:2], result) or result.is_nested:
            return
        weights, values = args[:2]
        if weights.dim() not in (3, 4) or values.dim() != weights.dim():
            return
        origin = _origin(weights, _DROPOUT)
        made_by, dim = described(origin[0])
        if made_by != "Softmax" or dim is None or dim >= weights.dim() - 2:
            return
        scores: Any = origin[0].next_functions[0][0]
        for _ in range(_LONGEST_CHAIN):
            givers = (
                [] if scores is None else [n for n, _ in scores.next_functions if n is not None]
            )
            if scores is None or operation_of(scores) not in _SCORES or len(givers) != 1:
                break
            scores = givers[0]
        if scores is not None and operation_of(scores) == "Bmm":
            self._note("matmul", weights, values, result, {}, origin)

    def _note(
        self,
        name: str,
        prediction: torch.Tensor,
        target: torch.Tensor,
        result: torch.Tensor,
        facts: dict[str, Any],
        made: tuple[Any, list[Any]] | None = None,
    ) -> _LossCall | None:
        if len(self._calls) >= _MOST_CALLS:
            return None
        origin, views = _origin(prediction) if made is None else made
        made_by, dim = described(origin)
        if name in _OF_LOGARITHMS and made_by in _WEIGHTED:
            made_by = _weighted_logarithm(origin) or made_by
        dim = dimension_after(reversed(views), dim)
        location = user_location()
        owner, owner_made = self._survey.innermost
        made_at = None if origin is None else self._made_at.get(origin._sequence_nr())
        is_loss = name in _LOSSES and node_of(result) is not None
        leads_to: frozenset[str] = frozenset()
        if is_loss and self._n_nodes < _MOST_NODES:
            graph = capture_graph((result,), self._names_of)
            self._n_nodes += len(graph.op)
            leads_to = frozenset(names[0] for names in graph.params if names)
        facts |= {
            "function": name,
            "input_shape": str(tuple(prediction.shape)),
            "target_shape": str(tuple(target.shape)),
            "input_made_by": made_by,
            "input_scale": self._written.scale_of(node_of(prediction)),
            "owner": owner if owner.lower().endswith("loss") else "",
            **columns_of(location),
            **columns_of(owner_made if owner.lower().endswith("loss") else None, "owner_"),
            **columns_of(made_at, "made_at_"),
        }
        if dim is not None:
            facts["input_dim"] = dim
        node: Any = node_of(result)
        call = _LossCall(facts, -1 if node is None else node._sequence_nr(), leads_to, is_loss)
        self._calls.append(call)
        return call


def _are_tensors(*values: Any) -> bool:
    return all(isinstance(value, torch.Tensor) for value in values)


def _is_plain_index(index: Any) -> bool:
    return isinstance(index, tuple | int | torch.Tensor)


def _blows_up(first: torch.Tensor, second: torch.Tensor, result: torch.Tensor) -> bool:
    """Whether [N, 1] and [N] became [N, N]."""
    shapes = {first.dim(): first, second.dim(): second}
    if set(shapes) != {1, 2} or result.dim() != 2:
        return False
    n = shapes[1].shape[0]
    return n > 1 and tuple(shapes[2].shape) == (n, 1) and tuple(result.shape) == (n, n)


def _origin(tensor: torch.Tensor, passed_over: Set[str] = _PASSED_OVER) -> tuple[Any, list[Any]]:
    """The node of the operation that made a tensor, and those passed over, the last one first."""
    node: Any = node_of(tensor)
    passed: list[Any] = []
    while node is not None and operation_of(node) in passed_over:
        givers = [giver for giver, _ in node.next_functions if giver is not None]
        # What is divided stands first, and is itself behind what it is divided by.
        if not givers or len(passed) == _LONGEST_CHAIN or node.next_functions[0][0] is None:
            break
        passed.append(node)
        node = givers[0]
    return node, passed


def _weighted_logarithm(node: Any) -> str:
    """The operation that gave logarithms which are then multiplied with what needs no gradient."""
    for _ in range(_LONGEST_CHAIN):
        givers = [giver for giver, _ in node.next_functions if giver is not None]
        name = operation_of(node)
        if name not in _WEIGHTED | _PASSED_OVER or len(givers) != 1:
            break
        node = givers[0]
    return name if name in _LOGARITHMS else ""


def _range_of(prediction: torch.Tensor, class_dim: int) -> torch.Tensor:
    values = prediction.detach().float()
    return torch.stack([values.amin(), values.amax(), values.sum(dim=class_dim).mean()])
