"""The arithmetic of gradient contents against a naive model that keeps lists of writes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gradscope.run.schema import STATUSES
from gradscope.session.gradients import GradientHistory, GradientLook

N_PARAMS = 3
HOLDERS = {0: [0, 1, 2], 1: [1, 2]}  # two optimizers, of which the second shares two parameters


@dataclass
class NaiveGradient:
    """What is in one ``.grad``, as a list of what was put there."""

    content: list[object] = field(default_factory=list)
    exists: bool = False
    token: int = 0
    version: int = 0
    edited: bool = False
    edited_after_use: bool = False

    @property
    def is_zero(self) -> bool:
        return self.exists and not self.content

    def look(self) -> tuple[int, int, bool]:
        return (self.token if self.exists else 0, self.version if self.exists else 0, self.is_zero)


class NaiveModel:
    def __init__(self) -> None:
        self.gradients = [NaiveGradient() for _ in range(N_PARAMS)]
        # Every unit ever put into a gradient, and the step at which an optimizer first used it.
        self.used: dict[int, dict[object, int]] = {optimizer: {} for optimizer in HOLDERS}
        self.n_tokens = 0
        self.n_units = 0
        self.n_steps = 0

    def unit(self, kind: str) -> object:
        self.n_units += 1
        return (kind, self.n_units)

    def new_token(self) -> int:
        self.n_tokens += 1
        return self.n_tokens

    def backward(self, params: list[int]) -> None:
        for param in params:
            gradient = self.gradients[param]
            if gradient.exists:
                gradient.version += 1
            else:
                gradient.exists, gradient.token, gradient.version = True, self.new_token(), 0
                gradient.content = []
            gradient.content.append(self.unit("write"))
            gradient.edited = False

    def set_to_none(self, params: list[int]) -> None:
        for param in params:
            self.gradients[param] = NaiveGradient()

    def zero(self, params: list[int], *, counted: bool) -> None:
        for param in params:
            gradient = self.gradients[param]
            if gradient.exists:
                gradient.version += counted
                gradient.content = []

    def assign(self, params: list[int]) -> None:
        for param in params:
            self.gradients[param] = NaiveGradient(
                content=[self.unit("assigned")], exists=True, token=self.new_token()
            )

    def fill(self, params: list[int]) -> None:
        for param in params:
            gradient = self.gradients[param]
            if gradient.is_zero:
                gradient.version += 1
                gradient.content = [self.unit("assigned")]

    def is_spent(self, param: int) -> bool:
        content = self.gradients[param].content
        return bool(content) and any(
            content[-1] in used
            for optimizer, used in self.used.items()
            if param in HOLDERS[optimizer]
        )

    def edit(self, params: list[int]) -> None:
        for param in params:
            gradient = self.gradients[param]
            if gradient.content:
                gradient.version += 1
                gradient.edited = True

    def step(self, optimizer: int) -> list[tuple[str, int, int]]:
        rows = []
        for param in HOLDERS[optimizer]:
            gradient, used = self.gradients[param], self.used[optimizer]
            carried = [unit for unit in gradient.content if unit in used]
            new = [unit for unit in gradient.content if unit not in used]
            if not gradient.exists:
                status = "none"
            elif not gradient.content:
                status = "zeroed"
            elif carried and new:
                status = "compounded"
            elif carried:
                status = "stale"
            elif any(kind == "assigned" for kind, _ in new):
                status = "assigned"
            else:
                status = "fresh" if len(new) == 1 else "accumulated"
            since = min((used[unit] for unit in carried), default=-1)
            rows.append((status, len(new), since))
            for unit in new:
                used[unit] = self.n_steps
        self.n_steps += 1
        return rows

    def look(self, params: list[int]) -> GradientLook:
        seen = [self.gradients[param].look() for param in params]
        return GradientLook(
            at=np.array(params),
            tokens=[token for token, _, _ in seen],
            versions=[version for _, version, _ in seen],
            squares=np.array([0.0 if zero else 1.0 for _, _, zero in seen]),
        )


ALL = list(range(N_PARAMS))
SOME = st.lists(st.sampled_from(ALL), min_size=1, max_size=N_PARAMS, unique=True)
ACTIONS = st.one_of(
    st.tuples(st.just("backward"), SOME),
    st.tuples(st.just("set_to_none"), SOME),
    st.tuples(st.just("zero"), SOME),
    st.tuples(st.just("zero_uncounted"), st.just(ALL)),
    st.tuples(st.just("assign"), SOME),
    st.tuples(st.just("edit"), SOME),
    st.tuples(st.just("fill"), SOME),
    st.tuples(st.just("step"), st.sampled_from(sorted(HOLDERS))),
)


@settings(max_examples=600, deadline=None)
@given(st.lists(ACTIONS, max_size=40), st.booleans())
def test_every_status_is_that_of_the_naive_model(
    actions: list[tuple[str, object]], looks_serve_twice: bool
) -> None:
    naive, history = NaiveModel(), GradientHistory()
    history.grow(N_PARAMS)
    last: GradientLook | None = None

    def look_before_step(held: list[int]) -> GradientLook:
        """As a step makes it: what the last backward left is looked at once where it is so."""
        look = naive.look(held)
        is_same = last is not None and held == ALL and looks_serve_twice
        if is_same and (last.tokens, last.versions) == (look.tokens, look.versions):
            last.squares = look.squares
            return last
        return look

    for action, argument in actions:
        if action == "backward":
            history.look_before_backward(naive.look(ALL))
            naive.backward(argument)
            last = naive.look(ALL)
            last.squares = None
            wrote = history.look_after_backward(last)
            assert sorted(np.flatnonzero(wrote)) == sorted(argument)
        elif action == "step":
            expected = naive.step(argument)
            held = HOLDERS[argument]
            consumption = history.consume(argument, naive.n_steps - 1, look_before_step(held))
            found = [
                (STATUSES[status], int(n), int(since))
                for status, n, since in zip(
                    consumption.status, consumption.n_writes, consumption.carried_from, strict=True
                )
            ]
            assert found == expected
            history.look_after_step(naive.look(held))
        elif action == "zero_uncounted":
            # What p.grad.data.zero_() does, for all gradients at once, as programs do it. Seen
            # only by a look that reads values, which a backward begins with.
            naive.zero(argument, counted=False)
            history.look_before_backward(naive.look(ALL))
        elif action == "zero":
            naive.zero(argument, counted=True)
            history.look_outside(naive.look(ALL))
        else:
            getattr(naive, action)(argument)
            # Two changes by the program between two looks are one change; the model knows both.
            history.look_outside(naive.look(ALL))


def looks(*gradients: tuple[int, int, bool]) -> GradientLook:
    token, version, zero = zip(*gradients, strict=True)
    squares = np.where(zero, 0.0, 1.0)
    return GradientLook(np.arange(len(token)), token, version, squares)


def test_an_edit_between_backward_and_step_is_told_apart_from_one_after_use() -> None:
    history = GradientHistory()
    history.grow(1)
    history.look_before_backward(looks((0, 0, False)))
    history.look_after_backward(looks((7, 0, False)))
    clipped = history.consume(0, 0, looks((7, 1, False)))
    assert clipped.edited[0]
    assert not clipped.edited_after_use[0]

    history.look_after_step(looks((7, 1, False)))
    history.look_before_backward(looks((7, 2, False)))  # scaled down by hand, not cleared
    history.look_after_backward(looks((7, 3, False)))
    decayed = history.consume(0, 1, looks((7, 3, False)))
    assert STATUSES[decayed.status[0]] == "compounded"
    assert not decayed.edited[0]
    assert decayed.edited_after_use[0]


def test_clipping_of_used_and_new_gradients_is_no_edit_after_use() -> None:
    history = GradientHistory()
    history.grow(1)
    for step in range(3):
        version = 2 * step
        history.look_before_backward(looks((7 if step else 0, version, False)))
        history.look_after_backward(looks((7, version + 1, False)))
        consumption = history.consume(0, step, looks((7, version + 2, False)))
        history.look_after_step(looks((7, version + 2, False)))
    assert STATUSES[consumption.status[0]] == "compounded"
    assert consumption.edited[0]
    assert not consumption.edited_after_use[0]


def test_what_a_step_itself_does_to_gradients_is_not_the_programs_doing() -> None:
    history = GradientHistory()
    history.grow(1)
    history.look_before_backward(looks((0, 0, False)))
    history.look_after_backward(looks((7, 0, False)))
    history.consume(0, 0, looks((7, 0, False)))
    history.look_after_step(looks((7, 1, False)))  # SGD with nesterov writes into .grad
    history.look_before_backward(looks((7, 1, False)))
    history.look_after_backward(looks((7, 2, False)))
    assert not history.consume(0, 1, looks((7, 2, False))).edited_after_use[0]


def after_a_backward() -> tuple[GradientHistory, GradientLook]:
    history = GradientHistory()
    history.grow(1)
    history.look_before_backward(looks((0, 0, False)))
    look = looks((7, 0, False))
    history.look_after_backward(look)
    return history, look


def test_after_a_clearing_the_same_id_and_version_are_another_gradient() -> None:
    for is_shared in (False, True):
        history, look = after_a_backward()
        history.forget(slice(0, 1))
        found = history.consume(0, 0, look if is_shared else looks((7, 0, False)))
        assert STATUSES[found.status[0]] == "assigned"


def test_zeros_that_moved_no_version_are_seen_by_a_look_that_serves_twice() -> None:
    for is_shared in (False, True):
        history, look = after_a_backward()
        history.consume(0, 0, look)
        now = looks((7, 0, True))  # after p.grad.data.zero_()
        if is_shared:
            look.squares = now.squares
        found = history.consume(0, 1, look if is_shared else now)
        assert STATUSES[found.status[0]] == "zeroed"


def test_a_gradient_that_backward_computed_as_zeros_is_fresh() -> None:
    history = GradientHistory()
    history.grow(2)
    history.look_before_backward(looks((0, 0, False), (0, 0, False)))
    history.look_after_backward(looks((7, 0, True), (8, 0, False)))
    consumption = history.consume(0, 0, looks((7, 0, True), (8, 0, False)))
    assert [STATUSES[status] for status in consumption.status] == ["fresh", "fresh"]


def test_gradients_that_came_while_nobody_watched_are_one_write_and_nobodys_leftover() -> None:
    history = GradientHistory()
    history.grow(1)
    history.adopt(looks((7, 3, False)))
    history.look_before_backward(looks((7, 3, False)))
    history.look_after_backward(looks((7, 4, False)))
    consumption = history.consume(0, 0, looks((7, 4, False)))
    assert STATUSES[consumption.status[0]] == "accumulated"
