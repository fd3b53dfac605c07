"""What happens to an error of gradscope's own: it is told once, and never reaches the training."""

from __future__ import annotations

import sys
import warnings

from gradscope.errors import GradscopeWarning


class Failures:
    """Collects errors by the part in which they happened.

    Args:
        raises: let errors out instead, for gradscope's own tests.

    Attributes:
        silent: the parts that have failed and are no longer used.
    """

    def __init__(self, *, raises: bool = False) -> None:
        self.silent: dict[str, str] = {}
        self._raises = raises

    def take(self, part: str, slug: str, error: Exception) -> str:
        """Silence ``part``, warn about it the first time, and return the error in words."""
        if self._raises:
            raise error
        text = f"{type(error).__name__}: {error}"
        if part not in self.silent:
            self.silent[part] = text
            warn(slug, f"{part} failed and is switched off; training goes on ({text})")
        return text


def warn(slug: str, text: str) -> None:
    """Warn, on standard error where the program turns warnings into exceptions."""
    warning = GradscopeWarning(slug, text)
    try:
        warnings.warn(warning, stacklevel=2)
    except GradscopeWarning:
        print(warning, file=sys.stderr)
