"""Telling what is found while the loop still runs."""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from gradscope.errors import FindingsError, GradscopeWarning, UsageError, text_of
from gradscope.rules import Finding, Findings, Severity
from gradscope.session.failures import warn
from gradscope.session.ranks import is_first
from gradscope.taps.optimizer_steps import optimizer_steps

if TYPE_CHECKING:
    from gradscope.rules.criteria import Criteria
    from gradscope.session.session import Session

OnFinding = Literal["collect", "warn", "raise"] | Callable[[Finding], object]

_FIRST_JUDGEMENT = 8
"""After so many attempts of the optimizers the loop is judged for the first time; then after twice
as many each time, so that a short loop hears early and a long one is rarely held up."""

_LONGEST_INTERVAL = 256
"""So many attempts at most lie between two judgements, as far as their cost allows."""

_SHARE_OF_JUDGING = 0.01
"""The share of time that may go into judging, once the interval no longer grows."""


def checked_on_finding(on_finding: Any) -> OnFinding:
    """Return what is to be done with a finding, checked.

    Raises:
        UsageError: if it is no word that is known and nothing that can be called.
    """
    words = ("collect", "warn", "raise")
    if callable(on_finding) or on_finding in words:
        checked: OnFinding = on_finding
        return checked
    raise UsageError(
        f"on_finding={on_finding!r}: pass 'collect', 'warn', 'raise', or a function that is called "
        "with each finding"
    )


class Teller:
    """Judges a loop from time to time while it runs, and tells each finding once.

    It listens to the optimizers' steps after the session does, and looks at nothing but tables.
    An error of it is told as a warning and never reaches the training; a :class:`FindingsError`,
    if it is asked for, is let out when the optimizer's ``step`` returns.

    While the loop runs, an error is told at once and a warning when it is found a second time: what
    seems likely after eight steps may not after sixteen. At the end everything is told.

    Args:
        session: what is watched.
        criteria: by what it is judged.
        on_finding: what is done with each finding.
    """

    def __init__(self, session: Session, criteria: Criteria, on_finding: OnFinding) -> None:
        self._session = session
        self._criteria = criteria
        self._on_finding = on_finding
        self._told: list[Finding] = []
        self._seen: list[Finding] = []
        self._thread = 0
        self._attempts = 0
        self._next = _FIRST_JUDGEMENT
        self._not_before = 0.0
        self._is_silent = False

    def start(self) -> None:
        """Begin to listen; to be called after the session has begun."""
        if self._on_finding != "collect":
            self._thread = threading.get_ident()
            optimizer_steps.add(self)

    def stop(self) -> None:
        """Listen no more."""
        optimizer_steps.remove(self)

    def finish(self, *, may_raise: bool = True) -> None:
        """Tell what has not been told, once the session has stopped.

        Args:
            may_raise: False while another exception is on its way, which must not be hidden.

        Raises:
            FindingsError: if that is asked for and something new is found.
        """
        if self._on_finding != "collect":
            self._guarded(lambda: self._judge(is_end=True, may_raise=may_raise))

    def step_ended(self, optimizer: Any) -> None:
        """Judge, if it is time to."""
        if threading.get_ident() != self._thread:
            return
        self._attempts += 1
        if self._attempts < self._next or time.perf_counter() < self._not_before:
            return
        self._next = self._attempts + min(self._attempts, _LONGEST_INTERVAL)
        began = time.perf_counter()
        try:
            self._guarded(lambda: self._judge(is_end=False, may_raise=True))
        finally:
            ended = time.perf_counter()
            self._session.recording.spend("judging", ended - began)
            if self._attempts >= _LONGEST_INTERVAL:
                self._not_before = ended + (ended - began) / _SHARE_OF_JUDGING

    def failed(self, where: str, error: Exception) -> None:
        """Let out what is asked for; tell no more after anything else."""
        if isinstance(error, FindingsError):
            raise error
        self._failed(error)

    def _judge(self, *, is_end: bool, may_raise: bool) -> None:
        self._session.settle(wait=is_end)
        found = self._criteria.judge(self._session.recording).at_least(Severity.WARNING)
        new = [
            finding
            for finding in found
            if not _is_among(finding, self._told)
            and (is_end or finding.severity == Severity.ERROR or _is_among(finding, self._seen))
        ]
        self._seen = list(found)
        self._told += new
        if self._on_finding == "raise":
            if new and may_raise:
                raise FindingsError(Findings(new))
            return
        if self._on_finding == "warn" and not is_first():
            return  # one warning is enough; what is found here is in the run directory
        for finding in new:
            self._tell(finding)

    def _tell(self, finding: Finding) -> None:
        if callable(self._on_finding):
            self._on_finding(finding)
            return
        steps = f" ({finding.steps})" if finding.steps else ""
        text = f"{finding.code} {finding.message}{steps}; fix: {finding.fix}"
        if finding.file is None or finding.line is None:
            warn(finding.name, text)
            return
        try:
            warnings.warn_explicit(
                GradscopeWarning(finding.name, text), None, finding.file, finding.line
            )
        except GradscopeWarning as warning:  # the program turns warnings into exceptions
            print(warning, file=sys.stderr)

    def _guarded(self, function: Callable[[], None]) -> None:
        try:
            if not self._is_silent:
                function()
        except FindingsError:
            raise
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        if not self._is_silent:
            self._is_silent = True
            text = f"telling a finding failed; training goes on ({text_of(error)})"
            with suppress(Exception):
                warn("on-finding-failed", text)


def _is_among(finding: Finding, known: list[Finding]) -> bool:
    """Whether a finding is one of those, or about a part of what one of those is about."""
    return any(
        finding.code == each.code
        and finding.optimizer == each.optimizer
        and set(finding.params) <= set(each.params)
        for each in known
    )
