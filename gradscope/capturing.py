"""``graph()`` and ``capture()``: the autograd graph of one loss, without a watch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from gradscope.errors import ScopeStateError, UsageError
from gradscope.graphs.autograd_graph import AutogradGraph
from gradscope.graphs.overlay import StepFacts

if TYPE_CHECKING:
    import torch

    from gradscope.instruments.call_log import CallLog
    from gradscope.instruments.graph_cut import GraphCutFinder
    from gradscope.instruments.source_lines import SourceLines
    from gradscope.run.captured_graph import CapturedGraph, Registered


def graph(loss: Any, model: Any = None) -> AutogradGraph:
    """Return the autograd graph behind a loss, before or after its backward.

    Made after the fact, it does not know which module made what; :func:`capture` around the forward
    tells that.

    Args:
        loss: a tensor, or any nesting of tensors in tuples, lists, dicts and dataclasses.
        model: what the parameters are called: a module, several modules, the names and tensors of
            ``named_parameters()``, or a dict of them. Without it leaves have no names.

    Raises:
        UsageError: if there is no tensor in ``loss``, or ``model`` is none of these.
    """
    from gradscope.instruments.passed import tensors_in

    return _Parameters(model).graph(tensors_in("loss", loss))


class Capture:
    """Follows the module calls of a forward, so that its graph can tell which module made what.

    Made by :func:`capture`; use it as a context manager around the forward.
    """

    def __init__(self, model: Any, *, lines: bool = False) -> None:
        from gradscope.instruments.passed import described, modules_in

        self._modules = modules_in(model)
        if not self._modules:
            raise UsageError(
                "model must be a torch.nn.Module, the one that is called inside of the block, or a "
                f"list of them; this is {described(model)}"
            )
        self._parameters = _Parameters(model)
        self._wants_lines = lines
        self._lines: SourceLines | None = None
        self._finder: GraphCutFinder | None = None
        self._log: CallLog | None = None
        self._is_open = False

    def __enter__(self) -> Capture:
        if self._is_open:
            raise ScopeStateError("this capture is inside of its block already")
        from gradscope.instruments.call_log import CallLog, paths_of
        from gradscope.session.census import is_compiled

        if not any(is_compiled(module) for _, module in self._modules):
            self._log = CallLog(paths_of(self._modules))
            self._log.start()
            if self._wants_lines:
                self._follow_lines()
        self._is_open = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> Literal[False]:
        self._is_open = False
        if self._log is not None:
            self._log.stop()
        if self._finder is not None:
            self._finder.disarm()
            self._finder = None
        return False

    def graph(self, loss: Any) -> AutogradGraph:
        """Return the graph behind a loss of the forward, inside of the block or after it.

        Args:
            loss: as for :func:`graph`.

        Raises:
            UsageError: if there is no tensor in ``loss``.
        """
        from gradscope.instruments.passed import tensors_in

        return self._parameters.graph(tensors_in("loss", loss), self._attributed)

    def _attributed(self, captured: CapturedGraph) -> CapturedGraph:
        if self._log is not None:
            captured = self._log.attribute(captured)
        return captured if self._lines is None else self._lines.attribute(captured)

    def _follow_lines(self) -> None:
        from gradscope.instruments.graph_cut import GraphCutFinder
        from gradscope.instruments.source_lines import SourceLines

        self._lines = SourceLines()
        self._finder = GraphCutFinder(lambda error: None)
        self._finder.tell(self._lines)


def capture(model: Any, *, lines: bool = False) -> Capture:
    """Follow the module calls of one forward; its graph then tells which module made what.

        with gradscope.capture(model) as c:
            loss = loss_of(model(x))
        c.graph(loss).render("graph.svg")

    Nothing is computed differently, and nothing is left behind in torch or in the model. The inside
    of a compiled model is not seen.

    Args:
        model: the model that is called, or several.
        lines: whether to follow the lines of the program, too: each call of torch is then slower.

    Raises:
        UsageError: if ``model`` is no module.
    """
    return Capture(model, lines=lines)


class _Parameters:
    """What the leaves of a graph are called."""

    def __init__(self, model: Any) -> None:
        self._names: dict[int, list[str]] = {}
        self._tensors: dict[int, torch.Tensor] = {}
        from gradscope.instruments.passed import named_tensors

        for name, tensor in named_tensors("model", model):
            self._names.setdefault(id(tensor), []).append(name)
            self._tensors[id(tensor)] = tensor

    def graph(
        self,
        roots: list[torch.Tensor],
        attributed: Callable[[CapturedGraph], CapturedGraph] = lambda captured: captured,
    ) -> AutogradGraph:
        from gradscope.instruments.autograd_graph import capture_graph

        leaves: list[torch.Tensor] = []

        def names_of(leaf: torch.Tensor) -> tuple[str, ...]:
            leaves.append(leaf)
            return tuple(self._names.get(id(leaf), ()))

        captured = capture_graph(roots, names_of, saved=True)
        captured = attributed(replace(captured, registered=self._all()))
        facts = _facts_of(leaves, captured.params)
        return AutogradGraph(captured, facts=lambda: facts)

    def _all(self) -> tuple[Registered, ...]:
        from gradscope.run.captured_graph import Registered

        return tuple(
            Registered(tuple(self._names[key]), tuple(tensor.shape), tensor.requires_grad)
            for key, tensor in self._tensors.items()
        )


def _facts_of(leaves: list[torch.Tensor], names: tuple[tuple[str, ...], ...]) -> StepFacts:
    """What the gradients of leaves look like, where there are any."""
    import torch

    norms: dict[str, float] = {}
    nonfinite: dict[str, float] = {}
    with torch.no_grad():
        for leaf, known_as in zip(leaves, names, strict=True):
            gradient = leaf.grad
            if gradient is None or not known_as or gradient.is_meta:
                continue
            if gradient.layout != torch.strided:
                gradient = gradient.coalesce().values()
            flat = gradient.detach().abs().to(torch.float64)
            norms[known_as[0]] = float(flat.square().sum().sqrt())
            nonfinite[known_as[0]] = (
                0.0 if math.isfinite(norms[known_as[0]]) else float((~torch.isfinite(flat)).sum())
            )
    return StepFacts(grad_norm=norms, nonfinite=nonfinite)
