"""Compares two graphs: two steps of a run, or two runs.

Calls of modules are compared by their path and by which call of that module it is; what is done in
one call of a module is aligned by the names of its operations. What is the same in both is then
known, and each operation that is in both can be asked whether it gives and takes the same.
"""

from __future__ import annotations

import difflib
from collections import Counter
from typing import TYPE_CHECKING, Final

import numpy as np

from gradscope.graphs.compared_graph import (
    ONE_SIDED,
    REACHED,
    ComparedGraph,
    matched_parameters,
    told_with,
)
from gradscope.graphs.difference import Change, GraphDifference
from gradscope.graphs.fingerprint import fingerprint
from gradscope.graphs.likeness import without_numbers
from gradscope.graphs.wording import counted, operation_name, shape_text

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    from gradscope.graphs.compared_graph import Call, Key, Matched, Parameter
    from gradscope.graphs.difference import How, Kind
    from gradscope.run.captured_graph import CapturedGraph, LongIntegers

_ALIGNED_AT_MOST: Final = 2_000
"""Operations of one call, on either side, that are aligned one by one; more are only counted."""

_MOST_WORK: Final = 10_000_000
"""Pairs of equal operations that aligning looks at, in all calls together: two seconds. Thousands
of operations of two or three kinds would take difflib minutes."""

# What a node of one graph corresponds to in the other one, if to no node.
_GONE, _UNSURE = -1, -2

_NO_CALL: Final = -1
_PROGRAM: Final = "the program"


def difference(before: CapturedGraph, after: CapturedGraph) -> GraphDifference:
    """Compare two graphs.

    Told are operations, parameters and calls of modules that are in one graph only; operations in
    both whose outputs or inputs differ; parameters and modules that lead to the loss in one graph
    only, or are frozen in one only; names that a parameter has gained or lost. Calls of modules
    that differ as a whole are told as such, without what is inside. An input is not told where
    what gave it before has vanished and what gives it now has appeared.

    Equal are graphs with equal :func:`~gradscope.graphs.fingerprint.fingerprint`, if parameters and
    module calls that do not lead to the loss are equal, too.

    Args:
        before: the first graph.
        after: the second one.
    """
    sides = ComparedGraph(before), ComparedGraph(after)
    is_same = fingerprint(before) == fingerprint(after)
    if is_same and before.registered == after.registered and sides[0].calls == sides[1].calls:
        return GraphDifference(())
    comparison = _Comparison(*sides)
    comparison.compare()
    changes = comparison.changes()
    if not is_same and not changes:
        # Operations that are only counted may be wired in another way.
        comparison.tell("changed", "operation", "inputs", "some wiring", "another")
        changes = comparison.changes()
    return GraphDifference(changes)


