"""One parameter's step, summed up."""

from __future__ import annotations

import json
import math

import pandas as pd
import torch
from torch import nn

import gradscope
from gradscope.views.parameter_summary import ParameterSummary


def test_it_says_in_words_what_the_tables_say() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    with gradscope.watch(model, optimizer, every=1, on_error="raise") as scope:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 3)).square().mean().backward()
            optimizer.step()
    summary = scope.explain("weight", step=1)
    text, updates = str(summary), scope.updates
    (row,) = updates[(updates["step"] == 1) & (updates["param"] == "weight")].to_dict("records")
    assert text.startswith("weight, step 1\n")
    assert "(2, 3) · float32 · on cpu" in text
    assert "lr 0.25" in text
    assert f"norm {row['update_norm']:.4g}" in text
    assert f"decay {row['decay_norm']:.4g}" in text
    assert f"{100 * row['update_ratio']:.3g} % of the weight's norm" in text
    assert max(map(len, text.splitlines())) <= 100
    assert summary.rows["updates"]["residual"] == row["residual"]
    assert json.loads(json.dumps(summary.to_dict(), default=str))["step"] == 1


def test_what_is_not_known_is_left_out() -> None:
    rows = {
        "params": {"shape": "(2,)", "dtype": "float32", "group": pd.NA},
        "updates": {"update_norm": 0.5, "residual": math.nan, "optimizer": "opt"},
    }
    summary = ParameterSummary("w", 3, rows)
    labels = [label for label, _ in summary.facts]
    assert "update" in labels
    assert "formula" not in labels
    assert "gradient" not in labels
    assert "nan" not in str(summary).lower()


def test_names_are_escaped() -> None:
    shown = ParameterSummary("<b>&", 0, {"params": {"shape": "<i>"}})._repr_html_()
    assert "<b>&</b>" not in shown.replace("<b>&lt;b&gt;&amp;, step 0</b>", "")
    assert "&lt;i&gt;" in shown
    assert "<i>" not in shown
