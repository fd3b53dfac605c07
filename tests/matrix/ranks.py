"""Runs the cells of a distributed loop in processes of their own, all of one loop together."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

_TIMEOUT = 900


@functools.cache
def results_on_ranks(title: str, n_ranks: int, kinds: tuple[str, ...]) -> dict[str, list[str]]:
    """Run a loop with these optimizers; returns verdict and detail of each.

    Raises:
        RuntimeError: if a process ends otherwise than it should.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{rank}.json" for rank in range(n_ranks)]
        processes = [
            subprocess.Popen(
                [sys.executable, str(HERE / "ranks.py"), title, ",".join(kinds), str(path)],
                env={
                    **os.environ,
                    "RANK": str(rank),
                    "WORLD_SIZE": str(n_ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "OMP_NUM_THREADS": "1",
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank, path in enumerate(paths)
        ]
        outputs = []
        try:
            for process in processes:
                outputs.append(process.communicate(timeout=_TIMEOUT)[0])
        finally:
            for process in processes:
                process.kill()
        if any(process.returncode for process in processes):
            raise RuntimeError(f"{title}: a process ended early\n" + "\n".join(outputs))
        found = [json.loads(path.read_text("utf-8")) for path in paths]
    return {
        kind: max((results[kind] for results in found), key=lambda result: result[0] == "failed")
        for kind in kinds
    }


def main() -> None:
    """Be one of the processes."""
    import traceback
    import warnings

    import torch.distributed as dist
    from cell import Cell, run
    from cells import FEATURES, kind_of

    title, kinds, path = sys.argv[1:]
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    feature = next(feature for feature in FEATURES if feature.title == title)
    results = {}
    for kind in kinds.split(","):
        try:
            outcome = run(Cell(feature, kind_of(kind)))
            results[kind] = [outcome.verdict, outcome.detail]
        except Exception:
            results[kind] = ["failed", traceback.format_exc()]
    Path(path).write_text(json.dumps(results), "utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
