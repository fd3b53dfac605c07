"""``watch()`` and what it returns: the live view of one training run."""

from __future__ import annotations

import fnmatch
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from html import escape
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

from gradscope.config import (
    KEEP_STEPS,
    OnError,
    WatchOptions,
    as_directory,
    as_graph_steps,
    as_patterns,
    as_steps,
    switched_off,
)
from gradscope.errors import (
    FindingsError,
    GradscopeError,
    RunDirectoryError,
    ScopeStateError,
    UsageError,
    text_of,
)
from gradscope.own_code import is_ours
from gradscope.recorded_run import RecordedRun
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import torch
    from torch import nn

    from gradscope.judging import OnFinding
    from gradscope.rules.criteria import Criteria
    from gradscope.rules.finding import Finding
    from gradscope.rules.rule import Rule
    from gradscope.run.weight_step import WeightStep
    from gradscope.session.session import Session

P = ParamSpec("P")
T = TypeVar("T")


_SWITCHED_OFF = "gradscope is switched off by GRADSCOPE=0 in the environment: nothing was watched"


class Scope(RecordedRun):
    """The live view of one training run: its tables, its findings, its graph.

    Made by :func:`watch`. Use it as a context manager around the loop, as a decorator of the
    function that holds the loop, or with :meth:`start` and :meth:`stop`. The tables can be read at
    any time, also while the loop runs.
    """

    _why_not = _SWITCHED_OFF
    """What is shown of a scope that watches nothing."""

    def __init__(
        self,
        session: Any | None,
        criteria: Criteria | None = None,
        on_finding: OnFinding = "collect",
    ) -> None:
        self._session = session
        self._recording = session.recording if session is not None else Recording()
        self._criteria = criteria
        self._is_inside = False
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
        self._is_inside = True
        try:
            self._session.event("watch_started")
            self._session.start()
            if self._teller is not None:
                self._teller.start()
        except Exception as error:
            self._session.failed("watch", error)
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

    def _stop(self, *, may_raise: bool, ended: str = "finished") -> Scope:
        session, teller = self._session, self._teller
        if session is None or not self._is_inside:
            return self
        if session.running:
            self._refuse_inside_hook("stop()")
        self._is_inside = False
        try:
            if session.running:  # else it has been stopped already, by a failure or by a limit
                session.stop()
                session.event("watch_stopped")
        except Exception as error:
            session.failed("watch", error)
        try:
            session.finish_saving(ended)
        except Exception as error:
            session.saving_failed(error)
        if teller is not None:
            try:
                teller.stop()
            except Exception as error:
                session.failed("watch", error)
                with suppress(Exception):  # what is left in place would outlive us
                    teller.stop()
            try:
                teller.finish(may_raise=may_raise)
            except FindingsError:
                raise
            except Exception as error:
                session.failed("watch", error)
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
            try:
                self._session.event("paused")
                self._session.pause()
                if self._teller is not None:
                    self._teller.stop()
            except Exception as error:
                self._session.failed("watch", error)
        return self._paused()

    def resume(self) -> None:
        """Look again after :meth:`pause`."""
        if self._session is not None and self._session.paused:
            try:
                self._session.resume()
                self._session.event("resumed")
                if self._teller is not None:
                    self._teller.start()
            except Exception as error:
                self._session.failed("watch", error)

    def __enter__(self) -> Scope:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> Literal[False]:
        if error is None:
            self._stop(may_raise=True)
            return False
        if self._session is not None and self._session.running:
            try:
                self._session.event("exception", text_of(error))
            except Exception as failure:  # of ours; the program's own is on its way
                self._session.failed("events", failure)
        self._stop(may_raise=False, ended=type(error).__name__)
        return False

    def __call__(self, function: Callable[P, T]) -> Callable[P, T]:
        """Watch each call of ``function``."""

        @functools.wraps(function)
        def watched(*args: P.args, **kwargs: P.kwargs) -> T:
            with self:
                return function(*args, **kwargs)

        return watched

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything that memory holds to a run directory, for :func:`gradscope.open`.

        Args:
            path: the directory; it must not exist, or be empty.

        Returns:
            The directory.

        Raises:
            UsageError: if ``path`` is no path, or something lies there already.
            OSError: if it cannot be written.
        """
        directory = as_directory("path", path)
        if directory is None:
            raise UsageError("path=None: pass the path of a directory, as in 'runs/exp1'")
        from gradscope.run.directory.layout import is_free
        from gradscope.session.ranks import place_now

        place = place_now()
        if not is_free(directory, place.rank, place.world_size):
            raise UsageError(f"path={str(path)!r}: something lies there already; name another one")
        self._settle()
        if self._session is not None:
            from gradscope.session.saving import save_now

            plain = {} if self._criteria is None else self._criteria.as_plain()
            copies = self._session.last_copies()
            save_now(directory, self._recording, self._elapsed(), plain, copies)
        return directory

    # -- what it knows besides --------------------------------------------------------------

    def __repr__(self) -> str:
        return self._why_not if self._session is None else super().__repr__()

    def __rich__(self) -> Any:
        return self._why_not if self._session is None else super().__rich__()

    def _repr_html_(self) -> str:
        return escape(self._why_not) if self._session is None else super()._repr_html_()

    def _versions(self) -> dict[str, str]:
        import platform

        import torch

        return {"Python": platform.python_version(), "torch": torch.__version__}

    def _elapsed(self) -> float:
        return 0.0 if self._session is None else float(self._session.elapsed)

    def _last_copied(
        self, step: int, param: int, position: int, index: tuple[int, ...]
    ) -> WeightStep | None:
        if self._session is None:
            return None
        copied: WeightStep | None = self._session.weight(step, param, position, index)
        return copied

    def _refuse_inside_hook(self, what: str) -> None:
        """A function that is told findings runs inside a hook of torch's, which must stay."""
        try:
            from gradscope.taps.optimizer_steps import optimizer_steps

            is_inside = optimizer_steps.inside_hook
        except Exception:  # then nothing of it can be told
            is_inside = False
        if is_inside:
            raise ScopeStateError(
                f"{what} cannot be called from a function passed as on_finding: let the loop see "
                "that it is to end, or use on_finding='raise'"
            )

    def _settle(self, *, wait: bool = True) -> None:
        if self._session is not None:
            self._session.settle(wait=wait)


