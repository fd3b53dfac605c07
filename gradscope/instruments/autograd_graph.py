"""Reads the autograd graph behind the roots of a backward into flat arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.autograd.graph import GradientEdge

from gradscope.garbage import no_collection
from gradscope.instruments.graph_release import bound_release_depth
from gradscope.instruments.saved_tensors import SavedTensorReader
from gradscope.run.captured_graph import CapturedGraph, Outputs, Shape

NamesOf: TypeAlias = Callable[[torch.Tensor], tuple[str, ...]]

_ACCUMULATE_GRAD = "AccumulateGrad"


@no_collection()
def capture_graph(
    root_nodes: Sequence[Any], names_of: NamesOf, *, saved: bool = False
) -> CapturedGraph:
    """Walk the graph behind ``root_nodes`` and return it as plain arrays.

    The walk follows ``next_functions`` without recursion. It unpacks no saved tensor, so it works
    before and after the backward and never makes a checkpoint recompute; the result refers to
    nothing of torch's, so it keeps no graph alive.

    Args:
        root_nodes: root tensors, ``grad_fn`` nodes or gradient edges, mixed as one likes. The
            same node given twice is one root. Tensors that do not require grad, and None (the
            ``grad_fn`` of a detached tensor), have no graph and are passed over. Give the tensor
            rather than its ``grad_fn`` where a custom Function made it: that node lives only as
            long as the tensor.
        names_of: the names of a leaf tensor in the user's program, all of them if it is tied, an
            empty tuple if it is no known parameter. Called once for each leaf.
        saved: whether to read what the nodes keep for the backward; after it, that is gone.

    Returns:
        The captured graph; without nodes if no root has a graph. It knows nothing of modules.

    Raises:
        TypeError: if a root is neither a tensor nor a node.
    """
    nodes: list[Any] = []
    number: dict[Any, int] = {}
    for node in map(_node_of, root_nodes):
        if node is not None and node not in number:
            number[node] = len(nodes)
            nodes.append(node)
    n_roots = len(nodes)

    ops: dict[str, int] = {}
    op_of_type: dict[type, int] = {}
    accumulate_grad = ops[_ACCUMULATE_GRAD] = 0
    op: list[int] = []
    sequence_nr: list[int] = []
    source: list[int] = []
    first_edge: list[int] = []
    source_output: list[int] = []
    leaf_nodes: list[int] = []
    leaves: list[torch.Tensor] = []
    output: list[int] = []
    read_outputs = _OutputReader()
    read_saved = SavedTensorReader()
    for at, node in enumerate(nodes):  # grows while it is walked
        kind = op_of_type.get(type(node))
        if kind is None:
            kind = _number_of_op(node, ops, op_of_type)
        op.append(kind)
        first_edge.append(len(source))
        output.append(read_outputs(node))
        if kind == accumulate_grad:
            # Its own number is the largest uint64, so that the engine runs it first.
            sequence_nr.append(-1)
            leaf_nodes.append(at)
            leaves.append(node.variable)
            continue
        sequence_nr.append(node._sequence_nr())
        if saved:
            read_saved(at, node)
        for used, used_output in node.next_functions:
            if used is None:  # this input required no grad
                continue
            known = number.get(used)
            if known is None:
                known = number[used] = len(nodes)
                nodes.append(used)
            source.append(known)
            source_output.append(used_output)

    first_edge.append(len(source))
    bound_release_depth(nodes, first_edge, source, sequence_nr)

    param = np.full(len(nodes), -1, np.int32)
    param[leaf_nodes] = np.arange(len(leaves))
    return CapturedGraph(
        ops=tuple(ops),
        op=np.array(op, dtype=np.int32),
        sequence_nr=np.array(sequence_nr, dtype=np.int64),
        source=np.array(source, dtype=np.int32),
        target=np.repeat(np.arange(len(nodes), dtype=np.int32), np.diff(first_edge)),
        source_output=np.array(source_output, dtype=np.int32),
        param=param,
        params=tuple(tuple(names_of(leaf)) for leaf in leaves),
        param_shape=tuple(tuple(leaf.shape) for leaf in leaves),
        outputs=read_outputs.all,
        output=np.array(output, dtype=np.int32),
        roots=np.arange(n_roots, dtype=np.int32),
        saved=read_saved.result(),
    )


def _node_of(root: Any) -> Any:
    if isinstance(root, torch.Tensor):
        if root.grad_fn is not None or not root.requires_grad:
            return root.grad_fn
        with torch.enable_grad():  # a leaf: its AccumulateGrad is seen only from a node above it
            above: Any = root.view_as(root).grad_fn
        return above.next_functions[0][0]
    if isinstance(root, GradientEdge):
        return root.node
    if root is None or hasattr(root, "next_functions"):
        return root
    raise TypeError(f"a root must be a tensor or a grad_fn, not {type(root).__name__}")


def _number_of_op(node: Any, ops: dict[str, int], op_of_type: dict[type, int]) -> int:
    name = type(node).__name__
    if name == "CppFunction":  # C++ functions without a Python class of their own share this one
        name = str(node.name()).removeprefix("torch::autograd::")
        return ops.setdefault(name, len(ops))
    return op_of_type.setdefault(type(node), ops.setdefault(name, len(ops)))


class _OutputReader:
    """Reads the shapes and dtypes of a node's forward outputs, and numbers the combinations."""

    def __init__(self) -> None:
        self._number: dict[Any, int] = {}
        self._of_one: dict[Any, int] = {}
        self._all: list[Outputs] = []

    def __call__(self, node: Any) -> int:
        # Private, seen in torch 2.13. It holds sizes, not tensors, and survives the backward.
        try:
            metadata = node._input_metadata
            if len(metadata) == 1:  # as good as always, and this is read of every node
                (only,) = metadata
                seen: Any = (tuple(only.shape), only.dtype)
                number = self._of_one.get(seen)
                if number is None:
                    number = self._of_one[seen] = self._numbered((seen,))
                return number
            seen = tuple([(tuple(each.shape), each.dtype) for each in metadata])
        except (AttributeError, RuntimeError):  # a nested tensor has no such shape
            seen = ()
        return self._numbered(seen)

    def _numbered(self, seen: tuple[tuple[Shape, torch.dtype], ...]) -> int:
        number = self._number.get(seen)
        if number is None:
            number = self._number[seen] = len(self._all)
            self._all.append(
                Outputs(
                    tuple(shape for shape, _ in seen),
                    tuple(str(dtype).removeprefix("torch.") for _, dtype in seen),
                )
            )
        return number

    @property
    def all(self) -> tuple[Outputs, ...]:
        return tuple(self._all)
