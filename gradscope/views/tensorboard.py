"""The course of a run as scalars for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradscope.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

SCALARS = {
    "steps": {
        "loss": "loss",
        "grad_norm": "grad_norm",
        "update_norm": "update_norm",
        "weight_norm": "weight_norm",
        "step_ms": "time/step_ms",
    },
    "groups": {"lr": "lr/group{group}", "weight_decay": "weight_decay/group{group}"},
    "grads": {"norm": "grad_norm_of/{param}"},
    "updates": {"update_ratio": "update_ratio_of/{param}"},
}
"""What is written: columns by table, and the tag of each, made from other columns of its row."""


def write_scalars(
    tables: Iterable[tuple[str, Iterable[pa.Table]]],
    folder: Path,
    *,
    began: float = 0.0,
    by_optimizer: bool = False,
) -> int:
    """Write an event file with the scalars of a run.

    Needs the package ``tensorboard``, and not torch.

    Args:
        tables: name and rows of those in ``SCALARS``, ``steps`` first.
        folder: where the event file is made.
        began: when the run did, in seconds since 1970.
        by_optimizer: whether several optimizers took turns; then what each of them has is kept
            apart by its name.

    Returns:
        How many scalars were written. NaN stands for what was not recorded, and is left out.

    Raises:
        UsageError: if tensorboard is not installed.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise UsageError(
            f"--to tensorboard needs the package tensorboard ({error}): pip install tensorboard"
        ) from error

    writer, clock, n = EventFileWriter(str(folder)), _Clock(began), 0
    try:
        for table, parts in tables:
            for row in _rows(parts):
                if table == "steps":
                    clock.see(row)
                for tag, value in _scalars(table, row, by_optimizer=by_optimizer):
                    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
                    at = clock.time_of(row["step"])
                    writer.add_event(Event(wall_time=at, step=row["step"], summary=summary))
                    n += 1
    finally:
        writer.close()
    return n


def _rows(parts: Iterable[pa.Table]) -> Iterator[dict[str, Any]]:
    for part in parts:
        yield from part.to_pylist()


def _scalars(table: str, row: dict[str, Any], *, by_optimizer: bool) -> Iterator[tuple[str, float]]:
    for column, tag in SCALARS[table].items():
        value = row[column]
        if value is not None and value == value:
            of = f"{row['optimizer']}/" if by_optimizer and "param" not in row else ""
            yield of + tag.format_map(row), float(value)


class _Clock:
    """When each step ended, from the times between the steps of each optimizer."""

    def __init__(self, began: float) -> None:
        self._began = began
        self._now: dict[str, float] = {}
        self._ends: dict[int, float] = {}

    def see(self, row: dict[str, Any]) -> None:
        now = self._now.get(row["optimizer"], self._began) + row["step_ms"] / 1e3
        self._now[row["optimizer"]] = self._ends[row["step"]] = now

    def time_of(self, step: int) -> float:
        return self._ends.get(step, self._began)
