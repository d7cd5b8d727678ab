"""Who is alive, by what the topic table promises: a live speaker is never silent for longer than a topic's ``every_s``.

Silent for three of these intervals it is late, for ten silent. Judged by the hearer's monotonic clock alone. What the
broker had kept (MQTT's RETAIN flag) is no sign of life: the speaker counts as heard from the moment it is listened to.
A hearer that was cut off, or stood still itself, forgives the silence of that time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from protocol.codec import Received
from protocol.messages import Speaker
from protocol.topics import TOPICS

LATE_AFTER, SILENT_AFTER = 3, 10
"""Intervals without a word."""
GONE = frozenset({"lost", "disconnected", "sleeping", "failed"})
"""Whoever is said to be so is not expected to speak."""
MAX_SPEAKERS = 10_000
"""More are not followed, but counted: names are the speakers' own."""

EVERY_S: dict[str, float] = {topic.name: topic.every_s for topic in TOPICS if topic.every_s}
"""Declared intervals in seconds, by topic."""


@dataclass
class _Heard:
    state: str
    every_s: float
    since_s: float
    """Its last word, or when it was first listened to, or forgiven."""
    fresh: bool
    """A word was heard that the broker had not kept."""
    skew_ms: float | None = None
    told: bool = False
    """It was reported as late."""

    def liveness(self, now_s: float) -> str:
        if self.state in GONE:
            return "gone"
        silent_s = now_s - self.since_s
        if silent_s >= SILENT_AFTER * self.every_s:
            return "silent"
        if silent_s >= LATE_AFTER * self.every_s:
            return "late"
        return "live" if self.fresh else "unknown"


class Liveness:
    """Follows every speaker on topics that are promised to be said again. Thread-safe.

    Args:
        every_s: intervals by topic name in place of the table's; for tests.
        now_s: the monotonic clock.
    """

    def __init__(self, every_s: Mapping[str, float] | None = None, now_s: Callable[[], float] = time.monotonic) -> None:
        self._every_s = EVERY_S if every_s is None else every_s
        self._now_s = now_s
        self._lock = threading.Lock()
        self._heard: dict[tuple[str, str], _Heard] = {}
        self.not_followed = 0
        """Words of speakers beyond MAX_SPEAKERS."""

    def hear(self, message: Received) -> None:
        """Take note of a word. Its struct has ``state`` and ``time_us``, as those of these topics have."""
        every_s = self._every_s.get(message.topic.topic.name)
        if not every_s:
            return
        key = (message.node, message.topic.names.get("service", ""))
        state: str = message.data.state
        with self._lock:
            known = self._heard.get(key)
            if known is None:
                if len(self._heard) >= MAX_SPEAKERS:
                    self.not_followed += 1
                    return
                known = self._heard[key] = _Heard(state, every_s, message.received_s, fresh=False)
            known.state = state
            if message.retained:
                return
            known.since_s, known.fresh = message.received_s, True
            if state not in GONE and message.data.time_us:
                age_s = self._now_s() - message.received_s
                known.skew_ms = message.data.time_us / 1000 - (time.time() - age_s) * 1000

    def forgive(self) -> None:
        """The hearer was deaf until now: nobody's silence counts."""
        now_s = self._now_s()
        with self._lock:
            for known in self._heard.values():
                known.since_s = now_s

    def speakers(self) -> list[Speaker]:
        """Everyone who was heard, by name."""
        now_s = self._now_s()
        with self._lock:
            return [self._speaker(key, known, now_s) for key, known in sorted(self._heard.items())]

    def changes(self) -> list[tuple[Speaker, str]]:
        """Who became ``late`` since the last call, who of those is ``back``, and who is known to be ``gone`` now."""
        now_s = self._now_s()
        found = []
        with self._lock:
            for key, known in sorted(self._heard.items()):
                liveness = known.liveness(now_s)
                late = liveness in ("late", "silent")
                if late != known.told:
                    known.told = late
                    found.append(
                        (self._speaker(key, known, now_s), "late" if late else "gone" if liveness == "gone" else "back")
                    )
        return found

    @staticmethod
    def _speaker(key: tuple[str, str], known: _Heard, now_s: float) -> Speaker:
        return Speaker(
            node=key[0],
            service=key[1],
            state=known.state,
            liveness=known.liveness(now_s),
            silent_s=round(max(0.0, now_s - known.since_s), 3),
            skew_ms=None if known.skew_ms is None else round(known.skew_ms, 1),
        )
