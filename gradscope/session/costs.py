"""What watching costs: every second is counted once, under what it was spent on."""

from __future__ import annotations

import time

from gradscope.run.recording import Recording


class Costs:
    """A clock for parts that run inside one another; the inner part's time is not the outer's.

    Args:
        recording: where the times are kept.
    """

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        # Of each part that is running: when it began, and what inner parts took of it.
        self._running: list[list[float]] = []
        self._total = 0.0

    def begin(self) -> None:
        """Start the clock of a part."""
        self._running.append([time.perf_counter(), 0.0])

    def end(self, part: str) -> None:
        """Stop the clock of the part that was started last, and say what it was."""
        began, inner = self._running.pop()
        seconds = time.perf_counter() - began
        self._recording.spend(part, seconds - inner)
        if self._running:
            self._running[-1][1] += seconds
        else:
            self._total += seconds

    def add(self, part: str, seconds: float) -> None:
        """Count time that was taken outside of every part."""
        self._recording.spend(part, seconds)
        self._total += seconds

    @property
    def total(self) -> float:
        """Seconds spent so far, those of the parts that are running included."""
        running = time.perf_counter() - self._running[0][0] if self._running else 0.0
        return self._total + running
