"""Reads the autograd graph behind the roots of a backward into flat arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.autograd.graph import GradientEdge

from gradscope.instruments.graph_release import bound_release_depth
from gradscope.run.captured_graph import CapturedGraph, Shape

NamesOf: TypeAlias = Callable[[torch.Tensor], tuple[str, ...]]

_ACCUMULATE_GRAD = "AccumulateGrad"


def capture_graph(root_nodes: Sequence[Any], names_of: NamesOf) -> CapturedGraph:
    """Walk the graph behind ``root_nodes`` and return it as plain arrays.

    The walk follows ``next_functions`` without recursion. It reads no saved tensor, so it works
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

    Returns:
        The captured graph; without nodes if no root has a graph.

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
    op: list[int] = []
    sequence_nr: list[int] = []
    source: list[int] = []
    first_edge: list[int] = []
    source_output: list[int] = []
    param: list[int] = []
    leaves: list[torch.Tensor] = []
    output_shape: list[tuple[Shape, ...]] = []
    output_dtype: list[tuple[str, ...]] = []
    outputs = _OutputReader()
    for node in nodes:  # grows while it is walked
        name = _op_name(node)
        op.append(ops.setdefault(name, len(ops)))
        first_edge.append(len(source))
        shapes, dtypes = outputs.read(node)
        output_shape.append(shapes)
        output_dtype.append(dtypes)
        if name == _ACCUMULATE_GRAD:
            # Its own number is the largest uint64, so that the engine runs it first.
            sequence_nr.append(-1)
            param.append(len(leaves))
            leaves.append(node.variable)
            continue
        sequence_nr.append(node._sequence_nr())
        param.append(-1)
        for used, output in node.next_functions:
            if used is None:  # this input required no grad
                continue
            at = number.get(used)
            if at is None:
                at = number[used] = len(nodes)
                nodes.append(used)
            source.append(at)
            source_output.append(output)

    first_edge.append(len(source))
    bound_release_depth(nodes, first_edge, source)

    return CapturedGraph(
        ops=tuple(ops),
        op=np.array(op, dtype=np.int32),
        sequence_nr=np.array(sequence_nr, dtype=np.int64),
        source=np.array(source, dtype=np.int32),
        target=np.repeat(np.arange(len(nodes), dtype=np.int32), np.diff(first_edge)),
        source_output=np.array(source_output, dtype=np.int32),
        param=np.array(param, dtype=np.int32),
        params=tuple(tuple(names_of(leaf)) for leaf in leaves),
        param_shape=tuple(tuple(leaf.shape) for leaf in leaves),
        output_shape=tuple(output_shape),
        output_dtype=tuple(output_dtype),
        roots=np.arange(n_roots, dtype=np.int32),
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


def _op_name(node: Any) -> str:
    name = type(node).__name__
    if name == "CppFunction":  # C++ functions without a Python class of their own share this one
        name = str(node.name()).removeprefix("torch::autograd::")
    return name


class _OutputReader:
    """Reads the shapes and dtypes of a node's forward outputs; equal ones become one object."""

    def __init__(self) -> None:
        self._shared: dict[Any, Any] = {}
        self._dtype_name: dict[torch.dtype, str] = {}

    def read(self, node: Any) -> tuple[tuple[Shape, ...], tuple[str, ...]]:
        # Private, seen in torch 2.13. It holds sizes, not tensors, and survives the backward.
        try:
            metadata = node._input_metadata
            shapes = tuple([tuple(output.shape) for output in metadata])
        except (AttributeError, RuntimeError):  # a nested tensor has no such shape
            return (), ()
        dtypes = tuple([self._name(output.dtype) for output in metadata])
        return self._shared.setdefault(shapes, shapes), self._shared.setdefault(dtypes, dtypes)

    def _name(self, dtype: torch.dtype) -> str:
        name = self._dtype_name.get(dtype)
        if name is None:
            name = self._dtype_name[dtype] = str(dtype).removeprefix("torch.")
        return name
