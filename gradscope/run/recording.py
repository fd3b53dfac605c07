"""All tables of one training run, and who its parameters and optimizers are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from gradscope.run.captured_graph import CapturedGraph
from gradscope.run.columns import MISSING, Columns
from gradscope.run.kept_tensors import KeptTensors
from gradscope.run.schema import MODELS, PARAMS, TABLES
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


_MADE_WHEN_ASKED = ("params", "models")
"""Tables of what is known by now, and not of what happened."""

MOST_GRAPHS = 512
"""How many graphs are kept before every second one is forgotten."""


@dataclass(slots=True)
class ParameterEntry:
    """What is known of one parameter; its number is its place in :attr:`Recording.parameters`.

    Attributes:
        name: as ``model.named_parameters()`` gives it, with the model's own name in front where
            several models are watched; a place in ``optimizer.param_groups`` for one in no model.
        aliases: its other names, where modules share it.
        module: path of the holding module; ``""`` for the model itself or for none.
        module_type: class name of that module.
        in_model: whether a watched model has it registered.
        shape: its shape.
        dtype: its element type, without ``torch.``.
        device: where it lies.
        requires_grad: at the last look.
        requires_grad_changed: the step at which it was last seen to flip, or None.
        holders: (optimizer number, group number) of each optimizer that holds it.
        reached: whether any backward has written its gradient.
        norm_first: L2 norm of its values when it was first met; NaN if not read.
        norm_last: likewise when the watch ended.
        n_symmetric_looks: at how many closer looks all rows of its values were equal, and of its
            gradient too; of a recurrent layer's those of each gate.
        n_symmetric_columns_looks: likewise of the columns of a matrix.
        n_looks: at how many closer looks both were read.
        copy_of: number of the parameter whose very values it began with, or None.
    """

    name: str
    aliases: tuple[str, ...] = ()
    module: str = ""
    module_type: str = ""
    in_model: bool = True
    shape: tuple[int, ...] = ()
    dtype: str = ""
    device: str = ""
    requires_grad: bool = True
    requires_grad_changed: int | None = None
    holders: list[tuple[int, int]] = field(default_factory=list)
    reached: bool = False
    norm_first: float = math.nan
    norm_last: float = math.nan
    n_symmetric_looks: int = 0
    n_symmetric_columns_looks: int = 0
    n_looks: int = 0
    copy_of: int | None = None

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        product = 1
        for size in self.shape:
            product *= size
        return product


@dataclass(slots=True)
class OptimizerEntry:
    """What is known of one optimizer; its number is its place in :attr:`Recording.optimizers`.

    Attributes:
        name: as the program names it.
        kind: its class.
        n_groups: how many parameter groups it has.
        hyperparameters: names of the entries of its groups.
    """

    name: str
    kind: str
    n_groups: int = 0


@dataclass(slots=True)
class ModelEntry:
    """One watched model.

    Attributes:
        name: as the program names it.
        kind: its class.
        ineffective_freezes: attributes that look like a freeze and are none.
    """

    name: str
    kind: str
    ineffective_freezes: tuple[str, ...] = ()


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
    """

    def __init__(self) -> None:
        self.models: list[ModelEntry] = []
        self.optimizers: list[OptimizerEntry] = []
        self.parameters: list[ParameterEntry] = []
        self.graphs: dict[int, CapturedGraph] = {}
        self.tracked: dict[int, TrackedWeights] = {}
        self.kept = KeptTensors()
        self.seconds = 0.0
        self.observe_seconds: dict[str, float] = {}
        self.observe_calls: dict[str, int] = {}
        self.notes: list[str] = []
        self._n_reached = 0
        self._tracked_bytes = 0
        self._facts: tuple[Any, Any, Any] | None = None
        self._columns = {
            name: Columns(table) for name, table in TABLES.items() if name not in _MADE_WHEN_ASKED
        }
        self._frames: dict[str, tuple[Any, pd.DataFrame]] = {}

    def rows(self, table: str) -> Columns:
        """Return the stored rows of a table, to append to or to read as arrays."""
        return self._columns[table]

    def frame(self, table: str) -> pd.DataFrame:
        """Return a table as a DataFrame; changing it changes nothing that was recorded."""
        if table in _MADE_WHEN_ASKED:
            return self._params_frame() if table == "params" else self._models_frame()
        rows = self._columns[table]
        names = [parameter.name for parameter in self.parameters]
        optimizers = [optimizer.name for optimizer in self.optimizers]
        # Rules and views ask for the same tables many times between two steps.
        stamp = (rows.n_rows, tuple(optimizers), hash(tuple(names)))
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
        rows = self._columns[table]
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
        """How many attempts of an optimizer were recorded."""
        return self._columns["steps"].n_rows

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
        self.tracked[step] = weights
        self._tracked_bytes += weights.n_bytes
        if self._tracked_bytes > MOST_TRACKED_BYTES:
            for forgotten in list(self.tracked)[1:-1:2]:
                self._tracked_bytes -= self.tracked.pop(forgotten).n_bytes

    def keep_graph(self, step: int, graph: CapturedGraph) -> None:
        """Keep the graph of a step; their number is bounded, so old ones are thinned out."""
        self.graphs[step] = graph
        if len(self.graphs) > MOST_GRAPHS:
            for forgotten in list(self.graphs)[1:-1:2]:
                del self.graphs[forgotten]

    def numels_and_roundoffs(self, params: np.ndarray[Any, Any]) -> tuple[Any, Any]:
        """Return facts of some parameters that do not change, remembered for the same array.

        Returns:
            float64[n], how many numbers each holds, and float64[n], the unit roundoff of its dtype,
            NaN where there is none.
        """
        if self._facts is None or self._facts[0] is not params:
            entries = [self.parameters[param] for param in params.tolist()]
            numels = np.array([entry.numel for entry in entries], np.float64)
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
        steps = self._columns["steps"]
        if not steps.n_rows:
            return {}
        last = {
            name: float(steps.array(name)[-1])
            for name in ("step", "loss", "grad_norm", "step_ms", "observe_ms")
        }
        groups = self._columns["groups"]
        if groups.n_rows:
            last["lr"] = float(groups.array("lr")[-1])
        for name in ("update_norm", "weight_norm"):
            known = steps.array(name)
            known = known[~np.isnan(known)]
            if len(known):
                last[name] = float(known[-1])
        return last

    def _models_frame(self) -> pd.DataFrame:
        columns = Columns(MODELS)
        for model in self.models:
            columns.append(
                {
                    "model": model.name,
                    "kind": model.kind,
                    "ineffective_freezes": ", ".join(model.ineffective_freezes),
                }
            )
        return columns.frame([], [])

    def _params_frame(self) -> pd.DataFrame:
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
                }
            )
        return columns.frame([parameter.name for parameter in self.parameters], optimizers)
