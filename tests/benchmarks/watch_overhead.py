"""What watching costs: time of a training step with gradscope, over the same step without.

    python tests/benchmarks/watch_overhead.py [--only gpt,mlp] [--settings watched,every=1]
        [--peers FOLDER] [--repetitions 3] [--write docs/benchmarks.md]

Each figure comes from a process of its own that trains one model under one setting, on one thread,
and the settings take turns (bare, watched, every=1, bare, ...), so that a machine that slows down
slows them all. Ratios are taken within a turn. CPU time is that of the whole process, which counts
gradscope's own threads and is blind to what else the machine does.

Per step it is a mean and not a median: the steps that are recorded in full are few and dear, and a
median would leave them out. The first steps are recorded densely by design and are therefore
reported apart, as is what happens once: entering and leaving the watch, and reading the tables.

With ``--peers`` other tools are timed too. What they need is installed into folders of their own
in FOLDER, so that none meets the packages of another.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from settings import DESCRIPTIONS, PACKAGES, PEERS, SETTINGS
from workloads import STEPS, WORKLOADS, build

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Measurement:
    """CPU time of one process, in milliseconds, unless it says otherwise.

    Attributes:
        first_ms: mean of the first steps.
        steady_ms: mean of the steps after those.
        once_ms: entering and leaving the watch together; near 0 when bare.
        read_ms: reading every table afterwards, which is when put-off work is done and pandas is
            imported; 0 when bare.
        last_loss: the loss of the last step; watching must not change it.
        wall_ms: mean of the steps after the first, by the clock.
        peak_mib: the most memory that the process had until the end of the watch, in MiB.
        counted: of the time of those steps, the share that gradscope says it took; NaN for others.
    """

    first_ms: float
    steady_ms: float
    once_ms: float
    read_ms: float
    last_loss: float
    wall_ms: float
    peak_mib: float
    counted: float


def measure(workload: str, setting: str, n_steps: int, n_first: int) -> Measurement:
    """Train in this process and read its clock; meant to be the process's only work."""
    import torch

    torch.set_num_threads(1)
    model, optimizer, compute_loss = build(workload)
    losses: list[float] = []
    after_step: Any = None

    def train(n: int) -> tuple[float, float]:
        start = time.process_time(), time.perf_counter()
        for _ in range(n):
            loss = compute_loss()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if after_step is not None:
                after_step(len(losses))
        ended = time.process_time(), time.perf_counter()
        return 1e3 * (ended[0] - start[0]) / n, 1e3 * (ended[1] - start[1]) / n

    # torch's own first steps (thread pools, lazy imports) are nobody's overhead.
    train(3)
    start = time.process_time()
    with (SETTINGS | PEERS)[setting](model, optimizer) as watching:
        after_step, scope = watching if isinstance(watching, tuple) else (watching, None)
        entered = time.process_time()
        first_ms, _ = train(n_first)
        counted = 0.0 if scope is None else _seconds_counted(scope)
        steady_ms, wall_ms = train(n_steps - n_first)
        if scope is not None:
            counted = (_seconds_counted(scope) - counted) / (1e-3 * wall_ms * (n_steps - n_first))
        leaving = time.process_time()
    left = time.process_time()
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    once_ms = 1e3 * (entered - start + left - leaving)
    if scope is not None:
        _ = scope.tables
    return Measurement(
        first_ms,
        steady_ms,
        once_ms,
        1e3 * (time.process_time() - left),
        losses[-1],
        wall_ms,
        peak_mib,
        float("nan") if scope is None else counted,
    )


def _seconds_counted(scope: Any) -> float:
    # What scope.overhead says, without importing pandas in the midst of the training.
    scope._session.settle()
    return float(sum(scope._session.recording.observe_seconds.values()))


def install_peers(folder: Path) -> None:
    """Install what the others need, each into a folder of its own, if it is not there yet."""
    for setting, package in PACKAGES.items():
        target = folder / package
        if not target.exists():
            print(f"installing {package} for {setting}", file=sys.stderr)
            constraints = str(ROOT / "constraints.txt")
            subprocess.run(
                [
                    *(sys.executable, "-m", "pip", "install", "--quiet", "-c", constraints),
                    *("--target", str(target), package),
                ],
                check=True,
            )


def measure_in_own_process(arguments: argparse.Namespace, workload: str, setting: str):
    """Run :func:`measure` in a fresh interpreter on one thread."""
    paths = [str(ROOT)]
    if setting in PACKAGES:
        paths.append(str(arguments.peers / PACKAGES[setting]))
    completed = subprocess.run(
        [
            *(sys.executable, __file__, "--measure", workload, setting),
        ],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(paths),
        },
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Measurement(**json.loads(completed.stdout.splitlines()[-1]))


