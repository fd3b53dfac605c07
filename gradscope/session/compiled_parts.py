"""What of a program is compiled, and so not seen; and whether that moves weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import nn

from gradscope.session.attempts import Attempts
from gradscope.session.census import Census, is_compiled

_MOST_CALLS = 64
"""Of how many calls of compiled code it is looked at whether they move weights."""


class CompiledParts:
    """Says of each compiled module and function once that its inside is not seen.

    Args:
        census: knows the models, and notes which parts of them are compiled.
        attempts: knows the optimizers, and whether their weights have moved.
        event: adds a row to ``events``.
        name_of: the name of an optimizer, by its number.
    """

    def __init__(
        self,
        census: Census,
        attempts: Attempts,
        event: Callable[..., None],
        name_of: Callable[[int], str],
    ) -> None:
        self._census = census
        self._attempts = attempts
        self._event = event
        self._name_of = name_of
        self._told: weakref.WeakSet[Any] = weakref.WeakSet()
        self._n_calls = 0
        self._before: dict[int, Any] = {}
        self._moved: set[int] = set()

    def model_called(self, module: nn.Module) -> None:
        """Say so of a model that is compiled as a whole."""
        if is_compiled(module) and module not in self._told:
            self._told.add(module)
            self.tell_parts(module)

    def tell_parts(self, module: nn.Module) -> None:
        """Say so of every compiled part of a model that has not been told of."""
        for path, kind in self._census.note_compiled(module):
            self._tell(f"part {path} ({kind})" if path else kind)

    def entered(self, function: Any) -> None:
        """Say so of a function that begins, and look at what it may move."""
        if self._n_calls < _MOST_CALLS:
            self._n_calls += 1
            self._tell_function(function)
            self._before = self._attempts.versions()

    def left(self) -> None:
        """Say so if it has moved weights, and no step was seen."""
        before, self._before = self._before, {}
        now = self._attempts.versions() if before else {}
        for number, (n_attempts, versions) in before.items():
            if number in self._moved or number not in now:
                continue
            if now[number][0] == n_attempts and now[number][1] != versions:
                self._moved.add(number)
                name = self._name_of(number)
                self._event(
                    "unobserved",
                    f"compiled code moves the weights of {name}: these updates are not seen; those "
                    f"of torch.compile({name}.step) are",
                    optimizer=number,
                )

    def _tell_function(self, function: Any) -> None:
        # Methods are those of modules and optimizers, which are told of elsewhere.
        if isinstance(function, FunctionType) and function not in self._told:
            self._told.add(function)
            self._tell(function.__qualname__)

    def _tell(self, what: str) -> None:
        self._event("unobserved", f"{what} is compiled: its inside is not seen")
