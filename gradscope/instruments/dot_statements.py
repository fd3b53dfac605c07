"""Writes the autograd graph behind tensors down as the boxes and lines of torchviz's picture.

What is drawn, in which words, colours and order is as in :func:`torchviz.make_dot`, so that
Graphviz lays both pictures out alike. What is different is how the graph is read: without
recursion, and without unpacking what it has saved. So a graph of any depth can be read, before and
after its backward, and no hook of the program's runs; under activation checkpointing such a hook is
the user's forward once more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import torch
from torch._C._autograd import SavedTensor

from gradscope.instruments.graph_release import bound_release_depth
from gradscope.instruments.passed import named_tensors, tensors_in
from gradscope.taps.tap import out_of_sight

LEAF: Final = "lightblue"
OUTPUT: Final = "darkolivegreen1"
BASE_OF_VIEW: Final = "darkolivegreen3"
SAVED: Final = "orange"

# Data that an operation keeps does not flow from one to the other.
_KEPT: Final = (("dir", "none"),)
_VIEWED: Final = (("style", "dotted"),)

_SAVED_PREFIX: Final = "_saved_"
_RAW_PREFIX: Final = "_raw"
_FREED: Final = "[freed]"
_PACKED: Final = "[packed by a hook]"
_UNREADABLE: Final = "[unreadable]"


class NodeStatement(NamedTuple):
    """One box.

    Attributes:
        name: by which edges refer to it, ``"n0"``, ``"n1"`` … as first mentioned.
        label: the text in it, of one or more lines.
        fill: its colour, None for an operation, which gets Graphviz's own.
        kind: tells the statements apart where torch must not be imported.
    """

    name: str
    label: str
    fill: str | None
    kind: Literal["node"] = "node"


class EdgeStatement(NamedTuple):
    """One line between two boxes.

    Attributes:
        tail: the box where it begins.
        head: the box to which it points, if it points.
        attributes: pairs of a Graphviz attribute and its value.
        kind: tells the statements apart where torch must not be imported.
    """

    tail: str
    head: str
    attributes: tuple[tuple[str, str], ...]
    kind: Literal["edge"] = "edge"


class CommentStatement(NamedTuple):
    """What has to be said about the whole picture; it is not drawn.

    Attributes:
        text: one line.
        kind: tells the statements apart where torch must not be imported.
    """

    text: str
    kind: Literal["comment"] = "comment"


DotStatement: TypeAlias = NodeStatement | EdgeStatement | CommentStatement


def dot_statements(
    var: Any, params: Any, *, show_attrs: bool, show_saved: bool, max_attr_chars: int
) -> list[DotStatement]:
    """Write down the picture of the graph behind ``var``.

    The result holds nothing of torch's; it is the same for the same graph, whenever it is asked.

    Args:
        var: a tensor, or tuples, lists, dicts and dataclasses of tensors, nested as one likes.
            What else is in them is passed over. A tensor without a graph is one box.
        params: the names of tensors: a dict from names to tensors, an iterable of pairs of a name
            and a tensor (``model.named_parameters()``), a model, or None. A tensor that has
            several names is drawn with all of them, one a line.
        show_attrs: whether an operation's box lists what it saved: numbers and sizes as they are,
            tensors as ``[saved tensor]``; ``[freed]`` if a backward is through with it and
            ``[packed by a hook]`` if ``torch.autograd.graph.saved_tensors_hooks``, of which
            activation checkpointing is made, put something in its place.
        show_saved: whether to draw the saved tensors, as far as they are neither freed nor packed.
            Those of custom Functions are always drawn.
        max_attr_chars: how long a listed value may be, at least 3.

    Returns:
        Boxes and lines in torchviz's order. First of all comes a comment if no tensor in ``var``
        requires grad.

    Raises:
        UsageError: if there is no tensor in ``var``, or ``params`` is nothing of the above.
    """
    outputs = tensors_in("var", var)
    named = named_tensors("params", params)
    writer = _StatementWriter(
        named, list_saved=show_attrs, draw_saved=show_saved, max_chars=max(max_attr_chars, 3)
    )
    out_of_sight(writer.write, outputs)
    return writer.statements


class _StatementWriter:
    """Collects statements, and holds what it has given a name while it lives.

    Args:
        named: names and tensors.
        list_saved: whether operations list what they saved.
        draw_saved: whether saved tensors get a box.
        max_chars: how long a listed value may be.
    """

    def __init__(
        self,
        named: list[tuple[str, torch.Tensor]],
        *,
        list_saved: bool,
        draw_saved: bool,
        max_chars: int,
    ) -> None:
        self.statements: list[DotStatement] = []
        self._list_saved = list_saved
        self._draw_saved = draw_saved
        self._max_chars = max_chars
        self._boxes: dict[int, str] = {}
        self._seen: set[int] = set()
        self._attributes: dict[type, list[str]] = {}
        # The id of an object that is gone may be given to the next one.
        self._held: list[Any] = [tensor for _, tensor in named]
        names: dict[int, dict[str, None]] = {}
        for name, tensor in named:
            names.setdefault(id(tensor), {})[name] = None
        self._names = {tensor: "\n".join(each) for tensor, each in names.items()}

    def write(self, outputs: list[torch.Tensor]) -> None:
        """Write down the outputs and everything behind them."""
        chains = [_with_bases(output) for output in outputs]
        tensors = [tensor for chain in chains for tensor in chain]
        # Before anything of the program's is read that might raise: a deep graph whose nodes have
        # been seen must not be left as it is.
        self._held.append(_bounded_nodes([tensor.grad_fn for tensor in tensors]))
        if not any(tensor.requires_grad for tensor in tensors):
            self.statements.append(
                CommentStatement("nothing that was given requires grad: there is no autograd graph")
            )
        for chain in chains:
            self._write_output(chain)

    def _write_output(self, chain: list[torch.Tensor]) -> None:
        n_new = 0
        for tensor in chain:
            if not self._is_new(tensor):
                break
            self._node(tensor, self._tensor_label(tensor), BASE_OF_VIEW if n_new else OUTPUT)
            if tensor.grad_fn is not None:
                self._write_operations(tensor.grad_fn)
                self._edge(tensor.grad_fn, tensor)
            n_new += 1
        for view, base in reversed(list(pairwise(chain[: n_new + 1]))):
            self._edge(base, view, _VIEWED)

    def _write_operations(self, root: Any) -> None:
        if not self._is_new(root):
            return
        self._begin_operation(root)
        entered = [(root, iter(root.next_functions))]
        while entered:
            node, inputs = entered[-1]
            for used, _ in inputs:
                if used is None:  # this input required no grad
                    continue
                self._edge(used, node)
                if self._is_new(used):
                    self._begin_operation(used)
                    entered.append((used, iter(used.next_functions)))
                    break
            else:
                entered.pop()
                self._end_operation(node)

    def _begin_operation(self, node: Any) -> None:
        texts: dict[str, str] = {}
        if self._list_saved or self._draw_saved:
            for attribute in self._saved_attributes(node):
                name = attribute.removeprefix(_SAVED_PREFIX)
                value, texts[name] = _read_saved(node, attribute)
                if self._draw_saved:
                    self._write_saved(node, name, value)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, torch.Tensor):
            self._is_new(leaf)
            self._node(leaf, self._tensor_label(leaf), LEAF)
            self._edge(leaf, node)
        label = type(node).__name__
        if self._list_saved and texts:
            label = _with_table(label, texts, self._max_chars)
        self._node(node, label, None)

    def _write_saved(self, node: Any, name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self._is_new(value)
            named = [(name, value)]
        elif isinstance(value, tuple):
            # torchviz would still draw one of these as an output of its own.
            named = [(f"{name}[{at}]", each) for at, each in enumerate(value)]
        else:
            return
        for each_name, tensor in named:
            if isinstance(tensor, torch.Tensor):
                self._edge(node, tensor, _KEPT)
                self._node(tensor, self._tensor_label(tensor, each_name), SAVED)

    def _end_operation(self, node: Any) -> None:
        for tensor in _saved_by_program(node):
            self._is_new(tensor)
            self._edge(tensor, node, _KEPT)
            self._node(tensor, self._tensor_label(tensor), SAVED)

    def _saved_attributes(self, node: Any) -> list[str]:
        kind = type(node)
        found = self._attributes.get(kind)
        if found is None:
            found = [name for name in dir(kind) if name.startswith(_SAVED_PREFIX)]
            self._attributes[kind] = found
        # What a custom Function stores in its context are attributes of this one node.
        own = [name for name in getattr(node, "__dict__", ()) if name.startswith(_SAVED_PREFIX)]
        return sorted({*found, *own}) if own else found

    def _tensor_label(self, tensor: torch.Tensor, name: str = "") -> str:
        return f"{name or self._names.get(id(tensor), '')}\n {_size_text(tensor)}"

    def _is_new(self, thing: Any) -> bool:
        if id(thing) in self._seen:
            return False
        self._seen.add(id(thing))
        return True

    def _node(self, thing: Any, label: str, fill: str | None) -> None:
        self.statements.append(NodeStatement(self._box_of(thing), label, fill))

    def _edge(self, tail: Any, head: Any, attributes: tuple[tuple[str, str], ...] = ()) -> None:
        self.statements.append(EdgeStatement(self._box_of(tail), self._box_of(head), attributes))

    def _box_of(self, thing: Any) -> str:
        box = self._boxes.get(id(thing))
        if box is None:
            box = self._boxes[id(thing)] = f"n{len(self._boxes)}"
            self._held.append(thing)
        return box


def _with_bases(tensor: torch.Tensor) -> list[torch.Tensor]:
    chain = [tensor]
    while (base := chain[-1]._base) is not None:
        chain.append(base)
    return chain


def _bounded_nodes(roots: Iterable[Any]) -> list[Any]:
    """All nodes behind ``roots``, made safe to free."""
    nodes = list(dict.fromkeys(root for root in roots if root is not None))
    number = {node: at for at, node in enumerate(nodes)}
    first_edge: list[int] = []
    source: list[int] = []
    for node in nodes:  # grows while it is walked
        first_edge.append(len(source))
        for used, _ in node.next_functions:
            if used is None:
                continue
            known = number.get(used)
            if known is None:
                known = number[used] = len(nodes)
                nodes.append(used)
            source.append(known)
    first_edge.append(len(source))
    bound_release_depth(nodes, first_edge, source)
    return nodes


def _read_saved(node: Any, attribute: str) -> tuple[Any, str]:
    """The value of one attribute as far as it can be drawn, and what a table says of it.

    The tensors are those that lie in the node. Reading the attribute itself would give the same
    ones, and an output of the node's own as a new tensor each time, but runs hooks and raises for a
    tensor that was changed in place since (torch 2.13).
    """
    try:
        raw = getattr(node, _RAW_PREFIX + attribute, None)
        slots = raw if isinstance(raw, tuple) else (raw,)
        value: Any = None
        if any(isinstance(slot, SavedTensor) for slot in slots):
            value = tuple(map(_tensor_in, slots))
            if any(_is_packed(slot) for slot in slots):
                return value, _PACKED
            if not isinstance(raw, tuple):
                (value,) = value
        if not _holds_tensor(value):
            # Not a tensor, one that was never given, or one that is gone: that raises.
            value = getattr(node, attribute)
        if isinstance(value, torch.Tensor):
            return value, "[saved tensor]"
        return value, "[saved tensors]" if _holds_tensor(value) else str(value)
    except RuntimeError:
        return None, _FREED
    except Exception:  # a custom Function's context may hold anything
        return None, _UNREADABLE


def _saved_by_program(node: Any) -> Iterator[torch.Tensor]:
    """What a custom Function gave to ``save_for_backward``, without what is freed or packed."""
    try:
        slots = getattr(node, "_raw_saved_tensors", ())
    except RuntimeError:  # a backward is through with it
        return
    for slot in slots:
        tensor = _tensor_in(slot)
        if tensor is not None:
            yield tensor


def _is_packed(slot: Any) -> bool:
    # What a hook has put there may well be a tensor, or None.
    return slot.unpack_hook is not None


def _tensor_in(slot: Any) -> torch.Tensor | None:
    return None if _is_packed(slot) else slot.data


def _holds_tensor(value: Any) -> bool:
    parts = value if isinstance(value, tuple) else (value,)
    return any(isinstance(part, torch.Tensor) for part in parts)


def _size_text(tensor: torch.Tensor) -> str:
    try:
        return f"({', '.join(map(str, tensor.size()))})"
    except Exception:  # a nested tensor has none; a subclass of the program's may do anything
        return f"({'nested' if tensor.is_nested else 'size unknown'})"


def _with_table(title: str, rows: dict[str, str], max_chars: int) -> str:
    names = max(map(len, rows))
    values = min(max(map(len, rows.values())), max_chars)
    lines = [title, "-" * max(names + values + 2, len(title))]
    for name, text in rows.items():
        shown = text if len(text) <= values else f"{text[: values - 3]}..."
        lines.append(f"{name:<{names}}: {shown:>{values}}")
    return "\n".join(lines)
