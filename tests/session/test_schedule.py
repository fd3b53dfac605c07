"""Which steps are recorded in full."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from gradscope.session.schedule import Schedule


class Loop:
    """A loop whose steps take what they are told, with what a recorded step costs on top."""

    def __init__(self, schedule: Schedule, *, usual: float = 0.0) -> None:
        self.schedule, self.usual = schedule, usual
        self.recorded: list[int] = []
        self.trained = self.watched = 0.0
        self.n = 0

    def run(self, times: Iterable[float], cost: float) -> Loop:
        for training in times:
            full = self.schedule.is_recorded(self.n)
            if full:
                self.recorded.append(self.n)
            if not _is_free(self.n):
                self.trained += training
                self.watched += self.usual + (cost if full else 0.0)
            self.schedule.ended(
                self.n, training=training, watching=self.usual, cost=cost if full else 0.0
            )
            self.n += 1
        return self

    @property
    def share(self) -> float:
        """Of the time that training took, what watching took; free steps left out."""
        return self.watched / self.trained


def _is_free(step: int) -> bool:
    return step < 3 or step & (step - 1) == 0


def test_the_first_steps_and_powers_of_two_are_recorded_whatever_they_cost() -> None:
    loop = Loop(Schedule(0.01, None)).run([0.001] * 40, cost=1.0)
    assert loop.recorded == [0, 1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize("budget", [0.01, 0.03, 0.2])
@pytest.mark.parametrize("usual", [0.0, 0.0001])
def test_the_budget_is_used_and_not_exceeded(budget: float, usual: float) -> None:
    loop = Loop(Schedule(budget, None), usual=usual).run([0.02] * 4000, cost=0.004)
    assert 0.9 * budget < loop.share <= 1.01 * budget


def test_it_holds_when_steps_become_faster_after_the_first() -> None:
    loop = Loop(Schedule(0.03, None)).run([1.0] * 50, cost=0.01)
    loop.trained = loop.watched = 0.0
    loop.run([0.005] * 4000, cost=0.01)
    assert 0.025 < loop.share <= 0.031  # two steps of what was saved before


def test_it_holds_when_steps_are_irregular() -> None:
    chance = random.Random(0)
    times = [0.001 * 10 ** chance.uniform(0, 3) for _ in range(4000)]
    loop = Loop(Schedule(0.03, None)).run(times, cost=0.02)
    assert 0.02 < loop.share <= 0.0301


def test_it_holds_when_recording_becomes_dearer() -> None:
    loop = Loop(Schedule(0.03, None)).run([0.01] * 500, cost=0.001)
    loop.trained = loop.watched = 0.0
    loop.run([0.01] * 8000, cost=0.05)
    assert 0.025 < loop.share <= 0.0305


def test_a_long_pause_is_followed_by_two_recorded_steps_and_not_by_many() -> None:
    loop = Loop(Schedule(0.01, None)).run([0.01] * 100, cost=0.01)
    n = loop.n
    loop.run([600.0], cost=0.01).run([0.01] * 20, cost=0.01)
    assert len([step for step in loop.recorded if step >= n and not _is_free(step)]) <= 3


def test_a_quarter_is_left_for_recording_where_every_step_takes_more_than_the_budget() -> None:
    loop = Loop(Schedule(0.04, None), usual=0.005).run([0.01] * 4000, cost=0.01)
    n = len([step for step in loop.recorded if not _is_free(step)])
    assert n * 0.01 / loop.trained == pytest.approx(0.01, rel=0.1)


def test_a_closer_look_is_paid_for_by_fewer_recorded_steps() -> None:
    schedule = Schedule(0.01, None)
    loop = Loop(schedule).run([0.01] * 100, cost=0.001)
    before = len(loop.recorded)
    schedule.spend(0.05)
    loop.run([0.01] * 400, cost=0.001)
    assert [step for step in loop.recorded[before:] if not _is_free(step)] == []


def test_optimizers_share_the_budget() -> None:
    alone, shared = Schedule(0.01, None), Schedule(0.01, None)
    n_alone = n_shared = 0
    for step in range(3000):
        for schedule, share in ((alone, 1.0), (shared, 0.5)):
            full = schedule.is_recorded(step)
            if schedule is alone:
                n_alone += full
            else:
                n_shared += full
            cost = 0.001 if full else 0.0
            schedule.ended(step, training=0.01, watching=0.0, cost=cost, share=share)
    assert n_shared == pytest.approx(n_alone / 2, rel=0.1)


def test_every_overrides_the_budget() -> None:
    assert Loop(Schedule(0.001, 4)).run([0.1] * 10, cost=9.0).recorded == [0, 4, 8]


def test_a_slow_first_step_does_not_make_the_others_look_dear() -> None:
    loop = Loop(Schedule(0.1, None)).run([100.0], cost=50.0).run([0.01] * 2, cost=0.01)
    loop.run([0.01] * 200, cost=0.01)
    assert len(loop.recorded) > 15
