"""Whether this machine was suspended: CLOCK_BOOTTIME goes on then, CLOCK_MONOTONIC does not (clock_gettime(2))."""

from __future__ import annotations

import time
from collections.abc import Callable

SHORTEST_S = 1.0
"""Shorter ones are not told from two clocks that are read one after the other on a busy machine."""


def _suspended_s() -> float:
    """Seconds that this machine has been suspended since it was booted."""
    before_s = time.monotonic()
    boot_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    # Between the two readings of the other clock: a pause in between is no suspend.
    return boot_s - (before_s + time.monotonic()) / 2


class SuspendClock:
    """Says how long the machine slept since it was asked last.

    Args:
        suspended_s: seconds suspended since boot; injected by tests.
    """

    def __init__(self, suspended_s: Callable[[], float] = _suspended_s) -> None:
        self._suspended_s = suspended_s
        self._last_s = suspended_s()

    def slept_s(self) -> float:
        """Seconds since the last call that were slept away; 0 when none were."""
        now_s = self._suspended_s()
        slept_s = now_s - self._last_s
        if slept_s < SHORTEST_S:
            return 0.0
        self._last_s = now_s
        return slept_s
