"""All tables of one training run, and who its parameters and optimizers are."""

from __future__ import annotations

import os
import threading
import weakref
from collections import ChainMap
from collections.abc import Callable, Iterable, MutableMapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gradscope.run.captured_graph import CapturedGraph
from gradscope.run.columns import MISSING, Columns
from gradscope.run.entries import ModelEntry, OptimizerEntry, ParameterEntry
from gradscope.run.kept_tensors import KeptTensors
from gradscope.run.schema import MODELS, PARAMS, TABLES
from gradscope.run.thinning import MOST_ROW_BYTES, OF_STEPS, Thinning, is_of_thinning, thin
from gradscope.run.weight_step import TrackedWeights

if TYPE_CHECKING:
    import pandas as pd


_UNIT_ROUNDOFF = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "complex64": 2.0**-24,
    "complex128": 2.0**-53,
}

MOST_TRACKED_BYTES = 64 * 2**20
"""What the tracked weights of all steps may take before every second step is forgotten."""


MADE_WHEN_ASKED = ("params", "models")
"""Tables of what is known by now, and not of what happened."""

_CHECKED_EVERY = 64
"""After so many steps it is seen whether the rows still fit."""

_LONGEST_WAIT = 4096
"""A backward that no step has claimed after so many others counts as one that none will."""

_MOST_TIMED = 50
"""Of so many last steps the time is taken that the next ones are expected to take."""

MOST_GRAPHS = 512
"""How many graphs are kept before every second one is forgotten."""


