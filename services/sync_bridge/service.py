"""The sync bridge: compares what nodes hold, and fetches what this one has missed.

It hears the digest that every node's memory store says. When another node's differs from ours for more than a
moment, it asks both for their vectors and fetches, range by range, what the other holds and we do not, into this
node's memory store. New entries come by themselves; this repairs what a broker, a crash or an absence lost.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

from edge.service import Service, hears
from protocol.codec import Received
from protocol.entries import entry_hash
from protocol.errors import AskExpired, MindstreamError, StorageError
from protocol.messages import (
    MemoryEntries,
    MemoryHave,
    MemoryMerge,
    MemoryMerged,
    MemoryRepair,
    MemoryVector,
    MemoryVectorAsk,
    OriginHave,
)

log = logging.getLogger(__name__)

SETTLE_S = 0.5
"""A difference younger than this is new entries on their way, not a gap."""
RETRY_FIRST_S, RETRY_MAX_S = 1.0, 30.0
ASK_TTL_MS = 10_000
RANGE_ENTRIES = 1_000
"""Entries asked for at once; the answer is bounded in bytes as well."""


@dataclass
class _Peer:
    """What is known of another node's memory."""

    digest: bytes = b""
    retry_s: float = RETRY_FIRST_S
    next_s: float = 0.0
    fetched: int = 0
    behind: int = 0
    """Entries that it held and we did not, at the last comparison."""
    waiting_for: str = ""
    """Why the last comparison failed; empty when it did not."""


class SyncBridge(Service):
    """Keeps this node's memory in step with the others'."""

    name = "sync_bridge"

    def setup(self) -> None:
        self._peers: dict[str, _Peer] = {}
        self._own_digest = b""
        self._changed = threading.Condition()
        self._ending = False
        self._worker = self.worker_thread(self._run, "sync worker")
        self._keyring = self.context.peers.keyring()

    def started(self) -> None:
        self._worker.start()

    def teardown(self) -> None:
        with self._changed:
            self._ending = True
            self._changed.notify()
        if self._worker.is_alive():
            self._worker.join(5.0)

    def details(self) -> dict[str, Any]:
        with self._changed:
            return {
                "in_step": sum(peer.digest == self._own_digest for peer in self._peers.values()),
                "behind": max((self._behind(peer) for peer in self._peers.values()), default=0),
                "peers": {
                    name: {
                        "in_step": peer.digest == self._own_digest,
                        "behind": self._behind(peer),
                        "fetched": peer.fetched,
                        **({"waiting_for": peer.waiting_for} if peer.waiting_for else {}),
                    }
                    for name, peer in sorted(self._peers.items())
                },
            }

    def _behind(self, peer: _Peer) -> int:
        return 0 if peer.digest == self._own_digest else peer.behind

    @hears(MemoryHave)
    def have(self, message: Received) -> None:
        """A node, perhaps this one, holds something new."""
        with self._changed:
            now_s = time.monotonic()
            if message.node == self.node:
                for peer in self._peers.values():
                    if peer.digest == self._own_digest:
                        # In step until now: what this node got just now is on its way to the other as well.
                        peer.next_s = max(peer.next_s, now_s + SETTLE_S)
                self._own_digest = message.data.digest
            else:
                peer = self._peers.setdefault(message.node, _Peer())
                if peer.digest == self._own_digest:
                    peer.next_s = now_s + SETTLE_S
                else:
                    peer.next_s = min(peer.next_s, now_s + RETRY_FIRST_S)
                peer.digest = message.data.digest
                peer.retry_s = RETRY_FIRST_S
            self._changed.notify()

    def tick(self) -> None:
        """Trust given or taken while this runs takes effect at once: what was refused is asked for again."""
        try:
            keyring = self.context.peers.keyring()
        except StorageError as error:
            log.warning("reading whom to trust: %s", error)
            return
        if keyring is not self._keyring:
            self._keyring = keyring
            with self._changed:
                for peer in self._peers.values():
                    peer.next_s, peer.retry_s = 0.0, RETRY_FIRST_S
                self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._ending:
                    return
                due = self._due()
                if due is None:
                    self._changed.wait(0.25)
                    continue
                name, peer = due
            try:
                fetched, offered = self._compare(name)
                peer.behind = max(0, offered - fetched)
                peer.waiting_for = "" if fetched or not offered else "nothing of what it holds was accepted"
                progress = fetched > 0
            except AskExpired as error:
                progress, peer.waiting_for = False, error.message
            except MindstreamError as error:
                progress, peer.waiting_for = False, str(error)
                self.bus.counters.add("failed.compare")
                log.warning("comparing memories with %s: %s", name, error)
            peer.retry_s = RETRY_FIRST_S if progress else min(RETRY_MAX_S, peer.retry_s * 2)
            peer.next_s = time.monotonic() + peer.retry_s

    def _due(self) -> tuple[str, _Peer] | None:
        """The peer whose memory differs from ours and whose turn it is."""
        now_s = time.monotonic()
        for name, peer in self._peers.items():
            if peer.digest != self._own_digest and now_s >= peer.next_s:
                return name, peer
        return None

    def _compare(self, peer: str) -> tuple[int, int]:
        """Fetch what ``peer`` holds and we do not: entries fetched, and entries that it had for us."""
        theirs: MemoryVector = self.bus.ask(peer, MemoryVectorAsk(), ttl_ms=ASK_TTL_MS)
        ours: MemoryVector = self.bus.ask(self.node, MemoryVectorAsk(), ttl_ms=ASK_TTL_MS)
        held = {(have.node, have.scope, have.log_id): have for have in ours.origins}
        fetched = offered = 0
        for origin in theirs.origins:
            own = held.get((origin.node, origin.scope, origin.log_id))
            first = own.seq + 1 if own else 1
            if own is not None and self._contradicts(own, origin):
                first = origin.seq  # our store shall see it, refuse it, and say that there is a fork
            if first <= origin.seq:
                offered += origin.seq - first + 1
                fetched += self._fetch(peer, origin, first)
        return fetched, offered

    def _contradicts(self, own: OriginHave, other: OriginHave) -> bool:
        """Whether another node holds another chain than ours, up to where it is no longer than ours.

        The longer side would not notice by itself: it lacks nothing.
        """
        if other.seq > own.seq:
            return False
        if other.seq == own.seq:
            return other.hash != own.hash
        ask = MemoryRepair(own.node, own.scope, own.log_id, other.seq, other.seq)
        found: MemoryEntries = self.bus.ask(self.node, ask, ttl_ms=ASK_TTL_MS)
        return bool(found.entries) and entry_hash(found.entries[0].header) != other.hash

    def _fetch(self, peer: str, origin: OriginHave, first: int) -> int:
        """Fetch one origin's entries from ``first`` on, as far as they are accepted; how many were new."""
        fetched = 0
        while first <= origin.seq and not self._ending:
            last = min(origin.seq, first + RANGE_ENTRIES - 1)
            ask = MemoryRepair(origin.node, origin.scope, origin.log_id, first, last)
            found: MemoryEntries = self.bus.ask(peer, ask, ttl_ms=ASK_TTL_MS)
            if not found.entries:
                return fetched
            merged: MemoryMerged = self.bus.ask(self.node, MemoryMerge(entries=found.entries), ttl_ms=ASK_TTL_MS)
            self.bus.counters.add("repaired", merged.stored)
            fetched += merged.stored
            self._peers[peer].fetched += merged.stored  # at once: what comes after may fail
            if merged.refused:
                return fetched  # not trusted, or a fork: the store has said so
            first += len(found.entries)
        return fetched
