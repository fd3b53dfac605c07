"""The verbs about a recorded run, made to fail at one point after the other.

Run as a program, like ``fault_programs.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[n]) for n in range(3)]
import fault_points  # noqa: E402

if __name__ == "__main__":
    fault_points.install()

import argparse  # noqa: E402
import contextlib  # noqa: E402
import faulthandler  # noqa: E402
import io  # noqa: E402
import tempfile  # noqa: E402
from collections import Counter  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from fault_loops import plain  # noqa: E402
from fault_points import FAULTS, POINTS  # noqa: E402

import gradscope  # noqa: E402
from gradscope.cli import main as gradscope_command  # noqa: E402

VERBS = {
    "summary": (["summary"], None),
    "table": (["table", "steps"], None),
    "table as csv": (["table", "grads"], "out.csv"),
    "explain": (["explain", "0.weight[0,0]"], None),
    "tree": (["graph"], None),
    "tree in a file": (["graph"], "out.txt"),
    "json": (["graph"], "out.json"),
    "picture": (["graph"], "out.dot"),
    "page": (["graph"], "out.html"),
    "report": (["report"], "out.html"),
}
"""Each verb with its arguments, and the file that it writes, if any."""

OLD = b"what was there before"


def record(path: Path) -> None:
    training = plain()
    with gradscope.watch(training.models, training.optimizers, save=path, keep="0.weight"):
        for number in range(4):
            training.step(number)


class Verb:
    """A verb with a file in its way that it may overwrite."""

    def __init__(self, name: str, run: Path, folder: Path) -> None:
        words, output = VERBS[name]
        self.folder = folder
        self.output = None if output is None else folder / output
        self.arguments = [words[0], str(run), *words[1:]]
        if self.output is not None:
            self.arguments += ["-o", str(self.output), "--force"]
        self.run_once()
        self.healthy = self.run_once()
        assert self.healthy[0] == 0, self.healthy

    def run_once(self, fault: tuple[Any, ...] | None = None) -> tuple[Any, str, bytes, list[str]]:
        """Status or error, what was said, what is in the file, and what else lies there."""
        for path in self.folder.iterdir():
            path.unlink()
        if self.output is not None:
            self.output.write_bytes(OLD)
        out, err = io.StringIO(), io.StringIO()
        status: Any
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if fault is not None:
                fault_points.fail_at(*fault)
            try:
                status = gradscope_command(self.arguments)
            except BaseException as error:
                status = error
            if fault is not None:
                fault_points.end_of_faults()
        content = b"" if self.output is None else self.output.read_bytes()
        others = [path.name for path in self.folder.iterdir() if path != self.output]
        return status, err.getvalue(), content, others

    def is_whole(self, content: bytes) -> bool:
        """Whether a file is like the healthy one; a fault may come after it was written."""
        healthy: bytes = self.healthy[2]
        return content[-20:] == healthy[-20:] and abs(len(content) - len(healthy)) < 100

    def judge(self, fault: tuple[Any, ...]) -> list[str]:
        """What a fault has broken that it may not break, in words."""
        status, said, content, others = self.run_once(fault)
        broken = []
        if others:
            broken.append(f"left behind: {others}")
        if isinstance(status, BaseException) and type(status) is not fault[1]:
            broken.append(f"another error: {status!r}")
        if fault[1] is fault_points.BrokenDiskError and status not in (0, 2):
            broken.append(f"no word but a traceback: {status!r}")
        if status == 2 and "broken on purpose" not in said:
            broken.append(f"does not say why: {said!r}")
        if content != OLD and not self.is_whole(content):
            broken.append(f"overwritten by {len(content)} bytes, status {status!r}")
        if self.output is not None and status == 0 and content == OLD:
            broken.append("nothing written, and no word")
        return broken


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--verb", action="append")
    parser.add_argument("--share", type=int, default=1, help="one of so many points")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {"broken": [], "n_faults": 0}
    done: set[int] = set()
    with tempfile.TemporaryDirectory() as folder:
        run, empty = Path(folder) / "run", Path(folder) / "empty"
        record(run)
        empty.mkdir()
        for name in arguments.verb or VERBS:
            verb = Verb(name, run, empty)
            with fault_points.noting() as reached:
                verb.run_once()
            for number in sorted(reached):
                point = POINTS[number]
                is_file = FAULTS.kinds[number] in ("files", "import", "pyarrow")
                share = max(1, arguments.share // 8) if is_file else arguments.share
                if number in done or point.digest % share:
                    continue
                done.add(number)
                error = fault_points.ERRORS[point.digest // 7 % 3]
                faulthandler.dump_traceback_later(120, exit=True)
                broken = verb.judge((number, error, 0, 10**9 if point.digest % 2 else 1))
                faulthandler.cancel_dump_traceback_later()
                report["n_faults"] += 1
                if broken:
                    report["broken"].append([name, str(point), error.__name__, broken])
                    print(f"[{name}] {point} ({error.__name__})", *broken, sep="\n     ")
            print(name, len(reached), "points", flush=True)
    report["n_points"] = len(FAULTS.kinds)
    report["by_kind"] = Counter(FAULTS.kinds.values())
    return fault_points.told(report, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