class _Comparison:
    """Compares two graphs, part by part, and collects what is told.

    What there is once for each graph lies in pairs: before, after.
    """

    def __init__(self, before: ComparedGraph, after: ComparedGraph) -> None:
        self._sides = before, after
        self._graphs = graphs = before.captured, after.captured
        self._with_calls = bool(before.calls and after.calls)
        self._by_call = [side.by_call(with_calls=self._with_calls) for side in self._sides]
        ops = {op: i for i, op in enumerate(dict.fromkeys(graphs[0].ops + graphs[1].ops))}
        alike = Counter(map(operation_name, ops))
        self._names = [op if alike[name := operation_name(op)] > 1 else name for op in ops]
        self._op = [np.array([ops[op] for op in g.ops], np.int64)[g.op] for g in graphs]
        self._outputs = list(dict.fromkeys(graphs[0].outputs + graphs[1].outputs))
        outputs = {each: i for i, each in enumerate(self._outputs)}
        self._output = [
            np.array([outputs[each] for each in g.outputs], np.int64)[g.output] for g in graphs
        ]
        self._first_input = [np.searchsorted(g.target, np.arange(len(g) + 1)) for g in graphs]
        # For each node of one graph the node of the other.
        self._partner = [np.full(len(graph), _GONE, np.int64) for graph in graphs]
        # Paths of modules that are told as a whole, and which way: lost or gained.
        self._whole: set[tuple[str, How]] = set()
        self._work_left = float(_MOST_WORK)
        self._numbers: tuple[dict[int, int], dict[int, int]] = {}, {}
        self._told: dict[tuple[How, str, Kind, str, str, str, str, Hashable], list[int]] = {}

    def compare(self) -> None:
        """Find everything."""
        matched = matched_parameters(self._sides[0].parameters(), self._sides[1].parameters())
        if self._with_calls:
            self._compare_modules(matched)
        aligned = self._align()
        for old, new in matched:
            self._join(old.nodes if old else (), new.nodes if new else ())
        self._match_unnamed(*aligned)
        self._compare_inputs(*aligned)
        self._compare_roots()
        for old, new in matched:
            self._compare_parameters(old, new)

    def tell(
        self,
        how: How,
        kind: Kind,
        what: str,
        before: str = "",
        after: str = "",
        *,
        at: Key | str = None,
        n: int = 1,
        weight: int = 1,
        likeness: Hashable = None,
    ) -> None:
        """Take down a difference, to be described as in :class:`Change`.

        The module is given by one of its calls or by its path. A ``likeness`` stands for ``what``,
        ``before`` and ``after`` where these have in them numbers that differ between modules.
        """
        path = at if isinstance(at, str) else at[0] if at else ""
        owner = path or (_PROGRAM if at is None else self._class_of_model())
        like = (how, without_numbers(owner), kind, likeness or (what, before, after))
        told = self._told.setdefault((how, path, kind, what, before, after, owner, like), [0, 0])
        told[0] += n
        told[1] += weight

    def changes(self) -> list[Change]:
        """Return what was told."""
        return [
            Change(how, path, kind, what, n, before, after, owner, weight, like)
            for (how, path, kind, what, before, after, owner, like), (n, weight) in (
                self._told.items()
            )
        ]

    def _class_of_model(self) -> str:
        kinds = [each.kind for side in self._sides for each in side.calls if not each.path]
        return kinds[-1] if kinds else "the model"

    # -- modules ----------------------------------------------------------------------------------

    def _compare_modules(self, matched: list[Matched]) -> None:
        before, after = self._sides
        # (how, path, what, before, after) → numbers of the calls, and their operations
        told: dict[tuple[How, str, str, str, str], list[tuple[int, int]]] = {}
        n_params = Counter(each for pair in matched for each in told_with(*pair))

        def note(how: How, call: Call, n: int, before: str = "", after: str = "") -> None:
            what = f"{call.kind}, {counted(n, 'operation')}"
            way: How = "appeared" if how == "appeared" or after == REACHED else "vanished"
            if (call.path, way) in self._whole and n_params[call.path, way]:
                what += f", {counted(n_params[call.path, way], 'parameter')}"
            told.setdefault((how, call.path, what, before, after), []).append((call.number, n))

        both = (before, after), (after, before)
        for (side, other), how in zip(both, ONE_SIDED, strict=True):
            is_gone: list[bool] = []
            for call, parent in zip(side.calls, side.parents, strict=True):
                is_gone.append((call.path, call.number) not in other.call_of)
                if call.path not in other.paths:
                    self._whole.add((call.path, how))
                if is_gone[-1] and not (parent >= 0 and is_gone[parent]):
                    note(how, call, int(side.n_reached[len(is_gone) - 1]))
        has_changed: list[bool] = []
        for old, parent in zip(before.calls, before.parents, strict=True):
            at = after.call_of.get((old.path, old.number))
            new = old if at is None else after.calls[at]
            has_changed.append(old.state != new.state)
            if old.kind != new.kind:
                self.tell("changed", "module", "class", old.kind, new.kind, at=old.path)
            if at is not None and has_changed[-1]:
                if (old.state == REACHED) != (new.state == REACHED):
                    self._whole.add((old.path, ONE_SIDED[new.state == REACHED]))
                if not (parent >= 0 and has_changed[parent]):
                    n = int(max(before.n_reached[len(has_changed) - 1], after.n_reached[at]))
                    note("changed", old, n, old.state, new.state)
        for (how, path, what, was, now), calls in told.items():
            numbers = [number + 1 for number, _ in calls]
            if path in before.paths and path in after.paths and max(numbers) > 1:
                what += f", call {numbers[0]:,}"
                what += f" … {numbers[-1]:,}" if len(numbers) > 1 else ""
            weight = sum(max(n, 1) for _, n in calls)
            self.tell(how, "module", what, was, now, at=path, n=len(calls), weight=weight)

    # -- operations -------------------------------------------------------------------------------

    def _align(self) -> tuple[LongIntegers, LongIntegers]:
        """Find which operations correspond to each other, and compare what they give.

        Returns:
            int64[k] twice, nodes of the first graph and their partners in the second one.
        """
        nothing = np.zeros(0, np.int64)
        aligned = [(nothing, nothing)]
        for key in dict.fromkeys([*self._by_call[0], *self._by_call[1]]):
            if key is None or self._is_reached_in_both(key):
                old, new = (by_call.get(key, nothing) for by_call in self._by_call)
                for pair in self._align_call(key, old, new):
                    self._compare_outputs(key, *pair)
                    aligned.append(pair)
        old, new = (np.concatenate(nodes) for nodes in zip(*aligned, strict=True))
        self._join(old, new)
        return old, new

    def _is_reached_in_both(self, key: tuple[str, int]) -> bool:
        calls = [side.call_of.get(key, _NO_CALL) for side in self._sides]
        return all(
            call != _NO_CALL and side.calls[call].state == REACHED
            for call, side in zip(calls, self._sides, strict=True)
        )

    def _align_call(
        self, key: Key, old: LongIntegers, new: LongIntegers
    ) -> Iterator[tuple[LongIntegers, LongIntegers]]:
        """Yield equally many nodes of each graph that correspond to each other; tell the others."""
        n_first = _n_alike(self._op[0][old], self._op[1][new])
        yield old[:n_first], new[:n_first]
        old, new = old[n_first:], new[n_first:]
        n_last = _n_alike(self._op[0][old][::-1], self._op[1][new][::-1])
        yield old[len(old) - n_last :], new[len(new) - n_last :]
        old, new = old[: len(old) - n_last], new[: len(new) - n_last]
        matcher = _Matcher(self._op[0][old], self._op[1][new], self._work_left)
        is_small = max(len(old), len(new)) <= _ALIGNED_AT_MOST
        opcodes = matcher.get_opcodes() if is_small else []
        self._work_left = matcher.work_left
        if not is_small or matcher.work_left < 0:
            self._count(key, old, new)
            return
        for tag, i, i_end, j, j_end in opcodes:
            if tag == "equal":
                yield old[i:i_end], new[j:j_end]
            else:
                self._tell_operations("vanished", key, 0, old[i:i_end])
                self._tell_operations("appeared", key, 1, new[j:j_end])

    def _count(self, key: Key, old: LongIntegers, new: LongIntegers) -> None:
        """Compare many operations by how many there are of each kind."""
        self._partner[0][old] = _UNSURE
        self._partner[1][new] = _UNSURE
        ops, others = self._op[0][old], self._op[1][new]
        for op in np.union1d(ops, others).tolist():
            these, those = old[ops == op], new[others == op]
            if len(these) == len(those):
                self._compare_outputs(key, these, those)
            self._tell_operations("vanished", key, 0, these[len(those) :])
            self._tell_operations("appeared", key, 1, those[len(these) :])

    def _tell_operations(self, how: How, key: Key, side: int, nodes: LongIntegers) -> None:
        for node in nodes.tolist():
            shapes = self._outputs[self._output[side][node]].shapes
            what = f"{self._name(side, node)} {', '.join(map(shape_text, shapes))}".rstrip()
            self.tell(how, "operation", what, at=key)

    def _compare_outputs(self, key: Key, old: LongIntegers, new: LongIntegers) -> None:
        differs = self._output[0][old] != self._output[1][new]
        for node, other in zip(old[differs].tolist(), new[differs].tolist(), strict=True):
            was, now = (
                self._outputs[output[n]]
                for output, n in zip(self._output, (node, other), strict=True)
            )
            name = self._name(1, other)
            for what, each, others in (
                ("output", [*map(shape_text, was.shapes)], [*map(shape_text, now.shapes)]),
                ("dtype", was.dtypes, now.dtypes),
            ):
                if len(each) != len(others):
                    n_each, n_others = str(len(each)), str(len(others))
                    self.tell("changed", "operation", f"{name}: {what}s", n_each, n_others, at=key)
                    continue
                for i, (a, b) in enumerate(zip(each, others, strict=True)):
                    if a != b:
                        which = f"{what} {i + 1}" if len(each) > 1 else what
                        self.tell("changed", "operation", f"{name}: {which}", a, b, at=key)

    def _join(self, old: Sequence[int] | LongIntegers, new: Sequence[int] | LongIntegers) -> None:
        """Note that nodes correspond to each other, as many as there are on both sides."""
        n = min(len(old), len(new))
        nodes, others = np.asarray(old[:n], np.int64), np.asarray(new[:n], np.int64)
        self._partner[0][nodes] = others
        self._partner[1][others] = nodes

    # -- edges ------------------------------------------------------------------------------------

    def _match_unnamed(self, old: LongIntegers, new: LongIntegers) -> None:
        """Find which leaves without names correspond to each other: those that are used alike."""
        unnamed = [
            (g.param >= 0) & ~np.array([*map(bool, g.params), True])[g.param] for g in self._graphs
        ]
        _, _, edges, others = self._inputs(old, new)
        used = [g.source[e] for g, e in zip(self._graphs, (edges, others), strict=True)]
        both = unnamed[0][used[0]] & unnamed[1][used[1]]
        how_often = Counter(zip(used[0][both].tolist(), used[1][both].tolist(), strict=True))

        def likeness(pair: tuple[int, int]) -> tuple[bool, int]:
            return self._output[0][pair[0]] == self._output[1][pair[1]], how_often[pair]

        for node, other in sorted(how_often, key=likeness, reverse=True):
            if self._partner[0][node] == _GONE and self._partner[1][other] == _GONE:
                self._join([node], [other])
        left = [
            np.flatnonzero(leaf & (partner == _GONE))
            for leaf, partner in zip(unnamed, self._partner, strict=True)
        ]
        by_output: dict[int, list[int]] = {}
        for other in left[1].tolist():
            by_output.setdefault(int(self._output[1][other]), []).append(other)
        for node in left[0].tolist():
            if by_output.get(int(self._output[0][node])):
                self._join([node], [by_output[int(self._output[0][node])].pop(0)])
        found = np.flatnonzero(unnamed[0] & (self._partner[0] >= 0))
        self._compare_outputs(None, found, self._partner[0][found])
        for side, how in enumerate(ONE_SIDED):
            gone = left[side][self._partner[side][left[side]] == _GONE]
            self._tell_operations(how, None, side, gone)

    def _inputs(
        self, old: LongIntegers, new: LongIntegers
    ) -> tuple[LongIntegers, LongIntegers, LongIntegers, LongIntegers]:
        """Line up the inputs of those pairs of nodes that have equally many.

        Returns:
            int64[i] four times, for each of these inputs: the number of its pair, which input of
            the nodes it is, its edge in the first graph and in the second one.
        """
        first, others = self._first_input[0][old], self._first_input[1][new]
        n_inputs = self._first_input[0][old + 1] - first
        pair = np.flatnonzero(n_inputs == self._first_input[1][new + 1] - others)
        n_inputs = n_inputs[pair]
        position = np.arange(n_inputs.sum()) - np.repeat(np.cumsum(n_inputs) - n_inputs, n_inputs)
        pair = np.repeat(pair, n_inputs)
        return pair, position, first[pair] + position, others[pair] + position

    def _compare_inputs(self, old: LongIntegers, new: LongIntegers) -> None:
        before, after = self._graphs
        pair, position, edge, other_edge = self._inputs(old, new)
        source, other = before.source[edge], after.source[other_edge]
        partner, other_partner = self._partner[0][source], self._partner[1][other]
        output, other_output = before.source_output[edge], after.source_output[other_edge]
        differs = (partner != other) | (output != other_output)
        differs &= (partner != _UNSURE) & (other_partner != _UNSURE)
        differs &= (partner != _GONE) | (other_partner != _GONE)
        for i in np.flatnonzero(differs).tolist():
            node, new_node = int(old[pair[i]]), int(new[pair[i]])
            was = self._giver(0, node, int(source[i]), int(output[i]))
            now = self._giver(1, new_node, int(other[i]), int(other_output[i]))
            if was == now:
                was = self._giver(0, node, int(source[i]), int(output[i]), exactly=True)
                now = self._giver(1, new_node, int(other[i]), int(other_output[i]), exactly=True)
                now += " (another one)" if was == now else ""
            self._tell_input(new_node, f"input {position[i] + 1}", was, now)
        n_inputs = [np.diff(first) for first in self._first_input]
        differs = n_inputs[0][old] != n_inputs[1][new]
        for node, other in zip(old[differs].tolist(), new[differs].tolist(), strict=True):
            lost, gained = self._lost(0, node, other), self._lost(1, other, node)
            if lost or gained:
                n, n_now = n_inputs[0][node], n_inputs[1][other]
                self._tell_input(other, "number of inputs", str(n), str(n_now))

    def _lost(self, side: int, node: int, other: int) -> bool:
        """Whether a node has inputs that its partner has not.

        Leaves that are in one graph only do not count: they are told by themselves.
        """
        has = Counter(self._given(1 - side, other))
        for source, output in self._given(side, node):
            partner = int(self._partner[side][source])
            if partner == _GONE and self._graphs[side].param[source] >= 0:
                continue
            if partner != _UNSURE and not has[partner, output]:
                return True
            has[partner, output] -= 1
        return False

    def _given(self, side: int, node: int) -> list[tuple[int, int]]:
        graph, first = self._graphs[side], self._first_input[side]
        edges = slice(int(first[node]), int(first[node + 1]))
        return [
            *zip(graph.source[edges].tolist(), graph.source_output[edges].tolist(), strict=True)
        ]

    def _tell_input(self, node: int, what: str, was: str, now: str) -> None:
        what = f"{self._name(1, node)}: {what}"
        likeness = (what, without_numbers(was), without_numbers(now))
        self.tell("changed", "operation", what, was, now, at=self._key(1, node), likeness=likeness)

    def _giver(self, side: int, node: int, source: int, output: int, exactly: bool = False) -> str:
        """What gives a node its input, in words."""
        graph = self._graphs[side]
        key, user = self._key(side, source), self._key(side, node)
        text = self._name(side, source)
        if graph.param[source] >= 0 and (names := graph.params[graph.param[source]]):
            text = names[0]
        if exactly:
            text += f" #{self._number(side, source)}"
        if len(graph.outputs_of(source).shapes) > 1 or output:
            text = f"output {output + 1} of {text}"
        if key is not None and key != user:
            path = key[0].removeprefix(f"{user[0]}." if user and user[0] else "")
            text += f" in {path or self._class_of_model()}"
            text += f", call {key[1] + 1}" if exactly else ""
        return f"from {text}"

    def _compare_roots(self) -> None:
        for side, answers in enumerate((("yes", "no"), ("no", "yes"))):
            roots = set(self._graphs[1 - side].roots.tolist())
            for node in dict.fromkeys(self._graphs[side].roots.tolist()):
                partner = int(self._partner[side][node])
                if partner not in roots and partner != _UNSURE and partner != _GONE:
                    what = f"{self._name(side, node)}: backward starts here"
                    self.tell("changed", "operation", what, *answers, at=self._key(side, node))

    def _key(self, side: int, node: int) -> Key:
        call = int(self._graphs[side].call[node]) if self._with_calls else _NO_CALL
        return self._sides[side].key(call)

    def _name(self, side: int, node: int) -> str:
        is_leaf = self._graphs[side].param[node] >= 0
        return "leaf tensor" if is_leaf else self._names[self._op[side][node]]

    def _number(self, side: int, node: int) -> int:
        """Which operation of its name it is in its call, or which leaf, from 1 on."""
        numbers = self._numbers[side]
        if not numbers:
            for nodes in self._by_call[side].values():
                how_often = Counter[int]()
                for each, op in zip(nodes.tolist(), self._op[side][nodes].tolist(), strict=True):
                    how_often[op] += 1
                    numbers[each] = how_often[op]
        return numbers.get(node, int(self._graphs[side].param[node]) + 1)

    # -- parameters -------------------------------------------------------------------------------

    def _compare_parameters(self, old: Parameter | None, new: Parameter | None) -> None:
        some = new or old
        if some is None or told_with(old, new) & self._whole:
            return
        name = some.names[0].rpartition(".")
        if old is None or new is None:
            # Whoever knows no model does not know what it has besides.
            knows = self._graphs[old is not None].registered
            if some.state == REACHED or knows:
                how = ONE_SIDED[old is None]
                what = f"{name[2]} {shape_text(some.shape)}"
                what += "" if some.state == REACHED else f", {some.state}"
                self.tell(how, "parameter", what, at=name[0])
            return
        for what, was, now in (
            ("", old.state, new.state),
            (": names", " = ".join(sorted(old.names)), " = ".join(sorted(new.names))),
            (": shape", shape_text(old.shape), shape_text(new.shape)),
            (": dtype", self._dtype(0, old), self._dtype(1, new)),
        ):
            if was != now and (was and now):
                like = (
                    (what, without_numbers(was), without_numbers(now)) if "name" in what else None
                )
                self.tell(
                    "changed", "parameter", name[2] + what, was, now, at=name[0], likeness=like
                )

    def _dtype(self, side: int, parameter: Parameter) -> str:
        outputs = [self._graphs[side].outputs_of(node) for node in parameter.nodes]
        return ", ".join(dict.fromkeys(dtype for each in outputs for dtype in each.dtypes))


