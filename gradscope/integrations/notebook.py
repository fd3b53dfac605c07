"""``%load_ext gradscope``: ``%%gradscope`` watches the training loop of a notebook's cell."""

from __future__ import annotations

import argparse
import ast
import itertools
import linecache
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from gradscope.errors import GradscopeError, UsageError, text_of

if TYPE_CHECKING:
    from gradscope.scope import Scope
    from gradscope.session.session import Session
    from gradscope.session.step_limit import StepLimit


def load_ipython_extension(shell: Any) -> None:
    """Declare the magics ``%%gradscope`` and ``%gradscope``; IPython calls this."""
    magics = _Magics(shell)
    shell.register_magic_function(magics.cell, "cell", "gradscope")
    shell.register_magic_function(magics.line, "line", "gradscope")


def unload_ipython_extension(shell: Any) -> None:
    """Take the magics away again."""
    for kind in ("cell", "line"):
        shell.magics_manager.magics[kind].pop("gradscope", None)


class _Magics:
    """The magics of one shell, and the scope of the last cell that was watched."""

    def __init__(self, shell: Any) -> None:
        self._shell = shell
        self._last: Scope | None = None

    def line(self, line: str) -> Scope | None:
        """Return the scope of the last cell that ``%%gradscope`` watched.

        ``scope = %gradscope`` keeps it: tables, findings, graph and explanations.
        """
        if line.strip():
            _refuse("%gradscope takes nothing; %%gradscope, with two, watches a cell")
        if self._last is None:
            _refuse("no cell was watched yet: write %%gradscope as the first line of one")
        return self._last

    def cell(self, line: str, cell: str) -> Any:
        """Watch the training loop in this cell, and show what was seen after it.

        Models and optimizers are found as the loop uses them. ``--steps N`` stops watching after N
        steps, ``--select`` and ``--ignore`` choose rules, ``-o DIR`` records to a run directory.
        """
        __tracebackhide__ = True
        from gradscope.config import switched_off

        tree, run = self._compiled(cell)
        if switched_off():
            return run()
        try:
            watch = _watch(_options(line), _optimizers(tree, self._shell.user_ns))
        except GradscopeError as error:
            _refuse(str(error))
        except Exception as error:  # of ours: the cell runs all the same
            print(f"gradscope: watching failed ({text_of(error)})", file=sys.stderr)
            return run()
        self._last = watch.scope
        try:
            value = run()
        except BaseException as error:
            self._finish(watch, error)
            raise
        self._finish(watch)
        return value

    def _finish(self, watch: _Watch, error: BaseException | None = None) -> None:
        """End the watch; what fails here hides neither the cell's value nor its exception."""
        try:
            self._end(watch, error)
        except Exception as failure:
            with suppress(Exception):
                print(f"gradscope: the verdict failed ({text_of(failure)})", file=sys.stderr)

    def _end(self, watch: _Watch, error: BaseException | None) -> None:
        from IPython.display import display

        from gradscope.session.ending import note_ending, raised_at

        session = watch.session
        if watch.limit is not None:
            watch.limit.stop()
        if error is not None:
            note_ending(session, error)
        session.stop()
        session.finish_saving("finished" if error is None else type(error).__name__)
        display(watch.scope)  # type: ignore[no-untyped-call]
        if error is None:
            return
        from gradscope.views.exception_explanation import explain_exception

        place = raised_at(error)
        where = (None, None) if place is None else (place.file, place.line)
        told = explain_exception(session.recording, type(error).__name__, str(error), *where)
        if told is not None:
            print(told, file=sys.stderr)

    def _compiled(self, cell: str) -> tuple[ast.Module, Callable[[], Any]]:
        """The cell parsed, and as a function that returns the value of its last expression."""
        # The line of the magic, and empty ones that IPython drops, come first: lines count as the
        # notebook shows them.
        n_empty = len(list(itertools.takewhile(str.isspace, cell.splitlines(keepends=True))))
        text = "\n" * (1 + n_empty) + self._shell.transform_cell(cell)
        # Newer versions of IPython count on before a cell runs; the display hook knows its number.
        name = f"In[{self._shell.displayhook.prompt_count}]"
        # Tracebacks, and we for the names of things, read the lines of the program from here.
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        whole = ast.parse(text, name)
        tree = self._shell.transform_ast(ast.parse(text, name))
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        body = compile(tree, name, "exec", dont_inherit=True)
        value = None
        if isinstance(last, ast.Expr):
            value = compile(ast.Expression(last.value), name, "eval", dont_inherit=True)
        names = self._shell.user_ns

        def run() -> Any:
            __tracebackhide__ = True
            exec(body, names)
            return None if value is None else eval(value, names)

        return whole, run


def _optimizers(tree: ast.Module, names: dict[str, Any]) -> dict[str, Any]:
    """The optimizers of earlier cells that this one mentions, by name.

    Met only when it steps for the first time, an optimizer has no name, and its first backward has
    passed already.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    mentioned = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    made_here = {node.id for node in mentioned if not isinstance(node.ctx, ast.Load)}
    found: dict[str, Any] = {}
    for node in mentioned:
        thing = names.get(node.id)
        is_new = node.id not in made_here and not any(thing is known for known in found.values())
        if is_new and isinstance(thing, torch.optim.Optimizer):
            found[node.id] = thing
    return found


@dataclass(frozen=True, slots=True)
class _Watch:
    session: Session
    scope: Scope
    limit: StepLimit | None


def _watch(options: argparse.Namespace, optimizers: dict[str, Any]) -> _Watch:
    """Begin to watch whatever trains, and these optimizers."""
    from gradscope.config import WatchOptions, as_directory, project_config
    from gradscope.rules.criteria import criteria
    from gradscope.run.directory.layout import make_room
    from gradscope.scope import Scope
    from gradscope.session.session import Session

    config = project_config(".")
    judged_by = criteria(
        _listed(options.select) or config.select,
        (*config.ignore, *_listed(options.ignore)),
        config.ignore_params,
        config.thresholds,
    )
    output = as_directory("--output", options.output)
    if output is not None:
        make_room("--output", output, force=options.force)
    session = Session(WatchOptions(save=output), discovers=True)
    for name, optimizer in optimizers.items():
        session.watch_optimizer(optimizer, name)
    if output is not None:
        session.save_to(output, judged_by.as_plain())
    session.start()
    limit = None
    if options.steps is not None:
        from gradscope.session.step_limit import StepLimit

        limit = StepLimit(session, options.steps)
        limit.start()
    return _Watch(session, Scope(session, judged_by), limit)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"%%gradscope: {message}")


def _options(line: str) -> argparse.Namespace:
    """What stands behind the magic.

    Raises:
        UsageError: if it cannot be understood.
    """
    parser = _Parser(prog="%%gradscope", add_help=False)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--select", default="")
    parser.add_argument("--ignore", default="")
    parser.add_argument("-o", "--output")
    parser.add_argument("--force", action="store_true")
    try:
        options = parser.parse_args(shlex.split(line))
    except ValueError as error:
        raise UsageError(f"%%gradscope: {error}") from None
    if options.steps is not None and options.steps < 1:
        raise UsageError(f"%%gradscope: --steps {options.steps}: pass 1 or more")
    return options


def _listed(given: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in given.split(",") if word.strip())


def _refuse(text: str) -> NoReturn:
    """Say what is wrong in one line, as IPython does for its own magics."""
    from IPython.core.error import UsageError as MagicError

    raise MagicError(text)
