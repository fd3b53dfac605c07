"""Programs of several processes under ``gradscope run``, and what is left when one is killed."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

import gradscope

sys.path.insert(0, str(Path(__file__).parent))
from launching import HERE, run_program, run_ranks, start_ranks

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
    [("train", "not", (0, 1)), ("train", "too", (0, 1, 2)), ("nothing", "too", (0,))],
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
    assert "no defect found" in done.stderr
    assert {len(run.frame("steps")) for run in opened._recording.ranks.values()} == {10}


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
