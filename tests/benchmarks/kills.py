"""Kill a recorded training at random moments and open what it left: ``python kills.py [N]``.

Every run has to open; the steps that the last ``run.json`` counts, which is written after the rows,
have to be there as a whole, and no step in part.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gradscope
from gradscope.run.directory.layout import read_json

PROGRAM = """
import sys, torch
from gradscope.run.directory import writer
writer.FLUSH_SECONDS = 0.02
writer.PART_BYTES = 20_000
import gradscope
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
optimizer = torch.optim.AdamW(model.parameters())
with gradscope.watch(model, optimizer, save=sys.argv[1], keep="0.bias", every=5):
    print("begins", flush=True)
    while True:
        optimizer.zero_grad()
        model(torch.randn(16, 6)).square().sum().backward()
        optimizer.step()
"""


def kill(path: Path, seconds: float) -> None:
    """Train into a directory, and kill the process so many seconds after it has begun."""
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    while seconds > 0.2 and not (path / "steps" / "part-0000-000000.parquet").exists():
        time.sleep(0.01)  # most are killed while they write, some before they have
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def check(path: Path) -> int:
    """Open what is left; returns how many steps there are."""
    promised = read_json(path / "run.json")["steps"]
    run = gradscope.open(path)
    steps = run.steps["step"].tolist()
    assert steps == list(range(len(steps))), "a step is missing"
    assert len(steps) == promised, f"{promised} steps were flushed, {len(steps)} are there"
    assert run.grads.groupby("step").size().eq(4).all(), "a step is there in part"
    assert run.grads["step"].nunique() == len(steps)
    assert len(run.notes) == 1, run.notes
    repr(run)
    if len(steps) > 3:
        run.explain("0.weight", (0, 0), 0)
        run.tensors("0.bias")
    return len(steps)


def main() -> None:
    """Kill, open, and print what became of it."""
    n_kills = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    random.seed(0)
    counts = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(n_kills):
            path = Path(folder) / str(number)
            kill(path, random.uniform(0.0, 1.5))
            counts.append(check(path))
    print(f"{len(counts)} kills, {len(counts)} runs opened, {sum(counts)} steps in them")
    print(f"steps in a run: {min(counts)} to {max(counts)}; {counts.count(0)} without any")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
