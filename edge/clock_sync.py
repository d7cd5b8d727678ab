"""Whether the operating system says that this machine's clock is synchronised."""

from __future__ import annotations

import ctypes
import threading
import time
from pathlib import Path

_FRESH_S = 5.0
_TIME_ERROR = 5
"""adjtimex(2)'s clock state when the clock is not synchronised."""
_TIMEX_BYTES = 512
"""More than the kernel's struct timex has; all zero, its ``modes`` ask for nothing to be changed."""
_TIMESYNCD_MARK = Path("/run/systemd/timesync/synchronized")


def read_clock_synced() -> bool:
    """By adjtimex(2), else by systemd-timesyncd's mark. What cannot be found out counts as not synchronised."""
    try:
        state = int(ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES)))
    except (OSError, AttributeError):
        state = -1
    if state >= 0:
        return state != _TIME_ERROR
    return _TIMESYNCD_MARK.exists()


class ClockSync:
    """``read_clock_synced``, asked again only every few seconds. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._value = False
        self._until_s = 0.0

    def __call__(self) -> bool:
        with self._lock:
            now_s = time.monotonic()
            if now_s >= self._until_s:
                self._value, self._until_s = read_clock_synced(), now_s + _FRESH_S
            return self._value
