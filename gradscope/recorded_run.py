"""What a live scope and an opened run have in common: tables, findings, graph, explanations."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any, Literal

from gradscope.errors import FindingsError, ScopeStateError, UsageError, text_of
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import os
    from pathlib import Path

    import numpy.typing as npt
    import pandas as pd

    from gradscope.graphs.autograd_graph import AutogradGraph
    from gradscope.rules.criteria import Criteria
    from gradscope.rules.finding import Findings
    from gradscope.run.weight_step import WeightStep
    from gradscope.views.explanation import Explanation
    from gradscope.views.parameter_summary import ParameterSummary


def _not_shown(error: Exception) -> str:
    """What is shown in the place of what could not be made."""
    return f"gradscope: the run cannot be shown ({text_of(error)}); its tables can still be read"


class RecordedRun:
    """One training run as tables, findings, graphs and explanations.

    :class:`gradscope.Scope` is one that is being recorded, :class:`gradscope.Run` one that was.
    """

    _recording: Recording
    _criteria: Criteria | None = None

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
    def checksums(self) -> pd.DataFrame:
        """One row per step at which ranks are compared, and parameter."""
        return self._table("checksums")

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
        from gradscope.rules.criteria import Criteria

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
        ``update_norm`` and ``weight_norm`` of the last recorded step. Where ``watch(total_steps=)``
        has said how many steps there will be, also ``progress``, from 0 to 1, and ``seconds_left``,
        if they take as long as the last ones did.
        """
        self._settle(wait=False)  # asked for in the middle of a loop
        return self._recording.latest()

    @property
    def captured_steps(self) -> list[int]:
        """The steps whose autograd graph was captured, for :meth:`graph`."""
        self._settle()
        return sorted(self._recording.graphs)

    def graph(self, step: int | None = None) -> AutogradGraph:
        """Return the autograd graph behind the loss of a captured step.

        Which steps are captured is told to :func:`watch`.

        Args:
            step: number of the step, as in ``steps``; by default the last one captured.

        Raises:
            ScopeStateError: if no graph was captured, or none of that step.
        """
        from gradscope.graphs.autograd_graph import AutogradGraph
        from gradscope.views.graph_facts import graph_facts, steps_of_backward

        self._settle()
        run = self._recording
        graphs = self._recording.graphs
        if not graphs:
            raise ScopeStateError(
                "no graph was captured: that happens in the first step, when backward has run "
                "and its optimizer has stepped; watch(graph=...) asks for others"
            )
        if step is None:
            step = max(graphs)
        earlier = [known for known in graphs if known < step]
        if step not in graphs and earlier and step in steps_of_backward(run, max(earlier)):
            raise ScopeStateError(
                f"step {step} had no backward of its own: it used the gradients of the one before "
                f"step {max(earlier)}, whose graph it is"
            )
        if step not in graphs:
            raise ScopeStateError(
                f"the graph of step {step} was not captured; captured: {sorted(graphs)}; "
                f"watch(graph=[{step}]) asks for it"
            )
        return AutogradGraph(
            graphs[step], step=step, facts=lambda: graph_facts(run, self.findings, step)
        )

    def explain(
        self, param: str, index: int | tuple[int, ...] | None = None, step: int = -1
    ) -> Explanation | ParameterSummary:
        """Explain the update of one weight with every number in the formula.

        Any weight of the last recorded step of its optimizer can be explained, every weight of
        parameters and steps asked for with ``keep=``, and 16 weights of each parameter, spread
        evenly, at every recorded step. In a model of more than about four million parameters these
        take turns: at each recorded step there is a part of them.

        Args:
            param: name of the parameter, as in ``scope.params``.
            index: of the weight, ``(3, 7)``; of a complex parameter with 0 for the real or 1 for
                the imaginary part at the end. None sums up the whole parameter.
            step: number of the step, as in ``scope.steps``; a negative one counts the parameter's
                recorded steps from the last.

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
            OSError: if it cannot be written; what was there before stays.
        """
        from gradscope.views.report import checked_output, report_page, write_report

        checked_output(path, force=force)  # before any work
        self._settle()
        page = report_page(self._recording, self.findings, self._versions())
        return write_report(page, path, force=force)

    @property
    def overhead(self) -> pd.DataFrame:
        """What watching has cost so far: a row per instrument, and a last one for all together.

        Columns: ``calls``, ``total_ms``, ``ms_per_call``, ``ms_per_step``, and ``share`` of the
        time watched. ``structure`` is what happens at every step: following the loop and telling
        whose gradients are fresh; ``tables`` is writing the rows.
        """
        self._settle()
        return self._recording.overhead(self._elapsed())

    # A program prints this before it saves its weights: it must not fail, whatever does.

    def __repr__(self) -> str:
        try:
            from gradscope.views.terminal import plain_text

            return plain_text(self._recording, self.findings)
        except Exception as error:
            return _not_shown(error)

    def __rich__(self) -> Any:
        try:
            from gradscope.views.terminal import screen

            return screen(self._recording, self.findings)
        except Exception as error:
            return _not_shown(error)

    def _repr_html_(self) -> str:
        try:
            from gradscope.views.notebook import html

            return html(self._recording, self.findings)
        except Exception as error:
            return escape(_not_shown(error))

    def _table(self, name: str) -> pd.DataFrame:
        self._settle()
        return self._recording.frame(name)

    # -- what a scope adds ------------------------------------------------------------------

    def _settle(self, *, wait: bool = True) -> None:
        """See to it that everything seen so far is in the recording."""

    def _versions(self) -> dict[str, str]:
        """What a report says of where the run took place, by name."""
        return {}

    def _elapsed(self) -> float:
        """Seconds watched so far."""
        return self._recording.seconds

    def _last_copied(
        self, step: int, param: int, position: int, index: tuple[int, ...]
    ) -> WeightStep | None:
        """Any weight around the last recorded step of its optimizer; None if it is not there."""
        return None
