"""The state machine that turns events into step records. Free of torch.

An attempt of an optimizer to update owns everything since its previous attempt: the forwards, the
backwards that wrote to its parameters, the clearing, the clipping. The ledger is told of each event
once all values it needs are known, in the order in which the events happened.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from gradscope.session.gradients import (
    NO_GRADIENT,
    Consumption,
    Flags,
    GradientHistory,
    GradientLook,
    Integers,
    as_slice,
)

_LONGEST_ORDER = 40


@dataclass(frozen=True, slots=True)
class Backward:
    """One backward.

    Attributes:
        number: counted from 0.
        root: value of the loss, NaN if it is no scalar.
        reached: whether it wrote the gradient of a watched parameter.
    """

    number: int
    root: float
    reached: bool


@dataclass(slots=True)
class Attempt:
    """What has happened since an optimizer's previous attempt.

    Attributes:
        began: when the previous attempt ended, in seconds of the process clock.
        order: what happened, as (word, how often in a row).
        n_forward: how many forwards with gradients there were.
        zeroed, zeroed_by: see the table ``steps``.
        train_mode: whether every forward so far was in training mode.
        first_node: the autograd sequence number at the first forward, or None.
        graph_nodes: nodes created from there to the last backward.
        forward_seconds, backward_seconds: time in each.
        taken: the backwards that belong here, and whose gradients are still there.
        n_used: how many of these the step that is under way has used, within a closure.
        used_before: backwards of earlier closures of the step, which it has used as well.
        foreign: backwards that wrote to strangers only.
        discarded: numbers of backwards whose gradients were cleared before any step used them.
    """

    began: float
    order: list[tuple[str, int]] = field(default_factory=list)
    n_forward: int = 0
    zeroed: str = ""
    zeroed_by: str = ""
    train_mode: bool = True
    first_node: int | None = None
    graph_nodes: int = 0
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    taken: list[Backward] = field(default_factory=list)
    n_used: int = 0
    used_before: list[int] = field(default_factory=list)
    foreign: list[Backward] = field(default_factory=list)
    discarded: list[int] = field(default_factory=list)

    @property
    def backwards(self) -> list[int]:
        """Numbers of the backwards whose gradients this attempt is about."""
        return self.used_before + [backward.number for backward in self.taken]

    @property
    def loss(self) -> float:
        """Sum of the roots behind its gradients; NaN if there are none, or one was no scalar."""
        return sum(backward.root for backward in self.taken) if self.taken else math.nan

    def take(self, backward: Backward, last_node: int, seconds: float) -> None:
        """Let a backward belong here."""
        self.note("backward")
        self.taken.append(backward)
        self.backward_seconds += seconds
        if self.first_node is not None:
            self.graph_nodes = max(self.graph_nodes, last_node - self.first_node)

    def drop_cleared(self) -> None:
        """Count no backward whose gradients have been cleared before any step used them."""
        self.used_before += [backward.number for backward in self.taken[: self.n_used]]
        unused, self.n_used = self.taken[self.n_used :], 0
        self.discarded += [backward.number for backward in unused if backward.reached]
        self.taken = [backward for backward in unused if not backward.reached]

    def note(self, word: str) -> None:
        """Add an event to the order; the same word again only counts up."""
        if self.order and self.order[-1][0] == word:
            self.order[-1] = (word, self.order[-1][1] + 1)
        else:
            self.order.append((word, 1))

    def spelled_order(self) -> str:
        """The order in words, repetitions of one or several events told once with ``×n``."""
        return spell_order([f"{word} ×{n}" if n > 1 else word for word, n in self.order])


@dataclass(slots=True)
class StepRecord:
    """One finished attempt: a row of ``steps`` and the gradients that it read."""

    step: int
    optimizer: int
    optimizer_step: int
    outcome: str
    attempt: Attempt
    consumption: Consumption
    seconds: float


class Ledger:
    """Follows every optimizer's attempts and every parameter's gradient."""

    def __init__(self) -> None:
        self.gradients = GradientHistory()
        self.n_steps = 0
        self.n_backwards = 0
        self._at: dict[int, Integers | slice] = {}
        self._attempts: dict[int, Attempt] = {}
        self._n_attempts: dict[int, int] = {}
        self._has_used: dict[int, bool] = {}

    def holds(self, optimizer: int, params: Integers, now: float) -> None:
        """Note which parameters an optimizer holds; told anew whenever that changes."""
        self._at[optimizer] = as_slice(params)
        self.gradients.grow(int(params.max(initial=-1)) + 1)
        if optimizer not in self._attempts:
            self._attempts[optimizer] = Attempt(began=now)
            self._n_attempts[optimizer] = 0
            self._has_used[optimizer] = False

    def takes_over(self, optimizer: int) -> None:
        """Let an optimizer that is first met at its step have what has happened before it.

        That is what another one has waiting that holds some of the same parameters.
        """
        held = set(_numbers_at(self._at[optimizer]))
        for other, attempt in self._attempts.items():
            if other != optimizer and attempt.taken and held & set(_numbers_at(self._at[other])):
                self._attempts[optimizer] = copy.deepcopy(attempt)

    def forward(
        self,
        optimizers: Iterable[int],
        *,
        first_node: int,
        seconds: float,
        training: bool,
        with_grad: bool,
    ) -> None:
        """Account for one outermost call of a watched model.

        Args:
            optimizers: those that hold parameters of the model.
            first_node: autograd's sequence number when the call began.
            seconds: how long it took.
            training: whether the model was in training mode.
            with_grad: whether gradients were enabled; a call without is an evaluation, and counts
                neither as a forward of the step nor for its mode.
        """
        for attempt in self._of(optimizers):
            if not with_grad:
                attempt.note("forward without grad")
                continue
            attempt.note("forward")
            attempt.n_forward += 1
            attempt.forward_seconds += seconds
            attempt.train_mode &= training
            if attempt.first_node is None:
                attempt.first_node = first_node

    def zero_grad(self, optimizers: Iterable[int], params: Integers, by: str) -> None:
        """Account for a call of ``zero_grad`` that cleared ``params``; ``by`` names the method."""
        self.gradients.forget(params)
        for attempt in self._of(optimizers):
            attempt.note("zero_grad")
            attempt.zeroed_by = by

    def note(self, optimizers: Iterable[int], word: str) -> None:
        """Account for any other event that belongs into the order."""
        for attempt in self._of(optimizers):
            attempt.note(word)

    def backward_started(self, look: GradientLook) -> None:
        """Account for the gradients as a backward finds them."""
        self.gradients.look_before_backward(look)
        for optimizer, at in self._at.items():
            used, unused = self.gradients.contents(optimizer, at)
            if unused.any():
                continue  # a further backward of the same attempt
            attempt = self._attempts[optimizer]
            attempt.drop_cleared()
            if used.all():
                attempt.zeroed = "never" if used.size else "none"
            elif used.any():
                attempt.zeroed = "partly"
            else:
                token = self.gradients.token(at)
                attempt.zeroed = "none" if (token == NO_GRADIENT).all() else "zero"

    def backward_ended(
        self,
        look: GradientLook,
        *,
        root: float,
        last_node: int,
        seconds: float,
        is_foreign: bool = False,
        used_inside: bool = False,
    ) -> tuple[int, Flags]:
        """Account for what a backward wrote.

        Args:
            look: the gradients as it left them.
            root: value of the loss, NaN if it is no scalar.
            last_node: autograd's sequence number when it began.
            seconds: how long it took.
            is_foreign: whether its graph ends in tensors that are all strangers to the watch. It
                belongs to a step only if no other backward does.
            used_inside: whether a step inside of it has used what it wrote.

        Returns:
            The number of the backward, and which gradients of ``look`` it wrote.
        """
        wrote = self.gradients.look_after_backward(look)
        written = np.zeros(self.gradients.n, np.bool_)
        written[look.at] = wrote
        concerned = [optimizer for optimizer, at in self._at.items() if written[at].any()]
        number = self.n_backwards
        self.n_backwards += 1
        # A backward that reaches nobody's parameters is everybody's affair.
        everybody: Iterable[int] = () if used_inside else self._at
        for attempt in self._of(concerned or everybody):
            backward = Backward(number, root, bool(concerned))
            if is_foreign:
                attempt.foreign.append(backward)
            else:
                attempt.take(backward, last_node, seconds)
        return number, wrote

    def backward_used_inside(
        self, optimizer: int, look: GradientLook, *, root: float, last_node: int, seconds: float
    ) -> int:
        """Account for what a backward that is still running wrote, before a step that uses it.

        Args:
            optimizer: number of the optimizer that is about to step.
            look: its parameters' gradients now.
            root: value of the loss, NaN if it is no scalar.
            last_node: autograd's sequence number when the backward began.
            seconds: for how long it has been running.

        Returns:
            The number that the backward will have.
        """
        self.gradients.look_after_backward(look)
        backward = Backward(self.n_backwards, root, reached=True)
        self._attempts[optimizer].take(backward, last_node, seconds)
        return self.n_backwards

    def other_backward(self) -> int:
        """Account for a call into the engine that writes no ``.grad``; returns its number."""
        self.n_backwards += 1
        return self.n_backwards - 1

    def consume(self, optimizer: int, look: GradientLook) -> Consumption:
        """Account for the gradients that an update of ``optimizer`` is about to read."""
        attempt = self._attempts[optimizer]
        attempt.n_used = len(attempt.taken)
        return self.gradients.consume(optimizer, self.n_steps, look)

    def describe(self, optimizer: int, look: GradientLook) -> Consumption:
        """Tell what an update would read, for one that does not take place."""
        return self.gradients.describe(optimizer, look)

    def end_attempt(
        self, optimizer: int, consumption: Consumption, *, outcome: str, now: float
    ) -> StepRecord:
        """Close the current attempt of an optimizer and begin its next."""
        attempt = self._attempts[optimizer]
        if not consumption.holds_something:
            attempt.discarded += [each.number for each in attempt.taken if each.reached]
        if not attempt.taken:
            attempt.taken = attempt.foreign
        attempt.note("step" if outcome == "stepped" else f"step {outcome}")
        if attempt.zeroed_by == "" and attempt.zeroed in ("none", "zero"):
            attempt.zeroed_by = "hand" if self._has_used[optimizer] else ""
        self._has_used[optimizer] |= bool((consumption.n_writes > 0).any())
        record = StepRecord(
            step=self.n_steps,
            optimizer=optimizer,
            optimizer_step=self._n_attempts[optimizer],
            outcome=outcome,
            attempt=attempt,
            consumption=consumption,
            seconds=now - attempt.began,
        )
        self.n_steps += 1
        self._n_attempts[optimizer] += 1
        self._attempts[optimizer] = Attempt(began=now)
        return record

    def backwards_of(self, optimizer: int) -> list[int]:
        """Numbers of the backwards since the optimizer's last attempt."""
        return self._attempts[optimizer].backwards

    def go_on(self, n_steps: int, n_backwards: int, n_attempts: Mapping[int, int]) -> None:
        """Count on from where a run was interrupted.

        Args:
            n_steps: how many there were.
            n_backwards: likewise.
            n_attempts: of the steps, by optimizer.
        """
        self.n_steps, self.n_backwards = n_steps, n_backwards
        self._n_attempts.update(n_attempts)

    def first_open_backward(self) -> int:
        """Number of the first backward that the next step of some optimizer may belong to."""
        return min(
            (
                number
                for attempt in self._attempts.values()
                for number in (
                    *attempt.backwards[:1],
                    *(each.number for each in attempt.foreign[:1]),
                )
            ),
            default=self.n_backwards,
        )

    def _of(self, optimizers: Iterable[int]) -> list[Attempt]:
        return [self._attempts[number] for number in optimizers if number in self._attempts]


