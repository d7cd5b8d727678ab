"""Hybrid logical clock: timestamps that order causally related events even when wall clocks disagree.

Kulkarni et al., "Logical Physical Clocks and Consistent Snapshots in Globally Distributed Databases",
2014. A stamp is one 64-bit integer: 48 bits of Unix time in milliseconds, 16 bits of counter.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

COUNTER_BITS = 16
MAX_DRIFT_MS = 60_000
"""A remote stamp further ahead of this node's clock than this is stored but never merged, so that one
node with a wrong clock cannot drag every other node's stamps along."""


def _unix_ms() -> int:
    return time.time_ns() // 1_000_000


def pack(time_ms: int, counter: int) -> int:
    """One 64-bit stamp of a time in milliseconds and a counter."""
    return time_ms << COUNTER_BITS | counter


def time_ms_of(stamp: int) -> int:
    """The Unix time in milliseconds of a stamp."""
    return stamp >> COUNTER_BITS


class HybridLogicalClock:
    """One node's clock. Thread-safe.

    Args:
        now_ms: the wall clock, Unix milliseconds; injected by tests.
        max_drift_ms: how far ahead a remote stamp may be and still be merged.
        last: the greatest stamp already given out, from the log, so that a restart never goes back.
    """

    def __init__(self, now_ms: Callable[[], int] = _unix_ms, max_drift_ms: int = MAX_DRIFT_MS, last: int = 0) -> None:
        self._now_ms = now_ms
        self._max_drift_ms = max_drift_ms
        self._last = last
        self._lock = threading.Lock()
        self.refused_merges = 0
        """Remote stamps beyond the bound: stored by the caller, not merged here."""

    @property
    def last(self) -> int:
        """The greatest stamp given out or merged so far."""
        return self._last

    def tick(self) -> int:
        """A new stamp for a local event, greater than every stamp given out or merged before."""
        with self._lock:
            self._last = max(pack(self._now_ms(), 0), self._last + 1)
            return self._last

    def merge(self, remote: int) -> bool:
        """Take note of a remote stamp. False, and nothing changed, when it is beyond the drift bound."""
        with self._lock:
            if time_ms_of(remote) > self._now_ms() + self._max_drift_ms:
                self.refused_merges += 1
                return False
            self._last = max(self._last, remote)
            return True
