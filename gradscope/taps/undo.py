"""What takes out of torch again what was put in place there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class Undo:
    """Calls to be made at the end, the latest first; one that fails is not lost.

    As a context manager it makes them only if the block raises.
    """

    def __init__(self) -> None:
        self._left: list[Callable[[], Any]] = []

    def callback(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Add a call."""
        self._left.append(functools.partial(function, *arguments))

    def close(self) -> None:
        """Make the calls.

        Raises:
            Exception: what a call raised, twice in a row. All others have been made by then, and
                the next :meth:`close` makes this one again.
        """
        failed: Exception | None = None
        for _ in range(2):
            failed = None
            for take_out in reversed(tuple(self._left)):
                try:
                    take_out()
                except Exception as error:
                    failed = error
                else:
                    self._left.remove(take_out)
            if failed is None:
                return
        assert failed is not None
        raise failed

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.close()
