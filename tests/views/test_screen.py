"""The screen: the verdict, the six lines, and what they say."""

from __future__ import annotations

import xml.dom.minidom
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradscope
from gradscope.errors import UsageError
from gradscope.rules import RULES
from gradscope.run.entries import ParameterEntry
from gradscope.run.recording import Recording
from gradscope.scope import Scope
from gradscope.views.loop import summarize
from gradscope.views.notebook import html
from gradscope.views.terminal import plain_text

LINES = ["parameters", "forward", "zero_grad", "backward", "step", "loss"]


def scope_of(*, clear: bool, steps: int = 30) -> Scope:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, y = torch.randn(64, 6), torch.randint(0, 3, (64,))
    with gradscope.watch(model, optimizer, on_error="raise") as scope:
        for _ in range(steps):
            if clear:
                optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return scope


def test_a_healthy_loop_is_told_line_by_line() -> None:
    scope = scope_of(clear=True)
    steps = scope.steps
    text = str(scope)
    lines = [line.split()[0] for line in text.splitlines() if line[:1].isalpha()]
    assert lines[1:7] == LINES
    text = " ".join(text.split())  # however the lines were broken
    assert "model (Sequential) · optimizer (AdamW) · 30 steps" in text
    assert "✓ no defect found" in text
    assert "optimizer holds 4 of 4 tensors (83 of 83 numbers) in 1 group" in text
    assert "1 call a step, in training mode" in text
    assert f"{steps['graph_nodes'].iloc[0]} graph nodes" in text
    assert "used gradients cleared to None before backward at all 29 later steps" in text
    assert "by optimizer.zero_grad()" in text
    assert "order at all 30 steps: zero_grad, forward, backward, step" in text
    assert "of 120 gradients read by steps: 120 fresh, 0 compounded, 0 stale" in text
    assert f"{steps['loss'].iloc[0]:.4g} first → {steps['loss'].iloc[-1]:.4g} last" in text
    assert "lr 0.01" in text
    assert f"checked: {len(RULES)} rules (gradscope rule --all)" in text


def test_a_finding_is_shown_with_place_and_fix_and_marks_its_line() -> None:
    text = str(scope_of(clear=False))
    assert "✗ missing-zero-grad" in text
    assert "test_screen.py:" in text
    assert "fix: call optimizer.zero_grad()" in text
    assert "← GS201" in next(line for line in text.splitlines() if line.startswith("zero_grad"))
    assert "used gradients NOT cleared before backward at all 29 later steps" in text


def test_the_screen_fits_a_hundred_columns_and_forty_lines() -> None:
    for clear in (True, False):
        lines = str(scope_of(clear=clear)).splitlines()
        assert max(map(len, lines)) <= 100
        assert len(lines) <= 40


@pytest.mark.parametrize(
    ("event", "detail", "said"),
    [
        ("instrument_failed", "step_started: ValueError", "a part of gradscope failed"),
        ("ended", "RuntimeError: out of memory", "before RuntimeError ended the program"),
    ],
)
def test_no_tick_where_nobody_can_say_that_all_is_well(event: str, detail: str, said: str) -> None:
    scope = scope_of(clear=True)
    assert "✓ no defect found" in plain_text(scope._recording)
    row = {"step": 3, "event": event, "detail": detail, "subject": "", "file": ""}
    scope._recording.rows("events").append(row)
    for shown in (plain_text(scope._recording), html(scope._recording)):
        assert "✓" not in shown
        assert "✗" not in shown
        assert "– no defect found" in shown
        assert said in " ".join(shown.split())


def test_an_empty_recording_has_a_screen() -> None:
    run = Recording()
    assert "no step of a watched optimizer was seen" in plain_text(run)
    assert "gradscope" in html(run)
    assert summarize(run).healthy


def test_the_notebook_display_says_the_same_and_is_well_formed() -> None:
    scope = scope_of(clear=False)
    fragment = scope._repr_html_()
    xml.dom.minidom.parseString(fragment.replace("<br>", "<br/>"))
    for word in ("GS201", "missing-zero-grad", "fix:", *LINES):
        assert word in fragment


