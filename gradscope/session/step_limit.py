"""``--steps N``: stop watching after N steps, at the first moment at which that is safe."""

from __future__ import annotations

import threading
from typing import Any

from gradscope.session.session import Session
from gradscope.taps.engine import inside_backward, inside_transform
from gradscope.taps.model_calls import model_calls
from gradscope.taps.optimizer_steps import optimizer_steps
from gradscope.taps.tap import Tap
from gradscope.taps.zero_grad import zero_grad

_TAPS: tuple[Tap, ...] = (model_calls, zero_grad, optimizer_steps)


class StepLimit:
    """Stops a session between two steps.

    An optimizer's hooks cannot be removed from within them, and a step must not be left half seen:
    so the watch ends with the first call of a model or of ``zero_grad`` after the last step asked
    for.

    Args:
        session: what to stop; it has to be started before :meth:`start`.
        n_steps: after how many attempts of any optimizer.
    """

    def __init__(self, session: Session, n_steps: int) -> None:
        self._session = session
        self._n_steps = n_steps
        self._open: set[int] = set()  # by id: one whose step raised is in it until its next
        self._thread: int | None = None
        self._is_over = False

    def start(self) -> None:
        """Begin to count."""
        try:
            for tap in _TAPS:
                tap.add(self)
        except Exception as error:
            self.failed("start", error)
            self.stop()

    def stop(self) -> None:
        """Count no more."""
        self._is_over = True
        for tap in _TAPS:
            tap.remove(self)

    def takes_call(self, module: Any) -> bool:
        """Stop if it is time; take the call, so that those inside of it cost nothing."""
        if self._is_over:
            self.stop()
            return False
        self._stop_if_done()
        return True

    def call_ended(self, module: Any) -> None:
        """Nothing to do."""

    def zero_grad_called(self, owner: Any, location: Any) -> None:
        """Stop if it is time."""
        if not self._is_over:
            self._stop_if_done()

    def step_started(self, optimizer: Any, has_closure: bool) -> None:
        """Note that a step is under way."""
        self._open.add(id(optimizer))

    def step_ended(self, optimizer: Any) -> None:
        """Note the thread that trains."""
        self._open.discard(id(optimizer))
        self._thread = threading.get_ident()

    def failed(self, where: str, error: Exception) -> None:
        """Watch to the end: the limit is a convenience."""
        self._is_over = True
        self._session.part_failed("step_limit", error)
        if self._session.running or not optimizer_steps.inside_hook:
            self.stop()  # while the session listens, too, no hook is removed by this

    def _stop_if_done(self) -> None:
        if not self._session.running:
            self.stop()
            return
        done = self._session.n_steps >= self._n_steps
        if not done or self._open or self._thread != threading.get_ident():
            return
        if inside_backward() or inside_transform() or optimizer_steps.inside_hook:
            return
        self.stop()
        self._session.stop()
        self._session.recording.notes.append(
            f"what came after {self._session.recording.n_steps} steps: --steps ended the watch"
        )
