"""Small trainings under watch, what they leave behind, and what no fault may change of it.

Run as a program, it lets gradscope fail at one point after the other and writes down what broke::

    python tests/contract/fault_programs.py --share 8
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

TESTED = os.environ.get("GRADSCOPE_TESTED", str(Path(__file__).parents[2]))
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), TESTED]
import fault_points  # noqa: E402

if __name__ == "__main__":
    fault_points.install()

import argparse  # noqa: E402
import contextlib  # noqa: E402
import faulthandler  # noqa: E402
import gc  # noqa: E402
import io  # noqa: E402
import math  # noqa: E402
import re  # noqa: E402
import shutil  # noqa: E402
import tempfile  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
import warnings  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
import torch._dynamo  # noqa: E402
from fault_loops import cut_loss, everything_at_once, odd_kinds, plain  # noqa: E402
from fault_points import FAULTS, POINTS, Point  # noqa: E402
from traces import clean_up, snapshot  # noqa: E402
from twins import Training, everything_of  # noqa: E402

import gradscope  # noqa: E402
from gradscope.config import WatchOptions  # noqa: E402
from gradscope.errors import GradscopeError, GradscopeWarning  # noqa: E402
from gradscope.run.columns import MISSING  # noqa: E402
from gradscope.run.schema import TABLES, Kind  # noqa: E402
from gradscope.scope import Scope  # noqa: E402
from gradscope.session import session as session_module  # noqa: E402
from gradscope.session.session import Session  # noqa: E402
from gradscope.session.step_limit import StepLimit  # noqa: E402
from gradscope.taps.module_calls import module_calls  # noqa: E402

N_STEPS = 5
FOREVER = 10**9


# -- scenarios ------------------------------------------------------------------------------


@dataclass
class Scenario:
    """A training, and how it is watched.

    Attributes:
        make: makes the training.
        watch: returns a scope that does not watch yet, given an empty folder.
        during: called after each step of the loop.
        whole: the same without what takes something away from the recording.
    """

    name: str
    make: Callable[[], Training]
    watch: Callable[[Training, Path], Scope]
    n_steps: int = N_STEPS
    during: Callable[[Scope, int], None] = lambda scope, number: None
    whole: Scenario | None = None


def _all_taps(training: Training, folder: Path) -> Scope:
    return gradscope.watch(training.models, training.optimizers, keep="*", every=2, graph="changed")


def _saved(training: Training, folder: Path) -> Scope:
    return gradscope.watch(
        training.models,
        training.optimizers,
        save=folder / "run",
        keep="*.weight",
        keep_steps=2,
        every=2,
        on_finding="warn",
        total_steps=12,
    )


def _thin(scope: Scope, number: int) -> None:
    """What otherwise takes thousands of steps and some seconds."""
    if scope._session is None:
        return
    saving = scope._session._saving
    writer = None if saving is None else saving._writer
    if number == 5 and writer is not None and writer._thread is not None:
        flushes = writer.n_flushes
        writer._wake.set()
        ends = time.monotonic() + 1
        while writer.n_flushes == flushes and writer.failure is None and time.monotonic() < ends:
            time.sleep(0.002)
    if number == 7:
        scope._recording.most_row_bytes = 6_000
        scope._session._guarded("ledger", scope._recording.forget_rows)


def _discovered(training: Training, folder: Path) -> Scope:
    session = Session(WatchOptions(every=2), discovers=True)
    return Scope(session)


def _limited(training: Training, folder: Path) -> Scope:
    session = Session(WatchOptions(every=2), discovers=True)
    scope = Scope(session)
    start = scope.start

    def start_both() -> Scope:
        start()
        StepLimit(session, 3).start()
        return scope

    scope.start = start_both  # type: ignore[method-assign]
    return scope


def _with_pauses(training: Training, folder: Path) -> Scope:
    return gradscope.watch(
        training.models, training.optimizers, every=2, graph=None, on_finding=lambda finding: None
    )


def _pause(scope: Scope, number: int) -> None:
    if number == 1:
        scope.pause()
    elif number == 2:
        scope.resume()
    elif number == 3:
        scope.stop()
        scope.start()


def _every(training: Training, folder: Path) -> Scope:
    return gradscope.watch(training.models, training.optimizers, every=1, graph="every", keep="*")


SCENARIOS = {
    each.name: each
    for each in (
        Scenario("all taps", everything_at_once, _all_taps),
        Scenario("saved", plain, _saved, 10, _thin, Scenario("not thinned", plain, _saved, 10)),
        Scenario("discovered", everything_at_once, _discovered),
        Scenario("limited", plain, _limited, whole=Scenario("to the end", plain, _discovered)),
        Scenario("paused", plain, _with_pauses, N_STEPS, _pause),
        Scenario("cut", cut_loss, _every, 2),
        Scenario("odd kinds", odd_kinds, _every, 3),
    )
}


# -- what a training leaves behind ----------------------------------------------------------


@dataclass
class Left:
    """What a watched training leaves behind."""

    result: dict[str, bytes]
    tables: dict[str, list[dict[str, Any]]]
    told: list[str]
    others: list[str]
    notes: list[str]
    traces: list[str]
    raised: str = ""
    n_raised: int = 0
    scope: Any = None
    findings: set[str] = field(default_factory=set)
    trouble: list[str] = field(default_factory=list)


def run(scenario: Scenario, folder: Path, fault: tuple[Any, ...] | None = None) -> Left:
    """Train under watch, with a fault in it."""
    training = scenario.make()
    before = snapshot(training.models, training.optimizers)
    seen: list[torch.Tensor] = []
    raised, scope = "", None
    out, unraisable = io.StringIO(), []
    hook, thread_hook = sys.unraisablehook, threading.excepthook
    sys.unraisablehook = lambda found: unraisable.append(f"unraisable: {found.exc_value!r}")
    threading.excepthook = lambda found: unraisable.append(f"thread: {found.exc_value!r}")
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stderr(out):
        warnings.simplefilter("always")
        if fault is not None:
            fault_points.fail_at(*fault)
        try:
            scope = scenario.watch(training, folder)
            with scope:
                for number in range(scenario.n_steps):
                    seen += training.step(number)
                    scenario.during(scope, number)
        except BaseException as error:
            raised = "".join(traceback.format_exception(error)[-4:])
        n_raised = fault_points.end_of_faults() if fault is not None else 0
    sys.unraisablehook, threading.excepthook = hook, thread_hook
    after = snapshot(training.models, training.optimizers)
    traces = after.differences_from(before)
    traces += [f"listener of {type(tap).__name__}" for tap in _taps() if tap.listeners]
    clean_up()
    traces += _held_locks(scope)
    told = [str(w.message) for w in caught if isinstance(w.message, GradscopeWarning)]
    others = [str(w.message) for w in caught if not isinstance(w.message, GradscopeWarning)]
    return Left(
        everything_of(training, seen),
        {} if scope is None else tables_of(scope._recording),
        told,
        others + unraisable + [line for line in out.getvalue().splitlines() if line],
        [] if scope is None else list(scope._recording.notes),
        traces,
        raised,
        n_raised,
        scope,
    )


def _taps() -> list[Any]:
    return [
        *session_module._TAPS,
        session_module.optimizer_creation,
        session_module.module_creation,
        module_calls,
    ]


def _held_locks(scope: Any) -> list[str]:
    locks = {f"lock of {type(tap).__name__}": tap._lock for tap in _taps()}
    if scope is not None:
        locks["lock of the recording"] = scope._recording.lock
        session = scope._session
        if session is not None:
            locks["lock of the session"] = session._lock
            writer = None if session._saving is None else session._saving._writer
            if writer is not None:
                locks["lock of the writer"] = writer._flushing
    held: list[str] = []

    def look() -> None:  # another thread: the locks may be re-entered by the one that holds them
        for name, lock in locks.items():
            if lock.acquire(blocking=False):
                lock.release()
            else:
                held.append(name)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return held


_TIMES = re.compile(r".*_ms|time|seconds")


def tables_of(recording: Any) -> dict[str, list[dict[str, Any]]]:
    """All rows of a recording as plain values, without what a clock has told."""
    found = {}
    for name, table in TABLES.items():
        rows = recording.made_now(name) if name in ("params", "models") else recording.rows(name)
        columns = {}
        for column in table.columns:
            if _TIMES.fullmatch(column.name):
                continue
            is_text = column.kind is Kind.TEXT
            values = rows.texts(column.name) if is_text else rows.array(column.name)
            columns[column.name] = values.tolist()
        found[name] = [
            dict(zip(columns, values, strict=True))
            for values in zip(*columns.values(), strict=True)
        ]
    return found


def _is_missing(value: Any) -> bool:
    return value == "" or value == MISSING or value == -1 or _is_nan(value)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _same(one: Any, other: Any) -> bool:
    return one == other or (_is_nan(one) and _is_nan(other))


KEYS = {
    "params": ("param",),
    "models": ("model",),
    "steps": ("step",),
    "groups": ("step", "optimizer", "group"),
    "grads": ("step", "param"),
    "state": ("step", "param", "when", "key"),
    "moments": ("step", "param"),
    "updates": ("step", "param"),
    "backwards": ("backward",),
}
_NOT_COUNTED = {"nonfinite", "scaled", "n_alive"}
OURS = {"instrument_failed", "armed"}
_OF_THE_END = {"watch_stopped", "watch_started", "paused", "resumed"}
"""Events whose step is how many had ended by then."""


Rows = dict[str, list[dict[str, Any]]]


def differences(healthy: Rows, whole: Rows, faulty: Rows) -> tuple[Counter[str], Counter[str]]:
    """What is missing of a healthy recording, and what is wrong in a faulty one, by column.

    Args:
        healthy: what the healthy recording holds.
        whole: the same, and what it has forgotten because it was too much.
        faulty: what a faulty one holds.
    """
    missing: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    for table, rows in healthy.items():
        found = faulty.get(table, [])
        if rows == found:
            continue
        if table in KEYS:
            known = {tuple(row[key] for key in KEYS[table]) for row in rows}
            expected = {tuple(row[key] for key in KEYS[table]): row for row in whole[table]}
            there = {tuple(row[key] for key in KEYS[table]): row for row in found}
            missing[table] += len(known - there.keys())
            wrong[table] += len(there.keys() - expected.keys())
            for key in expected.keys() & there.keys():
                for column, value in there[key].items():
                    if not _same(value, expected[key][column]):
                        is_missing = _is_missing(value) or (column in _NOT_COUNTED and not value)
                        kind = missing if is_missing else wrong
                        kind[f"{table}.{column}"] += 1
        else:
            left = Counter(_frozen(row) for row in rows)
            others = Counter(_frozen(row) for row in found if row.get("event") not in OURS)
            missing[table] += sum((left - others).values())
            wrong[table] += sum((others - Counter(_frozen(row) for row in whole[table])).values())
    return +missing, +wrong


_SO_FAR = tuple(
    f"params.{name}"
    for name in (
        *("norm_last", "reached", "n_looks", "n_symmetric_looks"),
        *("module", "registered"),  # of models that are discovered
    )
)
"""Columns that tell what was seen by the end, which is less where the watch has ended early."""


_WITHOUT_CUTS = ("steps.order", "steps.graph_nodes", "backwards.ends_in_cut", "strangers")
"""Of a backward that reached nobody, where no cut was seen, nobody can tell whose it was."""


def strange_rows(healthy: list[dict[str, Any]], faulty: list[dict[str, Any]]) -> list[str]:
    """Rows that a healthy recording has not, each with the one most like it."""
    known = {_frozen(row) for row in healthy}
    said = []
    for row in faulty:
        if _frozen(row) in known:
            continue
        unlike = [{k: v for k, v in row.items() if not _same(v, other[k])} for other in healthy]
        likest = min(range(len(unlike)), key=lambda n: len(unlike[n]), default=None)
        if likest is None:
            said.append(f"    {row}")
        else:
            there = {k: healthy[likest][k] for k in unlike[likest]}
            where = {k: row[k] for k in ("step", "event", "param") if k in row}
            said.append(f"    {where}: {unlike[likest]} for {there}")
    return said


def _frozen(row: dict[str, Any]) -> str:
    if row.get("event") in _OF_THE_END:
        row = {**row, "step": -1}
    return repr(sorted(row.items()))


# -- what must hold -------------------------------------------------------------------------


def empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


class Judge:
    """Says what a fault has broken that it may not break."""

    def __init__(self, scenario: Scenario, folder: Path, *, shows: bool) -> None:
        self.shows = shows
        self._scenario = scenario
        self._folder = folder
        training = scenario.make()
        self.unwatched = everything_of(
            training, [t for n in range(scenario.n_steps) for t in training.step(n)]
        )
        self.run_once()  # what torch and we import and make with the first use
        self.healthy = self.run_once()
        self.again = self.run_once()
        self.healthy.findings = findings_of(self.healthy.scope)
        self.whole = self.healthy.tables
        if scenario.whole is not None:
            self.whole = run(scenario.whole, empty(folder)).tables
        self._judged: dict[str, list[str]] = {}
        assert self.healthy.result == self.unwatched
        assert self.healthy.told == self.again.told
        missing, wrong = differences(self.healthy.tables, self.whole, self.again.tables)
        assert not missing, missing
        assert not wrong, wrong

    def run_once(self, fault: tuple[Any, ...] | None = None) -> Left:
        """Train once in an empty folder."""
        return run(self._scenario, empty(self._folder), fault)

    def reached(self) -> dict[int, int]:
        """How often the healthy run comes by each point."""
        with fault_points.noting() as reached:
            self.run_once()
        return dict(reached)

    def judge(self, left: Left) -> list[str]:
        """What a fault has broken that it may not break, in words."""
        broken = []
        if left.raised:
            broken.append(f"raised into the program: {left.raised}")
        if left.result != self.unwatched:
            names = [n for n in self.unwatched if left.result.get(n) != self.unwatched[n]]
            broken.append(f"training differs: {names[:4]}")
        if left.traces:
            broken.append(f"left behind: {left.traces[:4]}")
        if left.others:
            broken.append(f"said besides: {left.others[:4]}")
        if len(set(left.told)) != len(left.told):
            broken.append(f"told twice: {left.told}")
        new = [text for text in left.told if text not in self.healthy.told]
        for text in new:
            if not re.search(r"\[[a-z]+(-[a-z]+)+\]$", text):
                broken.append(f"without slug: {text}")
        if left.scope is None:
            return broken
        missing, wrong = differences(self.healthy.tables, self.whole, left.tables)
        for name in _SO_FAR if new else ():
            missing[name] += wrong.pop(name, 0)
        missing = +missing
        if any("graph_cut failed" in text for text in new):
            for name in _WITHOUT_CUTS:
                wrong.pop(name, None)
        if wrong:
            broken.append(f"wrong rows: {dict(wrong)}")
            for table in {name.partition(".")[0] for name in wrong}:
                broken += strange_rows(self.whole[table], left.tables[table])[:6]
        if missing and not new:
            broken.append(f"lost without a word: {dict(missing)}")
        of_the_watch = [text for text in new if "[on-finding-failed]" not in text]
        if of_the_watch and not any("broken on purpose" in note for note in left.notes):
            broken.append(f"told, not noted: {of_the_watch}")
        if not any("[watch-failed]" in text for text in new):
            for table in ("steps", "grads"):
                if missing[table]:
                    broken.append(f"{table} lost by {new}: {missing[table]}")
        if missing or wrong or new:
            content = repr(left.tables)
            if content not in self._judged:
                self._judged[content] = self._judged_findings(left)
            broken += self._judged[content]
        broken += self._judged_directory(left)
        return broken

    def _judged_findings(self, left: Left) -> list[str]:
        try:
            found = findings_of(left.scope) - {"GS901", "GS902"}
            if self.shows:
                str(left.scope)
        except Exception as error:
            return [f"cannot be shown: {traceback.format_exception(error)[-2:]}"]
        extra = found - self.healthy.findings
        return [f"says of a healthy loop: {sorted(extra)}"] if extra else []

    def _judged_directory(self, left: Left) -> list[str]:
        path = self._folder / "run"
        if not path.exists() or self._scenario.name != "saved":
            return []
        broken = []
        hidden = [str(p.relative_to(path)) for p in path.rglob(".*")]
        if hidden:
            broken.append(f"half-written: {hidden}")
        try:
            stored = gradscope.open(path)
        except GradscopeError as error:
            if not left.told:
                broken.append(f"cannot be opened: {error}")
            return broken
        try:
            rows = tables_of(stored._recording)
            missing, wrong = differences(self.healthy.tables, self.whole, rows)
            for name in _SO_FAR:
                del missing[name], wrong[name]
            new = [text for text in left.told if text not in self.healthy.told]
            if wrong:
                broken.append(f"wrong rows stored: {dict(wrong)}")
            if missing and not new:
                broken.append(f"not stored, without a word: {dict(missing)}")
            torn = [note for note in stored.notes if "cannot be read" in note]
            if torn:
                broken.append(f"torn: {torn}")
        except Exception as error:
            broken.append(f"cannot be read: {traceback.format_exception(error)[-2:]}")
        return broken


def findings_of(scope: Scope) -> set[str]:
    return {finding.code for finding in scope.findings if finding.severity.name != "INFO"}


def is_programs(point: Point) -> bool:
    """Whether a call is the program's own, which goes through a tap."""
    names = ("original", "func", "closure", "module._call_impl")
    return point.file.startswith("taps/") and point.callee in names


