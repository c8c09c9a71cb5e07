"""Seconds that count: those spent on training steps."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Clock = Callable[[], float]
"""Tells the time in seconds since any moment."""


class Stopwatch:
    """Seconds spent on steps."""

    def __init__(self, now: Clock = time.perf_counter, seconds: float = 0.0):
        self.now = now
        self._counted = seconds
        self._since: float | None = now()
        self._lap = seconds

    @property
    def seconds(self) -> float:
        """Seconds counted so far."""
        return self._counted + (0.0 if self._since is None else self.now() - self._since)

    def lap(self) -> float:
        """Seconds counted since the last lap."""
        now = self.seconds
        lap, self._lap = now - self._lap, now
        return lap

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Count nothing meanwhile."""
        self._counted, self._since = self.seconds, None
        try:
            yield
        finally:
            self._since = self.now()