class Recording:
    """Everything recorded of one run.

    Attributes:
        models, optimizers, parameters: who took part, by number.
        graphs: captured autograd graphs by step.
        tracked: a few weights of every parameter, by recorded step.
        kept: the tensors around chosen steps that the program asked for.
        seconds: how long the watch has lasted, pauses left out.
        observe_seconds: time spent by gradscope, by what it was spent on; each second once.
        observe_calls: how often, likewise.
        notes: what could not be observed, or failed, in plain words.
        is_unfinished: whether it is read from a directory without an end.
        total_steps: how many steps there will be in all, where the program has said so.
        lock: held while rows are forgotten or something is kept, and while a copy of what is new
            is taken away, which happens in another thread.
        settled: by table how many rows will not change any more; replaced as a whole.
        thinning: what of the tables was forgotten; None as long as memory holds every row.
        tracked_before: of the steps before this one, tracked weights of some were forgotten.
        most_row_bytes: what the rows may take before some are forgotten.
        before_thinning: called before rows are forgotten.
        rank_in_group, world_size: which of how many processes that train together this one is.
    """

    def __init__(self) -> None:
        self.models: list[ModelEntry] = []
        self.optimizers: list[OptimizerEntry] = []
        self.parameters: list[ParameterEntry] = []
        self.graphs: MutableMapping[int, CapturedGraph] = {}
        self.tracked: MutableMapping[int, TrackedWeights] = {}
        self.kept = KeptTensors()
        self.seconds = 0.0
        self.observe_seconds: dict[str, float] = {}
        self.observe_calls: dict[str, int] = {}
        self.notes: list[str] = []
        self.is_unfinished = False
        self.total_steps: int | None = None
        self.lock = threading.RLock()
        self.settled: dict[str, int] = {}
        self.thinning: Thinning | None = None
        self.most_row_bytes = MOST_ROW_BYTES
        self.before_thinning: Callable[[], None] = lambda: None
        self.tracked_before = 0
        self.rank_in_group, self.world_size = 0, 1
        self._ranks: dict[int, Recording] = {}
        self._memory: tuple[Any, dict[str, Any]] | None = None
        self._n_steps = 0
        self._n_reached = 0
        self._claims: list[tuple[int, int]] = []
        self._tracked_bytes = 0
        self._facts: tuple[Any, Any, Any] | None = None
        self._columns = {
            name: Columns(table) for name, table in TABLES.items() if name not in MADE_WHEN_ASKED
        }
        self._frames: dict[str, tuple[Any, pd.DataFrame]] = {}
        _recordings.add(self)

    @property
    def ranks(self) -> dict[int, Recording]:
        """This recording, and those of the other processes of its run, by rank."""
        return self._ranks or {0: self}

    def add_rank(self, rank: int, other: Recording) -> None:
        """Take in the recording of another process of the run."""
        if not self._ranks:
            self._ranks = {getattr(self, "rank", 0): self}
        self._ranks[rank] = other

    def rows(self, table: str) -> Columns:
        """Return the stored rows of a table, to append to or to read as arrays."""
        if table == "backwards" and self._claims:
            self._settle_claims()
        return self._columns[table]

    def unreadable(self, tables: Iterable[str]) -> tuple[str, ...]:
        """Return those of some tables of which a part lies in a file that cannot be read."""
        return ()

    def frame(self, table: str) -> pd.DataFrame:
        """Return a table as a DataFrame; changing it changes nothing that was recorded."""
        if table in MADE_WHEN_ASKED:
            names = [parameter.name for parameter in self.parameters]
            return self.made_now(table).frame(names, [])
        rows = self.rows(table)
        names = [parameter.name for parameter in self.parameters]
        optimizers = [optimizer.name for optimizer in self.optimizers]
        # Rules and views ask for the same tables many times between two steps.
        stamp = (rows.n_rows, self.n_steps, tuple(optimizers), hash(tuple(names)))
        known = self._frames.get(table)
        if known is None or known[0] != stamp:
            known = self._frames[table] = (stamp, rows.frame(names, optimizers))
        return known[1].copy()

    def rows_of(self, table: str, **wanted: int) -> pd.DataFrame:
        """Return the rows of a table in which columns have a value, without building all.

        Args:
            table: its name.
            wanted: value by column; steps, optimizers and parameters by their numbers.
        """
        rows = self.rows(table)
        is_wanted = np.ones(rows.n_rows, np.bool_)
        for name, value in wanted.items():
            is_wanted &= rows.array(name) == value
        return rows.frame(
            [parameter.name for parameter in self.parameters],
            [optimizer.name for optimizer in self.optimizers],
            np.flatnonzero(is_wanted),
        )

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table by its name."""
        return {name: self.frame(name) for name in TABLES}

    @property
    def n_steps(self) -> int:
        """How many attempts of an optimizer were recorded, those forgotten since included."""
        steps = self.rows("steps")
        return max(self._n_steps, int(steps.array("step")[-1]) + 1 if steps.n_rows else 0)

    def go_on(self, n_steps: int) -> None:
        """Count on from a number of steps that were recorded before."""
        self._n_steps = n_steps
        self._n_reached = sum(parameter.reached for parameter in self.parameters)

    def row_of_step(self, step: int) -> int | None:
        """Return the row of ``steps`` that is about a step; None if memory does not hold it."""
        steps = self.rows("steps").array("step")
        row = int(np.searchsorted(steps, step))
        return row if row < len(steps) and steps[row] == step else None

    def add_backward(self, values: dict[str, Any]) -> None:
        """Add a row to ``backwards``."""
        self._columns["backwards"].append(values)

    def claim_backward(self, backward: int, step: int) -> None:
        """Note the step that a backward belongs to, unless an earlier one has claimed it."""
        with self.lock:
            self._claims.append((backward, step))

    def _settle_claims(self) -> None:
        with self.lock:
            claims, self._claims = self._claims, []
            backwards = self._columns["backwards"]
            numbers, steps = backwards.array("backward"), backwards.array("step")
            for backward, step in claims:
                row = int(np.searchsorted(numbers, backward))
                if row < len(numbers) and numbers[row] == backward and steps[row] == MISSING:
                    backwards.set("step", row, step)

    def are_claimed(self, numbers: Iterable[int]) -> bool:
        """Whether every one of these backwards belongs to a step."""
        backwards = self.rows("backwards")
        unclaimed = backwards.array("backward")[backwards.array("step") == MISSING]
        return not np.isin(list(numbers), unclaimed).any()

    def steps_ended(self, first_open: int, n_steps: int = 1) -> None:
        """Note that all rows of some steps are there; forget some rows if they are too many.

        Args:
            first_open: number of the first backward that a later step may still claim.
            n_steps: how many steps have ended since the last time.
        """
        for columns in self._columns.values():
            columns.store()
        numbers = self.rows("backwards").array("backward")
        first_open = max(first_open, int(numbers[-1]) - _LONGEST_WAIT if len(numbers) else 0)
        settled = {table: self._columns[table].n_rows for table in OF_STEPS}
        settled["backwards"] = int(np.searchsorted(numbers, first_open))
        self.settled = settled
        checked, self._n_steps = self._n_steps // _CHECKED_EVERY, self._n_steps + n_steps
        if self._n_steps // _CHECKED_EVERY > checked:
            self.forget_rows()

    def forget_rows(self) -> None:
        """Forget the rows of some steps if all rows together take more than they may."""
        if sum(columns.n_bytes for columns in self._columns.values()) <= self.most_row_bytes:
            return
        self.before_thinning()
        with self.lock:
            unsettled = self.rows("backwards").n_rows - self.settled.get("backwards", 0)
            self.thinning = thin(self._columns, self.most_row_bytes, self.graphs, self.thinning)
            self.settled = {table: self._columns[table].n_rows for table in OF_STEPS}
            self.settled["backwards"] = max(0, self._columns["backwards"].n_rows - unsettled)
            self.notes[:] = [note for note in self.notes if not is_of_thinning(note)]
            self.notes.append(self.thinning.in_words())
            self._frames.clear()

    def reached(self, params: np.ndarray[Any, Any]) -> None:
        """Note that a backward has written the gradients of these parameters."""
        if self._n_reached == len(self.parameters):
            return  # the usual case, every step after the first
        for number in params.tolist():
            self.parameters[number].reached = True
        self._n_reached = sum(parameter.reached for parameter in self.parameters)

    def set_norms(self, when: str, norms: dict[int, float]) -> None:
        """Note norms of parameters by number, as ``norm_first`` or ``norm_last``."""
        for number, norm in norms.items():
            setattr(self.parameters[number], when, norm)

    def track(self, step: int, weights: TrackedWeights) -> None:
        """Keep the tracked weights of a step; memory is bounded, so old steps are thinned out."""
        with self.lock:
            self.tracked[step] = weights
            self._tracked_bytes += weights.n_bytes
            if self._tracked_bytes > MOST_TRACKED_BYTES:
                for forgotten in list(_own(self.tracked))[1:-1:2]:
                    self._tracked_bytes -= self.tracked.pop(forgotten).n_bytes
                self.tracked_before = step

    def keep_graph(self, step: int, graph: CapturedGraph) -> None:
        """Keep the graph of a step; their number is bounded, so old ones are thinned out."""
        with self.lock:
            self.graphs[step] = graph
            if len(_own(self.graphs)) > MOST_GRAPHS:
                for forgotten in list(_own(self.graphs))[1:-1:2]:
                    del self.graphs[forgotten]

    def memory(self) -> dict[str, Any] | None:
        """Return which steps memory holds, as plain data; None if nothing was forgotten."""
        if self.thinning is None and self.tracked_before == 0:
            return None
        stamp = (self.thinning, self.tracked_before)
        if self._memory is not None and self._memory[0] == stamp:
            return self._memory[1]
        memory = {
            "rows": None if self.thinning is None else self.thinning.as_plain(),
            "tracked_before": self.tracked_before,
            "tracked": [step for step in self.tracked if step < self.tracked_before],
        }
        self._memory = (stamp, memory)
        return memory

    def numels_and_roundoffs(self, params: np.ndarray[Any, Any]) -> tuple[Any, Any]:
        """Return facts of some parameters that do not change, remembered for the same array.

        Returns:
            float64[n], how many numbers of each this process holds, and float64[n], the unit
            roundoff of its dtype, NaN where there is none.
        """
        if self._facts is None or self._facts[0] is not params:
            entries = [self.parameters[param] for param in params.tolist()]
            held = [e.numel if e.n_local is None else e.n_local for e in entries]
            numels = np.array(held, np.float64)
            roundoffs = np.array([_UNIT_ROUNDOFF.get(entry.dtype, np.nan) for entry in entries])
            self._facts = (params, numels, roundoffs)
        return self._facts[1:]

    def spend(self, part: str, seconds: float) -> None:
        """Add to the time that watching took."""
        self.observe_seconds[part] = self.observe_seconds.get(part, 0.0) + seconds
        self.observe_calls[part] = self.observe_calls.get(part, 0) + 1

    def overhead(self, seconds: float) -> pd.DataFrame:
        """Return what watching cost, one row per instrument and a last one for all together.

        Args:
            seconds: how long it has been watched.
        """
        import pandas as pd

        spent = pd.Series(self.observe_seconds, dtype=float)
        calls = pd.Series(self.observe_calls, dtype=int)
        frame = pd.DataFrame({"calls": calls, "total_ms": 1e3 * spent})
        frame = frame.sort_values("total_ms", ascending=False)
        frame.loc["all"] = frame.sum()
        frame["calls"] = frame["calls"].astype(int)
        frame["ms_per_call"] = frame["total_ms"] / frame["calls"]
        frame["ms_per_step"] = frame["total_ms"] / max(1, self.n_steps)
        frame["share"] = frame["total_ms"] / (1e3 * seconds) if seconds else np.nan
        return frame.rename_axis("instrument")

    def latest(self) -> dict[str, float]:
        """Plain numbers of the last step; empty before the first."""
        steps = self.rows("steps")
        if not steps.n_rows:
            return {}
        last = {
            name: float(steps.array(name)[-1])
            for name in ("step", "loss", "grad_norm", "step_ms", "observe_ms")
        }
        groups = self.rows("groups")
        if groups.n_rows:
            last["lr"] = float(groups.array("lr")[-1])
        if self.total_steps is not None:
            last["progress"] = min(1.0, (last["step"] + 1) / self.total_steps)
            last["seconds_left"] = self._seconds_left(int(last["step"]) + 1)
        for name in ("update_norm", "weight_norm"):
            known = steps.array(name)
            known = known[~np.isnan(known)]
            if len(known):
                last[name] = float(known[-1])
        return last

    def _seconds_left(self, n_ended: int) -> float:
        """How long the steps that are still to come will take, if they take as long as the last."""
        steps = self.rows("steps")
        latest = slice(-_MOST_TIMED, None)
        # Each row's time is since the last step of the same optimizer.
        n_taking_turns = len(np.unique(steps.array("optimizer")[latest]))
        seconds = float(np.median(steps.array("step_ms")[latest])) / 1e3 / n_taking_turns
        return max(0, (self.total_steps or 0) - n_ended) * seconds

    def made_now(self, table: str) -> Columns:
        """Return the rows of ``params`` or ``models`` as of now."""
        return self._params_now() if table == "params" else self._models_now()

    def _models_now(self) -> Columns:
        columns = Columns(MODELS)
        for model in self.models:
            columns.append(
                {
                    "model": model.name,
                    "kind": model.kind,
                    "ineffective_freezes": ", ".join(model.ineffective_freezes),
                    "compiled": ", ".join(path or model.name for path in model.compiled),
                }
            )
        return columns

    def _params_now(self) -> Columns:
        columns = Columns(PARAMS)
        optimizers = [optimizer.name for optimizer in self.optimizers]
        for number, parameter in enumerate(self.parameters):
            flipped = parameter.requires_grad_changed
            columns.append(
                {
                    "param": number,
                    "module": parameter.module,
                    "module_type": parameter.module_type,
                    "shape": str(parameter.shape),
                    "numel": parameter.numel,
                    "dtype": parameter.dtype,
                    "device": parameter.device,
                    "requires_grad": parameter.requires_grad,
                    "requires_grad_changed": MISSING if flipped is None else flipped,
                    "optimizer": ", ".join(optimizers[holder] for holder, _ in parameter.holders),
                    "group": parameter.holders[0][1] if parameter.holders else MISSING,
                    "aliases": ", ".join(parameter.aliases),
                    "reached": parameter.reached,
                    "registered": parameter.in_model,
                    "norm_first": parameter.norm_first,
                    "norm_last": parameter.norm_last,
                    "n_symmetric_looks": parameter.n_symmetric_looks,
                    "n_symmetric_columns_looks": parameter.n_symmetric_columns_looks,
                    "n_looks": parameter.n_looks,
                    "copy_of": ""
                    if parameter.copy_of is None
                    else self.parameters[parameter.copy_of].name,
                    "replicas": ", ".join(map(str, parameter.replicas)),
                    "placements": parameter.placements,
                }
            )
        return columns


def _own(kept: MutableMapping[int, Any]) -> MutableMapping[int, Any]:
    """What is kept in memory, and not in the directory of a run that goes on."""
    return kept.maps[0] if isinstance(kept, ChainMap) else kept


_recordings: weakref.WeakSet[Recording] = weakref.WeakSet()


def _free_locks() -> None:
    """A child of this process has no thread that would ever give a lock back."""
    for recording in _recordings:
        recording.lock = threading.RLock()
        recording.before_thinning = lambda: None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_locks)
