"""How the order of events is told."""

from __future__ import annotations

import numpy as np
import pytest

from gradscope.session.gradients import NO_GRADIENT, GradientLook
from gradscope.session.ledger import Ledger, spell_order


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


def test_backwards_that_a_closure_has_used_stay_open_until_the_step_ends() -> None:
    def look(token: int) -> GradientLook:
        return GradientLook(slice(0, 1), [token], [0])

    ledger = Ledger()
    ledger.holds(0, np.array([0]), now=0.0)
    for number in range(3):
        ledger.backward_started(look(NO_GRADIENT))
        ledger.backward_ended(look(100 + number), root=1.0, last_node=0, seconds=0.0)
        used = ledger.consume(0, look(100 + number))
        # Rows of the backwards from here on may still change: they get their step.
        assert ledger.first_open_backward() == 0
    record = ledger.end_attempt(0, used, outcome="stepped", now=1.0)
    assert record.attempt.backwards == [0, 1, 2]
    assert not record.attempt.discarded
    assert ledger.first_open_backward() == 3