_OUTERMOST = {
    ("scope.py", f"self.{name}") for name in ("start", "_stop", "_paused", "_refuse_inside_hook")
}
"""Calls that begin and end everything: only a fault within them can be answered."""


_EMPTY_RECORDING = {"Recording.__init__", "Columns.__init__", "KeptTensors.__init__"}
"""Without an empty recording there is nothing that could be returned."""

_TAKES_OUT = re.compile(
    r".*\.(remove|disarm|close|stop|end|give_up|unregister|_take_out)|leave|take_out|_replace_all"
)
_TAKING_OUT = {"TorchFunctionTap._take_out", "_rebuild", "_replace_all"}
"""What takes a hook, a patch or a mode out is tried twice; it cannot fail for ever."""


def variants(point: Point, n_calls: int, *, all_of_them: bool) -> Iterator[tuple[Any, ...]]:
    """How a point fails: with which error, from which call on, and for how long."""
    digest = point.digest
    times = [(0, FOREVER), (0, 1), (n_calls // 2, FOREVER)]
    if point.function in _EMPTY_RECORDING:
        times = [(0, 1)] * 3
    if _TAKES_OUT.fullmatch(point.callee) or point.function in _TAKING_OUT:
        times = [(0, 1), (n_calls // 2, n_calls // 2 + 1), (0, 1)]
    if all_of_them:
        for error in fault_points.ERRORS:
            for first, last in times if n_calls > 1 else times[:1]:
                yield point.number, error, first, last
        return
    first, last = times[digest // 3 % 3] if n_calls > 1 else times[0]
    yield point.number, fault_points.ERRORS[digest % 3], first, last


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scenario", action="append")
    parser.add_argument("--share", type=int, default=1, help="one of so many points")
    parser.add_argument("--all", action="store_true", help="every error, every time")
    parser.add_argument("--point", default="", help="only points whose text has this in it")
    parser.add_argument("--kind", help="only calls into this: torch, files, threads, import ...")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--seconds", type=float, default=FOREVER)
    parser.add_argument("-v", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    report: dict[str, Any] = {"points": {}, "broken": [], "n_faults": 0}
    known: set[int] = set()
    done: set[int] = set()
    gc.disable()
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.scenario or SCENARIOS:
            judge = Judge(SCENARIOS[name], Path(folder) / "empty", shows=arguments.all)
            reached = judge.reached()
            known |= reached.keys()
            report["points"][name] = Counter(FAULTS.kinds[number] for number in reached)
            if arguments.count:
                continue
            n = 0
            for number in sorted(reached):
                point = POINTS[number]
                if number in done and not arguments.all:
                    continue  # an earlier training comes by, too
                if arguments.kind not in (None, FAULTS.kinds[number]) or is_programs(point):
                    continue
                if (point.file, point.callee) in _OUTERMOST:
                    continue
                done.add(number)
                if point.digest % arguments.share or arguments.point not in str(point):
                    continue
                if time.monotonic() - began > arguments.seconds:
                    break
                for fault in variants(point, reached[number], all_of_them=arguments.all):
                    faulthandler.dump_traceback_later(120, exit=True)
                    left = judge.run_once(fault)
                    broken = judge.judge(left)
                    faulthandler.cancel_dump_traceback_later()
                    n += 1
                    if n % 50 == 0:
                        gc.collect()
                    report["n_faults"] += left.n_raised > 0
                    if broken:
                        how = f"{fault[1].__name__} {fault[2]}..{fault[3]}"
                        report["broken"].append([name, str(point), how, broken])
                        print(f"[{name}] {point} ({how})")
                        for each in broken:
                            print("    ", each.replace("\n", "\n         "))
                    if left.traces:
                        sys.exit("what is left in torch would spoil all that follows")
                    if arguments.v:
                        print(point, fault, left.n_raised, left.told, left.notes)
            print(name, n, f"{time.monotonic() - began:.1f} s", flush=True)
    print({name: (sum(c.values()), dict(c)) for name, c in report["points"].items()})
    report["n_points"], report["n_calls"] = len(known), len(POINTS)
    report["by_kind"] = Counter(FAULTS.kinds[number] for number in known)
    print(f"{len(known)} points of {len(POINTS)} calls in the source: {dict(report['by_kind'])}")
    return fault_points.told(report, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
