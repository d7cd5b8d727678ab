"""Telling whoever asked how far a long save or fetch has come. What is said may be dropped: the answer comes anyway.

Who says how far he is hears, too, that nobody waits any more: ``OnBytes`` may raise Cancelled.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from protocol.errors import Cancelled
from protocol.messages import SnapshotProgress

EVERY_S = 0.2

Phase = str
OnBytes = Callable[[Phase, int, int], None]
"""Called with what is being done, the bytes (of ``read``, ``look`` and ``test``: tokens) that are done, and those of
all; it raises Cancelled when it is to end."""
Say = Callable[[str, SnapshotProgress], None]
"""Called with the run and what is to be said of it; it must not take long."""


def silent(_phase: Phase, _done_bytes: int, _total_bytes: int) -> None:
    """For those who do not ask."""


def telling(run: str, say: Say) -> OnBytes:
    """Says of ``run`` now and then how far it is: every phase's beginning and end, and at most five times a second in
    between. Silent without a run."""
    if not run:
        return silent
    phase_now, said_s = "", 0.0

    def on_bytes(phase: Phase, done_bytes: int, total_bytes: int) -> None:
        nonlocal phase_now, said_s
        now_s = time.monotonic()
        if phase == phase_now and done_bytes < total_bytes and now_s - said_s < EVERY_S:
            return
        phase_now, said_s = phase, now_s
        say(run, SnapshotProgress(phase, done_bytes, max(done_bytes, total_bytes) if total_bytes else 0))

    return on_bytes


def unless(cancelled: threading.Event, tell: OnBytes) -> OnBytes:
    """As ``tell``, until ``cancelled`` is set."""

    def on_bytes(phase: Phase, done_bytes: int, total_bytes: int) -> None:
        if cancelled.is_set():
            raise Cancelled(
                "saving a snapshot: who asked for it has cancelled it", hint="nothing of it is kept", reason="cancelled"
            )
        tell(phase, done_bytes, total_bytes)

    return on_bytes
