"""``gradscope run script.py [args]``: watch a program that nobody edited."""

from __future__ import annotations

import argparse
import os
import sys
from types import CodeType, ModuleType
from typing import Any

from gradscope.config import WatchOptions, switched_off
from gradscope.errors import UsageError


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
    code = _compiled(arguments.script)
    sys.argv = [arguments.script, *arguments.args]
    # As Python does for a script: its own folder is the first to import from.
    sys.path[0] = os.path.dirname(os.path.abspath(arguments.script))
    session = None
    if not switched_off():
        from gradscope.session.session import Session

        session = Session(WatchOptions(), discovers=True)
        session.start()
    try:
        return _execute_as_main(code, arguments.script)
    finally:
        if session is not None:
            session.stop()
            _print_screen(session.recording)


def _compiled(script: str) -> CodeType:
    try:
        with open(script, "rb") as file:
            source = file.read()
    except OSError as error:
        raise UsageError(f"cannot read {script}: {error.strerror}") from error
    return compile(source, script, "exec", dont_inherit=True)


def _execute_as_main(code: CodeType, script: str) -> int:
    main = ModuleType("__main__")
    main.__dict__.update(__file__=script, __builtins__=__builtins__)
    before = sys.modules["__main__"]
    sys.modules["__main__"] = main
    try:
        exec(code, main.__dict__)
    except SystemExit as exit_:
        return _status(exit_.code)
    except BaseException as error:
        _print_traceback(error)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    finally:
        # Whatever runs later, at exit, finds its globals where they were.
        sys.modules["__main__"] = main if main.__dict__ else before
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
    """Print the exception without the frames of ours that ran the program."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_code.co_filename == __file__:
        traceback = traceback.tb_next
    sys.excepthook(type(error), error.with_traceback(traceback), traceback)


def _print_screen(recording: Any) -> None:
    from rich.console import Console

    from gradscope.views.terminal import screen

    sys.stdout.flush()
    Console(stderr=True).print(screen(recording))
