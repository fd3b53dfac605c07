"""One parameter's step, summed up."""

from __future__ import annotations

import copy
import json
import math
import pickle

import numpy as np
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
    assert json.loads(json.dumps(summary.to_dict(), allow_nan=False))["step"] == 1


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


def test_states_before_and_after_are_told_once() -> None:
    """A moment's norm is in the table of moments; what is not there comes from that of states."""
    state = [
        {"key": key, "when": when, "norm": norm, "value": value}
        for key, when, norm, value in [
            ("exp_avg", "before", 1.0, math.nan),
            ("exp_avg", "after", 2.0, math.nan),
            ("step", "before", 3.0, 3.0),
            ("step", "after", 4.0, 4.0),
            ("eta", "after", 0.25, 0.25),
            ("prev", "before", 5.0, math.nan),
            ("prev", "after", 6.0, None),
        ]
    ]
    moments = {"exp_avg_norm_before": 1.0, "exp_avg_norm_after": 2.0, "step_count": 4.0}
    facts = dict(ParameterSummary("w", 3, {"moments": moments, "state": state}).facts)
    assert facts["exp_avg"] == "norm 1 → 2"
    assert facts["eta"] == "0.25"
    assert facts["prev"] == "norm 5 → 6"
    assert "step" not in facts
    assert facts["optimizer"] == "own step count 4"
    without = dict(ParameterSummary("w", 3, {"state": state}).facts)
    assert without["step"] == "3 → 4"


def test_least_mean_and_greatest_and_percentages() -> None:
    rows = {
        "moments": {
            "denominator_min": 0.1,
            "denominator_mean": 0.2,
            "denominator_max": math.inf,
        },
        "updates": {"update_ratio": 0.0123456, "weight_norm_after": 2.0, "unchanged_fraction": 0.5},
    }
    facts = dict(ParameterSummary("w", 3, rows).facts)
    assert facts["denominator"] == "least 0.1 · mean 0.2 · greatest inf"
    assert facts["update"] == "1.23 % of the weight's norm"
    assert facts["weight"] == "norm 2"
    assert facts["elements"] == "50 % left unchanged by rounding"


def test_its_plain_data_is_json_to_the_letter() -> None:
    rows = {
        "params": {"group": pd.NA, "numel": np.int64(3)},
        "updates": {"update_norm": np.float32(math.nan), "frozen": np.bool_(True)},
        "state": [{"key": "eta", "when": "after", "value": -math.inf}],
    }
    summary = ParameterSummary("w", 3, rows)
    assert json.loads(json.dumps(summary.to_dict(), allow_nan=False)) == {
        "param": "w",
        "step": 3,
        "params": {"group": None, "numel": 3},
        "updates": {"update_norm": "nan", "frozen": True},
        "state": [{"key": "eta", "when": "after", "value": "-inf"}],
    }


def test_it_can_be_copied_and_pickled() -> None:
    summary = ParameterSummary("w", 3, {"params": {"shape": "(2,)"}})
    for other in (copy.deepcopy(summary), pickle.loads(pickle.dumps(summary))):
        assert str(other) == str(summary)
        assert "scope.explain('w', index)" in str(other)


def test_a_long_fact_is_broken_beside_its_label() -> None:
    options = ", ".join(f"option_{i}" for i in range(20))
    lines = str(ParameterSummary("w", 3, {"groups": {"options": options}})).splitlines()
    assert max(map(len, lines)) <= 100
    (first, *others) = [line for line in lines if "option_" in line]
    assert others
    assert {len(line) - len(line.lstrip()) for line in others} == {first.index("option_0")}


def test_names_are_escaped() -> None:
    shown = ParameterSummary("<b>&", 0, {"params": {"shape": "<i>"}})._repr_html_()
    assert "<b>&</b>" not in shown.replace("<b>&lt;b&gt;&amp;, step 0</b>", "")
    assert "&lt;i&gt;" in shown
    assert "<i>" not in shown
