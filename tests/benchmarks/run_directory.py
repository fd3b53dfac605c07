"""What the run directory costs: ``python run_directory.py [write|read|share]``."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import gradscope
from gradscope.run.columns import Coded, Columns
from gradscope.run.directory import layout
from gradscope.run.directory.parts import named, numbered, write_part
from gradscope.run.directory.writer import DirectoryWriter
from gradscope.run.entries import OptimizerEntry, ParameterEntry
from gradscope.run.recording import Recording
from gradscope.run.schema import GRADS, STATUSES, Table

N_PARAMS = 1_000


def grads(n_steps: int, first: int = 0) -> dict[str, Any]:
    """Rows of ``grads`` as a training writes them."""
    n = n_steps * N_PARAMS
    random = np.random.default_rng(first)
    norm = np.exp(random.normal(size=n))
    return {
        "step": np.repeat(np.arange(first, first + n_steps), N_PARAMS),
        "param": np.tile(np.arange(N_PARAMS), n_steps),
        "optimizer": 0,
        "status": Coded(np.ones(n, np.int64), STATUSES),
        "n_writes": 1,
        "norm": norm,
        "mean": norm / 10,
        "std": norm / 2,
        "min": -norm,
        "max": norm,
        "abs_max": norm,
        "zero_fraction": 0.0,
    }


def write() -> None:
    """100,000 rows × 12 columns, from memory to a file."""
    narrow = Table("grads", GRADS.row, tuple(c for c in GRADS.columns if c.name in grads(1)))
    assert len(narrow.columns) == 12
    columns = Columns(narrow)
    columns.extend(100 * N_PARAMS, grads(100))
    names = [f"transformer.h.{n}.attn.weight" for n in range(N_PARAMS)]
    times = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / layout.part_name(0, 0)
        for _ in range(7):
            columns.n_taken = 0
            began = time.perf_counter()
            taken = columns.take(columns.n_rows)
            copied = time.perf_counter()
            write_part(path, narrow, named(narrow, numbered(narrow, taken), names, ["opt"], 0))
            times.append((time.perf_counter() - began, copied - began))
        size = path.stat().st_size
    best, copying = min(times)
    print(
        f"100,000 rows × 12 columns: {1e3 * best:.0f} ms, of that {1e3 * copying:.1f} ms to copy "
        f"them away; {size / 1e5:.0f} bytes a row"
    )


def write_run(path: Path, n_steps: int) -> None:
    """A run of 1,000 parameters, written by the writer in chunks of 100 steps."""
    recording = Recording()
    recording.parameters = [
        ParameterEntry(f"transformer.h.{n}.attn.weight", shape=(4,), holders=[(0, 0)])
        for n in range(N_PARAMS)
    ]
    recording.optimizers = [OptimizerEntry("optimizer", "AdamW", 1)]
    directory = DirectoryWriter(path, recording, {}, lambda: 1.0)
    directory._make_folders()
    for first in range(0, n_steps, 100):
        for step in range(first, first + 100):
            recording.rows("steps").append({"step": step, "outcome": "stepped", "recorded": True})
        recording.rows("grads").extend(100 * N_PARAMS, grads(100, first))
        recording._n_steps = first + 99
        recording.steps_ended(0)
        directory.flush()
        recording.forget_rows()
    directory.flush(is_last=True)
    directory._finish("finished")


def read() -> None:
    """10 million rows, opened and grouped by parameter."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        began = time.perf_counter()
        write_run(path, 10_000)
        parts = list((path / "grads").iterdir())
        size = sum(part.stat().st_size for part in parts)
        print(
            f"10 million rows written in {time.perf_counter() - began:.1f} s: {len(parts)} parts, "
            f"{size / 1e6:.0f} MB"
        )
        import pandas  # noqa: F401  # what is measured is not the import
        import pyarrow.dataset  # noqa: F401

        for _ in range(3):
            began = time.perf_counter()
            run = gradscope.open(path)
            table = run.table("grads", ["param", "norm"])
            means = table.groupby("param")["norm"].mean()
            by_pandas = time.perf_counter() - began
            began = time.perf_counter()
            rows = gradscope.open(path).dataset("grads").to_table(columns=["param", "norm"])
            grouped = rows.group_by("param").aggregate([("norm", "mean")])
            by_arrow = time.perf_counter() - began
            assert len(means) == grouped.num_rows == N_PARAMS
            print(f"opened and grouped: {by_pandas:.2f} s by run.table, {by_arrow:.2f} s by Arrow")
        began = time.perf_counter()
        run = gradscope.open(path)
        one = run.table("grads", ["step", "norm"], [("param", "==", "transformer.h.7.attn.weight")])
        print(f"one parameter's {len(one):,} rows: {time.perf_counter() - began:.2f} s")
        began = time.perf_counter()
        held = gradscope.open(path).grads
        print(f"what memory is to hold, {len(held):,} rows: {time.perf_counter() - began:.2f} s")


def share() -> None:
    """What writing adds to a step of the demo's GPT, in time on the clock and on all processors."""
    import torch

    from gradscope.demo.char_gpt import CharGPT
    from gradscope.demo.text import CharText

    torch.set_num_threads(1)
    text = CharText()
    clock: dict[bool, list[float]] = {True: [], False: []}
    of_thread, flush = [0.0], DirectoryWriter.flush

    def timed(self: DirectoryWriter, *, is_last: bool = False) -> None:
        began = time.thread_time()
        flush(self, is_last=is_last)
        of_thread[0] += 0.0 if is_last else time.thread_time() - began

    DirectoryWriter.flush = timed  # type: ignore[method-assign]
    cpu: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(int(os.environ.get("TURNS", "6"))):
            for saves in (turn % 2 == 0, turn % 2 == 1):
                torch.manual_seed(0)
                model = CharGPT(text.vocab_size)
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
                path = Path(folder) / str(turn) if saves else None
                n_steps = int(os.environ.get("STEPS", "150"))
                with gradscope.watch(model, optimizer, save=path):
                    for step in range(n_steps):
                        if step == 10:
                            began = time.perf_counter(), time.process_time()
                        xb, yb = text.get_batch("train")
                        _, loss = model(xb, yb)
                        optimizer.zero_grad(set_to_none=True)
                        loss.backward()
                        optimizer.step()
                    clock[saves].append((time.perf_counter() - began[0]) / (n_steps - 10))
                    cpu[saves].append((time.process_time() - began[1]) / (n_steps - 10))
                print(
                    f"save={saves!s:5}: {1e3 * clock[saves][-1]:.2f} ms a step by the clock, "
                    f"{1e3 * cpu[saves][-1]:.2f} ms of all processors",
                    flush=True,
                )
    steps = sum(clock[True]) * (n_steps - 10)
    print(
        f"the writer's thread took {1e3 * of_thread[0]:.0f} ms of {steps:.0f} s: "
        f"{100 * of_thread[0] / steps:.2f} %"
    )
    for what, times in (("by the clock", clock), ("of all processors", cpu)):
        pairs = np.array(times[True]) / np.array(times[False]) - 1
        print(f"writing adds {100 * np.median(pairs):+.2f} % {what} (median of {len(pairs)} pairs)")


if __name__ == "__main__":
    for name in sys.argv[1:] or ["write", "read", "share"]:
        {"write": write, "read": read, "share": share}[name]()