class _Matcher(difflib.SequenceMatcher[int]):
    """Aligns operations until it has done enough; then ``work_left`` is negative."""

    def __init__(self, ops: LongIntegers, others: LongIntegers, work_left: float) -> None:
        super().__init__(None, ops.tolist(), others.tolist(), autojunk=False)
        _, n_each = np.unique(others, return_counts=True)
        self._pairs_per_cell = (n_each**2).sum() / max(len(others), 1) ** 2
        self._lengths = len(ops), len(others)
        self.work_left = work_left

    def find_longest_match(
        self, alo: int = 0, ahi: int | None = None, blo: int = 0, bhi: int | None = None
    ) -> difflib.Match:
        """Find a stretch that is the same in both; none when enough has been done."""
        n_old = (self._lengths[0] if ahi is None else ahi) - alo
        n_new = (self._lengths[1] if bhi is None else bhi) - blo
        self.work_left -= n_old * n_new * self._pairs_per_cell
        if self.work_left < 0:
            return difflib.Match(alo, blo, 0)
        return super().find_longest_match(alo, ahi, blo, bhi)


def _n_alike(ops: LongIntegers, others: LongIntegers) -> int:
    """Return how many elements at the beginning are equal."""
    n = min(len(ops), len(others))
    differs = np.flatnonzero(ops[:n] != others[:n])
    return int(differs[0]) if len(differs) else n
