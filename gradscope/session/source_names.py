"""What the program calls a thing: read off the source text of the call that brought it to us.

Reading a frame's local variables would be simpler, but on Python 3.11 it leaves a snapshot of them
in the frame, which keeps the program's tensors (and so their graph) alive.
"""

from __future__ import annotations

import ast
import linecache
from types import FrameType

_FUNCTIONAL_CALL = "functional_call"


def call_in_progress(frame: FrameType | None) -> ast.Call | None:
    """Return the call expression that a frame is executing, or None if its text cannot be had."""
    expression = _expression_in_progress(frame)
    return expression if isinstance(expression, ast.Call) else None


def argument_names(frame: FrameType | None, position: int, keyword: str) -> list[str] | None:
    """Return how the call in progress spells one argument: one name, or one per list element.

    Args:
        frame: the frame that makes the call.
        position: place of the argument among the positional ones.
        keyword: its name, when passed by keyword.

    Returns:
        Names without a leading ``self.``, or None if the text cannot be had.
    """
    call = call_in_progress(frame)
    if call is None:
        return None
    argument: ast.expr | None = None
    if position < len(call.args):
        argument = call.args[position]
    for given in call.keywords:
        if given.arg == keyword:
            argument = given.value
    if argument is None or isinstance(argument, ast.Starred):
        return None
    if isinstance(argument, ast.List | ast.Tuple):
        return [_spelled(element) for element in argument.elts]
    return [_spelled(argument)]


def called_name(frame: FrameType | None) -> str | None:
    """Return the name of what is being called: ``netG`` in ``fake = netG(noise)``.

    In ``functional_call(net, weights, x)`` that is ``net``.
    """
    call = call_in_progress(frame)
    if call is None:
        return None
    name = _spelled(call.func)
    if name.rpartition(".")[2] == _FUNCTIONAL_CALL and call.args:
        return None if isinstance(call.args[0], ast.Starred) else _spelled(call.args[0])
    return name


def assigned_name(frame: FrameType | None) -> str | None:
    """Return the variable being assigned: ``opt_d`` in ``opt_d = Adam(…)``."""
    if frame is None:
        return None
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    # The statement may go over several lines, of which this is one; its first is what matters.
    first = _first_line_in_progress(frame)
    if first is not None:
        line = linecache.getline(frame.f_code.co_filename, first)
    position = _position(frame)
    if position is not None:
        of_several = _target_of(line, position[2])
        if of_several is not None:
            return of_several
    if position is not None and position[0] == frame.f_lineno:
        # Of several statements on one line, the one that the call stands in.
        line = line.encode()[: position[2]].decode(errors="replace").rpartition(";")[2]
    target, equals, _ = line.partition("=")
    target = target.split(":")[0].strip()
    if not equals or not target.replace(".", "").replace("_", "").isalnum():
        return None
    return target.removeprefix("self.")


def _target_of(line: str, column: int) -> str | None:
    """Whom a call in a line like ``a, b = Adam(…), Adam(…)`` is assigned to; None in any other."""
    code = line.lstrip()
    column -= len(line) - len(code)
    try:
        statements = ast.parse(code).body
    except SyntaxError:
        return None
    for statement in statements:
        if not isinstance(statement, ast.Assign):
            continue
        targets, values = statement.targets[0], statement.value
        if (
            not isinstance(targets, ast.Tuple | ast.List)
            or not isinstance(values, ast.Tuple | ast.List)
            or len(targets.elts) != len(values.elts)
        ):
            continue
        for target, value in zip(targets.elts, values.elts, strict=True):
            if value.col_offset <= column < (value.end_col_offset or 0):
                return _spelled(target)
    return None


def _first_line_in_progress(frame: FrameType) -> int | None:
    position = _position(frame)
    return None if position is None else position[0]


def _position(frame: FrameType) -> tuple[int, int, int, int] | None:
    positions = list(frame.f_code.co_positions())
    line, end_line, column, end_column = positions[frame.f_lasti // 2]
    if line is None or end_line is None or column is None or end_column is None:
        return None
    return line, end_line, column, end_column


def _expression_in_progress(frame: FrameType | None) -> ast.expr | None:
    if frame is None:
        return None
    position = _position(frame)
    if position is None:
        return None
    line, end_line, column, end_column = position
    lines = [
        linecache.getline(frame.f_code.co_filename, number).encode()
        for number in range(line, end_line + 1)
    ]
    if not all(lines):
        return None
    # Columns count bytes of UTF-8.
    lines[-1] = lines[-1][:end_column]
    lines[0] = lines[0][column:]
    try:
        parsed = ast.parse(b"(" + b"".join(lines) + b")", mode="eval")
    except (SyntaxError, ValueError):
        return None
    return parsed.body


def _spelled(expression: ast.expr) -> str:
    return ast.unparse(expression).removeprefix("self.")
