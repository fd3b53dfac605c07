"""A run that was interrupted goes on in the same directory, and says where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradscope
from gradscope.errors import UsageError
from gradscope.run.directory.layout import read_json, write_json


def model_of(width: int = 8, name: str = "body") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.add_module(name, nn.Linear(6, width))
    model.add_module("head", nn.Linear(width, 3))
    return model


def run_of(path: Path, steps: int, model: Any = None, checkpoint: Any = None) -> Any:
    model = model_of() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if checkpoint is not None:
        model.load_state_dict(checkpoint[0])
        optimizer.load_state_dict(checkpoint[1])
    with gradscope.watch(model, optimizer, save=path, keep="head.bias") as scope:
        for step in range(steps):
            torch.manual_seed(step)
            x = torch.randn(16, 6)
            optimizer.zero_grad()
            logits = model.head(next(iter(model.children()))(x))
            F.cross_entropy(logits, x[:, :3].argmax(1)).backward()
            optimizer.step()
    return scope, (model.state_dict(), optimizer.state_dict())


def test_steps_go_on_and_the_seam_is_marked(tmp_path: Path) -> None:
    first, checkpoint = run_of(tmp_path / "run", 12)
    steps, losses = first.steps, first.steps["loss"].tolist()
    second, _ = run_of(tmp_path / "run", 9, checkpoint=checkpoint)
    assert second.steps["step"].tolist() == list(range(21))
    assert second.steps["optimizer_step"].tolist() == list(range(21))
    assert second.steps["loss"].tolist()[:12] == losses
    pd.testing.assert_frame_equal(second.steps.iloc[:12], steps)
    assert second.backwards["backward"].tolist() == list(range(21))
    assert second.backwards["step"].tolist() == list(range(21))
    (seam,) = second.events.query("event == 'seam'").to_dict("records")
    assert seam["step"] == 12
    assert "gone on with at step 12" in repr(second).splitlines()[0]
    assert second.events["time"].is_monotonic_increasing

    run = gradscope.open(tmp_path / "run")
    for name, table in second.tables.items():
        pd.testing.assert_frame_equal(table, run.tables[name], check_exact=True, obj=name)
    assert list(run.findings) == list(second.findings)
    assert [f for f in run.findings if f.severity] == []
    (start,) = run.about["earlier_starts"]
    assert (start["steps"], start["how_it_ended"]) == (12, "finished")


def test_what_was_kept_before_the_seam_is_still_there(tmp_path: Path) -> None:
    first, checkpoint = run_of(tmp_path / "run", 5)
    explained, graph = repr(first.explain("body.weight", (0, 0), 1)), first.graph(0).to_json()
    tensors = first.tensors("head.bias", 1)
    second, _ = run_of(tmp_path / "run", 5, checkpoint=checkpoint)
    for run in (second, gradscope.open(tmp_path / "run")):
        assert repr(run.explain("body.weight", (0, 0), 1)) == explained
        assert run.graph(0).to_json() == graph
        assert run.graph().step == 5
        assert (run.tensors("head.bias", 1)["gradient"] == tensors["gradient"]).all()
        assert "gradient" in run.tensors("head.bias", 6)


def test_a_run_goes_on_more_than_once(tmp_path: Path) -> None:
    checkpoint = None
    for _ in range(3):
        scope, checkpoint = run_of(tmp_path / "run", 4, checkpoint=checkpoint)
    assert scope.steps["step"].tolist() == list(range(12))
    run = gradscope.open(tmp_path / "run")
    assert run.dataset("steps").count_rows() == 12
    assert len(run.about["earlier_starts"]) == 2


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    _, checkpoint = run_of(tmp_path / "run", 6)
    facts = read_json(tmp_path / "run" / "run.json")
    facts |= {"how_it_ended": None, "ended": None, "pid": 2**22 + 1}  # no process has that one
    write_json(tmp_path / "run" / "run.json", facts)
    (tmp_path / "run" / "grads" / ".part-0000-000001.parquet.writing").write_text("half")
    scope, _ = run_of(tmp_path / "run", 6, checkpoint=checkpoint)
    assert len(scope.steps) == 12
    assert gradscope.open(tmp_path / "run").notes == ()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (model_of(width=9), r"body\.weight.* has the shape \(8, 6\), here \(9, 6\)"),
        (model_of(name="trunk"), r"it has a parameter 'body\.weight'"),
    ],
)
def test_another_training_is_not_mixed_in(tmp_path: Path, model: Any, message: str) -> None:
    scope, _ = run_of(tmp_path / "run", 3)
    with pytest.raises(UsageError, match=f"run of another training.*{message}.*another directory"):
        run_of(tmp_path / "run", 3, model)
    assert len(gradscope.open(tmp_path / "run").steps) == len(scope.steps) == 3


def test_a_larger_model_is_another_training(tmp_path: Path) -> None:
    model = model_of()
    run_of(tmp_path / "run", 3)
    model.add_module("more", nn.Linear(3, 3))
    with pytest.raises(UsageError, match=r"it has no parameter 'more\.weight'"):
        run_of(tmp_path / "run", 3, model)


def test_a_directory_that_is_being_written_is_refused(tmp_path: Path) -> None:
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with (
        gradscope.watch(model, optimizer, save=tmp_path / "run"),
        pytest.raises(UsageError, match="is writing there now"),
    ):
        gradscope.watch(model, optimizer, save=tmp_path / "run")
