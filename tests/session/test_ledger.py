"""How the order of events is told."""

from __future__ import annotations

import pytest

from gradscope.session.ledger import spell_order


@pytest.mark.parametrize(
    ("events", "spelled"),
    [
        ("forward zero_grad backward step", "forward, zero_grad, backward, step"),
        (
            "zero_grad forward backward forward backward forward backward step",
            "zero_grad, (forward, backward) ×3, step",
        ),
        ("forward forward backward step", "forward ×2, backward, step"),
        ("", ""),
        ("step", "step"),
    ],
)
def test_a_repeated_sequence_is_told_once(events: str, spelled: str) -> None:
    assert spell_order(events.split()) == spelled


def test_an_endless_order_is_cut() -> None:
    events = [f"event{i}" for i in range(500)]
    assert spell_order(events).endswith("…")
    assert len(spell_order(events)) < 600
