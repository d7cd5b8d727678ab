"""Waiting for conditions, with a patience that a loaded machine does not use up."""

from __future__ import annotations

import time
from collections.abc import Callable

DEADLINE_S = 60.0
"""How long a test waits for what takes a moment on an idle machine. It bounds a failure, and measures nothing."""
TTL_MS = int(DEADLINE_S * 1000)
"""Time to live of asks in tests that are not about expiry."""


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = DEADLINE_S) -> None:
    """Wait until ``condition()`` is true; fail naming ``what`` when it is not in time.

    The condition must cover all that the next lines read: retained messages of two topics, a log line and the event
    of the same cause, or an answer and a counter may come in any order.
    """
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.01)
