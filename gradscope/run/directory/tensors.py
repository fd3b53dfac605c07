"""Tensors around steps as safetensors files and back."""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gradscope.errors import RunDirectoryError
from gradscope.formulas import FORMULAS
from gradscope.run.captured_graph import CapturedGraph
from gradscope.run.directory.layout import shown, write_bytes
from gradscope.run.interchange import from_json
from gradscope.run.kept_tensors import KeptTensors
from gradscope.run.weight_step import GivenTogether, TrackedWeights, WeightStep

Array = npt.NDArray[Any]
Kept = Mapping[int, tuple[Mapping[str, Array], GivenTogether]]
"""Tensors by name, and what else the rule was given, by number of the parameter."""


def write_kept(path: Path, kept: Kept) -> None:
    """Write the tensors of some parameters around one step."""
    arrays: dict[str, Array] = {}
    common = {}
    for param, (tensors, given) in kept.items():
        common[str(param)] = _plain_given(given)
        arrays |= {f"{param}/{name}": array for name, array in tensors.items()}
    _write(path, arrays, {"common": common})


def read_kept(path: Path) -> dict[int, tuple[dict[str, Array], GivenTogether]]:
    """Return what :func:`write_kept` has written.

    Raises:
        OSError, ValueError: if the file is torn or something else.
    """
    arrays, facts = _read(path)
    try:
        kept: dict[int, tuple[dict[str, Array], GivenTogether]] = {
            int(param): ({}, _given(given)) for param, given in facts["common"].items()
        }
        for key, array in arrays.items():
            param, _, name = key.partition("/")
            kept[int(param)][0][name] = array
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    return kept


def write_tracked(path: Path, tracked: Mapping[int, TrackedWeights]) -> None:
    """Write the tracked weights of some steps."""
    arrays: dict[str, Array] = {}
    facts = {}
    for step, weights in tracked.items():
        arrays |= {
            f"{step}/param": weights.param,
            f"{step}/position": weights.position,
            f"{step}/run": weights.run,
            **{f"{step}/values/{name}": array for name, array in weights.values.items()},
        }
        facts[str(step)] = [_plain_given(given) for given in weights.common]
    _write(path, arrays, {"tracked": facts})