def watch(
    model: nn.Module | Iterable[nn.Module],
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
    *,
    every: int | None = None,
    budget: float = 0.01,
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
    save: str | os.PathLike[str] | None = None,
    total_steps: int | None = None,
    sync_every: int | None = None,
    on_error: OnError = "record",
) -> Scope:
    """Watch a training loop from the inside.

        with gradscope.watch(model, optimizer) as scope:
            ...  # the loop, unchanged

    Training is not changed: weights, optimizer state, random numbers and losses stay the same to
    the last bit. After the block nothing of it is left in torch.

    Args:
        model: the model, or several: ``[d, g]``.
        optimizer: the optimizer, or several: ``[opt_d, opt_g]``. One that the program makes later
            for parameters of these models is watched from its first step on.
        every: record every n-th step in full, whatever it costs. By default the first three
            steps are, those whose number is a power of two, and as many more as the budget allows.
        budget: the share of the step time that watching may take. It spaces what is chosen (steps
            recorded in full, closer looks); that gets a quarter of it at least, even where what is
            seen at every step takes more.
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
        save: a directory to which the recording is written while the loop runs, every few
            seconds, for :func:`gradscope.open`; what it says survives the process, however that
            ends. One that holds a run of the same training (the same parameters and optimizers) is
            gone on with: steps count on, and an event ``seam`` stands where.
        total_steps: how many steps there will be, of all optimizers together, if that is known:
            then ``scope.latest``, the screen and ``gradscope summary`` tell how far the run is.
        sync_every: compare the weights of the ranks of a process group at every n-th step of each
            optimizer while they train, with one all-gather of a few numbers, in which every rank
            has to take part: all have to watch, and to step their optimizers equally often.
            Without it nothing is sent, and ranks are compared when the run is opened.
        on_error: ``"record"`` keeps an error of gradscope's own away from the training and tells
            it once as a warning; ``"raise"`` lets it out.

    Returns:
        A scope, not yet watching: enter it, decorate with it, or call its ``start()``.

    Raises:
        UsageError: if what is passed cannot be watched; the message names it.
        UnknownRuleError: if something is said of a rule that there is not.
    """
    try:
        options = WatchOptions(
            budget=budget,
            every=every,
            include=as_patterns("params", params),
            exclude=as_patterns("exclude", exclude),
            keep=as_patterns("keep", keep),
            keep_steps=as_steps("keep_steps", keep_steps),
            graph=as_graph_steps(graph),
            save=as_directory("save", save),
            total_steps=total_steps,
            sync_every=sync_every,
            on_error=on_error,
        )
        if switched_off():
            return Scope(None)
        from gradscope.judging import checked_on_finding
        from gradscope.rules.criteria import criteria

        models, optimizers = checked_models(model), checked_optimizers(optimizer)
        judged_by = criteria(select, ignore, ignore_params, thresholds, rules)
        on_finding = checked_on_finding(on_finding)
        session = _session(options, models, optimizers)
        _check_keep(session.recording, options)
        if options.save is not None:
            try:
                stored, waits = _run_at(options.save)
                session.save_to(options.save, judged_by.as_plain(), stored, waits=waits)
            except GradscopeError:
                raise
            except Exception as error:  # it may have taken up some of what lies there
                session = _session(options, models, optimizers)
                session.saving_failed(error)
        return Scope(session, judged_by, on_finding)
    except GradscopeError:  # what was passed cannot be watched
        raise
    except Exception as error:
        if on_error == "raise":
            raise
        return _scope_of_nothing(error)


