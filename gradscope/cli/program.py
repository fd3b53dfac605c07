"""The program that is watched, run as ``python`` itself would run it."""

from __future__ import annotations

import importlib.machinery
import itertools
import os
import runpy
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, ModuleType, TracebackType
from typing import Any

from gradscope.errors import UsageError
from gradscope.own_code import is_ours


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended.

    Attributes:
        status: the exit status that Python would give it.
        error: the exception that nobody caught, if one ended it; ``SystemExit`` is none.
    """

    status: int
    error: BaseException | None = None


class NoSuchModuleError(UsageError):
    """``-m`` names nothing that can be run."""


class Program:
    """A script or a module, ready to be run.

    Args:
        argv: what ``sys.argv`` is to be.
        folder: the first place to import from.
        load: returns the code and the globals of ``__main__``; may run code of the program.
    """

    def __init__(
        self,
        argv: list[str],
        folder: str,
        load: Callable[[], tuple[CodeType, dict[str, Any]]],
    ) -> None:
        self.folder = folder
        self._argv = argv
        self._load = load

    def run(self) -> Ended:
        """Run the program in this process, as ``__main__``, and tell how it ended.

        Raises:
            NoSuchModuleError: if there is no such module.
        """
        sys.argv = list(self._argv)
        if not sys.flags.safe_path:  # then Python, too, puts nothing in front
            sys.path[0] = self.folder
        main = ModuleType("__main__")
        try:
            code, names = self._load()
            main.__dict__.update(names, __annotations__={}, __builtins__=__builtins__)
            # Left in place afterwards: what runs at exit still looks its globals up there.
            sys.modules["__main__"] = main
            exec(code, main.__dict__)
        except SystemExit as exit_:
            return Ended(_status(exit_.code))
        except BaseException as error:
            if isinstance(error, NoSuchModuleError) and sys.modules["__main__"] is not main:
                raise
            return Ended(130 if isinstance(error, KeyboardInterrupt) else 1, error)
        return Ended(0)


def script_program(script: str, arguments: list[str]) -> Program:
    """Return the program in a file.

    Raises:
        UsageError: if it cannot be read.
    """
    # Python, too, makes the path of the script absolute, and leaves sys.argv as it was typed.
    path = os.path.abspath(script)
    try:
        with open(path, "rb") as file:
            source = file.read()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error

    def load() -> tuple[CodeType, dict[str, Any]]:
        return compile(source, path, "exec", dont_inherit=True), {
            "__doc__": None,
            "__package__": None,
            "__loader__": importlib.machinery.SourceFileLoader("__main__", path),
            "__spec__": None,
            "__file__": path,
            "__cached__": None,
        }

    return Program([script, *arguments], os.path.dirname(path), load)


def module_program(name: str, arguments: list[str]) -> Program:
    """Return the program that ``python -m name`` would run."""

    def load() -> tuple[CodeType, dict[str, Any]]:
        # As pdb and trace do it: the one place that knows every rule of ``-m``.
        _, spec, code = runpy._get_module_details(name, NoSuchModuleError)  # type: ignore[attr-defined]
        sys.argv[0] = spec.origin
        return code, {
            "__doc__": None,
            "__package__": spec.parent,
            "__loader__": spec.loader,
            "__spec__": spec,
            "__file__": spec.origin,
            "__cached__": spec.cached,
        }

    return Program(["-m", *arguments], os.getcwd(), load)


def print_exception(error: BaseException) -> None:
    """Print an exception as Python would, without the frames of gradscope's own."""
    for each in _with_causes(error):
        each.__traceback__ = _without_ours(each.__traceback__)
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
    _flush()
    try:
        sys.excepthook(type(error), error, error.__traceback__)
    except Exception:
        print("Error in sys.excepthook:", file=sys.stderr)
        traceback.print_exc()
        print("\nOriginal exception was:", file=sys.stderr)
        sys.__excepthook__(type(error), error, error.__traceback__)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):  # None, a broken pipe, closed
            continue


def _with_causes(error: BaseException) -> list[BaseException]:
    """An exception and all that Python prints with it."""
    found: dict[int, BaseException] = {}
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if each is None or id(each) in found:
            continue
        found[id(each)] = each
        waiting += [each.__cause__, each.__context__]
        if isinstance(each, BaseExceptionGroup):
            waiting += each.exceptions
    return list(found.values())


def _without_ours(first: TracebackType | None) -> TracebackType | None:
    """A traceback with our frames unlinked from it, and torch's that only led to them."""
    parts = []
    each = first
    while each is not None:
        parts.append(each)
        each = each.tb_next
    codes = [part.tb_frame.f_code for part in parts]
    dropped = {n for n, code in enumerate(codes) if is_ours(code.co_filename)}
    for n in tuple(dropped):
        # A function mode, which follows calls at armed steps, has torch go a round about way: the
        # function hands itself over to the mode, and the mode calls it again (torch 2.13).
        if n and codes[n - 1].co_name == "handle_torch_function":
            dropped.add(n - 1)
            if n > 1 and codes[n - 2] in codes[n + 1 : n + 2]:
                dropped.add(n - 2)
    kept = [part for n, part in enumerate(parts) if n not in dropped]
    for here, after in itertools.pairwise([*kept, None]):
        if here is not None:
            here.tb_next = after
    return kept[0] if kept else None


def _status(code: Any) -> int:
    """The exit status that Python would give to ``sys.exit(code)``."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code
    _flush()
    print(code, file=sys.stderr)
    return 1
