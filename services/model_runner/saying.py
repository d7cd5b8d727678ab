"""What runs say, in order, on a thread of its own: a slow broker must not hold up the engine."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

log = logging.getLogger(__name__)

MOST_WAITING = 20_000
"""Tokens that may wait for the broker; what comes beyond is dropped and counted. The whole text stands in the run's
end, which always waits."""


class Sayer:
    """Carries out calls one after another. Thread-safe.

    Args:
        on_drop: called when a call was dropped because too many wait.
    """

    def __init__(self, on_drop: Callable[[], None]) -> None:
        self._on_drop = on_drop
        self._wake = threading.Condition(threading.Lock())
        self._waiting: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._main, name="run sayer", daemon=True)
        self._thread.start()

    def say(self, call: Callable[[], None], *, droppable: bool) -> None:
        """Do ``call`` after all that were given before; at once dropped when it may be and too many wait."""
        with self._wake:
            if droppable and len(self._waiting) >= MOST_WAITING:
                dropped = True
            else:
                dropped = False
                self._waiting.append(call)
                self._wake.notify()
        if dropped:
            self._on_drop()

    def stop(self) -> None:
        """End; what waits is not said."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(5.0)

    @property
    def died(self) -> bool:
        """Whether its thread has ended without being asked to."""
        return not self._thread.is_alive() and not self._stopping

    def _main(self) -> None:
        while True:
            with self._wake:
                while not self._waiting and not self._stopping:
                    self._wake.wait()
                if self._stopping:
                    return
                calls, self._waiting = self._waiting, deque()
            for call in calls:
                try:
                    call()
                except Exception:
                    log.exception("saying what a run has said")