def _session(
    options: WatchOptions, models: list[nn.Module], optimizers: list[torch.optim.Optimizer]
) -> Session:
    """A session that follows these, called what the program calls them."""
    from gradscope.session.session import Session

    session = Session(options)
    caller = calling_frame()
    names = names_of(caller, 0, "model", len(models), "model")
    for model, name in zip(models, names, strict=True):
        session.watch_model(model, name)
    names = names_of(caller, 1, "optimizer", len(optimizers), "optimizer")
    for optimizer, name in zip(optimizers, names, strict=True):
        session.watch_optimizer(optimizer, name)
    session.recording.total_steps = options.total_steps
    return session


def _scope_of_nothing(error: Exception) -> Scope:
    """What watch() returns when it fails itself: the training goes on as if it were not there."""
    from gradscope.session.failures import warn

    scope = Scope(None)
    text = f"watch() failed and nothing is watched; training goes on ({text_of(error)})"
    scope._why_not = f"gradscope: {text}"
    scope._recording.notes.append(text)
    with suppress(Exception):
        warn("watch-failed", text)
    return scope


def _run_at(path: Path) -> tuple[Any, bool]:
    """The run that lies in a directory, to be gone on with, and whether to wait with writing.

    None for the run if there is none, or none of this rank's.

    Raises:
        UsageError: if something else lies there.
    """
    from gradscope.run.directory.layout import is_free, ranks_in
    from gradscope.run.directory.stored import StoredRecording
    from gradscope.session.ranks import is_known_later, place_now
    from gradscope.session.saving import begins_beside

    place, is_known = place_now(), not is_known_later()
    if is_free(path, place.rank, place.world_size):
        return None, not is_known
    try:
        rank = place.rank if place.rank in ranks_in(path) else None
        stored = StoredRecording(path, rank)
    except RunDirectoryError as error:
        raise UsageError(f"save={str(path)!r}: {error}; name another directory") from error
    if is_known:
        return stored, False
    if begins_beside(stored.facts):
        return None, True
    if stored.world_size > 1:
        raise UsageError(
            f"save={str(path)!r} holds a run of {stored.world_size} ranks, and it is not known yet "
            "which of them this process is: call watch() after init_process_group(), or name "
            "another directory"
        )
    return stored, False


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
