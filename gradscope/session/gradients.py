"""What is inside every ``.grad``: plain arithmetic on counters, free of torch.

A gradient is described by where it lies on a time line of its own. Each write by a backward (or
assignment by the program) moves ``written`` on by one; clearing notes where the line stood in
``cleared``; a step of an optimizer notes where it stood in ``used``. So ``.grad`` holds the writes
in ``(cleared, written]``, of which the owner has used those up to where the line stood at its step.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Reals = npt.NDArray[np.float64]

NO_GRADIENT = 0
"""The token of a ``.grad`` that is None."""

# Numbers of the statuses, in the order of gradscope.run.schema.STATUSES.
NONE, FRESH, ACCUMULATED, COMPOUNDED, STALE, ASSIGNED, ZEROED = range(7)


class GradientLook:
    """Gradients at one moment.

    Made while training waits, and looked into later: what is noted then are lists.

    Attributes:
        at: numbers of the parameters looked at: int64[n], or a slice where they are consecutive.
        tokens: of each the identity of the ``.grad`` object, ``NO_GRADIENT`` for None.
        versions: of each autograd's version counter (0 for None).
        squares: float64[n], sum of the squares of its elements (NaN for None), or None if nobody
            read them. A version counter cannot tell everything: ``p.grad.data.zero_()`` does not
            move it.
    """

    __slots__ = ("_token", "_version", "at", "squares", "tokens", "versions")

    def __init__(
        self,
        at: Integers | slice,
        tokens: Sequence[int],
        versions: Sequence[int],
        squares: Reals | None = None,
    ) -> None:
        self.at, self.tokens, self.versions, self.squares = at, tokens, versions, squares
        self._token: Integers | None = None
        self._version: Integers | None = None

    @property
    def token(self) -> Integers:
        """int64[n], the tokens."""
        if self._token is None:
            self._token = np.array(self.tokens, np.int64)
        return self._token

    @property
    def version(self) -> Integers:
        """int64[n], the versions."""
        if self._version is None:
            self._version = np.array(self.versions, np.int64)
        return self._version

    @property
    def is_empty(self) -> bool:
        """Whether there is no gradient at all."""
        return self.tokens.count(NO_GRADIENT) == len(self.tokens)

    def is_same(self, at: Integers | slice, tokens: list[int], versions: list[int]) -> bool:
        """Whether a look at these parameters, given as a slice, has found what this one found."""
        return (
            isinstance(at, slice)
            and isinstance(self.at, slice)  # numbers have gaps where models are gone
            and at == self.at
            and tokens == self.tokens
            and versions == self.versions
        )

    @property
    def zero(self) -> Flags | None:
        """bool[n], whether all its elements are zero; None if nobody read them."""
        return None if self.squares is None else np.asarray(self.squares == 0)


@dataclass(slots=True)
class Consumption:
    """What an optimizer's step reads, one entry per parameter it holds.

    Attributes:
        status: int64[n], as numbered in this module.
        n_writes: int64[n], writes since the optimizer's last step.
        carried_from: int64[n], the earliest step whose used gradient is still in it, or -1.
        edited: bool[n], changed in place after the last write.
        edited_after_use: bool[n], changed in place after the last use.
        used_by_another: bool[n], used by a step of another optimizer since it was last written.
    """

    status: Integers
    n_writes: Integers
    carried_from: Integers
    edited: Flags
    edited_after_use: Flags
    used_by_another: Flags

    @classmethod
    def of_fresh(cls, edited: Flags, used_by_another: Flags) -> Consumption:
        """What a step reads that finds one new write in every gradient, and nothing older."""
        status, n_writes, carried_from, edited_after_use = _of_fresh(len(edited))
        return cls(status, n_writes, carried_from, edited, edited_after_use, used_by_another)

    @property
    def holds_something(self) -> bool:
        """Whether any gradient is there and not just zeroed."""
        return bool(((self.status != NONE) & (self.status != ZEROED)).any())


@functools.lru_cache(maxsize=16)
def _of_fresh(n: int) -> tuple[Integers, Integers, Integers, Flags]:
    """What does not depend on the gradients, made once."""
    made = np.full(n, FRESH), np.ones(n, np.int64), np.full(n, -1), np.zeros(n, np.bool_)
    for array in made:
        array.setflags(write=False)
    return made


_SAME = 1e-6
"""Two readings of one gradient agree to rounding; what differs by more has been changed."""


class GradientHistory:
    """The histories of all gradients, and what each optimizer has used of them."""

    def __init__(self) -> None:
        self.n = 0
        self._integers: dict[str, Integers] = {
            name: np.zeros(0, np.int64)
            for name in ("token", "version", "written", "cleared", "used", "assigned", "edited")
        }
        self._edited_after_use = np.zeros(0, np.bool_)
        self._last: GradientLook | None = None  # if nothing was forgotten since
        # The sums of squares that the last step read; NaN where the step may have changed them.
        self._squares_used = np.zeros(0, np.float64)
        # Per optimizer: where the line stood at its last step, and the earliest step of its
        # whose gradient is still inside.
        self._used: dict[int, Integers] = {}
        self._first_use: dict[int, Integers] = {}

    def grow(self, n: int) -> None:
        """Make room for parameters up to number ``n - 1``, all without gradient."""
        more = n - self.n
        if more <= 0:
            return
        for name, array in self._integers.items():
            self._integers[name] = np.concatenate([array, np.zeros(more, np.int64)])
        self._edited_after_use = np.concatenate([self._edited_after_use, np.zeros(more, np.bool_)])
        self._squares_used = np.concatenate([self._squares_used, np.full(more, np.nan)])
        for optimizer in self._used:
            self._used[optimizer] = np.concatenate([self._used[optimizer], _nothing(more)])
            self._first_use[optimizer] = np.concatenate(
                [self._first_use[optimizer], np.full(more, -1)]
            )
        self.n = n

    def adopt(self, look: GradientLook) -> None:
        """Take gradients that came while nobody was looking as one write each, used by no step."""
        at = look.at
        token, version, written, cleared = self._at(at, "token", "version", "written", "cleared")
        unknown = (look.token != token) | (look.version != version)
        present = look.token != NO_GRADIENT
        if look.zero is not None:
            present &= ~look.zero
        self._integers["cleared"][at] = np.where(unknown, written, cleared)
        self._integers["written"][at] = written + (unknown & present)
        self._remember(look)

    def look_outside(self, look: GradientLook) -> None:
        """Account for what the program did to gradients since the last look."""
        self._account(look, before_backward=False)

    def look_before_backward(self, look: GradientLook) -> None:
        """Like :meth:`look_outside`, where a change comes after the last step's use, if any."""
        self._account(look, before_backward=True)

    def _account(self, look: GradientLook, *, before_backward: bool) -> None:
        at = look.at
        if look.is_empty:  # the usual case after zero_grad: nothing is left
            self._integers["cleared"][at] = self._integers["written"][at]
            self._remember(look)
            return
        if look is self._last and (look.zero is None or not look.zero.any()):
            return  # the usual case between backward and step: nothing happened
        token, version, written, cleared, used = self._at(
            at, "token", "version", "written", "cleared", "used"
        )
        untouched = (look.token == token) & (look.version == version)
        if not before_backward and untouched.all() and (look.zero is None or not look.zero.any()):
            return
        gone = look.token == NO_GRADIENT
        replaced = ~gone & (look.token != token)
        touched = ~gone & ~replaced & (look.version != version)
        held = written > cleared
        spent = held & (written == used)
        empty = gone.copy()
        zero = look.zero
        if zero is not None:
            # Onto zeros is onto nothing, however they came. Right before a step, though, zeros
            # that nobody touched since backward wrote them are what backward computed.
            empty |= zero if before_backward else zero & (replaced | touched | spent)
        # Values written into a gradient that held nothing are put there by the program too.
        filled = touched & ~held & ~empty
        assigned = (replaced & ~empty) | filled
        edited = touched & held & ~empty
        if before_backward and look.squares is not None:
            # Through .data a program can change a gradient without moving its version.
            with np.errstate(invalid="ignore", divide="ignore"):
                other = np.abs(look.squares / self._squares_used[at] - 1) > _SAME
            edited |= untouched & spent & ~empty & other
        if before_backward:
            self._edited_after_use[at] |= edited & spent
        else:
            self._note("edited", at, edited, written)
        self._note("assigned", at, assigned, written + 1)
        self._integers["cleared"][at] = np.where(empty | assigned, written, cleared)
        # Last, because where ``at`` is a slice the arrays above are views of what is changed.
        self._integers["written"][at] = written + assigned
        self._remember(look)

    def look_after_backward(self, look: GradientLook) -> Flags:
        """Account for one backward; returns bool[n], which gradients it wrote."""
        at = look.at
        token, version, written = self._at(at, "token", "version", "written")
        gone = look.token == NO_GRADIENT
        wrote = ~gone & ((look.token != token) | (look.version != version))
        # A hook may clear a gradient in the middle of backward (an optimizer in backward).
        cleared_inside = gone & (token != NO_GRADIENT)
        self._integers["written"][at] = written + wrote
        self._note("cleared", at, cleared_inside, written)
        self._remember(look)
        return np.asarray(wrote)

    def look_after_step(self, look: GradientLook) -> None:
        """Note the gradients as a step leaves them: what it did to them is its own affair."""
        # SGD with nesterov and foreach changes .grad in place (torch 2.13); an optimizer may also
        # clear it.
        at = look.at
        self._note("cleared", at, look.token == NO_GRADIENT, self._integers["written"][at])
        self._squares_used[at] = np.nan
        self._remember(look)

    def forget(self, at: Integers | slice) -> None:
        """Take whatever is there at the next look for another object than what was there before.

        After a clearing that was told of: an id and a version may recur.
        """
        self._integers["token"][at] = -1
        self._last = None

    def consume(self, optimizer: int, step: int, look: GradientLook) -> Consumption:
        """Account for a step of ``optimizer`` that reads the gradients of ``look``.

        Args:
            optimizer: number of the optimizer.
            step: number of the step.
            look: its parameters' gradients right before the update.
        """
        consumption = self.describe(optimizer, look)
        at = look.at
        self._used[optimizer][at] = self._integers["written"][at]
        self._integers["used"][at] = self._integers["written"][at]
        self._first_use[optimizer][at] = np.where(
            consumption.carried_from >= 0,
            consumption.carried_from,
            np.where(consumption.n_writes > 0, step, -1),
        )
        self._edited_after_use[at] = False
        self._squares_used[at] = np.nan if look.squares is None else look.squares
        return consumption

    def describe(self, optimizer: int, look: GradientLook) -> Consumption:
        """Tell what a step of ``optimizer`` would read, and leave everything as it is."""
        self.look_outside(look)
        if optimizer not in self._used:
            self._used[optimizer] = _nothing(self.n)
            self._first_use[optimizer] = np.full(self.n, -1)
        at = look.at
        written, cleared, assigned, edited = self._at(
            at, "written", "cleared", "assigned", "edited"
        )
        used = self._used[optimizer][at]
        used_by_any = self._integers["used"][at]
        gone = look.token == NO_GRADIENT
        if (
            not gone.any()
            and (written - cleared == 1).all()
            and (np.maximum(used, assigned) <= cleared).all()
        ):  # the usual case: one backward since they were cleared, and nothing else
            return Consumption.of_fresh(edited == written, used_by_any == written)
        held = ~gone & (written > cleared)
        carried = held & (used > cleared)
        n_writes = np.where(held, written - np.maximum(used, cleared), 0)
        newly_assigned = held & (assigned > np.maximum(used, cleared))
        status = np.where(n_writes == 1, FRESH, ACCUMULATED)
        status[newly_assigned] = ASSIGNED
        status[carried] = np.where(n_writes[carried] > 0, COMPOUNDED, STALE)
        status[~held] = ZEROED
        status[gone] = NONE
        return Consumption(
            status=status,
            n_writes=n_writes,
            carried_from=np.where(carried, self._first_use[optimizer][at], -1),
            edited=held & (n_writes > 0) & (edited == written),
            edited_after_use=carried & self._edited_after_use[at],
            used_by_another=held & (used_by_any == written) & (used < written),
        )

    def token(self, at: Integers | slice) -> Integers:
        """Identity of each ``.grad`` at its last look."""
        return self._integers["token"][at]

    def contents(self, optimizer: int, at: Integers | slice) -> tuple[Flags, Flags]:
        """Return bool[n] twice: what holds gradient that ``optimizer`` has used, and has not."""
        written, cleared = self._at(at, "written", "cleared")
        used = self._used[optimizer][at] if optimizer in self._used else np.full_like(written, -1)
        held = written > cleared
        return held & (used > cleared), held & (written > used)

    def _at(self, at: Integers | slice, *names: str) -> Any:
        return tuple(self._integers[name][at] for name in names)

    def _note(self, name: str, at: Integers | slice, where: Flags, value: Integers) -> None:
        self._integers[name][at] = np.where(where, value, self._integers[name][at])

    def _remember(self, look: GradientLook) -> None:
        self._last = look
        self._integers["token"][look.at] = look.token
        self._integers["version"][look.at] = look.version


def as_slice(params: Integers) -> Integers | slice:
    """Consecutive numbers as a slice, which numpy indexes several times faster."""
    if len(params) and (np.diff(params) == 1).all():
        return slice(int(params[0]), int(params[-1]) + 1)
    return params


def _nothing(n: int) -> Integers:
    return np.full(n, -1, np.int64)
