"""The autograd graph behind one backward, as flat arrays that hold nothing of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Shape: TypeAlias = tuple[int, ...]
"""The extent of each dimension; ``()`` is a scalar."""


@dataclass(frozen=True, slots=True, eq=False)
class CapturedGraph:
    """The nodes that one backward will visit, or has visited, and the edges between them.

    A node is one ``grad_fn``: an operation of the forward, or the ``AccumulateGrad`` of a leaf.
    Nodes are numbered from 0 in the order of discovery, breadth first from the roots, so the roots
    come first. Edges point the way the data flowed in the forward, the reverse of torch's
    ``next_functions``; gradients flow against them. An operand used twice has two edges.

    A root that depends on no leaf gives a graph without nodes.

    Below, *n* is the number of nodes, *e* of edges, *p* of leaves and *r* of roots.

    Attributes:
        ops: every node type that occurs, once, as torch spells it (``"AddmmBackward0"``).
        op: int32[n], index into ``ops``.
        sequence_nr: int64[n], the number autograd gave the node when the forward made it; it grows
            with time within one thread. -1 for ``AccumulateGrad``, which has none.
        source: int32[e], the node whose output flows along the edge.
        target: int32[e], the node that used this output as an input.
        source_output: int32[e], which output of ``source`` it is, counted from 0.
        param: int32[n], index into ``params`` for the ``AccumulateGrad`` of a leaf, -1 for all
            other nodes.
        params: of each of the *p* leaves all names of that parameter, several if it is tied; an
            empty tuple for a leaf that is not a known parameter, such as an input that requires
            grad.
        param_shape: the shape of each of the *p* leaves.
        output_shape: of each of the *n* nodes the shapes of its forward outputs. An empty tuple
            where torch does not tell, as for nested tensors.
        output_dtype: of each of the *n* nodes the dtypes of its forward outputs, spelled without
            ``torch.`` (``"float32"``); same lengths as in ``output_shape``.
        roots: int32[r], the nodes from which the backward starts. A root without a graph has none.
    """

    ops: tuple[str, ...]
    op: npt.NDArray[np.int32]
    sequence_nr: npt.NDArray[np.int64]
    source: npt.NDArray[np.int32]
    target: npt.NDArray[np.int32]
    source_output: npt.NDArray[np.int32]
    param: npt.NDArray[np.int32]
    params: tuple[tuple[str, ...], ...]
    param_shape: tuple[Shape, ...]
    output_shape: tuple[tuple[Shape, ...], ...]
    output_dtype: tuple[tuple[str, ...], ...]
    roots: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.op)

    def __repr__(self) -> str:
        return (
            f"<CapturedGraph: {len(self)} nodes, {self.n_edges} edges, "
            f"{self.n_params} parameters, {len(self.roots)} roots>"
        )

    @property
    def n_edges(self) -> int:
        """How many edges there are."""
        return len(self.source)

    @property
    def n_params(self) -> int:
        """How many known parameters are reached; a tied one counts once, other leaves not."""
        return sum(1 for names in self.params if names)
