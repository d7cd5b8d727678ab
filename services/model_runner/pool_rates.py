"""How fast this node reads, loads from its own pool, and fetches from each peer: measured on real work (``costs``).

Before anything was measured a guess stands in: a fetch has a deadline, so a wrong one costs little and is put right by
the first.
"""

from __future__ import annotations

import math
import threading
import time

from services.model_runner.costs import Estimate, Link, PrefillRate

GUESSED_READ_S = 1 / 1000
"""A token."""
GUESSED_LOCAL_S = 1 / 300e6
"""A byte from this node's own store: read, decrypted, checked and put in place."""
GUESSED_LINK_S = 1 / 20e6
"""A byte from a peer."""
GUESSED_ASK_S = 0.02
FIXED_S = 0.005
"""Of any fetch: threads wake, a cache is made."""


class PoolRates:
    """On any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reading = PrefillRate()
        self._local = Estimate()
        self._links: dict[str, Link] = {}

    def has_read(self, start: int, end: int, seconds: float) -> None:
        """Positions ``start`` to ``end`` took so long."""
        with self._lock:
            self._reading.add(start, end, seconds, _now_us())

    def asked(self, node: str, seconds: float) -> None:
        """An ask and its answer took so long."""
        with self._lock:
            self._links.setdefault(node, Link()).latency.add(seconds, _now_us())

    def came(self, node: str, size_bytes: int, seconds: float) -> None:
        """So much came from a node; from this one's own store where ``node`` is empty."""
        if size_bytes <= 0 or seconds <= 0:
            return
        with self._lock:
            if node:
                self._links.setdefault(node, Link()).transfer(size_bytes, seconds, _now_us())
            else:
                self._local.add(seconds / size_bytes, _now_us())

    def read_s(self, start: int, end: int) -> float:
        """What reading these positions takes."""
        with self._lock:
            known = self._reading.seconds(start, end)
        return known if math.isfinite(known) else (end - start) * GUESSED_READ_S

    def load_s(self, own_bytes: int, node: str, peer_bytes: int) -> float:
        """What loading takes: so much from this node's own store, and so much from a peer, if one is named."""
        with self._lock:
            local = self._local.likely if self._local.known else GUESSED_LOCAL_S
            link = self._links.get(node, Link())
            byte = link.byte.likely if link.byte.known else GUESSED_LINK_S
            ask = link.latency.likely if link.latency.known else GUESSED_ASK_S
        # What comes from a peer is decrypted and checked here as well; its two asks are for entries and for chunks.
        over = 2 * ask + peer_bytes * (byte + local) if node else 0.0
        return FIXED_S + own_bytes * local + over

    def pays(self, size_bytes: int, read_s: float) -> bool:
        """Whether a block that took so long to read is loaded more quickly from this node's own store."""
        return self.load_s(size_bytes, "", 0) - FIXED_S < read_s


def _now_us() -> int:
    return time.time_ns() // 1000
