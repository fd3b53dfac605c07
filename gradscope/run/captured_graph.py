"""The autograd graph behind one loss, as flat arrays that hold nothing of torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Integers: TypeAlias = npt.NDArray[np.int32]
    LongIntegers: TypeAlias = npt.NDArray[np.int64]

Shape: TypeAlias = tuple[int, ...]
"""The extent of each dimension; ``()`` is a scalar."""


def operation(node_name: str) -> str:
    """Return the operation that a node is the backward of: ``Log`` for ``LogBackward0``."""
    return node_name.rstrip("0123456789").removesuffix("Backward")


def _no_integers() -> Integers:
    return np.zeros(0, np.int32)


def _no_long_integers() -> LongIntegers:
    return np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a node gave in the forward, an entry for each of its outputs.

    Attributes:
        shapes: their shapes; nothing where torch does not tell, as for nested tensors.
        dtypes: their element types, spelled without ``torch.`` (``"float32"``).
    """

    shapes: tuple[Shape, ...] = ()
    dtypes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Registered:
    """A parameter that a model has registered, whether or not the graph reaches it.

    Attributes:
        names: all its names, several if it is tied.
        shape: its shape.
        requires_grad: False for a frozen one, which no graph reaches.
    """

    names: tuple[str, ...]
    shape: Shape
    requires_grad: bool


@dataclass(frozen=True, slots=True, eq=False)
class ModuleCalls:
    """The calls of modules during the forward, in the order in which they began.

    Below, *c* is the number of calls.

    Attributes:
        modules: (path, class name) of each module that was called. The path is that of
            ``model.named_modules()``: ``""`` for the model itself, with the model's own name in
            front where there are several. A module outside of the models is called by its class
            name in angle brackets: ``"<CrossEntropyLoss>"``.
        module: int32[c], index into ``modules``.
        parent: int32[c], the call inside of which this one was made; -1 for none.
        first: int64[c], the autograd sequence number when the call began.
        last: int64[c], the sequence number when it ended: it made those from ``first`` up to, and
            not including, ``last``.
        without_grad: bool[c], whether gradients were switched off when it began.
        feeds: (giver, taker) of each call that was given, without a graph, memory in which an
            earlier call had put its result: what ``detach()`` and ``no_grad`` leave of an edge.
    """

    modules: tuple[tuple[str, str], ...] = ()
    module: Integers = field(default_factory=_no_integers)
    parent: Integers = field(default_factory=_no_integers)
    first: LongIntegers = field(default_factory=_no_long_integers)
    last: LongIntegers = field(default_factory=_no_long_integers)
    without_grad: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    feeds: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.module)

    def is_inside(self, call: int, around: int) -> bool:
        """Whether a call was made inside of another one, or is that one."""
        while call > around:
            call = int(self.parent[call])
        return call == around

    def with_inner(self, own: LongIntegers) -> LongIntegers:
        """Add to what is counted of each call, int64[c], what is counted of those inside of it."""
        total = own.copy()
        parents = self.parent.tolist()
        for call in range(len(self) - 1, -1, -1):  # inner calls begin later
            if parents[call] >= 0:
                total[parents[call]] += total[call]
        return total

    def path(self, call: int) -> str:
        """The path of the module that was called."""
        path, _ = self.modules[int(self.module[call])]
        return path

    def kind(self, call: int) -> str:
        """The class name of the module that was called."""
        _, kind = self.modules[int(self.module[call])]
        return kind


@dataclass(frozen=True, slots=True, eq=False)
class SavedTensors:
    """What nodes keep for the backward, as they keep it: nothing is unpacked to find out.

    Below, *s* is the number of saved tensors.

    Attributes:
        names: every name that occurs, as torch has it without ``_saved_`` (``"result"``).
        node: int32[s], the node that keeps it.
        name: int32[s], index into ``names``.
        shapes: the shape of each; None for what a hook has packed, such as a checkpoint's.
        n_bytes: int64[s], its size; 0 for what a hook has packed.
        storage: int32[s], number of the memory it lies in, by which what two nodes keep together is
            counted once; -1 for a parameter or other leaf, which is there anyway, and for what a
            hook has packed.
    """

    names: tuple[str, ...] = ()
    node: Integers = field(default_factory=_no_integers)
    name: Integers = field(default_factory=_no_integers)
    shapes: tuple[Shape | None, ...] = ()
    n_bytes: LongIntegers = field(default_factory=_no_long_integers)
    storage: Integers = field(default_factory=_no_integers)

    def __len__(self) -> int:
        return len(self.node)


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
        target: int32[e], the node that used this output as an input; in ascending order.
        source_output: int32[e], which output of ``source`` it is, counted from 0.
        param: int32[n], index into ``params`` for the ``AccumulateGrad`` of a leaf, -1 for all
            other nodes.
        params: of each of the *p* leaves all names of that parameter, several if it is tied; an
            empty tuple for a leaf that is not a known parameter, such as an input that requires
            grad.
        param_shape: the shape of each of the *p* leaves.
        outputs: every combination of output shapes and dtypes that occurs, once.
        output: int32[n], index into ``outputs``.
        roots: int32[r], the nodes from which the backward starts. A root without a graph has none.
        call: int32[n], index into ``calls`` of the innermost module call that made the node; -1 for
            a leaf, and for what was made outside of every module or while nobody looked.
        calls: the module calls of the forward; empty if they were not followed.
        registered: the parameters of the models; empty if no model is known.
        saved: what the nodes keep for the backward; empty if it was not read.
        began: the sequence number at which the step began: a node below it belongs to an earlier
            step. None if unknown.
        line: int32[n], index into ``lines`` of the line of the program that made the node, -1 where
            it is not known; empty if lines were not followed.
        lines: (file, line) of every line that occurs.
    """

    ops: tuple[str, ...]
    op: Integers
    sequence_nr: LongIntegers
    source: Integers
    target: Integers
    source_output: Integers
    param: Integers
    params: tuple[tuple[str, ...], ...]
    param_shape: tuple[Shape, ...]
    outputs: tuple[Outputs, ...]
    output: Integers
    roots: Integers
    call: Integers = field(default_factory=_no_integers)
    calls: ModuleCalls = field(default_factory=ModuleCalls)
    registered: tuple[Registered, ...] = ()
    saved: SavedTensors = field(default_factory=SavedTensors)
    began: int | None = None
    line: Integers = field(default_factory=_no_integers)
    lines: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        for name in ("call", "line"):
            if not len(getattr(self, name)):
                object.__setattr__(self, name, np.full(len(self.op), -1, np.int32))

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

    def op_of(self, node: int) -> str:
        """What torch calls the operation of a node."""
        name: str = self.ops[int(self.op[node])]
        return name

    def givers_of(self, node: int) -> list[int]:
        """The nodes whose outputs a node used, once for each time."""
        first, last = np.searchsorted(self.target, (node, node + 1))
        givers: list[int] = self.source[first:last].tolist()
        return givers

    def outputs_of(self, node: int) -> Outputs:
        """What a node gave in the forward."""
        outputs: Outputs = self.outputs[int(self.output[node])]
        return outputs
