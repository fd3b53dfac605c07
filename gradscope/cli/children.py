"""Processes that a watched program starts by ``multiprocessing``: each is watched for itself.

``os.fork()`` by itself is followed too: the hook that torch and others use after a fork begins the
watch, and ``os._exit``, with which such a child mostly ends, is replaced in it.

Else a process is handed over to whatever starts it as an object with a method ``_bootstrap``, which
is called in the new process, be it forked, spawned or forked from a server. A wrapper around that
object begins the watch there and ends it. What a process sees it writes to a run directory, the
program's own (``-o``) or one for the time being, and only if something trains in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.abc
import importlib.util
import multiprocessing
import multiprocessing.context
import os
import signal
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradscope.cli.ranks import remove_at_exit
from gradscope.run.directory import layout
from gradscope.taps.patch import replace
from gradscope.taps.undo import Undo

if TYPE_CHECKING:
    from gradscope.session.session import Session

_OF_OTHERS = ("torch.utils.data.", "concurrent.futures.process", "multiprocessing.managers")
"""Modules whose processes serve the program: loaders of data, pools, managers."""

_UNTRAINED = ("torch.utils.data.", "multiprocessing.managers")
"""Those among them in which nothing can train."""


_MOST_SECONDS_AT_SIGTERM = 10.0
"""So long a process that is to end may take to write what it has seen."""


@dataclasses.dataclass(frozen=True, slots=True)
class Watching:
    """How the processes of a program are watched.

    Attributes:
        path: the run directory that they write to.
        criteria: by what the run is judged, as plain data.
        n_steps: stop after so many steps; None for never.
    """

    path: str | None
    criteria: dict[str, Any]
    n_steps: int | None = None


class Children:
    """Sees to it that processes which a program starts are watched.

    Args:
        watching: how; without a path one is made for the time being.
        session: of this process; a child that is forked leaves it alone.

    Attributes:
        watching: likewise.
        session: likewise.
    """

    def __init__(self, watching: Watching, session: Session) -> None:
        self.watching = watching
        self.session = session
        self._undo = Undo()
        self._pid = os.getpid()
        self._has_started = False
        self._is_handing_over = False
        # Those that end when they are told to at Python's end; what they run is forgotten by then.
        self._served: weakref.WeakSet[Any] = weakref.WeakSet()

    def start(self) -> None:
        """Begin to take part when processes are started."""
        for name in ("ForkProcess", "SpawnProcess", "ForkServerProcess"):
            kind = getattr(multiprocessing.context, name, None)
            if kind is not None and "_Popen" in vars(kind):
                replace(self._undo, kind, "_Popen", self._wrap)

    def stop(self) -> None:
        """Take part no more."""
        global _current
        self._undo.close()
        if _current is self:
            _current = None

    def before_fork(self) -> None:
        """Have a place to which a process can write that is about to be forked."""
        if not self._is_handing_over:
            with contextlib.suppress(OSError):
                self._told()

    def after_fork(self) -> None:
        """Begin to watch a process that was forked, and nobody hands anything over to."""
        if self._is_handing_over or self.watching.path is None:
            return
        session = _guarded(lambda: _begin(self.watching))
        if session is not None:
            _end_before_exit(session)

    def wait(self) -> None:
        """Wait for the processes for which Python would wait at its end."""
        if not self._has_started or os.getpid() != self._pid:
            return
        for process in multiprocessing.active_children():
            if not process.daemon and process not in self._served:
                process.join()

    def leave_alone(self) -> None:
        """Leave the session of the process that this one was forked from."""
        with contextlib.suppress(Exception):
            self.session.abandon()

    @property
    def written(self) -> Path | None:
        """Where processes have written; None if none has."""
        if not self._has_started or self.watching.path is None:
            return None
        path = Path(self.watching.path)
        return path if layout.ranks_in(path) else None

    def _wrap(self, original: Any) -> Any:
        start: Callable[[Any], Any] = original.__func__

        def popen(process: Any) -> Any:
            self._is_handing_over = True
            try:
                return start(self._watched(process))
            finally:
                self._is_handing_over = False

        return staticmethod(popen)

    def _watched(self, process: Any) -> Any:
        if _target_of(process).startswith(_OF_OTHERS):
            self._served.add(process)
        if _target_of(process).startswith(_UNTRAINED):
            return process
        try:
            return _Child(process, self._told())
        except OSError:  # there is no room for what it would write
            return process

    def _told(self) -> Watching:
        if self.watching.path is None:
            path = tempfile.mkdtemp(prefix="gradscope-")
            self.watching = dataclasses.replace(self.watching, path=path)
            remove_at_exit(Path(path))
        self._has_started = True
        return self.watching


class _Child:
    """A process to be started, which watches itself when it has."""

    def __init__(self, process: Any, watching: Watching) -> None:
        self._process = process
        self._watching = watching

    def __getattr__(self, name: str) -> Any:
        return getattr(self._process, name)

    def __reduce__(self) -> Any:
        return _Child, (self._process, self._watching)

    def _bootstrap(self, *args: Any, **kwargs: Any) -> Any:
        """Run the process, watched; called in it."""
        if "torch" in sys.modules:
            _guarded(lambda: _begin(self._watching))
        else:  # a process without it is left as light as it is
            _when_torch_is_imported(lambda: _guarded(lambda: _begin(self._watching)))
        status = self._process._bootstrap(*args, **kwargs)
        _guarded(lambda: end_of_child("finished" if status == 0 else f"exit status {status}"))
        return status


class _TorchFinder(importlib.abc.MetaPathFinder):
    """Does something as soon as torch has been imported; finds nothing by itself."""

    def __init__(self, then: Callable[[], Any]) -> None:
        self._then = then

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """Find torch as all others would, and have its loader do what is to be done."""
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            self._then()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _when_torch_is_imported(then: Callable[[], Any]) -> None:
    sys.meta_path.insert(0, _TorchFinder(then))


_current: Children | None = None


def watch_children(watching: Watching, session: Session) -> Children:
    """Begin to watch the processes that this one starts."""
    global _current
    _current = Children(watching, session)
    _current.start()
    _follow_forks()
    return _current


@functools.cache
def _follow_forks() -> None:
    # What is registered stays; without somebody who watches it does nothing.
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=lambda: None if _current is None else _current.before_fork(),
            after_in_child=lambda: None if _current is None else _current.after_fork(),
        )


def end_of_child(ended: str) -> None:
    """Write what a child of the program's own has seen, which has come to the program's end."""
    if _current is not None:
        _end(_current.session, ended)


def _begin(watching: Watching) -> Session:
    from gradscope.cli.watching import begin_session

    if _current is not None:
        _current.leave_alone()
        _current.stop()
    session = begin_session(
        None if watching.path is None else Path(watching.path),
        watching.criteria,
        watching.n_steps,
    )
    watch_children(watching, session)
    _end_before_sigterm(session)
    return session


def _end_before_sigterm(session: Session) -> None:
    """Write what there is before the process is ended by whoever has started it.

    Pools end their workers like this, and so are the other ranks ended when one has failed. Not
    where the program has a handler of its own.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return
    pid = os.getpid()

    def handle(number: int, frame: Any) -> None:
        if os.getpid() == pid:  # and no child that inherited this
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a pool sends it twice
            if hasattr(signal, "setitimer"):  # whatever it was in the midst of, it does end
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, _MOST_SECONDS_AT_SIGTERM)
            _guarded(lambda: _end(session, "SIGTERM"))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, handle)
    _handlers.add(handle)


_handlers: set[Any] = set()
"""Ours, of which none may come while a session ends by itself."""


def _end_before_exit(session: Session) -> None:
    def wrap(original: Callable[[int], Any]) -> Callable[[int], Any]:
        def _exit(status: int) -> Any:
            _guarded(lambda: _end(session, f"exit status {status}" if status else "finished"))
            return original(status)

        return _exit

    replace(Undo(), os, "_exit", wrap)  # for good


def _end(session: Session, ended: str) -> None:
    is_ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) in _handlers
    )
    if is_ours:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        session.stop()
        session.finish_saving(ended)
    finally:
        if is_ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _guarded(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        print(
            f"gradscope: this process is not watched ({type(error).__name__}: {error})",
            file=sys.stderr,
        )
        return None


def _target_of(process: Any) -> str:
    """The module of what a process runs, with a dot behind it."""
    target = getattr(process, "_target", None)
    return f"{getattr(target, '__module__', None) or ''}."