def test_names_of_the_program_are_escaped_in_the_notebook() -> None:
    run = Recording()
    hostile = "<script>alert('x')</script>"
    run.parameters.append(ParameterEntry(name=hostile))
    run.rows("steps").append({"step": 0, "outcome": "stepped", "order": hostile})
    assert "<script>" not in html(run)
    assert "&lt;script&gt;" in html(run)


def test_square_brackets_in_names_are_text_in_the_terminal() -> None:
    run = Recording()
    run.notes.append("[bold red]not markup[/]")
    assert "[bold red]not markup[/]" in plain_text(run)


def test_a_rich_console_gets_colours() -> None:
    import io

    from rich.console import Console

    out = io.StringIO()
    Console(file=out, force_terminal=True, width=80).print(scope_of(clear=True))
    assert "\x1b[" in out.getvalue()
    assert "no defect found" in out.getvalue()


def test_several_optimizers_are_told_apart() -> None:
    a, b = nn.Linear(3, 1), nn.Linear(3, 1)
    opt_a = torch.optim.SGD(a.parameters(), lr=0.1)
    opt_b = torch.optim.SGD(b.parameters(), lr=0.2)
    with gradscope.watch([a, b], [opt_a, opt_b], on_error="raise") as scope:
        for _ in range(3):
            for model, optimizer in ((a, opt_a), (b, opt_b)):
                optimizer.zero_grad()
                model(torch.ones(1, 3)).sum().backward()
                optimizer.step()
    text = str(scope)
    assert "opt_a: 3 stepped; lr 0.1" in text
    assert "opt_b: 3 stepped; lr 0.2" in text


def test_how_far_a_run_is_where_its_length_is_known(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scope = gradscope.watch(
        model, optimizer, total_steps=1_200, save=tmp_path / "run", on_error="raise"
    )
    with scope:
        for _ in range(12):
            optimizer.zero_grad()
            model(torch.randn(4, 3)).sum().backward()
            optimizer.step()
        assert scope.latest["progress"] == 0.01
        middle = float(scope.steps["step_ms"].median())
        assert scope.latest["seconds_left"] == pytest.approx(1_188 * middle / 1e3)
    assert "12 of 1,200 steps" in repr(scope)
    assert "12 of 1,200 steps" in repr(gradscope.open(tmp_path / "run"))
    plain = gradscope.watch(model, optimizer, on_error="raise")
    with plain:
        optimizer.step()
    assert "progress" not in plain.latest
    assert "1 step in" in repr(plain)


@pytest.mark.parametrize("total", [0, -3, 1.5, "many", True])
def test_a_number_of_steps_that_is_none(total: object) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match="total_steps="):
        gradscope.watch(model, optimizer, total_steps=total)  # type: ignore[arg-type]


def test_an_optimizers_own_count_is_told_where_it_is_not_that_of_its_steps() -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters())

    def screen_of_two_steps() -> str:
        with gradscope.watch(model, optimizer, every=1) as scope:
            for _ in range(2):
                optimizer.zero_grad()
                model(torch.randn(8, 4)).square().mean().backward()
                optimizer.step()
        return " ".join(str(scope).split())

    first, second = screen_of_two_steps(), screen_of_two_steps()
    assert "(step 0 → 1)" in first
    assert "own step count" not in first
    assert "(step 0 → 1), own step count 3 → 4" in second


def test_gradients_that_the_program_computes_and_assigns_are_gradients_all_the_same() -> None:
    torch.manual_seed(0)
    model, own = nn.Linear(4, 3), nn.Linear(4, 3)
    optimizer = torch.optim.Adam(model.parameters())
    with gradscope.watch([model, own], optimizer) as scope:
        for _ in range(5):
            params = list(model.parameters())
            loss = model(torch.randn(5, 4)).square().mean() + 0 * own.weight.detach().sum()
            for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
                p.grad = g
            optimizer.step()
    text = str(scope)
    assert "one step only" not in text
    assert "no backward found a gradient that a step had used" in text
    (line,) = [line for line in text.splitlines() if "never given a gradient" in line] or [""]
    assert "model.weight" not in line


def test_adamax_has_no_second_moment_to_tell_of() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.Adamax(model.parameters())
    with gradscope.watch(model, optimizer) as scope:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(5, 4)).square().mean().backward()
            optimizer.step()
    text = str(scope)
    assert "state: |exp_avg| " in text
    assert "exp_avg_sq" not in text
