"""One of two graphs that are compared: its calls and parameters, as they are found in the other."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from gradscope.graphs.execution import execution_of
from gradscope.graphs.unreached import operations_made

if TYPE_CHECKING:
    from collections.abc import Hashable

    from gradscope.graphs.difference import How
    from gradscope.run.captured_graph import CapturedGraph, LongIntegers, Shape

Key: TypeAlias = "tuple[str, int] | None"
"""By which a call is found in either graph: path of the module, number of its call; None for what
lies outside of all modules."""

ONE_SIDED: Final[tuple[How, How]] = ("vanished", "appeared")


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a module, as far as two graphs can be compared by it."""

    path: str
    number: int
    kind: str
    state: str


@dataclass(slots=True, eq=False)
class Parameter:
    """A parameter, registered or reached, and the nodes that stand for it if it is reached."""

    names: tuple[str, ...]
    shape: Shape
    state: str
    nodes: list[int]


Matched: TypeAlias = tuple[Parameter | None, Parameter | None]


REACHED: Final = "leads to the loss"
NOT_REACHED: Final = "does not lead to the loss"
FROZEN: Final = "frozen"


class ComparedGraph:
    """One of the two graphs, and what is looked up in it again and again."""

    def __init__(self, captured: CapturedGraph) -> None:
        self.captured = captured
        self.n_made, self.n_reached = operations_made(captured)
        self.calls: list[Call] = []
        how_often = Counter[str]()
        for call in range(len(captured.calls)):
            path = captured.calls.path(call)
            self.calls.append(
                Call(path, how_often[path], captured.calls.kind(call), self._state(call))
            )
            how_often[path] += 1
        self.parents = captured.calls.parent.tolist()
        self.paths = frozenset(how_often)
        self.call_of = {(each.path, each.number): at for at, each in enumerate(self.calls)}

    def _state(self, call: int) -> str:
        if self.n_reached[call]:
            return REACHED
        if self.n_made[call]:
            return "is cut off"
        without_grad = self.captured.calls.without_grad[call]
        return "runs without gradients" if without_grad else "makes no operations"

    def key(self, call: int) -> Key:
        """What a call is found by in the other graph; None for the program."""
        return None if call < 0 else (self.calls[call].path, self.calls[call].number)

    def by_call(self, *, with_calls: bool) -> dict[Key, LongIntegers]:
        """Return the operations that each call has made itself, in order."""
        order = execution_of(self.captured).node.astype(np.int64)
        call = self.captured.call[order] if with_calls else np.full(len(order), -1)
        order, call = order[np.argsort(call, kind="stable")], np.sort(call)
        first = np.flatnonzero(np.diff(call, prepend=-2))
        return {
            self.key(int(call[nodes[0]])): order[nodes]
            for nodes in np.split(np.arange(len(order)), first[1:])
            if len(nodes)
        }

    def parameters(self) -> list[Parameter]:
        """Return what is registered, then what else is reached and has a name."""
        captured = self.captured
        known = [
            Parameter(each.names, each.shape, NOT_REACHED if each.requires_grad else FROZEN, [])
            for each in captured.registered
        ]
        by_name = {name: each for each in reversed(known) for name in each.names}
        for node in np.flatnonzero(captured.param >= 0).tolist():
            names, shape = (
                captured.params[captured.param[node]],
                captured.param_shape[captured.param[node]],
            )
            if not names:
                continue
            parameter = next((by_name[name] for name in names if name in by_name), None)
            if parameter is None:
                parameter = Parameter(names, shape, REACHED, [])
                known.append(parameter)
                by_name |= dict.fromkeys(names, parameter)
            parameter.names, parameter.shape = names, shape
            parameter.state = REACHED
            parameter.nodes.append(node)
        return known


def told_with(old: Parameter | None, new: Parameter | None) -> set[tuple[str, How]]:
    """Return the modules with which a parameter is told if they are, and which way they must go.

    None are returned for a parameter that is not lost or gained, or has become frozen or been that:
    then it has a reason of its own.
    """
    if old is not None and new is not None and {old.state, new.state} != {REACHED, NOT_REACHED}:
        return set()
    way = ONE_SIDED[old is None or (new is not None and new.state == REACHED)]
    around = set()
    for each in (old, new):
        for name in each.names if each else ():
            parts = name.split(".")
            around |= {(".".join(parts[:n]), way) for n in range(len(parts))}
    return around


def matched_parameters(old: list[Parameter], new: list[Parameter]) -> list[Matched]:
    """Return pairs of parameters that share a name, equal names first; None for one without."""
    pairs: dict[int, int] = {}
    free = dict.fromkeys(range(len(new)))
    for is_shared in (False, True):
        by_name: dict[Hashable, list[int]] = {}
        for number in free:
            names = new[number].names
            for key in names if is_shared else (frozenset(names),):
                by_name.setdefault(key, []).append(number)
        for number, each in enumerate(old):
            if number in pairs:
                continue
            for key in each.names if is_shared else (frozenset(each.names),):
                found = next((other for other in by_name.get(key, ()) if other in free), None)
                if found is not None:
                    pairs[number] = found
                    del free[found]
                    break
    return [
        *(
            (each, new[pairs[number]] if number in pairs else None)
            for number, each in enumerate(old)
        ),
        *((None, new[number]) for number in free),
    ]