def take_turns(arguments: argparse.Namespace, workload: str) -> dict[str, list[Measurement]]:
    """Measure every setting once, then again, as often as there are repetitions."""
    measurements: dict[str, list[Measurement]] = {setting: [] for setting in arguments.settings}
    for repetition in range(arguments.repetitions):
        for setting in arguments.settings:
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
                "wall_ratio": spread([turn.wall_ms / base.wall_ms for turn, base in pairs]),
                "peak_mib": spread([turn.peak_mib for turn in turns]),
                "counted": spread([turn.counted for turn in turns]),
                "same_loss": setting in PEERS
                or all(turn.last_loss == base.last_loss for turn, base in pairs),
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
        f"  {'setting':14} {'ms, steady':>22} {'ratio, steady':>24} {'by the clock':>12}"
        f" {f'ms, first {first}':>22} {'once, ms':>9} {'tables, ms':>10} {'MiB':>6} {'counted':>8}"
    )
    for row in rows:
        print(
            f"  {row['setting']:14} {_ranged(row['steady_ms'], 2):>22}"
            f" {_ranged(row['steady_ratio'], 3):>24} {row['wall_ratio']['median']:>12.3f}"
            f" {_ranged(row['first_ms'], 2):>22} {row['once_ms']['median']:9.0f}"
            f" {row['read_ms']['median']:10.0f} {row['peak_mib']['median']:6.0f}"
            f" {_percent(row['counted']['median']):>8}"
        )
    if not all(row["same_loss"] for row in rows):
        print("\n  THE LOSSES DIFFER: watching changed the training")


def _ranged(values: dict[str, float], digits: int) -> str:
    median, least, most = (f"{values[name]:.{digits}f}" for name in ("median", "min", "max"))
    return f"{median} ({least} - {most})"


def _percent(share: float) -> str:
    return "" if share != share else f"{100 * share:.1f} %"


def page(machine: dict[str, object], results: dict[str, list[dict]], settings: Any) -> str:
    """Return the page of the documentation."""
    lines = [
        "# What watching costs",
        "",
        "Time of a training step, over that of the same step unwatched. Each figure is the median",
        f"of {settings.repetitions} runs (smallest - largest), one process each, on one thread, by",
        "turns; CPU time of the process, without the first steps, which are recorded densely. *By",
        "the clock* counts what the processor waited for, and what else the machine did. *Counted*",
        "is the share of the time that `scope.overhead` says watching took; *MiB* the most memory",
        "that the process had until then, libraries included.",
        "",
        "Written by `make bench`, on this machine: "
        + ", ".join(f"{key} {value}" for key, value in machine.items())
        + ".",
    ]
    for workload, rows in results.items():
        lines += [
            "",
            f"## {WORKLOADS[workload]}",
            "",
            "{} steps, the first {} apart; a quarter of both for other tools.".format(
                *STEPS[workload]
            ),
            "",
            "| | ms a step | of bare | by the clock | first steps | once, ms | MiB | counted |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            cells = [
                DESCRIPTIONS[str(row["setting"])],
                _ranged(row["steady_ms"], 2),
                _ranged(row["steady_ratio"], 3),
                f"{row['wall_ratio']['median']:.3f}",
                f"{row['first_ratio']['median']:.2f}",
                f"{row['once_ms']['median']:.0f}",
                f"{row['peak_mib']['median']:.0f}",
                _percent(row["counted"]["median"]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--only", default=",".join(WORKLOADS), help="workloads, comma separated")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="settings, comma separated")
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="time other tools, too")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write a page of Markdown")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--measure", nargs=2, metavar=("WORKLOAD", "SETTING"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    arguments.settings = ["bare", *(s for s in arguments.settings.split(",") if s != "bare")]
    if arguments.peers is not None:
        arguments.settings += PEERS
        install_peers(arguments.peers)

    if arguments.measure:
        workload, setting = arguments.measure
        n_steps, n_first = STEPS[workload]
        if setting in PEERS:  # some take forty times as long
            n_steps, n_first = n_steps // 4, n_first // 4
        measurement = measure(workload, setting, n_steps, n_first)
        print(json.dumps(asdict(measurement)))
        return 0

    machine = describe_machine()
    if not arguments.json:
        print("  ".join(f"{key}: {value}" for key, value in machine.items()))
    results = {}
    for workload in arguments.only.split(","):
        results[workload] = summarise(take_turns(arguments, workload))
        if not arguments.json:
            print_table(workload, results[workload], STEPS[workload][1])
    if arguments.write:
        arguments.write.write_text(page(machine, results, arguments))
    if arguments.json:
        print(json.dumps({"machine": machine, "steps": STEPS, "workloads": results}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
