"""A graph for other programs: as JSON that can be read back without loss, and for networkx.

The JSON is one object::

    {"format": "gradscope autograd graph", "version": 1, "step": 3, "graph": {"ops": […], …}}

``graph`` has a key for each attribute of :class:`CapturedGraph`, where its meaning is told. Arrays
and tuples are lists, ``calls`` and ``saved`` objects of their own. A text that is no valid Unicode
(a parameter's name may hold any character) is a list of code points instead.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from gradscope.errors import UsageError
from gradscope.run.captured_graph import (
    CapturedGraph,
    ModuleCalls,
    Outputs,
    Registered,
    SavedTensors,
)

if TYPE_CHECKING:
    import networkx  # type: ignore[import-untyped]

FORMAT: Final = "gradscope autograd graph"
VERSION: Final = 1

_Reader: TypeAlias = Callable[[Any, str], Any]
"""Makes a field from what JSON holds in its place; is told where that is, for the message."""


def to_json(captured: CapturedGraph, step: int | None) -> str:
    """Write a graph as JSON, pure ASCII, without spaces.

    Args:
        captured: the graph.
        step: the training step it belongs to; None if unknown.
    """
    document = {"format": FORMAT, "version": VERSION, "step": step, "graph": _plain(captured)}
    return json.dumps(document, separators=(",", ":"))


def from_json(text: str) -> tuple[CapturedGraph, int | None]:
    """Read what :func:`to_json` has written.

    Returns:
        The graph, equal in every field to the one that was written, and its step.

    Raises:
        UsageError: if the text is cut off, is something else, comes from a newer gradscope, or
            holds something that is no graph; the message says what and where.
    """
    if not isinstance(text, str):
        raise UsageError(f"the graph must be given as text (str), not {type(text).__name__}")
    try:
        document = json.loads(text)
    except RecursionError:
        raise UsageError("this is no graph: it is nested too deeply") from None
    except ValueError as error:
        raise UsageError(f"this is no JSON, or only a part of it: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UsageError(f'this is no graph: a graph says {{"format": "{FORMAT}"}}')
    version = document.get("version")
    if type(version) is not int or version < 1:
        raise UsageError(f"version is {_shown(version)}, where a whole number from 1 on belongs")
    if version > VERSION:
        raise UsageError(
            f"this graph was written by a newer gradscope, in version {version} of the format, and "
            f"this one reads version {VERSION}: update gradscope"
        )
    read = _record(lambda **fields: fields, step=_or_none(_whole), graph=_GRAPH)
    fields = read({key: document[key] for key in document if key not in ("format", "version")}, "")
    _check_numbers(fields["graph"])
    return fields["graph"], fields["step"]


def to_networkx(captured: CapturedGraph) -> networkx.MultiDiGraph[int]:
    """Return the graph for networkx, its edges in the direction in which the data flowed.

    Nodes have ``op`` (as torch spells it), ``sequence_nr`` (-1 for a leaf), ``module`` and
    ``module_type`` (of the innermost module that made it; None for what no module made), ``call``
    (number of that module's call, -1 for none), ``param`` (first name of the parameter, or None),
    ``aliases`` (tuple of all its names), ``shapes`` and ``dtypes`` (tuples, an element for each
    output), ``is_root``, ``file`` and ``line`` (None where not known). Edges have
    ``source_output`` (which output of the source, from 0), ``shape`` (of that output; None if not
    known) and ``position`` (which input of the target, from 0, those that need no gradient left
    out). An operation that uses a tensor twice has two parallel edges.
    """
    import networkx  # comes with torch, which is why it may be taken for granted

    graph: networkx.MultiDiGraph[int] = networkx.MultiDiGraph()
    calls, roots = captured.calls, set(captured.roots.tolist())
    for node, (op, number, output, leaf, call, line) in enumerate(
        zip(
            captured.op.tolist(),
            captured.sequence_nr.tolist(),
            captured.output.tolist(),
            captured.param.tolist(),
            captured.call.tolist(),
            captured.line.tolist(),
            strict=True,
        )
    ):
        aliases = captured.params[leaf] if leaf >= 0 else ()
        file, line_number = captured.lines[line] if line >= 0 else (None, None)
        graph.add_node(
            node,
            op=captured.ops[op],
            sequence_nr=number,
            module=calls.path(call) if call >= 0 else None,
            module_type=calls.kind(call) if call >= 0 else None,
            call=call,
            param=aliases[0] if aliases else None,
            aliases=aliases,
            shapes=captured.outputs[output].shapes,
            dtypes=captured.outputs[output].dtypes,
            is_root=node in roots,
            file=file,
            line=line_number,
        )
    position = np.arange(captured.n_edges) - np.searchsorted(captured.target, captured.target)
    for source, target, which, at in zip(
        captured.source.tolist(),
        captured.target.tolist(),
        captured.source_output.tolist(),
        position.tolist(),
        strict=True,
    ):
        shapes = captured.outputs_of(source).shapes
        shape = shapes[which] if which < len(shapes) else None
        graph.add_edge(source, target, source_output=which, shape=shape, position=at)
    return graph


# -- writing --------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Return what JSON has for a value."""
    if isinstance(value, str):
        # JSON joins two halves of a pair to one character, and some readers refuse a single half.
        has_halves = any("\ud800" <= char <= "\udfff" for char in value)
        return list(map(ord, value)) if has_halves else value
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if dataclasses.is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    return value


# -- reading --------------------------------------------------------------------------------------


def _shown(value: Any) -> str:
    try:
        shown = ascii(value)
    except RecursionError:
        shown = "nested deeply"
    return shown if len(shown) <= 60 else f"{shown[:59]}…"


def _wrong(where: str, value: Any, wanted: str) -> UsageError:
    return UsageError(f"this is no graph: {where} is {_shown(value)}, where {wanted} belongs")


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        is_character = [type(each) is int and 0 <= each <= 0x10FFFF for each in value]
        if all(is_character):
            return "".join(map(chr, value))
    raise _wrong(where, value, "a text")


def _whole(value: Any, where: str) -> int:
    if type(value) is not int:
        raise _wrong(where, value, "a whole number")
    return value


def _extent(value: Any, where: str) -> int:
    if _whole(value, where) < 0:
        raise _wrong(where, value, "the extent of a dimension")
    return int(value)


def _flag(value: Any, where: str) -> bool:
    if type(value) is not bool:
        raise _wrong(where, value, "true or false")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise _wrong(where, value, "a list")
    return value


def _or_none(read: _Reader) -> _Reader:
    return lambda value, where: None if value is None else read(value, where)


def _tuple(read: _Reader) -> _Reader:
    def tuple_of(value: Any, where: str) -> tuple[Any, ...]:
        return tuple([read(each, f"{where}[{i}]") for i, each in enumerate(_list(value, where))])

    return tuple_of


def _pair(first: _Reader, second: _Reader) -> _Reader:
    def pair_of(value: Any, where: str) -> tuple[Any, Any]:
        if len(_list(value, where)) != 2:
            raise _wrong(where, value, "a pair")
        return first(value[0], f"{where}[0]"), second(value[1], f"{where}[1]")

    return pair_of


def _array(dtype: type[np.generic]) -> _Reader:
    element = bool if dtype is np.bool_ else int
    wanted = "true or false" if dtype is np.bool_ else f"a whole number of {dtype.__name__}"

    def array_of(value: Any, where: str) -> Any:
        low, high = (0, 1) if dtype is np.bool_ else _range(dtype)
        for i, each in enumerate(_list(value, where)):
            if type(each) is not element or not low <= each <= high:
                raise _wrong(f"{where}[{i}]", each, wanted)
        return np.array(value, dtype)

    return array_of


def _range(dtype: Any) -> tuple[int, int]:
    limits = np.iinfo(dtype)
    return int(limits.min), int(limits.max)


def _record(make: Callable[..., Any], **readers: _Reader) -> _Reader:
    def record(value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            raise _wrong(where, value, "an object")
        inside = f"{where}." if where else ""
        for key in readers:
            if key not in value:
                raise UsageError(
                    f"this is no graph, or only a part of one: {inside}{key} is missing"
                )
        for key in value:
            if key not in readers:
                raise UsageError(f"this is no graph: {inside}{_shown(key)} is unknown")
        return make(**{key: read(value[key], inside + key) for key, read in readers.items()})

    return record


_INTEGERS: Final = _array(np.int32)
_LONG_INTEGERS: Final = _array(np.int64)
_SHAPE: Final = _tuple(_extent)

_GRAPH: Final = _record(
    CapturedGraph,
    ops=_tuple(_text),
    op=_INTEGERS,
    sequence_nr=_LONG_INTEGERS,
    source=_INTEGERS,
    target=_INTEGERS,
    source_output=_INTEGERS,
    param=_INTEGERS,
    params=_tuple(_tuple(_text)),
    param_shape=_tuple(_SHAPE),
    outputs=_tuple(_record(Outputs, shapes=_tuple(_SHAPE), dtypes=_tuple(_text))),
    output=_INTEGERS,
    roots=_INTEGERS,
    call=_INTEGERS,
    calls=_record(
        ModuleCalls,
        modules=_tuple(_pair(_text, _text)),
        module=_INTEGERS,
        parent=_INTEGERS,
        first=_LONG_INTEGERS,
        last=_LONG_INTEGERS,
        without_grad=_array(np.bool_),
        feeds=_tuple(_pair(_whole, _whole)),
    ),
    registered=_tuple(_record(Registered, names=_tuple(_text), shape=_SHAPE, requires_grad=_flag)),
    saved=_record(
        SavedTensors,
        names=_tuple(_text),
        node=_INTEGERS,
        name=_INTEGERS,
        shapes=_tuple(_or_none(_SHAPE)),
        n_bytes=_LONG_INTEGERS,
        storage=_INTEGERS,
    ),
    began=_or_none(_whole),
    line=_INTEGERS,
    lines=_tuple(_pair(_text, _whole)),
)


def _check_numbers(graph: CapturedGraph) -> None:
    """Refuse lists that are not equally long, and numbers that refer to nothing.

    What is read here is taken apart later by code that trusts it.
    """
    calls, saved = graph.calls, graph.saved
    n, e, c, s = len(graph.op), len(graph.source), len(calls.module), len(saved.node)
    p = len(graph.params)
    for owner, prefix, names, length in (
        (graph, "graph", ("sequence_nr", "param", "output", "call", "line"), n),
        (graph, "graph", ("target", "source_output"), e),
        (graph, "graph", ("param_shape",), p),
        (calls, "graph.calls", ("parent", "first", "last", "without_grad"), c),
        (saved, "graph.saved", ("name", "shapes", "n_bytes", "storage"), s),
    ):
        for name in names:
            if len(getattr(owner, name)) != length:
                raise UsageError(
                    f"this is no graph: {prefix}.{name} has {len(getattr(owner, name))} elements, "
                    f"where {length} belong"
                )
    for where, numbers, low, high in (
        ("graph.op", graph.op, 0, len(graph.ops)),
        ("graph.source", graph.source, 0, n),
        ("graph.target", graph.target, 0, n),
        ("graph.source_output", graph.source_output, 0, 2**31),
        ("graph.param", graph.param, -1, p),
        ("graph.output", graph.output, 0, len(graph.outputs)),
        ("graph.roots", graph.roots, 0, n),
        ("graph.call", graph.call, -1, c),
        ("graph.line", graph.line, -1, len(graph.lines)),
        ("graph.calls.module", calls.module, 0, len(calls.modules)),
        ("graph.calls.parent", calls.parent, -1, np.arange(c)),
        ("graph.calls.feeds", np.array(calls.feeds, np.int64).reshape(-1), 0, c),
        ("graph.saved.node", saved.node, 0, n),
        ("graph.saved.name", saved.name, 0, len(saved.names)),
    ):
        wrong = np.flatnonzero((numbers < low) | (numbers >= high))
        if len(wrong):
            raise UsageError(
                f"this is no graph: {where}[{wrong[0]}] is {numbers[wrong[0]]}, which is the "
                "number of nothing in it"
            )
    if (np.diff(graph.target) < 0).any():
        raise UsageError("this is no graph: graph.target is not in ascending order")
    if (graph.param[graph.target] >= 0).any():
        raise UsageError("this is no graph: a leaf has an input")
    if _has_circle(graph):
        raise UsageError("this is no graph: its data flows in a circle")


def _has_circle(graph: CapturedGraph) -> bool:
    # Numbered by time, data flows to higher numbers, and nothing has to be followed.
    number, is_leaf = graph.sequence_nr, graph.param >= 0
    inner = ~is_leaf[graph.source]
    source, target = graph.source[inner], graph.target[inner]
    if (number[source] < number[target]).all():
        return False
    users: list[list[int]] = [[] for _ in range(len(graph))]
    unmet = np.bincount(target, minlength=len(graph)).tolist()
    for each, user in zip(source.tolist(), target.tolist(), strict=True):
        users[each].append(user)
    ready = [node for node, n_inputs in enumerate(unmet) if not n_inputs]
    for node in ready:  # grows while it is walked
        for user in users[node]:
            unmet[user] -= 1
            if not unmet[user]:
                ready.append(user)
    return len(ready) < len(graph)
