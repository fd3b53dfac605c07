"""``watch()`` and what it returns: the live view of one training run."""

from __future__ import annotations

import fnmatch
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

from gradscope.config import (
    KEEP_STEPS,
    OnError,
    WatchOptions,
    as_graph_steps,
    as_patterns,
    as_steps,
    switched_off,
)
from gradscope.errors import FindingsError, ScopeStateError, UsageError
from gradscope.own_code import is_ours
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd
    import torch
    from torch import nn

    from gradscope.graphs.autograd_graph import AutogradGraph
    from gradscope.graphs.overlay import StepFacts
    from gradscope.judging import Criteria, OnFinding
    from gradscope.rules.finding import Finding, Findings
    from gradscope.rules.rule import Rule
    from gradscope.run.weight_step import WeightStep
    from gradscope.views.explanation import Explanation
    from gradscope.views.parameter_summary import ParameterSummary

P = ParamSpec("P")
T = TypeVar("T")


class Scope:
    """The live view of one training run: its tables, its findings, its graph.

    Made by :func:`watch`. Use it as a context manager around the loop, as a decorator of the
    function that holds the loop, or with :meth:`start` and :meth:`stop`. The tables can be read at
    any time, also while the loop runs.
    """

    def __init__(
        self,
        session: Any | None,
        criteria: Criteria | None = None,
        on_finding: OnFinding = "collect",
    ) -> None:
        self._session = session
        self._recording = session.recording if session is not None else Recording()
        self._criteria = criteria
        self._teller: Any = None
        if session is not None and criteria is not None and on_finding != "collect":
            from gradscope.judging import Teller

            self._teller = Teller(session, criteria, on_finding)

    # -- around a loop ----------------------------------------------------------------------

    def start(self) -> Scope:
        """Begin to watch; goes on with the same recording after a :meth:`stop`.

        Raises:
            ScopeStateError: if this scope is watching already.
        """
        if self._session is None:
            return self
        if self._session.running:
            raise ScopeStateError(
                "this scope is watching already: leave its block, or call stop(), before it is "
                "entered again; a second loop at the same time needs a watch() of its own"
            )
        self._session.event("watch_started")
        self._session.start()
        if self._teller is not None:
            self._teller.start()
        return self

    def stop(self) -> Scope:
        """Stop watching; torch is left as it was found.

        To be called in the thread that trains: during an armed step something of ours lies on that
        thread's own stack of function modes, which no other thread can reach.

        Raises:
            FindingsError: if something is found that was not told yet, and the watch was told
                ``on_finding="raise"``.
        """
        return self._stop(may_raise=True)

    def _stop(self, *, may_raise: bool) -> Scope:
        if self._session is not None and self._session.running:
            self._refuse_inside_hook("stop()")
            self._session.stop()
            self._session.event("watch_stopped")
            if self._teller is not None:
                self._teller.stop()
                self._teller.finish(may_raise=may_raise)
        return self

    @contextmanager
    def _paused(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.resume()

    def pause(self) -> Any:
        """Look away until :meth:`resume`, or for the length of a ``with scope.pause():`` block."""
        if self._session is not None and self._session.running:
            self._refuse_inside_hook("pause()")
            self._session.event("paused")
            self._session.pause()
            if self._teller is not None:
                self._teller.stop()
        return self._paused()

    def resume(self) -> None:
        """Look again after :meth:`pause`."""
        if self._session is not None and self._session.paused:
            self._session.resume()
            self._session.event("resumed")
            if self._teller is not None:
                self._teller.start()

    def __enter__(self) -> Scope:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> Literal[False]:
        if error is not None and self._session is not None and self._session.running:
            self._session.event("exception", f"{type(error).__name__}: {error}")
        self._stop(may_raise=error is None)
        return False

    def __call__(self, function: Callable[P, T]) -> Callable[P, T]:
        """Watch each call of ``function``."""

        @functools.wraps(function)
        def watched(*args: P.args, **kwargs: P.kwargs) -> T:
            with self:
                return function(*args, **kwargs)

        return watched

    # -- what was seen ----------------------------------------------------------------------

    @property
    def params(self) -> pd.DataFrame:
        """One row per parameter."""
        return self._table("params")

    @property
    def groups(self) -> pd.DataFrame:
        """One row per step and parameter group: its hyper-parameters as they were."""
        return self._table("groups")

    @property
    def steps(self) -> pd.DataFrame:
        """One row per attempt of an optimizer to update."""
        return self._table("steps")

    @property
    def grads(self) -> pd.DataFrame:
        """One row per step and parameter: what its gradient was when the optimizer stepped."""
        return self._table("grads")

    @property
    def state(self) -> pd.DataFrame:
        """One row per recorded step, parameter, side of the update and key of its state."""
        return self._table("state")

    @property
    def moments(self) -> pd.DataFrame:
        """One row per recorded step and parameter of an Adam-like optimizer."""
        return self._table("moments")

    @property
    def updates(self) -> pd.DataFrame:
        """One row per recorded step and parameter: how far the weight moved."""
        return self._table("updates")

    @property
    def backwards(self) -> pd.DataFrame:
        """One row per call of ``backward`` or ``autograd.grad``."""
        return self._table("backwards")

    @property
    def events(self) -> pd.DataFrame:
        """One row per event outside forward, backward and step."""
        return self._table("events")

    @property
    def models(self) -> pd.DataFrame:
        """One row per watched model."""
        return self._table("models")

    @property
    def calls(self) -> pd.DataFrame:
        """One row per closer look and module called in it."""
        return self._table("calls")

    @property
    def activations(self) -> pd.DataFrame:
        """One row per closer look and innermost module: dead, saturated and non-finite outputs."""
        return self._table("activations")

    @property
    def batches(self) -> pd.DataFrame:
        """One row per closer look and tensor given to a model or a loss function."""
        return self._table("batches")

    @property
    def losses(self) -> pd.DataFrame:
        """One row per closer look and call of a loss function."""
        return self._table("losses")

    @property
    def strangers(self) -> pd.DataFrame:
        """One row per closer look and leaf of its graph that belongs to no watched model."""
        return self._table("strangers")

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table by its name."""
        self._settle()
        return self._recording.tables

    @property
    def findings(self) -> Findings:
        """What is wrong with the loop, the likeliest cause first.

        Judged anew each time it is asked for, by what :func:`watch` was told. It holds also what
        is only worth knowing (``info``), which the screen leaves out.
        """
        from gradscope.judging import Criteria

        self._settle()
        return (self._criteria or Criteria()).judge(self._recording)

    def raise_for_findings(self, at_least: Literal["error", "warning"] = "error") -> None:
        """Raise if something is wrong with the loop.

        Args:
            at_least: how severe it has to be.

        Raises:
            FindingsError: naming what is wrong; the findings are in its ``findings``.
            UsageError: if ``at_least`` is no severity.
        """
        from gradscope.rules.finding import Severity

        if at_least not in ("info", "warning", "error"):
            raise UsageError(f"at_least={at_least!r}: pass 'error' or 'warning'")
        found = self.findings.at_least(Severity[at_least.upper()])
        if found:
            raise FindingsError(found)

    @property
    def latest(self) -> dict[str, float]:
        """Plain numbers of the last finished step, for any logger; empty before the first.

        Keys: ``step``, ``loss``, ``lr``, ``grad_norm``, ``step_ms``, ``observe_ms``, and
        ``update_norm`` and ``weight_norm`` of the last recorded step.
        """
        return self._recording.latest()

    def graph(self, step: int | None = None) -> AutogradGraph:
        """Return the autograd graph behind the loss of a captured step.

        Which steps are captured is told to :func:`watch`.

        Args:
            step: number of the step, as in ``steps``; by default the last one captured.

        Raises:
            ScopeStateError: if no graph was captured, or none of that step.
        """
        from gradscope.graphs.autograd_graph import AutogradGraph

        self._settle()
        graphs = self._recording.graphs
        if not graphs:
            raise ScopeStateError(
                "no graph was captured: that happens in the first step, when backward has run "
                "and its optimizer has stepped; watch(graph=...) asks for others"
            )
        if step is None:
            step = max(graphs)
        earlier = [known for known in graphs if known < step]
        if step not in graphs and earlier and step in self._steps_of_backward(max(earlier)):
            raise ScopeStateError(
                f"step {step} had no backward of its own: it used the gradients of the one before "
                f"step {max(earlier)}, whose graph it is"
            )
        if step not in graphs:
            raise ScopeStateError(
                f"the graph of step {step} was not captured; captured: {sorted(graphs)}; "
                f"watch(graph=[{step}]) asks for it"
            )
        return AutogradGraph(graphs[step], step=step, facts=lambda: self._facts_of(step))

    def _facts_of(self, step: int) -> StepFacts:
        """What is known of the parameters at a step, each by the parameter's name."""
        from gradscope.graphs.overlay import StepFacts

        steps = self._steps_of_backward(step)

        def by_param(table: str, column: str) -> dict[str, Any]:
            known: dict[str, Any] = {}
            for each in reversed(steps):
                rows = self._recording.rows_of(table, step=each).dropna(subset=[column])
                known |= dict(zip(rows["param"], rows[column], strict=True))
            return known

        named: dict[str, list[str]] = {}
        for finding in self.findings:
            for param in finding.params:
                named.setdefault(param, []).append(finding.code)
        return StepFacts(
            grad_norm=by_param("grads", "norm"),
            grad_status=by_param("grads", "status"),
            nonfinite=by_param("grads", "nonfinite"),
            update_ratio=by_param("updates", "update_ratio"),
            findings={param: ", ".join(codes) for param, codes in named.items()},
        )

    def _steps_of_backward(self, step: int) -> list[int]:
        """A step, and those after it that used gradients of the same backward."""
        with_backward = set(self._recording.rows("backwards").array("step").tolist())
        steps = [step]
        while steps[-1] + 1 < self._recording.n_steps and steps[-1] + 1 not in with_backward:
            steps.append(steps[-1] + 1)
        return steps

    def explain(
        self, param: str, index: int | tuple[int, ...] | None = None, step: int = -1
    ) -> Explanation | ParameterSummary:
        """Explain the update of one weight with every number in the formula.

        Any weight of the last recorded step of its optimizer can be explained, every weight of
        parameters and steps asked for with ``keep=``, and 16 weights of each parameter, spread
        evenly, at every recorded step.

        Args:
            param: name of the parameter, as in ``scope.params``.
            index: of the weight, ``(3, 7)``; of a complex parameter with 0 for the real or 1 for
                the imaginary part at the end. None sums up the whole parameter.
            step: number of the step, as in ``scope.steps``; a negative one counts the recorded
                steps from the last.

        Returns:
            For a weight an object whose attributes are the numbers: ``g``, ``m_before``, ``m``,
            ``lr``, ``denominator``, ``update``, ``weight_before``, ``weight_formula``,
            ``weight_stored`` and more. Printed, it shows each line of the rule.

        Raises:
            UsageError: if there is no such parameter or weight.
            ScopeStateError: if nothing is known of it at that step; the message says what to pass
                to :func:`watch` to know it.
        """
        from gradscope.views.explain import explain

        self._settle()
        return explain(self._recording, param, index, step, self._last_copied)

    def tensors(self, param: str, step: int = -1) -> dict[str, npt.NDArray[Any]]:
        """Return whole tensors around one step, of parameters asked for with ``keep=``.

        Args:
            param: name of the parameter.
            step: number of the step; a negative one counts the kept steps from the last.

        Returns:
            NumPy arrays by name: ``weight_before``, ``gradient``, ``weight_after``, and for each
            key of the optimizer's state ``<key>_before`` and ``<key>_after``, as far as they were
            there. Half precision comes as float32. The gradient is what the update read, a sparse
            one made dense, with ``touched`` beside it.

        Raises:
            UsageError: if there is no such parameter.
            ScopeStateError: if nothing was kept; the message says what to pass to :func:`watch`.
        """
        from gradscope.views.explain import tensors

        self._settle()
        return tensors(self._recording, param, step)

    def report(self, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Write what was seen as one page of HTML, to open in any browser and to send.

        It holds the findings, the loop as it ran, charts over steps, the flow of gradients, the
        anatomy of updates and the graph; nothing is ever fetched from anywhere.

        Args:
            path: where to, as in ``"run.html"``.
            force: whether a file that is there is overwritten.

        Returns:
            The path of the file.

        Raises:
            OutputExistsError: if the file is there already, and ``force`` is not set.
            UsageError: if the path is a folder, or lies in one that does not exist.
        """
        from gradscope.views.report import checked_output, report_page, write_report

        checked_output(path, force=force)  # before any work
        page = report_page(self._recording, self.findings, _versions())
        return write_report(page, path, force=force)

    @property
    def overhead(self) -> pd.DataFrame:
        """What watching has cost so far: a row per instrument, and a last one for all together.

        Columns: ``calls``, ``total_ms``, ``ms_per_call``, ``ms_per_step``, and ``share`` of the
        time watched. ``structure`` is what happens at every step: following the loop and telling
        whose gradients are fresh; ``tables`` is writing the rows.
        """
        self._settle()
        elapsed = 0.0 if self._session is None else self._session.elapsed
        return self._recording.overhead(elapsed)

    def __repr__(self) -> str:
        from gradscope.views.terminal import plain_text

        return plain_text(self._recording, self.findings)

    def __rich__(self) -> Any:
        from gradscope.views.terminal import screen

        return screen(self._recording, self.findings)

    def _repr_html_(self) -> str:
        from gradscope.views.notebook import html

        return html(self._recording, self.findings)

    def _table(self, name: str) -> pd.DataFrame:
        self._settle()
        return self._recording.frame(name)

    def _last_copied(
        self, step: int, param: int, position: int, index: tuple[int, ...]
    ) -> WeightStep | None:
        if self._session is None:
            return None
        copied: WeightStep | None = self._session.weight(step, param, position, index)
        return copied

    def _refuse_inside_hook(self, what: str) -> None:
        """A function that is told findings runs inside a hook of torch's, which must stay."""
        from gradscope.taps.optimizer_steps import optimizer_steps

        if optimizer_steps.inside_hook:
            raise ScopeStateError(
                f"{what} cannot be called from a function passed as on_finding: let the loop see "
                "that it is to end, or use on_finding='raise'"
            )

    def _settle(self) -> None:
        if self._session is not None:
            self._session.settle()


def _versions() -> dict[str, str]:
    """What a report says of where the run took place."""
    import platform

    import torch

    return {"Python": platform.python_version(), "torch": torch.__version__}


def watch(
    model: nn.Module | Iterable[nn.Module],
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
    *,
    every: int | None = None,
    budget: float = 0.03,
    params: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    keep: str | Iterable[str] = (),
    keep_steps: int | Iterable[int] = KEEP_STEPS,
    graph: Literal["first", "changed", "every"] | int | Iterable[int] | None = "first",
    on_finding: Literal["collect", "warn", "raise"] | Callable[[Finding], object] = "collect",
    select: str | Iterable[str] = (),
    ignore: str | Iterable[str] = (),
    ignore_params: Mapping[str, str | Iterable[str]] | None = None,
    thresholds: Mapping[str, Mapping[str, float]] | None = None,
    rules: Iterable[type[Rule]] = (),
    on_error: OnError = "record",
) -> Scope:
    """Watch a training loop from the inside.

        with gradscope.watch(model, optimizer) as scope:
            ...  # the loop, unchanged

    Training is not changed: weights, optimizer state, random numbers and losses stay the same to
    the last bit. After the block nothing of it is left in torch.

    Args:
        model: the model, or several: ``[d, g]``.
        optimizer: the optimizer, or several: ``[opt_d, opt_g]``.
        every: record every n-th step in full, whatever it costs. By default the first three
            steps are, and then as many as the budget allows.
        budget: the share of the step time that recording in full may take.
        params: patterns (as in ``fnmatch``) of the parameter names to watch; all by default.
        exclude: patterns of parameter names to leave out.
        keep: patterns of the parameters of which gradient, weight and state are kept whole, as
            they were before and after recorded steps, for ``scope.tensors`` and ``scope.explain``.
        keep_steps: the numbers of the steps of which they are kept, such as ``range(100, 110)``,
            which are then recorded in any case; or how many of the latest recorded steps.
        graph: of which steps the autograd graph is captured, with the module call that made each
            node: ``"first"``, each optimizer's first step; ``"changed"``, also those whose forward
            makes another number of nodes than before; ``"every"``; the numbers of the steps; or
            None for none.
        on_finding: what happens to errors and warnings while the loop runs. ``"collect"``:
            nothing, they are in ``scope.findings``; ``"warn"``: each is a
            :class:`GradscopeWarning`; ``"raise"``: the first ends the loop with a
            :class:`FindingsError`, raised when the ``step`` of an optimizer has returned, or when
            the block is left; a function is called with each :class:`Finding`. The loop is judged
            after 8 steps of the optimizers, then after 16, 32 and so on up to every 256, and at
            the end. Each finding is told once; a warning as soon as it is found twice.
        select: rules to look for, by code (``GS201``), beginning of a code (``GS2``) or name;
            empty for all.
        ignore: rules not to look for, likewise.
        ignore_params: patterns of parameter or module names to pass over, by rule:
            ``{"GS105": "aux.*"}``.
        thresholds: numbers to use in place of a rule's own: ``{"MY001": {"growth": 3.0}}``.
        rules: rules of your own, subclasses of :class:`Rule`, to be applied besides.
        on_error: ``"record"`` keeps an error of gradscope's own away from the training and tells
            it once as a warning; ``"raise"`` lets it out.

    Returns:
        A scope, not yet watching: enter it, decorate with it, or call its ``start()``.

    Raises:
        UsageError: if what is passed cannot be watched; the message names it.
        UnknownRuleError: if something is said of a rule that there is not.
    """
    options = WatchOptions(
        budget=budget,
        every=every,
        include=as_patterns("params", params),
        exclude=as_patterns("exclude", exclude),
        keep=as_patterns("keep", keep),
        keep_steps=as_steps("keep_steps", keep_steps),
        graph=as_graph_steps(graph),
        on_error=on_error,
    )
    if switched_off():
        return Scope(None)
    from gradscope.judging import checked_on_finding, criteria
    from gradscope.session.session import Session

    models, optimizers = checked_models(model), checked_optimizers(optimizer)
    caller = calling_frame()
    session = Session(options)
    judged_by = criteria(select, ignore, ignore_params, thresholds, rules)
    names = names_of(caller, 0, "model", len(models), "model")
    for each_model, name in zip(models, names, strict=True):
        session.watch_model(each_model, name)
    names = names_of(caller, 1, "optimizer", len(optimizers), "optimizer")
    for each_optimizer, name in zip(optimizers, names, strict=True):
        session.watch_optimizer(each_optimizer, name)
    _check_keep(session.recording, options)
    return Scope(session, judged_by, checked_on_finding(on_finding))


def _check_keep(recording: Recording, options: WatchOptions) -> None:
    names = [name for entry in recording.parameters for name in (entry.name, *entry.aliases)]
    for pattern in options.keep:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            some = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            raise UsageError(f"keep={pattern!r} matches no parameter; there is {some}")


def checked_models(model: Any) -> list[nn.Module]:
    """Return the models that were passed; raises :class:`UsageError` naming what is none."""
    from torch import nn

    models = [model] if isinstance(model, nn.Module) else _listed(model)
    if not models:
        raise UsageError(
            f"model={_short(model)} is no torch.nn.Module: pass the model that is trained, or a "
            "list of models"
        )
    for each in models:
        if not isinstance(each, nn.Module):
            raise UsageError(f"model: {_short(each)} is no torch.nn.Module")
        if next(each.parameters(), None) is None:
            raise UsageError(
                f"model: {type(each).__name__} has no parameters, so there is nothing to train in "
                "it; layers kept in a plain Python list are not registered, use nn.ModuleList"
            )
    return models


def checked_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """Return the optimizers that were passed; raises :class:`UsageError` naming what is none."""
    optimizers = [optimizer] if _unwrapped(optimizer) is not None else _listed(optimizer)
    if not optimizers:
        raise UsageError(
            f"optimizer={_short(optimizer)} is no torch.optim.Optimizer: pass the optimizer that "
            "updates the model, or a list of optimizers"
        )
    checked: list[torch.optim.Optimizer] = []
    for each in optimizers:
        inner = _unwrapped(each)
        if inner is None:
            raise UsageError(f"optimizer: {_short(each)} is no torch.optim.Optimizer")
        checked.append(inner)
    return checked


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer | None:
    """The optimizer whose step runs in the end: some frameworks put a wrapper around it."""
    import torch

    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, torch.optim.Optimizer):
        return inner
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else None


def _listed(things: Any) -> list[Any]:
    return list(things) if isinstance(things, list | tuple | set) else []


def calling_frame() -> FrameType | None:
    """Return the frame of the program that called us, by way of the pytest plugin perhaps."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and is_ours(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def names_of(
    caller: FrameType | None, position: int, keyword: str, count: int, fallback: str
) -> list[str]:
    """Return what the program calls an argument of the call that brought it to us."""
    from gradscope.session.source_names import argument_names

    found = argument_names(caller, position, keyword)
    if found is not None and len(found) == count:
        return found
    return [fallback] if count == 1 else [f"{fallback}{number}" for number in range(count)]


def _short(thing: Any) -> str:
    """A thing in one line: what it is rather than what it holds, where that would be long."""
    is_empty = isinstance(thing, list | tuple | dict) and not thing
    if thing is None or is_empty or isinstance(thing, str | int | float):
        return repr(thing)[:60]
    if isinstance(thing, type):
        return f"the class {thing.__name__}"
    return type(thing).__name__