def _numbers_at(at: Integers | slice) -> Iterable[int]:
    return range(at.start, at.stop) if isinstance(at, slice) else at.tolist()


def spell_order(words: list[str]) -> str:
    """Join events into one line, telling a repeated sequence once.

    >>> spell_order(["zero_grad", "forward", "backward", "forward", "backward", "step"])
    'zero_grad, (forward, backward) ×2, step'
    """
    parts: list[str] = []
    position = 0
    while position < len(words):
        length, times = _repetition(words, position)
        sequence = ", ".join(words[position : position + length])
        if times == 1:
            parts.append(words[position])
            position += 1
        else:
            parts.append(f"({sequence}) ×{times}" if length > 1 else f"{sequence} ×{times}")
            position += length * times
        if len(parts) == _LONGEST_ORDER:
            parts.append("…")
            break
    return ", ".join(parts)


def _repetition(words: list[str], position: int) -> tuple[int, int]:
    """The sequence that repeats at ``position`` and covers most: (its length, how often)."""
    best = (1, 1)
    for length in range(1, min(8, (len(words) - position) // 2) + 1):
        times = 1
        sequence = words[position : position + length]
        while words[position + times * length : position + (times + 1) * length] == sequence:
            times += 1
        if times > 1 and length * times > best[0] * best[1]:
            best = (length, times)
    return best
