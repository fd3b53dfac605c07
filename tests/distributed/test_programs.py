"""Programs of several processes under ``gradscope run``, and what is left when one is killed."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import gradscope

sys.path.insert(0, str(Path(__file__).parent))
from launching import HERE, free_port, run_program, run_ranks, start_ranks

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")

LOOPS = str(HERE / "loops.py")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_ranks_that_a_program_starts_are_watched(method: str, tmp_path: Path) -> None:
    found = tmp_path / "findings.json"
    run = ["-m", "gradscope", "run", "--findings", str(found), LOOPS, method]
    done = run_program([*run, "other_seeds"])
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert done.stderr.count("ranks-out-of-sync") == 2  # one screen: its line, and the finding
    document = json.loads(found.read_text())
    assert [finding["code"] for finding in document["findings"]] == ["GS801"]
    assert document["steps"] == 12


def test_ranks_that_torchrun_starts_write_one_run(tmp_path: Path) -> None:
    run = ["-m", "gradscope", "run", "-o", str(tmp_path / "run")]
    first, second = run_ranks([*run, LOOPS, "env", "past_the_wrapper"])
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "GS802" in first[2]
    assert second[1:] == ("", "")  # the first speaks for all
    opened = gradscope.open(tmp_path / "run")
    assert opened.ranks == (0, 1)
    assert [finding.code for finding in opened.findings] == ["GS802"]
    again = run_ranks([*run, "--force", LOOPS, "env", "wrapped"])
    assert [rank[0] for rank in again] == [0, 0], again
    assert "no defect found" in again[0][2]
    assert gradscope.open(tmp_path / "run").findings.unchecked == {}


SWEEP = """
import multiprocessing, sys, torch
from torch import nn

def train(seed):
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(10):
        x = torch.randn(8, 4)
        optimizer.zero_grad()
        loss = ((model(x) - x.sum(1, keepdim=True)) ** 2).mean()
        loss.backward()
        optimizer.step()

