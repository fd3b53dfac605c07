"""What happens to an error of gradscope's own: it is told once, and never reaches the training."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from gradscope.errors import GradscopeWarning, text_of
from gradscope.session.costs import Costs


class Failures:
    """Runs the parts of gradscope that may fail, and silences those that do.

    Args:
        note: told of each part that is silenced, with the error in words.
        costs: told how long each part took.
        raises: let errors out instead, for gradscope's own tests.
    """

    def __init__(
        self, note: Callable[[str, str], None], costs: Costs, *, raises: bool = False
    ) -> None:
        self._note = note
        self._costs = costs
        self._raises = raises
        self._silent: set[str] = set()

    def run(self, part: str, function: Callable[..., Any], *args: Any) -> Any:
        """Return ``function(*args)``; None when it fails, and from then on for this part."""
        if part in self._silent:
            return None
        self._costs.begin()
        try:
            return function(*args)
        except Exception as error:
            self.silence(part, "instrument-failed", error)
            return None
        finally:
            self._costs.end(part)

    def silence(self, part: str, slug: str, error: Exception) -> None:
        """Use ``part`` no more, and say so the first time; raises nothing unless asked to."""
        if self._raises:
            raise error
        if part in self._silent:
            return
        self._silent.add(part)
        text = text_of(error)
        with suppress(Exception):  # the warning says it all the same
            self._note(part, text)
        with suppress(Exception):
            warn(slug, f"{part} failed and is switched off; training goes on ({text})")


def warn(slug: str, text: str) -> None:
    """Warn, on standard error where the program turns warnings into exceptions.

    There, too, if what the program shows warnings with fails.
    """
    warning = GradscopeWarning(slug, text)
    try:
        warnings.warn(warning, stacklevel=2)
    except Exception:
        with suppress(Exception):  # it may be closed
            print(warning, file=sys.stderr)
