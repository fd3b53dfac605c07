"""Kept tensors: how many stay, and what is made of one weight of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gradscope.run import kept_tensors
from gradscope.run.kept_tensors import KeptTensors
from gradscope.run.weight_step import GivenTogether

NOTHING = GivenTogether(None, {}, {})


def arrays(step: int, size: int = 10) -> dict[str, Any]:
    return {"weight_before": np.full(size, float(step)), "weight_after": np.full(size, step + 1.0)}


def steps_kept(kept: KeptTensors, param: int = 0) -> list[int]:
    return kept.steps_of(param)


def test_of_the_latest_steps_as_many_as_were_asked_for() -> None:
    kept = KeptTensors(3)
    for step in range(0, 20, 2):
        for param in (0, 5):
            kept.keep(step, param, arrays(step), NOTHING)
    assert steps_kept(kept) == steps_kept(kept, 5) == [14, 16, 18]
    assert steps_kept(kept, 1) == []
    assert kept.tensors(12, 0) is None
    assert not kept.forgot, "nobody asked for more"


def test_beyond_the_bound_the_oldest_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_tensors, "MOST_BYTES", 1_000)
    kept = KeptTensors()
    for step in range(6):  # of 160 bytes each
        kept.keep(step, 0, arrays(step), NOTHING)
    assert steps_kept(kept) == list(range(6))
    assert not kept.forgot
    kept.keep(6, 0, arrays(6), NOTHING)
    assert steps_kept(kept) == list(range(1, 7))
    assert kept.forgot
    kept.keep(7, 0, arrays(7, size=40), NOTHING)
    assert steps_kept(kept) == [5, 6, 7]
    for step in range(8, 30):
        kept.keep(step, 0, arrays(step), NOTHING)
    assert steps_kept(kept) == list(range(24, 30)), "the bytes of what is gone are free again"


def test_one_step_is_kept_however_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_tensors, "MOST_BYTES", 1)
    kept = KeptTensors(5)
    for step in range(3):
        for param in range(2):
            kept.keep(step, param, arrays(step), NOTHING)
        assert steps_kept(kept) == steps_kept(kept, 1) == [step]


def test_what_is_given_out_is_a_copy() -> None:
    kept = KeptTensors()
    kept.keep(0, 0, arrays(3), NOTHING)
    first = kept.tensors(0, 0)
    assert first is not None
    first["weight_before"][:] = 99
    second = kept.tensors(0, 0)
    assert second is not None
    assert (second["weight_before"] == 3).all()


def test_one_weight_with_its_state_on_both_sides() -> None:
    kept = KeptTensors()
    around = {
        "weight_before": np.arange(6.0).reshape(2, 3),
        "gradient": 10 + np.arange(6.0).reshape(2, 3),
        "weight_after": 20 + np.arange(6.0).reshape(2, 3),
        "step_before": np.array(4.0),
        "step_after": np.array(5.0),
        "exp_avg_before": 30 + np.arange(6.0).reshape(2, 3),
        "exp_avg_after": 40 + np.arange(6.0).reshape(2, 3),
        "exp_avg_sq_before": 50 + np.arange(6.0).reshape(2, 3),
        "exp_avg_sq_after": 60 + np.arange(6.0).reshape(2, 3),
    }
    common = GivenTogether("AdamW", {"lr": 0.1, "t_before": 0.0}, {}, loss_scale=2.0)
    kept.keep(7, 3, around, common)
    found = kept.weight(7, 3, 4, (1, 1))
    assert found is not None
    assert found.formula == "AdamW"
    assert found.given == {
        "lr": 0.1,
        "t_before": 4,
        "weight_before": 4,
        "g": 7,
        "m_before": 34,
        "v_before": 54,
        "v_max_before": 0,
        "is_first": False,
    }
    assert found.stored == {"t": 5, "m": 44, "v": 64}
    assert (found.weight_stored, found.index) == (24, (1, 1))
    assert kept.weight(7, 2, 4, (1, 1)) is None
    assert kept.weight(6, 3, 4, (1, 1)) is None


def test_one_weight_of_complex_numbers_and_of_a_rule_unknown() -> None:
    kept = KeptTensors()
    before = np.array([1 + 2j, 3 + 4j], np.complex64)
    around = {"weight_before": before, "weight_after": before + (5 + 6j), "speed_after": before}
    kept.keep(0, 0, around, NOTHING)
    found = kept.weight(0, 0, 3, (1, 1))
    assert found is not None
    assert found.given == {"weight_before": 4}
    assert found.weight_stored == 10
    assert found.stored == {"speed": 4}


def test_one_weight_of_a_rule_for_whole_matrices() -> None:
    kept = KeptTensors()
    around = {
        "weight_before": np.ones((2, 3)),
        "weight_after": np.arange(6.0).reshape(2, 3),
        "gradient": np.full((2, 3), 8.0),
        "row_var_before": np.full((2, 1), 3.0),
        "step_before": np.array(2.0),
    }
    kept.keep(0, 0, around, GivenTogether("Adafactor", {}, {}, loss_scale=4.0))
    found = kept.weight(0, 0, 5, (1, 2))
    assert found is not None
    assert np.array_equal(found.given["g"], np.full((2, 3), 2.0))
    assert np.array_equal(found.given["R_before"], np.full((2, 1), 3.0))
    assert found.given["t_before"] == 2
    assert found.weight_stored == 5
