"""Counters and rate-limited events: what is dropped or refused is counted and said, never only logged."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from protocol.errors import ErrorInfo
from protocol.messages import Event

EVENT_INTERVAL_S = 1.0
"""Events of one name are at most one in this time; the count says how many there were."""


TROUBLES = ("dropped", "refused", "failed", "lost", "expired", "dead")
"""How the names of counters begin that somebody should know of."""
MAX_TEXT = 500
"""Characters of an event's text: whatever it quotes, the event fits its topic's limit."""


class Counters:
    """Named counts since start. Thread-safe."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()

    def add(self, name: str, count: int = 1) -> None:
        """Count ``count`` more of ``name``."""
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + count

    def __getitem__(self, name: str) -> int:
        return self._counts.get(name, 0)

    def snapshot(self) -> dict[str, int]:
        """All counts, a copy, sorted by name."""
        with self._lock:
            return dict(sorted(self._counts.items()))


class Events:
    """Says what happened, at most once a second a name, with how often. Thread-safe.

    Args:
        say: publishes an event; called from any thread.
        counters: counts every event under ``event.NAME``.
    """

    def __init__(self, say: Callable[[Event], None], counters: Counters) -> None:
        self._say = say
        self._counters = counters
        self._held: dict[str, Event] = {}
        self._last_s: dict[str, float] = {}
        self._lock = threading.Lock()

    def report(self, name: str, severity: str, text: str, *, error: ErrorInfo | None = None, count: int = 1) -> None:
        """Report one happening; held back, and counted, when one of its name was said just before."""
        self._counters.add(f"event.{name}", count)
        with self._lock:
            event = Event(name=name, severity=severity, text=text[:MAX_TEXT], count=count, error=error)
            if held := self._held.pop(name, None):
                event.count += held.count
            if time.monotonic() - self._last_s.get(name, -EVENT_INTERVAL_S) < EVENT_INTERVAL_S:
                self._held[name] = event
                return
            self._last_s[name] = time.monotonic()
        self._say(event)

    def flush(self, *, everything: bool = False) -> None:
        """Say what was held back and is due; called now and then, and with ``everything`` at the end."""
        now_s = time.monotonic()
        with self._lock:
            due = [n for n in self._held if everything or now_s - self._last_s[n] >= EVENT_INTERVAL_S]
            events = [self._held.pop(name) for name in due]
            self._last_s.update(dict.fromkeys(due, now_s))
        for event in events:
            self._say(event)
