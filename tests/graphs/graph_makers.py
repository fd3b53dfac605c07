"""Graphs of made-up forwards, written down as autograd and a call log would note them.

Nothing here needs torch. What is random is driven by a ``random.Random``, so that hypothesis has
only a seed to draw and large graphs cost it nothing.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from gradscope.run.captured_graph import CapturedGraph, ModuleCalls, Outputs, Registered, Shape

FEATURES: Shape = (2, 3)


@dataclass(frozen=True)
class Value:
    """One output of an operation, or a leaf."""

    node: int
    output: int = 0


class Forward:
    """Carries out operations one after the other and remembers who took what from whom."""

    def __init__(self) -> None:
        self._ops: list[str] = []
        self._inputs: list[list[Value]] = []
        self._outputs: list[Outputs] = []
        self._sequence_nr: list[int] = []
        self._call: list[int] = []
        self._leaf: dict[int, tuple[tuple[str, ...], Shape]] = {}
        self._next = 0
        self._modules: dict[tuple[str, str], int] = {}
        self._calls: list[tuple[int, int, int, bool]] = []
        self._last: list[int] = []
        self._open: list[int] = [-1]

    @property
    def n_calls(self) -> int:
        return len(self._calls)

    def leaf(self, *names: str, shape: Shape = FEATURES) -> Value:
        self._leaf[len(self._ops)] = (names, shape)
        return self._note("AccumulateGrad", [], Outputs((shape,), ("float32",)), -1, -1)

    def op(
        self,
        kind: str,
        *inputs: Value,
        shape: Shape = FEATURES,
        dtype: str = "float32",
        n_outputs: int = 1,
    ) -> Value:
        outputs = Outputs((shape,) * n_outputs, (dtype,) * n_outputs)
        value = self._note(f"{kind}Backward0", list(inputs), outputs, self._next, self._open[-1])
        self._next += 1
        return value

    @contextmanager
    def module(self, path: str, kind: str = "Block", *, grad: bool = True) -> Iterator[int]:
        number = self._modules.setdefault((path, kind), len(self._modules))
        call = len(self._calls)
        self._calls.append((number, self._open[-1], self._next, not grad))
        self._last.append(-1)
        self._open.append(call)
        yield call
        self._open.pop()
        self._last[call] = self._next

    def sinks(self) -> list[Value]:
        """The operations, and leaves, whose results nobody has used."""
        used = {value.node for inputs in self._inputs for value in inputs}
        return [Value(node) for node in range(len(self._ops)) if node not in used]

    def captured(
        self,
        *roots: Value,
        registered: Sequence[Registered] = (),
        feeds: Sequence[tuple[int, int]] = (),
        sequence_nr: Callable[[int], int] = lambda number: number,
    ) -> CapturedGraph:
        """Walk the graph behind the roots, breadth first, as the real capture does."""
        nodes = list(dict.fromkeys(root.node for root in roots))
        n_roots = len(nodes)
        number = {node: at for at, node in enumerate(nodes)}
        source, target, source_output = [], [], []
        for at, node in enumerate(nodes):  # grows while it is walked
            for value in self._inputs[node]:
                if value.node not in number:
                    number[value.node] = len(nodes)
                    nodes.append(value.node)
                source.append(number[value.node])
                target.append(at)
                source_output.append(value.output)
        ops = {"AccumulateGrad": 0}
        outputs: dict[Outputs, int] = {}
        leaves = [node for node in nodes if node in self._leaf]
        param = {node: at for at, node in enumerate(leaves)}
        calls = np.array(self._calls, np.int64).reshape(-1, 4)
        return CapturedGraph(
            op=np.array([ops.setdefault(self._ops[n], len(ops)) for n in nodes], np.int32),
            ops=tuple(ops),
            sequence_nr=np.array(
                [sequence_nr(s) if (s := self._sequence_nr[n]) >= 0 else -1 for n in nodes],
                np.int64,
            ),
            source=np.array(source, np.int32),
            target=np.array(target, np.int32),
            source_output=np.array(source_output, np.int32),
            param=np.array([param.get(n, -1) for n in nodes], np.int32),
            params=tuple(self._leaf[n][0] for n in leaves),
            param_shape=tuple(self._leaf[n][1] for n in leaves),
            output=np.array(
                [outputs.setdefault(self._outputs[n], len(outputs)) for n in nodes], np.int32
            ),
            outputs=tuple(outputs),
            roots=np.arange(n_roots, dtype=np.int32),
            call=np.array([self._call[n] for n in nodes], np.int32),
            calls=ModuleCalls(
                modules=tuple(self._modules),
                module=calls[:, 0].astype(np.int32),
                parent=calls[:, 1].astype(np.int32),
                first=calls[:, 2],
                last=np.array(self._last, np.int64),
                without_grad=calls[:, 3].astype(np.bool_),
                feeds=tuple(feeds),
            ),
            registered=tuple(registered),
        )

    def _note(
        self, kind: str, inputs: list[Value], outputs: Outputs, sequence_nr: int, call: int
    ) -> Value:
        self._ops.append(kind)
        self._inputs.append(inputs)
        self._outputs.append(outputs)
        self._sequence_nr.append(sequence_nr)
        self._call.append(call)
        return Value(len(self._ops) - 1)


# -- random graphs ------------------------------------------------------------------------------


def random_dag(seed: int, n_operations: int) -> CapturedGraph:
    """Operations that take anything made so far, inside of modules that open and close at will."""
    random = Random(seed)
    forward = Forward()
    values = [forward.leaf(f"w{i}", shape=(i % 2 + 1,)) for i in range(random.randint(1, 4))]
    n_kinds, reach = random.randint(1, 3), random.choice([2, 5, 1000])
    left = n_operations

    def work(depth: int) -> None:
        nonlocal left
        for _ in range(random.randint(1, 8)):
            if left <= 0:
                return
            chance = random.random()
            if chance < 0.25 and depth < 4:
                path, kind = f"m{depth}.{random.randrange(3)}", f"M{random.randrange(2)}"
                with forward.module(path, kind):
                    work(depth + 1)
            elif chance < 0.4:
                names = (f"p{len(values)}",) if random.random() < 0.8 else ()
                values.append(forward.leaf(*names, shape=(random.randint(1, 2),)))
            else:
                left -= 1
                made = forward.op(
                    f"Op{random.randrange(n_kinds)}",
                    *(random.choice(values[-reach:]) for _ in range(random.randint(1, 2))),
                    shape=(random.randint(1, 2),),
                    dtype=random.choice(["float32", "float32", "float16"]),
                    n_outputs=2,
                )
                values.append(Value(made.node, random.randrange(2)))

    while left > 0:
        work(0)
    return forward.captured(*_some_roots(forward, random))


def random_loops(seed: int, n_operations: int = 120) -> CapturedGraph:
    """A program of nested loops that hand values on in slots, collect some, and call modules."""
    random = Random(seed)
    program = _Program(random, n_operations)
    body = program.statements(0)
    forward = program.forward
    while not program.is_over:
        program.run(body)
        if random.random() < 0.5:
            break
    return forward.captured(*_some_roots(forward, random))


def _some_roots(forward: Forward, random: Random) -> list[Value]:
    """All results that nobody used, and sometimes one that somebody did."""
    roots = forward.sinks()
    if random.random() < 0.2:
        roots.append(Value(random.randrange(max(root.node for root in roots) + 1)))
    random.shuffle(roots)
    return roots


Statement = Callable[["_Program"], None]


class _Program:
    """Makes up statements, and carries them out on slots."""

    N_SLOTS = 4

    def __init__(self, random: Random, n_operations: int) -> None:
        self.random = random
        self.forward = Forward()
        self.left = n_operations
        self.path = "m"
        self.turns: list[int] = [0]
        weights = [self.forward.leaf(f"shared.{i}") for i in range(2)]
        start = self.forward.leaf("start") if random.random() < 0.7 else weights[0]
        self.weights = weights
        self.slots = [
            start if random.random() < 0.6 else self.forward.op("Start", start)
            for _ in range(self.N_SLOTS)
        ]
        self.collected: dict[int, list[Value]] = {}

    @property
    def is_over(self) -> bool:
        return self.left <= 0

    def run(self, body: list[Statement]) -> None:
        for statement in body:
            if self.is_over:
                return
            statement(self)

    # -- statements -------------------------------------------------------------------------

    def statements(self, depth: int) -> list[Statement]:
        makers = [self.operation] * 5 + [self.collect]
        if depth < 3:
            makers += [self.loop] * (3 if depth == 0 else 2) + [self.call, self.consume]
        if depth > 0:
            makers += [self.only_at_first]
        return [self.random.choice(makers)(depth) for _ in range(self.random.randint(1, 4))]

    def operation(self, depth: int) -> Statement:
        random = self.random
        to = random.randrange(self.N_SLOTS)
        kind = random.choice(["Add", "Mul", "Sub"])
        operands = [random.randrange(self.N_SLOTS) for _ in range(random.randint(1, 2))]
        weight = random.choice(["none", "none", "shared", "own", "of turn"])
        shape, n_outputs = random.choice([(2, 3), (2, 3), (3, 2)]), random.choice([1, 1, 2])
        number = random.randrange(10**6)

        def run(program: _Program) -> None:
            program.left -= 1
            inputs = [program.slots[slot] for slot in operands]
            if weight == "shared":
                inputs.append(program.weights[number % 2])
            elif weight == "own":
                inputs.append(program.forward.leaf(f"own.{program.left}"))
            elif weight == "of turn":
                inputs.append(program.weights[program.turns[-1] % 2])
            made = program.forward.op(kind, *inputs, shape=shape, n_outputs=n_outputs)
            program.slots[to] = Value(made.node, number % n_outputs)

        return run

    def loop(self, depth: int) -> Statement:
        body = self.statements(depth + 1)
        n_turns, growth = self.random.randint(2, 6), self.random.choice([0, 0, 0, 1, -1])

        def run(program: _Program) -> None:
            for turn in range(max(1, n_turns + growth * program.turns[-1])):
                program.turns.append(turn)
                program.run(body)
                program.turns.pop()

        return run

    def call(self, depth: int) -> Statement:
        body = self.statements(depth + 1)
        name, kind = f"m{self.random.randrange(3)}", f"M{self.random.randrange(2)}"
        is_numbered = self.random.random() < 0.5

        def run(program: _Program) -> None:
            around = program.path
            program.path = f"{around}.{name}.{program.turns[-1]}" if is_numbered else around + name
            with program.forward.module(program.path, kind):
                program.run(body)
            program.path = around

        return run

    def collect(self, depth: int) -> Statement:
        slot, into = self.random.randrange(self.N_SLOTS), self.random.randrange(2)

        def run(program: _Program) -> None:
            program.collected.setdefault(into, []).append(program.slots[slot])

        return run

    def consume(self, depth: int) -> Statement:
        body = self.statements(depth + 1)
        out_of, slot = self.random.randrange(2), self.random.randrange(self.N_SLOTS)

        def run(program: _Program) -> None:
            for turn, value in enumerate(program.collected.pop(out_of, ())):
                program.turns.append(turn)
                program.slots[slot] = value
                program.run(body)
                program.turns.pop()

        return run

    def only_at_first(self, depth: int) -> Statement:
        body = [self.operation(depth)]

        def run(program: _Program) -> None:
            if program.turns[-1] == 0:
                program.run(body)

        return run


# -- what copies have to do with each other, found without arrays -------------------------------


@dataclass(frozen=True)
class Input:
    """What an operation takes: a leaf, or an output of the operation at a place."""

    leaf: int = -1
    place: int = -1
    output: int = 0


def inputs_by_place(captured: CapturedGraph, order: Sequence[int]) -> list[list[Input]]:
    """The inputs of the operations, in an order of nodes, in the order of their arguments."""
    place = {int(node): at for at, node in enumerate(order)}
    inputs: list[list[Input]] = [[] for _ in order]
    for source, target, output in zip(
        captured.source.tolist(),
        captured.target.tolist(),
        captured.source_output.tolist(),
        strict=True,
    ):
        leaf = int(captured.param[source])
        inputs[place[target]].append(
            Input(leaf=leaf) if leaf >= 0 else Input(place=place[source], output=output)
        )
    return inputs


def why_not_copies(
    captured: CapturedGraph,
    order: Sequence[int],
    first: int,
    period: int,
    count: int,
    likeness: str,
) -> str:
    """Say what keeps stretches of the order from being copies of one another; "" for nothing."""
    inputs = inputs_by_place(captured, order)
    for place in range(first, first + period):
        copies = range(place, place + period * count, period)
        if len({features(captured, int(order[copy]), likeness) for copy in copies}) > 1:
            return f"place {place}: different operations"
        if len({len(inputs[copy]) for copy in copies}) > 1:
            return f"place {place}: different numbers of inputs"
        for k in range(len(inputs[place])):
            taken = [inputs[copy][k] for copy in copies]
            if not rule_of(captured, taken, first, period, likeness):
                return f"input {k} at {place}: {taken}"
    return ""


def features(captured: CapturedGraph, node: int, likeness: str) -> object:
    """What must agree of two operations by themselves."""
    outputs = captured.outputs_of(node)
    shapes = outputs.shapes if likeness != "op" else ()
    dtypes = outputs.dtypes if likeness == "exact" else ()
    return captured.op_of(node), shapes, dtypes


def rule_of(
    captured: CapturedGraph, taken: Sequence[Input], first: int, period: int, likeness: str
) -> str:
    """Name the rule by which corresponding operations take an input; "" if there is none."""
    if all(each.leaf >= 0 for each in taken):
        leaves = [each.leaf for each in taken]
        alike = {
            (bool(captured.params[leaf]), captured.param_shape[leaf]) if likeness != "op" else ()
            for leaf in leaves
        }
        if len(alike) > 1:
            return ""
        # All the same, or each with one of its own.
        steady = len({a == b for a, b in pairwise(leaves)}) == 1
        return "leaves" if steady else ""
    rule = _rule_of_operations(taken, first, period)
    if rule:
        return rule
    head, *rest = taken
    from_predecessor = rest[0].leaf < 0 and first <= rest[0].place < first + period
    if head.place < first and from_predecessor and _rule_of_operations(rest, first, period):
        return "enters"
    return ""


def _rule_of_operations(taken: Sequence[Input], first: int, period: int) -> str:
    if any(each.leaf >= 0 for each in taken) or len({each.output for each in taken}) > 1:
        return ""
    places = [each.place for each in taken]
    steps = {b - a for a, b in pairwise(places)}
    # In the first copy what the copy before would have made comes from elsewhere.
    if steps <= {period} and (places[0] >= first - period or max(places) < first):
        return "moves on"
    if len(steps) == 1 and max(places) < first:
        return "from before"
    return ""


# -- real graphs --------------------------------------------------------------------------------


def captured_forward(model: Any, compute_loss: Callable[[], Any]) -> CapturedGraph:
    """What a watched step would record of a forward; only this needs torch."""
    from gradscope.instruments.autograd_graph import capture_graph
    from gradscope.instruments.call_log import CallLog, paths_of

    log = CallLog(paths_of([("", model)]))
    log.start()
    try:
        loss = compute_loss()
    finally:
        log.stop()
    params: dict[int, Any] = {}
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        params[id(param)] = param
        names.setdefault(id(param), []).append(name)
    captured = capture_graph([loss], lambda leaf: tuple(names.get(id(leaf), ())))
    return replace(
        log.attribute(captured),
        registered=tuple(
            Registered(tuple(names[key]), tuple(param.shape), param.requires_grad)
            for key, param in params.items()
        ),
    )


def architecture(name: str, **options: Any) -> CapturedGraph:
    """The graph of one of the architectures among the examples."""
    path = Path(__file__).parents[2] / "examples" / "architectures.py"
    return captured_forward(*runpy.run_path(str(path))[name](**options))