def read_tracked(path: Path) -> dict[int, TrackedWeights]:
    """Return what :func:`write_tracked` has written.

    Raises:
        OSError, ValueError: if the file is torn or something else.
    """
    arrays, facts = _read(path)
    try:
        found = {}
        for step, common in facts["tracked"].items():
            start = f"{step}/values/"
            found[int(step)] = TrackedWeights(
                arrays[f"{step}/param"],
                arrays[f"{step}/position"],
                {key[len(start) :]: a for key, a in arrays.items() if key.startswith(start)},
                tuple([_given(given) for given in common]),
                arrays[f"{step}/run"],
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    return found


class StoredGraphs(Mapping[int, CapturedGraph]):
    """The graphs of a run directory by step, read when they are asked for.

    Args:
        paths: the files.
        notes: where it is told what cannot be read.
    """

    def __init__(self, paths: Mapping[int, Path], notes: list[str]) -> None:
        self._paths = dict(paths)
        self._notes = notes
        self._read: dict[int, CapturedGraph] = {}

    def __getitem__(self, step: int) -> CapturedGraph:
        if step not in self._read:
            path = self._paths[step]
            read = read_or_note(
                lambda path: from_json(path.read_text("utf-8", "replace")), path, self._notes
            )
            if read is None:
                raise RunDirectoryError(f"the graph of step {step} cannot be read: {shown(path)}")
            self._read[step], _ = read
        return self._read[step]

    def __iter__(self) -> Iterator[int]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


class StoredTensors(KeptTensors):
    """The kept tensors of a run directory, read when they are asked for.

    Args:
        paths: the files by step.
        notes: where it is told what cannot be read.
    """

    def __init__(self, paths: Mapping[int, Path], notes: list[str]) -> None:
        super().__init__()
        self._paths = dict(paths)
        self._notes = notes

    def steps_of(self, param: int) -> list[int]:
        """Return the steps of which tensors of a parameter are there, in order."""
        return [step for step in self._paths if param in self.of_step(step)]

    def of_step(self, step: int) -> Kept:
        """Return what was kept of a step, by parameter."""
        if step not in self._kept and step in self._paths:
            self._kept[step] = read_or_note(read_kept, self._paths[step], self._notes) or {}
        return self._kept.get(step, {})

    @property
    def steps(self) -> list[int]:
        """The steps of which anything is there, in order."""
        return list(self._paths)


class StoredLast(StoredTensors):
    """Copies of whole tensors around the last recorded step of each optimizer.

    Unlike kept tensors they bear the names of the rule's worksheet.
    """

    def weight(
        self, step: int, param: int, position: int, index: tuple[int, ...]
    ) -> WeightStep | None:
        """Return one weight around a step; None if that was not copied."""
        found = self.of_step(step).get(param)
        if found is None:
            return None
        arrays, common = found
        formula = FORMULAS.get(common.formula or "")
        is_whole = formula is not None and not formula.elementwise
        values: dict[str, Any] = {
            name: array.astype(np.float64) if is_whole else np.float64(array.reshape(-1)[position])
            for name, array in arrays.items()
        }
        after = values.pop("weight_after")
        return WeightStep(
            common.formula,
            {**common.given, **values},
            index,
            float(after[index] if is_whole else after),
        )


class StoredTracked(Mapping[int, TrackedWeights]):
    """The tracked weights of a run directory by step, read when they are asked for.

    Args:
        paths: the files, by the first step that each holds.
        notes: where it is told what cannot be read.
        is_held: tells of which steps memory held them too; the others are passed over.
    """

    def __init__(
        self, paths: Mapping[int, Path], notes: list[str], is_held: Callable[[int], bool]
    ) -> None:
        self._is_held = is_held
        self._paths = dict(paths)
        self._firsts = sorted(self._paths)
        self._notes = notes
        self._read: tuple[int, dict[int, TrackedWeights]] = (-1, {})

    def __getitem__(self, step: int) -> TrackedWeights:
        at = bisect.bisect_right(self._firsts, step) - 1
        if at < 0 or not self._is_held(step):
            raise KeyError(step)
        return self._of_file(self._firsts[at])[step]

    def __iter__(self) -> Iterator[int]:
        for first in self._firsts:
            yield from filter(self._is_held, self._of_file(first))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _of_file(self, first: int) -> dict[int, TrackedWeights]:
        if self._read[0] != first:
            found = read_or_note(read_tracked, self._paths[first], self._notes) or {}
            self._read = (first, found)
        return self._read[1]


def read_or_note(read: Any, path: Path, notes: list[str]) -> Any:
    """Return what ``read`` reads from a file; None, with a note, if it is torn or foreign."""
    try:
        return read(path)
    except Exception as error:  # whatever a damaged file makes of a library
        text = (
            f"{shown(path)}: cannot be read, skipped ({type(error).__name__}: {str(error)[:200]})"
        )
        if text not in notes:
            notes.append(text)
        return None


# -- files ----------------------------------------------------------------------------------------


def _write(path: Path, arrays: Mapping[str, Array], facts: dict[str, Any]) -> None:
    from safetensors.numpy import save

    plain: dict[str, Array] = {}
    dtypes = {}
    for key, array in arrays.items():
        array = np.array(array, order="C")  # one of no dimension stays so
        if np.iscomplexobj(array):
            dtypes[key] = str(array.dtype)
            array = array[..., None].view(array.real.dtype)
        plain[key] = array
    # safetensors sorts them; people are shown the order in which a rule takes them.
    facts = facts | {"complex": dtypes, "order": list(plain)}
    metadata = {"gradscope": json.dumps(facts)}
    write_bytes(path, save(plain, metadata))


def _read(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            facts = json.loads((file.metadata() or {}).get("gradscope", "{}"))
            if not isinstance(facts, dict) or not isinstance(facts.get("order"), list):
                raise ValueError("it says nothing about its tensors")
            arrays = {key: file.get_tensor(key) for key in facts["order"]}
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    for key, dtype in facts.get("complex", {}).items():
        arrays[key] = arrays[key].view(np.dtype(dtype))[..., 0]
    return arrays, facts


# -- what a rule was given ------------------------------------------------------------------------


def _plain_given(given: GivenTogether) -> dict[str, Any]:
    return {
        "formula": given.formula,
        "given": {name: _plain(value) for name, value in given.given.items()},
        "arrays": dict(given.arrays),
        "loss_scale": given.loss_scale,
    }


def _given(plain: Any) -> GivenTogether:
    return GivenTogether(
        plain["formula"],
        {name: _value(value) for name, value in plain["given"].items()},
        plain["arrays"],
        float(plain["loss_scale"]),
    )


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return {"tuple": [_plain(each) for each in value]}
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    return value.item() if isinstance(value, np.generic) else value


def _value(plain: Any) -> Any:
    if isinstance(plain, dict) and "tuple" in plain:
        return tuple([_value(each) for each in plain["tuple"]])
    if isinstance(plain, dict) and "array" in plain:
        return np.array(plain["array"], plain["dtype"])
    return plain
