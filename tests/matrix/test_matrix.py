"""Every optimizer of torch, in each of its implementations, in every loop: as promised, or said."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from cell import Cell, run
from cells import CELLS, FEATURES, is_quick
from compiled import WithCompiler
from optimizers import Kind, classes
from page import PAGE, SYMBOLS, told

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
]


HERE = CELLS if os.environ.get("GRADSCOPE_ALL_CELLS") == "1" else [*filter(is_quick, CELLS)]
"""All of them take half an hour: ``make matrix`` runs them."""


def cell_param(cell: Cell) -> Any:
    marks = []
    if issubclass(cell.feature, WithCompiler):  # the compiler has warnings of its own
        marks.append(pytest.mark.filterwarnings("ignore"))
    return pytest.param(cell, id=str(cell), marks=marks)


@pytest.mark.parametrize("cell", [cell_param(cell) for cell in HERE])
def test_a_cell_is_what_the_page_says_of_it(cell: Cell) -> None:
    if not cell.feature.can_run_here():
        pytest.skip("there is no compiler of C++")
    outcome = run(cell)
    assert told(cell) in (SYMBOLS[outcome.verdict], None), outcome


def test_every_optimizer_and_loop_has_cells() -> None:
    assert {cell.kind.cls for cell in CELLS if is_quick(cell)} == set(classes())
    quick = {cell.feature for cell in CELLS if is_quick(cell)}
    assert all(f in quick or getattr(f, "backend", "") == "inductor" for f in FEATURES)
    assert len({feature.title for feature in FEATURES}) == len(FEATURES)


def test_the_page_has_a_row_for_every_loop() -> None:
    text = PAGE.read_text("utf-8")
    for feature in FEATURES:
        assert f"\n| {feature.title} | " in text


def test_a_cell_fails_where_the_tables_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradscope.instruments.gradients import GradientReader

    plain = Cell(FEATURES[0], Kind(torch.optim.AdamW, "plain"))
    honest = GradientReader.gradients

    def a_little_larger(self: Any, parameters: Any) -> Any:
        return [None if g is None else g * 1.001 for g in honest(self, parameters)]

    monkeypatch.setattr(GradientReader, "gradients", a_little_larger)
    with pytest.raises(AssertionError):
        run(plain)


def test_a_cell_fails_where_a_bit_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradscope.session.session import Session

    plain = Cell(FEATURES[0], Kind(torch.optim.AdamW, "plain"))
    honest = Session.step_ended

    def draws(self: Any, optimizer: Any) -> None:
        torch.rand(1)
        honest(self, optimizer)

    monkeypatch.setattr(Session, "step_ended", draws)
    with pytest.raises(AssertionError, match="differ by bits"):
        run(plain)
