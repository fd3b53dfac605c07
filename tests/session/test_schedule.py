"""Which steps are recorded in full."""

from __future__ import annotations

import pytest

from gradscope.session.schedule import Schedule


def recorded(schedule: Schedule, *, n: int, cost: float, step_time: float) -> list[int]:
    steps = []
    for step in range(n):
        full = schedule.is_recorded(step)
        if full:
            steps.append(step)
        schedule.measured(step, recorded=full, cost=cost if full else 0, step_time=step_time)
    return steps


def test_the_first_steps_are_recorded_whatever_they_cost() -> None:
    assert recorded(Schedule(0.01, None), n=10, cost=1.0, step_time=0.001) == [0, 1, 2]


@pytest.mark.parametrize("budget", [0.01, 0.03, 0.2])
def test_the_cost_stays_inside_the_budget(budget: float) -> None:
    cost, step_time, n = 0.004, 0.02, 2000
    steps = recorded(Schedule(budget, None), n=n, cost=cost, step_time=step_time)
    share = (len(steps) - 3) * cost / (n * step_time)
    assert 0.45 * budget < share <= budget


def test_every_overrides_the_budget() -> None:
    assert recorded(Schedule(0.001, 4), n=10, cost=9.0, step_time=0.1) == [0, 4, 8]


def test_a_slow_first_step_does_not_make_the_others_look_cheap() -> None:
    schedule = Schedule(0.1, None)
    schedule.measured(0, recorded=True, cost=1.0, step_time=100.0)
    for step in (1, 2):
        schedule.measured(step, recorded=True, cost=0.01, step_time=0.01)
    assert schedule.stride == 10
