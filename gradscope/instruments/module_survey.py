"""What every module call of one closer look was like, and what came out of it."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointFunction

from gradscope.instruments.graph_nodes import node_of
from gradscope.instruments.late import Known, Late, Numbers
from gradscope.instruments.nested_tensors import nested_tensors
from gradscope.instruments.tensor_summary import is_readable
from gradscope.taps.user_frame import Location, columns_of

MadeAt: TypeAlias = Callable[[nn.Module], Location | None]

_REENTRANT: CodeType = CheckpointFunction.forward.__code__

_ENDS = {"Sigmoid": (0.0, 1.0), "sigmoid": (0.0, 1.0), "Tanh": (-1.0, 1.0), "tanh": (-1.0, 1.0)}
_NEAR_AN_END = 1e-3

_ACTIVATIONS = frozenset(
    {"relu", "relu_", "relu6", "leaky_relu", "elu", "gelu", "silu", "hardtanh", "sigmoid", "tanh"}
)
"""Functions whose outputs are read like those of modules, where no module stands for them."""

_SETTINGS = (
    "momentum",
    "track_running_stats",
    "p",
    "dim",
    "reduction",
)

STATISTICS_LEARNT = "running_statistics=learnt"
"""What is added to the settings of a batch normalisation in evaluation mode, unless its statistics
are a mean of 0 and a variance of 1 throughout."""

_MOST_MODULES = 5000

_OF_UNKNOWN = "\0"
"""Between the class and the id of a module that belongs to no watched model."""


@dataclass(slots=True)
class _Called:
    """One module, over all of its calls."""

    module: weakref.ref[nn.Module]
    kind: str
    runs: int = 0
    training: bool = True
    with_grad: bool = False
    checkpointed: bool = False
    has_graph: bool = False
    batch_size: int | None = None
    values_per_channel: int | None = None
    settings: str = ""
    made: Location | None = None
    # Whether a batch normalisation in evaluation mode has statistics other than a new one has.
    learnt: Late[Any] = field(default_factory=lambda: Known(None))

    def add(self, other: _Called) -> None:
        """Take in another module that is called by the same name."""
        self.runs += other.runs
        self.training &= other.training
        self.with_grad |= other.with_grad
        self.checkpointed |= other.checkpointed
        self.has_graph |= other.has_graph


@dataclass(slots=True)
class _Given:
    module: str
    kind: str
    shape: str
    numbers: Late[Any] = field(default_factory=lambda: Known(None))


class ModuleSurvey:
    """Follows the module calls of one thread.

    A module has the name that it has at the end: the first call of a second model shows that there
    are several, and all paths begin with a model's name from then on.

    Args:
        paths: gives the path of each module of the models by its id.
        made_at: where a module was made, as far as that was seen.
    """

    def __init__(self, paths: Callable[[], Mapping[int, str]], made_at: MadeAt) -> None:
        self._paths_now = paths
        self._paths = paths()
        self._last_paths: Mapping[int, str] | None = None
        self._made_at = made_at
        self._called: dict[str, _Called] = {}
        self._given: list[_Given] = []
        self._open: list[tuple[int, str, str]] = []
        self._open_made: list[Location | None] = []

    @property
    def innermost(self) -> tuple[str, Location | None]:
        """Class of the innermost module that is running, and where it was made."""
        return (self._open[-1][2], self._open_made[-1]) if self._open else ("", None)

    @property
    def here(self) -> str:
        """Key of the innermost module that is running, for :meth:`path_of`; empty outside.

        That of a model that is alone is empty as well.
        """
        return self._open[-1][1] if self._open else ""

    @property
    def is_inside(self) -> bool:
        """Whether a module is running."""
        return bool(self._open)

    def module_started(self, module: nn.Module, args: Any) -> None:
        """Note the beginning of a call."""
        kind = type(module).__name__
        path = self._paths.get(id(module))
        if path is None:
            path = f"<{kind}>{_OF_UNKNOWN}{id(module)}"
        self._open.append((id(module), path, kind))
        self._open_made.append(self._made_at(module))
        called = self._called.get(path)
        if called is None:
            if len(self._called) >= _MOST_MODULES:
                return
            known = weakref.ref(module)
            called = self._called[path] = _Called(known, kind, settings=_settings_of(module))
            called.made = self._open_made[-1]
            if not module.training:
                called.learnt = _has_learnt(module)
        called.runs += 1
        called.training &= module.training
        if torch.is_grad_enabled():
            called.with_grad = True
        elif not called.checkpointed:
            called.checkpointed = _is_in_reentrant_checkpoint()
        first = next(nested_tensors(args), None)
        if first is not None and is_readable(first) and first.dim():
            called.batch_size = first.shape[0]
            if first.dim() > 1 and first.shape[1]:
                called.values_per_channel = first.numel() // first.shape[1]

    def module_ended(self, module: nn.Module, result: Any) -> None:
        """Note the end of a call."""
        while self._open:
            known, path, kind = self._open.pop()
            self._open_made.pop()
            if known == id(module):
                break
        else:
            return
        called = self._called.get(path)
        outputs = list(nested_tensors(result))
        if called is not None:
            called.has_graph |= any(node_of(output) is not None for output in outputs)
        if outputs and next(module.children(), None) is None:
            self._read(path, kind, outputs[0])

    def function_called(self, name: str, result: Any) -> None:
        """Note what an activation function gave that no module stands for."""
        if name not in _ACTIVATIONS or not isinstance(result, torch.Tensor):
            return
        if self._open and self._open[-1][2].lower().replace("_", "") == name.strip("_"):
            return  # nn.ReLU calls relu itself
        self._read(self.here, name.strip("_"), result)

    def _read(self, path: str, kind: str, output: torch.Tensor) -> None:
        if len(self._given) < _MOST_MODULES and is_readable(output) and output.is_floating_point():
            shape = str(tuple(output.shape))
            self._given.append(_Given(path, kind, shape, _summary(output.detach(), kind)))

    @property
    def awaited(self) -> list[Late[Any]]:
        """What may still be on its way."""
        return [
            *(given.numbers for given in self._given),
            *(called.learnt for called in self._called.values()),
        ]

    def path_of(self, key: str) -> str:
        """Return the path of a module that was called, once the look has ended."""
        if self._last_paths is None:
            self._last_paths = self._paths_now()
        called = self._called.get(key)
        module = called.module() if called is not None else None
        known = self._last_paths.get(id(module)) if module is not None else None
        return key.split(_OF_UNKNOWN)[0] if known is None else known

    def calls(self) -> Iterator[dict[str, Any]]:
        """Give the rows of the table ``calls``, without their step."""
        by_path: dict[str, _Called] = {}
        for key, called in self._called.items():
            path = self.path_of(key)
            if path in by_path:
                by_path[path].add(called)
            else:
                by_path[path] = called
        for path, called in by_path.items():
            row = {name: getattr(called, name) for name in _Called.__slots__ if name != "module"}
            if row.pop("learnt").value():
                row["settings"] += f", {STATISTICS_LEARNT}"
            optional = ("batch_size", "values_per_channel")
            yield {
                "module": path,
                "module_type": row.pop("kind"),
                **columns_of(row.pop("made")),
                **{name: value for name, value in row.items() if name not in optional},
                **{name: row[name] for name in optional if row[name] is not None},
            }

    def activations(self) -> Iterator[dict[str, Any]]:
        """Give the rows of the table ``activations``, without their step."""
        for given in self._given:
            numbers = given.numbers.value()
            if numbers is None:
                continue
            row = dict(zip(_COLUMNS, numbers.tolist(), strict=True))
            yield {
                "module": self.path_of(given.module),
                "module_type": given.kind,
                "shape": given.shape,
                **row,
                "nonfinite": int(row["nonfinite"]),
            }


_COLUMNS = (
    "mean",
    "std",
    "abs_max",
    "zero_fraction",
    "dead_fraction",
    "saturated_fraction",
    "nonfinite",
)


def _summary(output: torch.Tensor, kind: str) -> Late[Any]:
    """The numbers of :data:`_COLUMNS`, as an array."""
    values = output.float()
    ends = _ENDS.get(kind)
    if values.device.type == "cpu":
        return Known(_summary_on_host(values.numpy(), ends))
    return Numbers(_summary_on_device(values, ends))


def _others(n_dims: int) -> tuple[int, ...]:
    """The dimensions over which a unit is looked at: channels of images, else the last one."""
    units = 1 if n_dims == 4 else n_dims - 1
    return tuple(dim for dim in range(n_dims) if dim != units)


def _summary_on_host(values: Any, ends: tuple[float, float] | None) -> Any:
    # A number known to be usual spares a look at every element.
    n = values.size
    with np.errstate(all="ignore"):
        mean = float(values.mean())
        n_nonzero = np.count_nonzero(values)
        zero_fraction, dead = 1 - n_nonzero / n, 0.0
        if n_nonzero < n:
            alive = (
                np.count_nonzero(values, axis=_others(values.ndim)) if values.ndim > 1 else values
            )
            dead = float(np.mean(np.equal(alive, 0)))
        nonfinite = 0 if math.isfinite(mean) else n - np.count_nonzero(np.isfinite(values))
        saturated = math.nan
        if ends is not None:
            low, high = ends
            near = (values - low < _NEAR_AN_END) | (high - values < _NEAR_AN_END)
            saturated = np.count_nonzero(near) / n
        centred = (values - mean).ravel()
        std = math.sqrt(float(np.dot(centred, centred)) / n)
        greatest = max(float(values.max()), -float(values.min()))
    return np.array([mean, std, greatest, zero_fraction, dead, saturated, nonfinite])


def _summary_on_device(values: torch.Tensor, ends: tuple[float, float] | None) -> torch.Tensor:
    n = values.numel()
    mean = values.mean()
    least, greatest = torch.aminmax(values)
    others = _others(values.dim())
    alive = torch.count_nonzero(values, dim=others) if others else (values != 0).long()
    saturated = torch.full((), float("nan"), device=values.device)
    if ends is not None:
        low, high = ends
        saturated = ((values - low < _NEAR_AN_END) | (high - values < _NEAR_AN_END)).float().mean()
    return torch.stack(
        [
            mean,
            # var_mean takes ten times as long.
            torch.linalg.vector_norm(values - mean) / math.sqrt(n),
            torch.maximum(greatest, -least),
            1 - alive.sum() / n,
            (alive == 0).float().mean(),
            saturated,
            (~torch.isfinite(values)).sum().float(),
        ]
    )


def _has_learnt(module: nn.Module) -> Late[Any]:
    """Whether a batch normalisation has other running statistics than a new one; else None."""
    mean, variance = (vars(module)["_buffers"].get(f"running_{of}") for of in ("mean", "var"))
    if mean is None or variance is None or not (is_readable(mean) and is_readable(variance)):
        return Known(None)
    return Numbers(((mean != 0).any() | (variance != 1).any()).reshape(1))


def _settings_of(module: nn.Module) -> str:
    known = vars(module)
    return ", ".join(f"{name}={known[name]}" for name in _SETTINGS if name in known)


def _is_in_reentrant_checkpoint() -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _REENTRANT:
            return True
        frame = frame.f_back
    return False
