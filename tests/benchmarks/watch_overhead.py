"""What watching costs: CPU time of a training step with gradscope, over the same step without.

    python tests/benchmarks/watch_overhead.py [--only gpt|mlp] [--repetitions 5] [--steps 200]

Each figure comes from a process of its own that trains one model under one setting, on one thread,
and the settings take turns (bare, watched, every=1, bare, ...), so that a machine that slows down
slows them all. Ratios are taken within a turn. Time is CPU time of the whole process, which counts
gradscope's own threads and is blind to what else the machine does.

Per step it is a mean and not a median: the steps that are recorded in full are few and dear, and a
median would leave them out. The first steps are recorded densely by design and are therefore
reported apart, as is what happens once: entering and leaving the watch, and reading the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

WORKLOADS = {
    "gpt": "character GPT, 0.8 M parameters in 54 tensors, batch 16 x 64, AdamW",
    "mlp": "100 x Linear(32, 32), 200 tensors, batch 64, AdamW",
}
SETTINGS = {"bare": None, "watched": {}, "every=1": {"every": 1}}


@dataclass(frozen=True)
class Measurement:
    """CPU time of one process, in milliseconds.

    Attributes:
        first_ms: mean of the first steps.
        steady_ms: mean of the steps after those.
        once_ms: entering and leaving the watch together; near 0 when bare.
        read_ms: reading every table afterwards, which is when put-off work is done and pandas is
            imported; 0 when bare.
        last_loss: the loss of the last step; watching must not change it.
    """

    first_ms: float
    steady_ms: float
    once_ms: float
    read_ms: float
    last_loss: float


def build(workload: str):
    """Return a model, its optimizer, and a function that gives the loss of a fresh batch."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    if workload == "gpt":
        from gradscope.demo.char_gpt import CharGPT
        from gradscope.demo.text import CharText

        text = CharText()
        model = CharGPT(text.vocab_size)

        def compute_loss():
            xb, yb = text.get_batch("train")
            return model(xb, yb)[1]
    else:
        layers = []
        for _ in range(100):
            linear = nn.Linear(32, 32)
            # Keeps the scale of signals and gradients through a hundred layers: vanishing ones
            # would become denormal numbers, whose arithmetic is slow for reasons of its own.
            nn.init.orthogonal_(linear.weight)
            layers += [linear, nn.Tanh()]
        model = nn.Sequential(*layers)
        inputs, targets = torch.randn(64, 32), torch.randn(64, 32)

        def compute_loss():
            return nn.functional.mse_loss(model(inputs), targets)

    return model, torch.optim.AdamW(model.parameters(), lr=1e-3), compute_loss


def measure(workload: str, setting: str, n_steps: int, n_first: int) -> Measurement:
    """Train in this process and read its clock; meant to be the process's only work."""
    import torch

    torch.set_num_threads(1)
    model, optimizer, compute_loss = build(workload)

    def train(n: int) -> float:
        start = time.process_time()
        for _ in range(n):
            loss = compute_loss()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return 1e3 * (time.process_time() - start) / n

    losses: list[float] = []
    # torch's own first steps (thread pools, lazy imports) are nobody's overhead.
    train(3)

    options = SETTINGS[setting]
    if options is None:
        watch = contextlib.nullcontext()
    else:
        import gradscope

        watch = gradscope.watch(model, optimizer, **options)
    start = time.process_time()
    with watch:
        entered = time.process_time()
        first_ms = train(n_first)
        steady_ms = train(n_steps - n_first)
        leaving = time.process_time()
    left = time.process_time()
    once_ms = 1e3 * (entered - start + left - leaving)
    if options is not None:
        _ = watch.tables
    read_ms = 1e3 * (time.process_time() - left)
    return Measurement(first_ms, steady_ms, once_ms, read_ms, losses[-1])


