"""A run equals itself and its twin; a run with one thing changed is told where it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from twin_loops import Loop, changed, run

import gradscope
from gradscope.cli import main
from gradscope.errors import RunDirectoryError, UsageError
from gradscope.scope import Scope

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(gradscope.__file__).parents[1])}


@pytest.fixture(scope="module")
def usual() -> Scope:
    return run(Loop())


@dataclass(frozen=True)
class Expected:
    step: int | None
    stage: str
    said: str
    param: str = ""


CHANGES = {
    "another seed": (
        changed(seed=1),
        Expected(None, "initial_weights", "4 of 6 parameters begin with other", "encoder.weight"),
    ),
    "another first weight": (
        changed(first_weight=0.01),
        Expected(None, "initial_weights", "head.weight begins with other values", "head.weight"),
    ),
    "another lr": (
        changed(lr=2e-2),
        Expected(0, "hyperparameters", "lr is 0.01 in A and 0.02 in B (group 0 of optimizer)"),
    ),
    "another lr from step 5": (
        changed(lr_from=(5, 1e-3)),
        Expected(5, "hyperparameters", "lr is 0.01 in A and 0.001 in B"),
    ),
    "other betas": (
        changed(betas=(0.9, 0.99)),
        Expected(0, "hyperparameters", "beta2 is 0.999 in A and 0.99 in B"),
    ),
    "another weight decay": (
        changed(weight_decay=0.1),
        Expected(0, "hyperparameters", "weight_decay is 0.01 in A and 0.1 in B"),
    ),
    "another optimizer": (
        changed(kind="SGD"),
        Expected(0, "hyperparameters", "is AdamW in A and SGD in B"),
    ),
    "another group": (
        changed(two_groups=True),
        Expected(0, "hyperparameters", "head.bias is in group 0 of optimizer in A and in group 1"),
    ),
    "a forgotten zero_grad": (
        changed(no_zero_grad_from=5),
        Expected(5, "order", "zero_grad is missing in B"),
    ),
    "an extra clip": (changed(clip=0.1), Expected(0, "order", "clip is in B only")),
    "an extra clip from step 5": (
        changed(clip=0.1, clip_from=5),
        Expected(5, "order", "clip is in B only"),
    ),
    "another limit of the clip": (
        changed(clip=0.2, usual={"clip": 0.1}),
        Expected(0, "order", "limit 0.1, 6 gradients in A and clip_grad_norm_, limit 0.2"),
    ),
    "eval left on": (changed(eval_from=5), Expected(5, "order", "eval mode in B")),
    "an optimizer made anew": (
        changed(anew_at=5),
        Expected(5, "state_before", "the optimizer has no state (step, exp_avg, exp_avg_sq)"),
    ),
    "a state that was emptied": (
        changed(emptied_at=5),
        Expected(5, "state_before", "no state (step, exp_avg, exp_avg_sq) of encoder.weight"),
    ),
    "a weight nudged between steps": (
        changed(nudge=(5, 0.01)),
        Expected(5, "weights_before", "of encoder.weight (norm", "encoder.weight"),
    ),
    "other data": (changed(data_seed=2), Expected(0, "inputs", "the input of Classifier differs")),
    "data of another scale": (changed(scale=2.0), Expected(0, "inputs", "the input of Classifier")),
    "other data from step 5": (
        changed(data_from=5),
        Expected(5, "loss", "the loss differs", ""),
    ),
    "a detach": (
        changed(cut_from=0),
        Expected(0, "graph", "leads to the loss in A and is cut off in B"),
    ),
    "a detach from step 5": (
        changed(cut_from=5),
        Expected(5, "graph", "encoder.weight and 3 more have no gradient in B"),
    ),
    "a softmax": (changed(softmax=True), Expected(0, "graph", "softmax 16 × 3 is in B only")),
    "another dropout": (
        changed(p=0.5),
        Expected(0, "forward", "drop (Dropout) is set to p=0.1 in A and to p=0.5 in B"),
    ),
    "a summed loss": (
        changed(reduction="sum"),
        Expected(0, "loss", "the loss reduction is mean in A and sum in B"),
    ),
    "an edited gradient": (
        changed(gradient_factor=(5, 0.5)),
        Expected(5, "gradients", "gradients differ: of norm.weight (norm", "norm.weight"),
    ),
    "another width": (
        changed(width=9),
        Expected(None, "parameters", "another shape: (8, 6) in A and (9, 6) in B"),
    ),
    "another dtype": (
        changed(dtype=torch.float64),
        Expected(None, "parameters", "float32 in A and float64 in B"),
    ),
    "a frozen parameter": (
        changed(frozen="encoder.bias"),
        Expected(None, "parameters", "encoder.bias is trained in A and frozen in B"),
    ),
    "frozen from step 5": (
        changed(frozen_from=5),
        Expected(5, "parameters", "encoder.bias is trained in A and frozen since step 5 in B"),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_one_changed_thing_is_told_where_it_starts(usual: Scope, change: str) -> None:
    loop, expected = CHANGES[change]
    found = gradscope.diff(run(changed(**loop.usual)) if loop.usual else usual, run(loop))
    first = found.first
    assert first is not None
    assert (first.step, first.stage) == (expected.step, expected.stage)
    assert expected.said in first.message
    if expected.param:
        assert first.param == expected.param
    assert not first.like_rounding
    assert not found.looks_like_rounding
    assert repr(found).startswith(f"✗ {first.when}: ")
    assert len(repr(found).splitlines()) <= 40
    json.dumps(found.to_dict(), allow_nan=False)
    assert list(found.to_pandas()["stage"]) == [each.stage for each in found.differences]


@pytest.mark.parametrize("change", ["another lr", "a forgotten zero_grad", "a detach"])
def test_the_other_way_round_the_sides_change_places(usual: Scope, change: str) -> None:
    twin = run(CHANGES[change][0])
    there, back = gradscope.diff(usual, twin).first, gradscope.diff(twin, usual).first
    assert there is not None
    assert back is not None
    assert (back.step, back.stage) == (there.step, there.stage)
    assert [(fact.a, fact.b) for fact in back.facts if fact.what in ("lr, group 0", "zeroed")] == [
        (fact.b, fact.a) for fact in there.facts if fact.what in ("lr, group 0", "zeroed")
    ]


@pytest.mark.parametrize(
    "loop",
    [
        Loop(),
        changed(clip=0.1),
        changed(kind="SGD"),
        changed(dtype=torch.float64),
        changed(dtype=torch.bfloat16),
        changed(no_zero_grad_from=5),
        changed(lr=1e30),
    ],
    ids=str,
)
def test_a_run_equals_itself_and_its_twin(loop: Loop) -> None:
    a, b = run(loop), run(loop)
    for found in (gradscope.diff(a, a), gradscope.diff(a, b)):
        assert not found
        assert found.first is None
        assert found.to_dict()["equal"] is True
        assert not len(found.to_pandas())
        assert repr(found).startswith("✓ equal: nothing that both runs recorded differs, in ")
    stages = gradscope.diff(a, b).comparison.compared
    assert {"order", "inputs", "graph", "forward", "loss", "gradients", "update"} <= set(stages)
    assert {"state_after", "state_before", "weights_before", "weights_after"} <= set(stages)


def test_other_steps_recorded_in_full_part_no_twins(usual: Scope) -> None:
    for options in ({"every": 3}, {"every": None}, {"every": 5, "graph": "every"}):
        found = gradscope.diff(usual, run(Loop(), **options))
        assert not found, found
        assert any("recorded in full in both" in note for note in found.comparison.not_compared)


def test_a_shorter_run_is_equal_as_far_as_it_goes(usual: Scope) -> None:
    found = gradscope.diff(usual, run(changed(steps=7)))
    assert not found
    assert found.comparison.n_steps == (12, 7)
    assert "A has 12 steps and B 7: the first 7 are in both" in repr(found)


def test_a_run_that_ends_in_the_midst_of_a_step_has_not_parted(
    usual: Scope, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        run(changed(raises_in=6), tmp_path / "run")
    cut = gradscope.open(tmp_path / "run")
    assert list(cut.steps["outcome"])[-1] == "open"
    for pair in ((usual, cut), (cut, usual)):
        found = gradscope.diff(*pair)
        assert not found, found
        assert found.comparison.n_common == 6
        assert f"step 6: {'AB'[pair.index(cut)]} ended in the midst of it" in repr(found)


def test_what_precedes_the_difference_is_equal(usual: Scope) -> None:
    found = gradscope.diff(usual, run(changed(data_from=5)))
    first = found.first
    assert first is not None
    assert "all weights before it are equal" in first.message
    assert first.hint == "left as its cause: the inputs, or a random number, such as dropout's"
    assert {fact.what for fact in first.facts} == {
        "loss",
        "inputs at step 4",
        "weights at step 5",
    }
    loss = usual.steps["loss"][5]
    other = first.b
    assert first.a == loss
    assert first.relative == pytest.approx(abs(loss - other) / max(loss, other))


def test_what_was_not_recorded_in_between_is_said() -> None:
    a, b = (run(each, every=20) for each in (Loop(), changed(nudge=(5, 0.01))))
    first = gradscope.diff(a, b).first
    assert first is not None
    assert (first.step, first.stage) == (5, "loss")
    assert "all weights before it are equal" not in first.message
    assert "an update since step 0, whose weights were not recorded in both" in first.hint


def test_rounding_is_told_apart_and_followed(usual: Scope) -> None:
    found = gradscope.diff(usual, run(changed(first_weight=2e-8)))
    first = found.first
    assert first is not None
    assert first.like_rounding
    assert found.looks_like_rounding
    assert found  # any difference counts
    assert "that looks like rounding" in repr(found)
    assert repr(found).startswith("≈ ")
    steps = [each.step for each in found.comparison.growth]
    assert steps[0] == 0
    assert steps[-1] == 11
    assert max(each.loss for each in found.comparison.growth) < 1e-6


@pytest.mark.parametrize(
    ("change", "step", "stage"),
    [({"no_zero_grad_from": 7}, 7, "order"), ({"data_from": 7}, 7, "loss")],
)
def test_a_real_difference_among_rounding_is_found(
    usual: Scope, change: dict[str, Any], step: int, stage: str
) -> None:
    found = gradscope.diff(usual, run(changed(first_weight=2e-8, **change)))
    beyond = found.comparison.beyond_rounding
    assert beyond is not None
    assert (beyond.step, beyond.stage) == (step, stage)
    assert not found.looks_like_rounding
    assert f"but then, step {step}" in repr(found).replace("\n", " ")


def test_rtol_passes_over_small_differences(usual: Scope) -> None:
    twin = run(changed(first_weight=2e-8))
    assert gradscope.diff(usual, twin)
    assert not gradscope.diff(usual, twin, rtol=1e-4)
    assert gradscope.diff(usual, run(changed(lr=2e-2)), rtol=1e-4)
    assert not gradscope.diff(usual, run(changed(lr=1.0001e-2)), rtol=0.5)


def test_the_numbers_are_those_of_the_tables(usual: Scope) -> None:
    twin = run(changed(gradient_factor=(5, 0.5)))
    first = gradscope.diff(usual, twin).first
    assert first is not None
    for scope, value in ((usual, first.a), (twin, first.b)):
        grads = scope.grads
        row = grads[(grads["step"] == 5) & (grads["param"] == "norm.weight")]
        assert value == row["norm"].item()
    assert first.relative == pytest.approx(0.5, rel=1e-3)
    assert (first.n_different, first.n_compared) == (1, 6)


def test_a_gradient_that_vanished_against_others_is_rounding() -> None:
    """What a bias before a normalisation gets is noise, however large beside itself."""
    from gradscope.comparison.numbers import relative

    whole = np.array([1.0])
    assert relative([1e-9], [3e-9])[0] > 0.5
    assert relative([1e-9], [3e-9], whole)[0] < 1.3e-6


def test_equal_numbers_are_those_that_are_the_same() -> None:
    from gradscope.comparison.numbers import in_digits, relative

    nan, inf = float("nan"), float("inf")
    apart = relative([1.0, nan, inf, nan, inf, 0.0, -1.0], [1.0, nan, inf, 1.0, -inf, 0.0, 1.0])
    assert apart.tolist() == [0.0, 0.0, 0.0, inf, inf, 0.0, 2.0]
    assert relative([1.0], [np.nextafter(1.0, 2.0)])[0] > 0
    assert in_digits(1.0, 1.0 + 1e-9) == ("1", "1.000000001")


def test_orders_are_read_as_they_are_spelled() -> None:
    from gradscope.comparison.pair import events_of
    from gradscope.session.ledger import spell_order

    for order in (
        ["zero_grad", "forward", "backward", "step"],
        ["zero_grad", *["forward", "backward"] * 3, "clip", "step"],
        ["forward"] * 4 + ["backward", "step"],
    ):
        assert events_of(spell_order(order)) == order


def test_runs_that_share_no_step_cannot_be_compared(usual: Scope) -> None:
    with pytest.raises(UsageError, match=r"nothing to compare.*12 steps and 0 steps"):
        gradscope.diff(usual, run(changed(steps=0)))


@pytest.mark.parametrize("rtol", [-1, float("nan"), float("inf"), "a", True])
def test_what_is_no_tolerance_is_refused(usual: Scope, rtol: Any) -> None:
    with pytest.raises(UsageError, match="rtol="):
        gradscope.diff(usual, usual, rtol=rtol)


def test_what_is_no_run_is_refused(usual: Scope, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a=3"):
        gradscope.diff(3, usual)  # type: ignore[arg-type]
    with pytest.raises(RunDirectoryError, match="there is no"):
        gradscope.diff(usual, tmp_path / "nothing")


# -- directories and the command line -------------------------------------------------------


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, loop in (
        ("a", Loop()),
        ("twin", Loop()),
        ("b", changed(no_zero_grad_from=5)),
    ):
        run(loop, folder / name)
    return folder


def test_directories_and_scopes_compare_alike(directories: Path, usual: Scope) -> None:
    assert not gradscope.diff(directories / "a", usual)
    assert not gradscope.diff(gradscope.open(directories / "a"), str(directories / "twin"))
    of_directories = gradscope.diff(directories / "a", directories / "b")
    of_scopes = gradscope.diff(usual, run(changed(no_zero_grad_from=5)))
    assert of_directories.differences == of_scopes.differences


def test_the_exit_status_says_whether_they_part(
    directories: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    a, twin, b = (str(directories / name) for name in ("a", "twin", "b"))
    assert main(["diff", a, twin]) == 0
    assert capsys.readouterr().out.startswith("✓ equal")
    assert main(["diff", a, b]) == 1
    out = capsys.readouterr().out
    assert out.startswith("✗ step 5: the order of events differs: zero_grad is missing in B\n")
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 100
    assert main(["diff", a, str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "holds no run" in captured.err
    assert captured.out == ""
    for arguments in (["diff", a], ["diff", a, b, "--rtol", "-1"], ["diff", a, b, "--rtol", "x"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2


def test_json_is_one_document_with_every_key(
    directories: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = str(directories / "a"), str(directories / "b")
    assert main(["diff", a, b, "--format", "json"]) == 1
    document = json.loads(capsys.readouterr().out)
    page = (Path(__file__).parents[2] / "docs" / "diff.md").read_text("utf-8")
    for key in (
        *document,
        *document["first"],
        *document["growth"][0],
        *document["first"]["facts"][0],
    ):
        assert f'"{key}"' in page, key
    assert document["a"] == {"run": a, "steps": 12}
    assert document["equal"] is False
    assert document["first"]["step"] == 5
    assert document["first"] == document["differences"][0]


SCRIPT = """
import sys, torch
torch.manual_seed(0)
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for step in range(8):
    if step == int(sys.argv[1]):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    optimizer.zero_grad()
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
"""


@pytest.mark.slow
def test_an_optimizer_made_anew_is_told_of_scripts_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.py").write_text(SCRIPT, "utf-8")
    for name, at in (("a", "-1"), ("b", "5")):
        subprocess.run(
            [sys.executable, "-m", "gradscope", "run", "-o", name, "train.py", at],
            env=ENVIRONMENT,
            cwd=tmp_path,
            capture_output=True,
            check=True,
            timeout=120,
        )
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    out = capsys.readouterr().out
    said = "✗ step 5: this is a step of optimizer in A and of optimizer#2 in B\n"
    assert out.startswith(said)
    assert "it is new in B: made anew, or another variable" in out
    command = next(line for line in out.splitlines() if line.strip().startswith("command"))
    assert command.split() == ["command", "…", "train.py", "-1", "…", "train.py", "5"]


@pytest.mark.parametrize("columns", ["40", "80"])
def test_a_narrow_window_is_respected(directories: Path, columns: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gradscope", "diff", "a", "b"],
        env={**ENVIRONMENT, "COLUMNS": columns, "NO_COLOR": "1"},
        cwd=directories,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= int(columns)
    assert "zero_grad" in done.stdout
    assert "\x1b" not in done.stdout


def test_runs_are_compared_where_there_is_no_torch(directories: Path) -> None:
    program = """
import sys
sys.modules["torch"] = None  # importing it raises ImportError
import gradscope
from gradscope.cli import main
print(repr(gradscope.diff("a", "b")))
assert main(["diff", "a", "twin"]) == 0
sys.exit(main(["diff", "a", "b", "--format", "json"]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env=ENVIRONMENT,
        cwd=directories,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr == ""
    assert done.returncode == 1
    assert "✗ step 5: the order of events differs: zero_grad is missing in B" in done.stdout


def test_names_of_a_program_do_nothing_to_a_terminal(usual: Scope) -> None:
    from dataclasses import replace

    from gradscope.views.run_difference import plain_text

    found = gradscope.diff(usual, run(changed(lr=2e-2)))
    first = found.first
    assert first is not None
    hostile = replace(first, message="\x1b[31m[bold]x\n" + "y" * 10_000)
    comparison = replace(found.comparison, differences=(hostile,))
    text = plain_text(("\x1b]0;x\x07", "b"), comparison)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[bold]x" in text
    assert len(text) < 5_000
