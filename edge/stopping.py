"""A flag that a signal handler may set.

``threading.Event`` is none: its lock is not reentrant, and a handler runs on the main thread between any two of its
instructions, also while that thread is inside ``wait`` and holds the lock. ``set`` then waits for itself, for ever, and
SIGTERM ends nothing. ``queue.SimpleQueue.put`` is reentrant by its documentation.
"""

from __future__ import annotations

from queue import Empty, SimpleQueue


class StopFlag:
    """Set once, by any thread or by a signal handler; waited for by any number of threads."""

    def __init__(self) -> None:
        self._set = False
        self._wake: SimpleQueue[None] = SimpleQueue()

    def set(self) -> None:
        """Set it, and wake who waits."""
        self._set = True
        self._wake.put(None)

    def is_set(self) -> bool:
        """Whether it was set."""
        return self._set

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it is set, ``timeout_s`` at most; whether it is."""
        if not self._set:
            try:
                self._wake.get(timeout=timeout_s)
            except Empty:
                return self._set
            self._wake.put(None)  # for the next one who waits
        return True