def nothing(seed):
    torch.zeros(1)

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    if sys.argv[1] == "pool":
        with context.Pool(1) as pool:  # which ends its workers by a signal
            pool.map(train, [0])
        sys.exit()
    target = {"train": train, "nothing": nothing}[sys.argv[1]]
    workers = [context.Process(target=target, args=(n,)) for n in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if sys.argv[2] == "too":
        train(5)
"""


@pytest.mark.parametrize(
    ("workers", "parent", "ranks"),
    [("train", "too", (0, 1, 2)), ("nothing", "too", (0,)), ("pool", "not", (0,))],
)
def test_processes_that_train_for_themselves(
    workers: str, parent: str, ranks: tuple[int, ...], tmp_path: Path
) -> None:
    program = tmp_path / "sweep.py"
    program.write_text(SWEEP)
    run = ["-m", "gradscope", "run", "-o", str(tmp_path / "run"), str(program)]
    done = run_program([*run, workers, parent])
    assert done.returncode == 0, done.stderr
    opened = gradscope.open(tmp_path / "run")
    assert opened.ranks == ranks
    assert opened.about["how_it_ended"] in ("finished", "SIGTERM" if workers == "pool" else "")
    assert "no defect found" in done.stderr
    assert {len(run.frame("steps")) for run in opened._recording.ranks.values()} == {10}


WATCHED_EARLY = """
import os, sys, torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import gradscope

def train(rank, path, port):
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    net = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    with gradscope.watch(net, optimizer, save=path):  # before it is known which rank this is
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        dist.init_process_group("gloo", rank=1 - rank, world_size=2)
        model = DistributedDataParallel(net)
        for step in range(6):
            x = torch.randn(8, 4)
            optimizer.zero_grad()
            ((model(x) - x.sum(1, keepdim=True)) ** 2).mean().backward()
            optimizer.step()
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.start_processes(train, tuple(sys.argv[1:]), nprocs=2, start_method="fork")
"""


def test_who_is_which_rank_is_told_when_something_trains(tmp_path: Path) -> None:
    program = tmp_path / "early.py"
    program.write_text(WATCHED_EARLY)
    done = run_program([str(program), str(tmp_path / "run"), free_port()])
    assert done.returncode == 0, done.stderr
    run = gradscope.open(tmp_path / "run")
    assert run.ranks == (0, 1)
    assert {each.world_size for each in run._recording.ranks.values()} == {2}
    assert run.steps.groupby("rank").size().tolist() == [6, 6]
    assert not run.findings.at_least(gradscope.Severity.WARNING)


AGAIN = """
import sys, torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import gradscope

dist.init_process_group("gloo")
for start in range(2):
    torch.manual_seed(start)  # the second start has other weights, on all ranks
    model = DistributedDataParallel(nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.manual_seed(dist.get_rank())
    with gradscope.watch(model, optimizer, save=sys.argv[1]):
        for step in range(5 + dist.get_rank() * (1 - start)):
            x = torch.randn(8, 4)
            optimizer.zero_grad()
            with model.no_sync():  # so that one rank can make a step more
                loss = ((model(x) - x.sum(1, keepdim=True)) ** 2).mean()
                loss.backward()
            dist.barrier() if step < 5 else None
            optimizer.step()
    dist.barrier()
dist.destroy_process_group()
"""


def test_each_rank_goes_on_where_it_has_ended(tmp_path: Path) -> None:
    program = tmp_path / "again.py"
    program.write_text(AGAIN)
    for status, _, errors in run_ranks([str(program), str(tmp_path / "run")]):
        assert status == 0, errors
    run = gradscope.open(tmp_path / "run")
    assert run.ranks == (0, 1)
    seams = run.events.query("event == 'seam'").set_index("rank")["step"].to_dict()
    assert seams == {0: 5, 1: 6}
    for rank, n_steps in ((0, 10), (1, 11)):
        assert run.steps.query(f"rank == {rank}")["step"].tolist() == list(range(n_steps))


FORKED = """
import os, sys, torch
from torch import nn

def train(lr):
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for step in range(10):
        x = torch.randn(8, 4)
        optimizer.zero_grad()
        ((model(x) - x.sum(1, keepdim=True)) ** 2).mean().backward()
        optimizer.step()

torch.set_num_threads(1)
children = []
for number in range(2):
    child = os.fork()
    if child == 0:
        train(0.01 * number)
        os._exit(0) if number == 0 else sys.exit(3)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


def finding_in(text: str, folder: Path, stdout: str) -> dict[str, Any]:
    """The one finding about a program, which prints this."""
    program, found = folder / "program.py", folder / "findings.json"
    program.write_text(text)
    done = run_program(["-m", "gradscope", "run", "--findings", str(found), str(program)])
    assert (done.returncode, done.stdout) == (0, stdout), done.stderr
    (finding,) = json.loads(found.read_text())["findings"]
    return finding


def test_what_goes_wrong_in_one_forked_child_is_found(tmp_path: Path) -> None:
    finding = finding_in(FORKED, tmp_path, "[0, 3]\n")
    assert finding["name"] == "zero-learning-rate"
    assert "of 2)" in finding["message"]


LATE = """
import multiprocessing, sys

def train(lr):
    before = "torch" in sys.modules
    import torch
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for step in range(10):
        x = torch.randn(8, 4)
        optimizer.zero_grad()
        ((model(x) - x.sum(1, keepdim=True)) ** 2).mean().backward()
        optimizer.step()
    print(before)

if __name__ == "__main__":
    worker = multiprocessing.get_context("spawn").Process(target=train, args=(0.0,))
    worker.start()
    worker.join()
"""


def test_a_worker_imports_torch_when_it_itself_wants_to(tmp_path: Path) -> None:
    finding = finding_in(LATE, tmp_path, "False\n")
    assert finding["name"] == "zero-learning-rate"


ENDLESS = """
import sys, time, torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import gradscope
from gradscope.run.directory import writer

writer.FLUSH_SECONDS = 0.2
dist.init_process_group("gloo")
model = DistributedDataParallel(nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
with gradscope.watch(model, optimizer, save=sys.argv[1]):
    while True:
        x = torch.randn(8, 4)
        optimizer.zero_grad()
        ((model(x) - x.sum(1, keepdim=True)) ** 2).mean().backward()
        optimizer.step()
        time.sleep(0.01)
"""


def test_a_rank_that_is_killed_leaves_a_run_that_can_be_read(tmp_path: Path) -> None:
    program, run = tmp_path / "endless.py", tmp_path / "run"
    program.write_text(ENDLESS)
    ranks = start_ranks([str(program), str(run)])
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                opened = gradscope.open(run)
                if opened.ranks == (0, 1) and opened.steps.groupby("rank").size().min() > 20:
                    break
            except (gradscope.GradscopeError, ValueError):
                pass
            time.sleep(0.1)
        os.kill(ranks[1].pid, signal.SIGKILL)
        ranks[0].communicate(timeout=60)  # its collective fails
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    opened = gradscope.open(run)
    assert opened.ranks == (0, 1)
    assert opened.about["how_it_ended"] == "RuntimeError"
    assert any(note.startswith("rank 1: the run has not ended") for note in opened.notes)
    assert (opened.steps.groupby("rank").size() > 20).all()
    assert not opened.findings.at_least(gradscope.Severity.WARNING)