def measure_in_own_process(arguments: argparse.Namespace, workload: str, setting: str):
    """Run :func:`measure` in a fresh interpreter on one thread."""
    completed = subprocess.run(
        [
            *(sys.executable, __file__, "--measure", workload, setting),
            *("--steps", str(arguments.steps), "--first", str(arguments.first)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Measurement(**json.loads(completed.stdout.splitlines()[-1]))


def take_turns(arguments: argparse.Namespace, workload: str) -> dict[str, list[Measurement]]:
    """Measure every setting once, then again, as often as there are repetitions."""
    measurements: dict[str, list[Measurement]] = {setting: [] for setting in SETTINGS}
    for repetition in range(arguments.repetitions):
        for setting in SETTINGS:
            print(f"{workload} {repetition + 1}/{arguments.repetitions} {setting}", file=sys.stderr)
            measurements[setting].append(measure_in_own_process(arguments, workload, setting))
    return measurements


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarise(measurements: dict[str, list[Measurement]]) -> list[dict[str, object]]:
    """Median and range over the repetitions, one row for each setting."""
    bare = measurements["bare"]
    rows: list[dict[str, object]] = []
    for setting, turns in measurements.items():
        pairs = list(zip(turns, bare, strict=True))
        rows.append(
            {
                "setting": setting,
                "steady_ms": spread([turn.steady_ms for turn in turns]),
                "steady_ratio": spread([turn.steady_ms / base.steady_ms for turn, base in pairs]),
                "first_ms": spread([turn.first_ms for turn in turns]),
                "first_ratio": spread([turn.first_ms / base.first_ms for turn, base in pairs]),
                "once_ms": spread([turn.once_ms for turn in turns]),
                "read_ms": spread([turn.read_ms for turn in turns]),
                "same_loss": all(turn.last_loss == base.last_loss for turn, base in pairs),
                "turns": [asdict(turn) for turn in turns],
            }
        )
    return rows


def describe_machine() -> dict[str, object]:
    import torch

    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":", 1)[1].strip() if names else processor
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def print_table(workload: str, rows: list[dict], first: int) -> None:
    print(f"\n{WORKLOADS[workload]}")
    print("CPU time per step: median (smallest - largest) over the repetitions\n")
    print(
        f"  {'setting':9} {'ms, steady':>22} {'ratio, steady':>24} {f'ms, first {first}':>22}"
        f" {'ratio, first':>20} {'once, ms':>9} {'tables, ms':>11}"
    )
    for row in rows:
        steady, ratio = row["steady_ms"], row["steady_ratio"]
        early, early_ratio = row["first_ms"], row["first_ratio"]
        cells = [
            f"{steady['median']:.2f} ({steady['min']:.2f} - {steady['max']:.2f})",
            f"{ratio['median']:.3f} ({ratio['min']:.3f} - {ratio['max']:.3f})",
            f"{early['median']:.2f} ({early['min']:.2f} - {early['max']:.2f})",
            f"{early_ratio['median']:.2f} ({early_ratio['min']:.2f} - {early_ratio['max']:.2f})",
        ]
        print(
            f"  {row['setting']:9} {cells[0]:>22} {cells[1]:>24} {cells[2]:>22} {cells[3]:>20}"
            f" {row['once_ms']['median']:9.0f} {row['read_ms']['median']:11.0f}"
        )
    if not all(row["same_loss"] for row in rows):
        print("\n  THE LOSSES DIFFER: watching changed the training")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200, help="steps in each process")
    parser.add_argument("--first", type=int, default=50, help="of these, reported apart")
    parser.add_argument("--only", choices=list(WORKLOADS))
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--measure", nargs=2, metavar=("WORKLOAD", "SETTING"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if not 0 < arguments.first < arguments.steps:
        parser.error("--first must be at least 1 and smaller than --steps")

    if arguments.measure:
        measurement = measure(*arguments.measure, arguments.steps, arguments.first)
        print(json.dumps(asdict(measurement)))
        return 0

    machine = describe_machine()
    if not arguments.json:
        print("  ".join(f"{key}: {value}" for key, value in machine.items()))
    workloads = [arguments.only] if arguments.only else list(WORKLOADS)
    results = {}
    for workload in workloads:
        results[workload] = summarise(take_turns(arguments, workload))
        if not arguments.json:
            print_table(workload, results[workload], arguments.first)
    if arguments.json:
        settings = {"steps": arguments.steps, "first": arguments.first}
        print(json.dumps({"machine": machine, **settings, "workloads": results}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
