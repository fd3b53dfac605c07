"""Two ranks write one run: what is in it, what is found, and that nothing of them is changed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import pytest
import torch
from torch.nn import functional as F

import gradscope
from gradscope.cli import main
from gradscope.errors import OutputExistsError, UsageError
from gradscope.rules.distributed.ranks_out_of_sync import RanksOutOfSync
from gradscope.run.directory.layout import make_room
from gradscope.run.entries import OptimizerEntry, ParameterEntry
from gradscope.run.global_norms import global_norms
from gradscope.run.recording import Recording

pytest.importorskip("torch.distributed")
if not torch.distributed.is_available():
    pytest.skip("torch was built without distributed", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))
import loops
from launching import HERE, run_ranks

Opener = Callable[[str], gradscope.Run]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every loop, run by two ranks without a watch and with one."""
    folder = tmp_path_factory.mktemp("ranks")
    for status, _, errors in run_ranks([str(HERE / "both_ways.py"), str(folder)]):
        assert status == 0, errors
    return folder


@pytest.fixture(scope="module")
def opened(recorded: Path) -> Opener:
    return lambda name: gradscope.open(recorded / name)


def test_the_weights_are_those_without_a_watch_and_nothing_is_left(recorded: Path) -> None:
    for rank in (0, 1):
        results = json.loads((recorded / f"rank{rank}.json").read_text())
        assert set(results) == {*loops.LOOPS, "found live", "no traces"}
        assert all(results.values()), results


@pytest.mark.parametrize("loop", loops.HEALTHY)
def test_nothing_is_found_in_a_healthy_loop(loop: loops.Loop, opened: Opener) -> None:
    run = opened(loop.__name__)
    assert run.ranks == (0, 1)
    assert list(run.findings.at_least(gradscope.Severity.WARNING)) == []
    assert run.findings.unchecked == {}


def test_the_first_step_parameters_and_ranks_are_named(opened: Opener) -> None:
    (finding,) = opened("other_seeds").findings
    assert (finding.code, finding.severity, finding.step_first) == ("GS801", 2, 0)
    assert set(finding.params) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert "between ranks 0 and 1: they began with different weights" in finding.message


def test_the_ranks_that_differ_from_most_are_told_apart() -> None:
    def rank_of(number: int) -> Recording:
        run = Recording()
        run.rank_in_group, run.world_size = number, 4
        run.parameters = [ParameterEntry(name) for name in ("a", "b")]
        run.optimizers = [OptimizerEntry("optimizer", "SGD")]
        for step in (0, 1, 2):
            is_odd = number == 2 and step > 0
            run.rows("checksums").extend(
                2,
                {
                    "step": step,
                    "param": [0, 1],
                    "optimizer": 0,
                    "attempt": step,
                    "weight": [10 + step, 99 if is_odd else 20 + step],
                    "gradient": [5 + step, 7 + step],
                },
            )
        return run

    first = rank_of(0)
    for number in (1, 2, 3):
        first.add_rank(number, rank_of(number))
    (finding,) = RanksOutOfSync().check(first)
    assert finding.message.startswith("b differs on rank 2 from those of ranks 0, 1 and 3: ")
    assert (finding.params, finding.step_first, finding.step_last) == (("b",), 1, 2)


def test_norms_of_parts_that_some_ranks_hold_twice() -> None:
    def rank_of(number: int) -> Recording:
        run = Recording()
        spread = "Replicate() of 2, Shard(dim=0) of 2"
        run.parameters = [ParameterEntry("part", placements=spread), ParameterEntry("whole")]
        steps = [0] if number == 3 else [0, 1]  # the last rank was killed
        for step in steps:
            norms = [3.0 if number % 2 else 4.0, 6.0]
            run.rows("grads").extend(2, {"step": step, "param": [0, 1], "norm": norms})
        return run

    first = rank_of(0)
    for number in (1, 2, 3):
        first.add_rank(number, rank_of(number))
    norms = global_norms(first, "grads")
    assert norms[["step", "param", "norm"]].values.tolist() == [
        [0, "part", 5.0],
        [0, "whole", 6.0],
        [1, "whole", 6.0],
    ]


def test_another_learning_rate_is_named(opened: Opener) -> None:
    (finding,) = opened("other_rates").findings
    assert (finding.code, finding.step_first) == ("GS801", 1)
    assert "lr is 0.1 on rank 0 and 0.2 on rank 1 at step 0" in finding.message


def test_weights_that_only_one_rank_loads_are_found_at_the_next_comparison(opened: Opener) -> None:
    (finding,) = opened("overwritten").findings
    assert (finding.code, finding.step_first) == ("GS801", 8)  # loaded after step 5


def test_a_forward_past_the_wrapper_is_the_cause(opened: Opener) -> None:
    (finding,) = opened("past_the_wrapper").findings
    assert finding.code == "GS802"
    assert [symptom[:5] for symptom in finding.symptoms] == ["GS801"]
    assert "module" in finding.fix


def test_a_rank_without_gradient_is_named(opened: Opener) -> None:
    (finding,) = opened("idle_rank").findings
    assert (finding.code, finding.count) == ("GS803", loops.STEPS)
    assert "on rank 1, at all 12 steps; on rank 0 it has gradients" in finding.message


