"""``gradscope run script.py [args]``: watch a program that nobody edited."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from types import ModuleType
from typing import Any

from gradscope.config import WatchOptions, switched_off
from gradscope.errors import UsageError
from gradscope.own_code import is_ours


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "run",
        help="run a training script under watch",
        description="Run a script as Python would, watch the models and optimizers that it makes, "
        "and print the loop as it really ran to standard error at its end.",
    )
    parser.add_argument("script", help="the script to run")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="arguments for the script")
    parser.set_defaults(execute=execute)


def execute(arguments: argparse.Namespace) -> int:
    """Run the script; its exit status is ours, its exceptions are printed as Python prints them."""
    # Python, too, makes the path of the script absolute, and leaves sys.argv as it was typed.
    script = os.path.abspath(arguments.script)
    source = _read(script)
    sys.argv = [arguments.script, *arguments.args]
    # As Python does for a script: its own folder is the first to import from.
    sys.path[0] = os.path.dirname(script)
    session = None
    if not switched_off():
        from gradscope.session.session import Session

        session = Session(WatchOptions(), discovers=True)
        session.start()
    try:
        return _execute_as_main(source, script)
    finally:
        if session is not None:
            session.stop()
            _print_screen(session.recording)


def _read(script: str) -> bytes:
    try:
        with open(script, "rb") as file:
            return file.read()
    except OSError as error:
        raise UsageError(f"cannot read {script}: {error.strerror}") from error


def _execute_as_main(source: bytes, script: str) -> int:
    main = ModuleType("__main__")
    main.__dict__.update(__file__=script, __builtins__=__builtins__)
    # Left in place afterwards: what runs at exit still looks its globals up there.
    sys.modules["__main__"] = main
    try:
        exec(compile(source, script, "exec", dont_inherit=True), main.__dict__)
    except SystemExit as exit_:
        return _status(exit_.code)
    except BaseException as error:
        _print_traceback(error)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _status(code: Any) -> int:
    """The exit status that Python would give to ``sys.exit(code)``."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code
    print(code, file=sys.stderr)
    return 1


def _print_traceback(error: BaseException) -> None:
    """Print the exception as Python would, without the frames of gradscope's own."""
    if sys.excepthook is not sys.__excepthook__:  # the program has its own way to print it
        sys.excepthook(type(error), error, error.__traceback__)
        return
    printed = traceback.TracebackException.from_exception(error)
    shown: list[traceback.TracebackException | None] = [printed]
    while shown:
        part = shown.pop()
        if part is not None:
            own = [frame for frame in part.stack if not is_ours(frame.filename)]
            part.stack = traceback.StackSummary.from_list(own)
            shown += [part.__cause__, part.__context__]
    print("".join(printed.format()), end="", file=sys.stderr)


def _print_screen(recording: Any) -> None:
    from rich.console import Console

    from gradscope.views.terminal import screen

    sys.stdout.flush()
    Console(stderr=True).print(screen(recording))
