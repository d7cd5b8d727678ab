"""What a fetch from the pool would take, and what reading would, from what this node has measured (``cost_book``).

Before anything was measured a guess stands in: a fetch has a deadline, so a wrong one costs little and is put right by
the first.
"""

from __future__ import annotations

import math
import threading
import time

from services.model_runner.cost_book import CostBook
from services.model_runner.costs import Estimate

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
    """On any thread.

    Args:
        costs: what is measured of reading and of links, by all of the runner.
    """

    def __init__(self, costs: CostBook) -> None:
        self._costs = costs
        self._lock = threading.Lock()
        self._local = Estimate()

    def asked(self, node: str, seconds: float) -> None:
        """An ask and its answer took so long."""
        self._costs.asked(node, seconds)

    def came(self, node: str, size_bytes: int, seconds: float) -> None:
        """So much came from a node; from this one's own store where ``node`` is empty."""
        if size_bytes <= 0 or seconds <= 0:
            return
        if node:
            self._costs.fetched(node, size_bytes, seconds)
            return
        with self._lock:
            self._local.add(seconds / size_bytes, time.time_ns() // 1000)

    def read_s(self, start: int, end: int) -> float:
        """What reading these positions takes."""
        known = self._costs.prefill.seconds(start, end)
        return known if math.isfinite(known) else (end - start) * GUESSED_READ_S

    def load_s(self, own_bytes: int, node: str, peer_bytes: int) -> float:
        """What loading takes: so much from this node's own store, and so much from a peer, if one is named."""
        with self._lock:
            local = self._local.likely if self._local.known else GUESSED_LOCAL_S
        over = 0.0
        if node:
            link = self._costs.link(node)
            byte = link.byte.likely if link.byte.known else GUESSED_LINK_S
            ask = link.latency.likely if link.latency.known else GUESSED_ASK_S
            # What comes from a peer is decrypted and checked here as well; entries are asked for, then chunks.
            over = 2 * ask + peer_bytes * (byte + local)
        return FIXED_S + own_bytes * local + over

    def pays(self, size_bytes: int, read_s: float) -> bool:
        """Whether a block that took so long to read is loaded more quickly from this node's own store."""
        return self.load_s(size_bytes, "", 0) - FIXED_S < read_s