def test_the_gradients_in_the_tables_are_the_reduced_ones(opened: Opener) -> None:
    run = opened("wrapped")
    grads = run.grads.pivot(index=["step", "param"], columns="rank", values="norm")
    assert len(grads) == 4 * loops.STEPS
    assert (grads[0] == grads[1]).all()
    # The mean of what each rank computes for itself, at the weights that rank 0 began with.
    model = loops.network(seed=0)
    means = [torch.zeros_like(p) for p in model.parameters()]
    for rank in (0, 1):
        x, y = loops.batch(0, rank)
        alone = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        for mean, gradient in zip(means, alone, strict=True):
            mean += gradient / 2
    names = [f"module.{name}" for name, _ in model.named_parameters()]
    wanted = [float(mean.double().norm()) for mean in means]
    np.testing.assert_allclose(grads.loc[0][0].loc[names], wanted, rtol=1e-6)


def test_tables_have_a_rank_and_so_have_the_files(opened: Opener, recorded: Path) -> None:
    run = opened("wrapped")
    for name in ("steps", "params", "groups", "backwards", "events", "checksums"):
        frame = getattr(run, name)
        assert frame.columns[0] == "rank"
        assert set(frame["rank"]) == {0, 1}, name
    chosen = run.table("steps", ["rank", "loss"], where="rank = 1 and step < 3")
    pd.testing.assert_frame_equal(
        chosen, run.steps.query("rank == 1 and step < 3")[["rank", "loss"]].reset_index(drop=True)
    )
    own = ds.dataset(recorded / "wrapped" / "steps").to_table(columns=["rank", "step"])
    assert own.num_rows == 2 * loops.STEPS == run.dataset("steps").count_rows()
    losses = run.steps.pivot(index="step", columns="rank", values="loss")
    assert (losses[0] != losses[1]).all()


def test_a_run_of_one_process_has_no_rank(tmp_path: Path) -> None:
    model = loops.network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradscope.watch(model, optimizer, save=tmp_path / "run") as scope:
        x, y = loops.batch(0, 0)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    run = gradscope.open(tmp_path / "run")
    assert run.ranks == (0,)
    assert "rank" not in run.steps
    assert "rank" not in ds.dataset(tmp_path / "run" / "steps").schema.names
    assert not (tmp_path / "run" / "ranks").exists()
    assert not len(scope.checksums)


def test_parts_of_parameters_come_to_the_norm_of_the_whole(opened: Opener) -> None:
    run = opened("fully_sharded")
    assert set(run.params["placements"]) == {"Shard(dim=0) of 2"}
    first = run.global_norms().query("step == 0").set_index("param")["norm"]
    model = loops.network()
    model.append(torch.nn.LayerNorm(3, bias=False))
    means = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for rank in (0, 1):
        x, y = loops.batch(0, rank)
        alone = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        for mean, gradient in zip(means.values(), alone, strict=True):
            mean += gradient / 2
    assert list(first.index) == list(means)
    np.testing.assert_allclose(first, [m.double().norm() for m in means.values()], rtol=1e-6)
    local = run.grads.query("step == 0 and rank == 0").set_index("param")["norm"]
    assert (local < first).all()
    updates = run.global_norms("updates").query("step == 0").set_index("param")
    np.testing.assert_allclose(
        updates["weight_norm_before"], [p.detach().double().norm() for p in model.parameters()]
    )
    assert run.updates["residual"].max() < 1e-4  # AdamW works on parts as on wholes
    with pytest.raises(UsageError, match="pass 'grads' or 'updates'"):
        run.global_norms("steps")


def test_each_rank_makes_room_for_itself(tmp_path: Path) -> None:
    def made(rank: int, name: str = "run.json") -> Path:
        path = tmp_path / (f"ranks/{rank:04d}" if rank else "") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
        return path

    files = [made(0), made(1), made(2)]
    parts = [tmp_path / "steps" / f"part-{rank:04d}-000000.parquet" for rank in (0, 1, 2)]
    for part in parts:
        part.parent.mkdir(exist_ok=True)
        part.touch()
    with pytest.raises(OutputExistsError, match="overwrite it with --force"):
        make_room("--output", tmp_path, force=False, rank=1, world_size=2)
    make_room("--output", tmp_path, force=True, rank=1, world_size=2)
    assert [file.exists() for file in (*files, *parts)] == [True, False, True, True, False, True]
    made(1)  # it has begun to write, and the first comes late
    make_room("--output", tmp_path, force=True, rank=0, world_size=2)
    assert [file.exists() for file in (*files, *parts)] == [False, True, False, *[False] * 3]
    make_room("--output", tmp_path, force=False, rank=0, world_size=2)
    (tmp_path / "something").touch()
    with pytest.raises(UsageError, match="something else than a run"):
        make_room("--output", tmp_path, force=True, rank=0, world_size=2)


def test_the_verbs_know_of_all_ranks(
    recorded: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["summary", str(recorded / "other_seeds")]) == 0
    assert "between ranks 0 and 1" in " ".join(capsys.readouterr().out.split())
    run = str(recorded / "wrapped")
    assert main(["table", run, "steps", "--where", "step = 3", "--columns", "rank,loss"]) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) == 3
    assert main(["report", run, "-o", str(tmp_path / "run.html")]) == 0
    assert main(["diff", run, run]) == 0
