"""Memory stays within its limit however long a run is, and what stays tells the same story."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from recorded_loops import perceptron
from torch.nn import functional as F

import gradscope
from gradscope.run.entries import OptimizerEntry, ParameterEntry
from gradscope.run.recording import Recording
from gradscope.run.schema import STATUSES

N_PARAMS = 20


def record(
    n_steps: int, most_bytes: int, strange: dict[int, dict[str, Any]] | None = None
) -> Recording:
    """A recording of a run of two optimizers that take turns."""
    recording = Recording()
    recording.most_row_bytes = most_bytes
    recording.parameters = [ParameterEntry(f"p.{number}") for number in range(N_PARAMS)]
    recording.optimizers = [OptimizerEntry("first", "SGD"), OptimizerEntry("second", "SGD")]
    for step in range(n_steps):
        odd = (strange or {}).get(step, {})
        optimizer = step % 2
        recording.rows("backwards").append({"backward": step, "step": step})
        recording.rows("events").append({"step": step, "event": "zero_grad"})
        recording.rows("groups").append({"step": step, "optimizer": optimizer})
        status = odd.get("status", "fresh")
        recording.rows("grads").extend(
            N_PARAMS,
            {
                "step": step,
                "param": np.arange(N_PARAMS),
                "status": status,
                "nonfinite": odd.get("nonfinite", 0),
            },
        )
        recorded = step % 10 < 2
        if recorded:
            for table in ("updates", "moments", "state"):
                recording.rows(table).extend(N_PARAMS, {"step": step, "param": np.arange(N_PARAMS)})
        counts = {f"n_{name}": N_PARAMS * (name == status) for name in STATUSES}
        recording.rows("steps").append(
            {
                "step": step,
                "optimizer": optimizer,
                "optimizer_step": step // 2,
                "outcome": odd.get("outcome", "stepped"),
                "loss": odd.get("loss", 1.0),
                "grad_norm": odd.get("grad_norm", 1.0),
                "n_backward": 1,
                "recorded": recorded,
                "backwards": str(step),
                **counts,
            }
        )
        recording.steps_ended(step + 1)
    recording.forget_rows()
    return recording


def n_bytes(recording: Recording) -> int:
    return sum(columns.n_bytes for columns in recording._columns.values())


def steps_in(recording: Recording, table: str) -> set[int]:
    return set(recording.rows(table).array("step").tolist())


def test_a_short_run_is_held_as_a_whole() -> None:
    recording = record(500, 2**30)
    assert recording.thinning is None
    assert len(recording.frame("steps")) == 500
    assert recording.notes == []


@pytest.mark.parametrize("n_steps", [2_000, 20_000])
def test_memory_is_bounded(n_steps: int) -> None:
    most = 4 * 2**20
    recording = record(n_steps, most)
    assert n_bytes(recording) <= most
    assert recording.n_steps == n_steps
    (note,) = recording.notes
    assert "memory holds the rows of grads, state, moments and updates for" in note
    assert ("steps, groups and backwards" in note) is (n_steps == 20_000)


def test_the_light_rows_stay_longer_than_the_heavy_ones() -> None:
    recording = record(2_000, 4 * 2**20)
    assert len(steps_in(recording, "grads")) < 1_500
    for table in ("steps", "groups", "backwards", "events"):
        assert steps_in(recording, table) == set(range(2_000)), table


def test_rows_of_one_step_stay_together() -> None:
    recording = record(20_000, 4 * 2**20)
    light, heavy = steps_in(recording, "steps"), steps_in(recording, "grads")
    assert heavy < light < set(range(20_000))
    for table in ("groups", "backwards", "events"):
        assert steps_in(recording, table) == light, table
    for table in ("updates", "moments", "state"):
        assert steps_in(recording, table) == {step for step in heavy if step % 10 < 2}, table
    assert recording.frame("grads").groupby("step").size().eq(N_PARAMS).all()
    assert list(recording.frame("steps")["backwards"]) == [str(step) for step in sorted(light)]


def test_first_last_and_an_even_choice_of_both_optimizers_stay() -> None:
    held = np.array(sorted(steps_in(record(20_000, 4 * 2**20), "grads")))
    assert {*range(60), *range(19_940, 20_000)} <= set(held.tolist())
    middle = held[(held > 1_000) & (held < 19_000)]
    assert np.diff(middle).max() < 20 * np.diff(middle).mean()
    for optimizer in (0, 1):
        assert (middle % 2 == optimizer).mean() > 0.3
    assert (middle % 10 < 2).mean() > 0.1  # recorded in full


@pytest.mark.parametrize(
    "odd",
    [
        {"loss": float("nan")},
        {"grad_norm": float("inf")},
        {"nonfinite": 3},
        {"outcome": "skipped"},
        {"status": "compounded"},
    ],
)
@pytest.mark.parametrize("limit", [4 * 2**20, 2**20])
def test_suspicious_steps_stay(odd: dict[str, Any], limit: int) -> None:
    recording = record(6_000, limit, {3_333: odd})
    assert 3_333 in steps_in(recording, "grads")
    assert 3_333 in steps_in(recording, "steps")


def test_a_run_that_is_suspicious_all_along_is_bounded_too() -> None:
    most = 2 * 2**20
    recording = record(6_000, most, {step: {"loss": float("nan")} for step in range(100, 6_000)})
    assert n_bytes(recording) <= most
    assert {100, 101, 102} <= steps_in(recording, "grads")


def train(path: Path | None, most_bytes: int, steps: int, *, clears: bool) -> gradscope.Scope:
    model = perceptron()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scope = gradscope.watch(model, optimizer, save=path)
    scope._recording.most_row_bytes = most_bytes
    with scope:
        for _ in range(steps):
            x = torch.randn(16, 6)
            if clears:
                optimizer.zero_grad()
            F.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
            optimizer.step()
    return scope


@pytest.mark.parametrize("most_bytes", [300_000, 100_000])
@pytest.mark.parametrize("clears", [True, False])
def test_the_opened_run_holds_what_the_scope_holds(
    tmp_path: Path, most_bytes: int, clears: bool
) -> None:
    scope = train(tmp_path / "run", most_bytes, 700, clears=clears)
    run = gradscope.open(tmp_path / "run")
    assert scope._recording.thinning is not None
    for name, table in scope.tables.items():
        pd.testing.assert_frame_equal(table, run.tables[name], check_exact=True, obj=name)
    assert list(run.findings) == list(scope.findings)
    assert repr(run) == repr(scope)
    # On disk there is everything.
    assert run.dataset("grads").count_rows() == 700 * 4
    assert run.dataset("steps").count_rows() == run.dataset("backwards").count_rows() == 700
    steps = run.table("steps", ["step"])["step"]
    np.testing.assert_array_equal(steps, np.arange(700))


@pytest.mark.parametrize("most_bytes", [300_000, 100_000])
@pytest.mark.parametrize("clears", [True, False])
def test_thinning_changes_no_verdict(most_bytes: int, clears: bool) -> None:
    whole = train(None, 2**30, 700, clears=clears)
    thinned = train(None, most_bytes, 700, clears=clears)
    assert thinned._recording.thinning is not None
    assert [f.code for f in thinned.findings] == [f.code for f in whole.findings]


def test_a_run_of_which_nobody_wrote_what_memory_held_is_read_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "run", 2**30, 700, clears=True)
    monkeypatch.setattr("gradscope.run.recording.MOST_ROW_BYTES", 200_000)
    run = gradscope.open(tmp_path / "run")
    assert 20 < run.grads["step"].nunique() < 600
    assert len(run.steps) == 700
    assert set(run.updates["step"]) <= set(run.grads["step"])
