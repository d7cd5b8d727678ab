"""The memory store: keeps this node's log and its copies of the others', and answers recalls from them.

It hears puts (committed together, answered after the commit), other nodes' new entries, and ranges that the
sync bridge fetched. It says its own new entries after they are committed, and a digest of all that it holds.
The log is its own outbox: what was committed and not said is said after a restart.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from edge.bus import Deferred
from edge.db import Database, open_database
from edge.service import Service, hears
from protocol.codec import Received
from protocol.entries import Origin
from protocol.errors import MindstreamError, StorageError
from protocol.messages import (
    MemoryEntries,
    MemoryHave,
    MemoryMerge,
    MemoryMerged,
    MemoryPut,
    MemoryRecall,
    MemoryRepair,
    MemoryStored,
    MemoryVector,
    MemoryVectorAsk,
)
from services.memory_store.log import MEMORY_LOG_SCHEMA, MemoryLog
from services.memory_store.recall import recall

log = logging.getLogger(__name__)

LINGER_S = 0.003
RETRY_S = 1.0
HAVE_INTERVAL_S = 0.2
"""The digest is said at most this often."""
RANGE_BYTES = 900 * 1024
"""Entries in one message, encoded: below the topic's limit."""


class MemoryStore(Service):
    """One node's memory."""

    name = "memory_store"

    def setup(self) -> None:
        self.db: Database = open_database(self.context.data_dir / "memory.db", schema=MEMORY_LOG_SCHEMA)
        self.log = MemoryLog(self.db, self.context.identity, self.context.peers.keyring)
        self._readers = ThreadPoolExecutor(1, "memory reader")
        self._news = threading.Event()
        self._ending = False
        self._have_said = b""
        self._speaker = self.worker_thread(self._speak, "memory speaker")

    def started(self) -> None:
        self._news.set()
        self._speaker.start()

    def reconnected(self) -> None:
        self._have_said = b""
        self._news.set()

    def teardown(self) -> None:
        self._ending = True
        self._news.set()
        if self._speaker.is_alive():
            self._speaker.join(5.0)
        self._readers.shutdown(cancel_futures=True)
        try:
            self.log.flush()
        except StorageError as error:
            log.warning("some memories will be said a second time: %s", error)
        self.db.close()

    def details(self) -> dict[str, Any]:
        return self.log.stats()

    # --- what it hears --------------------------------------------------------------------------------------

    @hears(MemoryPut, batch=256)
    def put(self, messages: list[Received]) -> list[MemoryStored | MindstreamError]:
        """Commit a batch of puts in one transaction; each is answered with its number."""
        results = self.log.put_many(messages)
        self._news.set()
        return results

    @hears(MemoryEntries, batch=16)
    def entries(self, messages: list[Received]) -> None:
        """New entries of other nodes: verified and committed before they are acknowledged."""
        self._merge([entry for message in messages if message.node != self.node for entry in message.data.entries])

    @hears(MemoryMerge)
    def merge(self, message: Received) -> MemoryMerged:
        """Entries that this node's sync bridge fetched."""
        return self._merge(message.data.entries)

    @hears(MemoryRecall)
    def recall(self, message: Received) -> Deferred:
        """Text recall, on the reader thread: it must not hold up puts."""
        ask: MemoryRecall = message.data
        own = message.node == self.node
        return self._read(lambda: recall(self.db, ask.query, ask.limit, include_private=own))

    @hears(MemoryVectorAsk)
    def have(self, _message: Received) -> Deferred:
        """How far this node holds each origin."""
        return self._read(self.log.vector)

    @hears(MemoryRepair)
    def repair(self, message: Received) -> Deferred:
        """A range of one origin's entries."""
        ask: MemoryRepair = message.data
        origin = Origin(ask.node, ask.scope, ask.log_id)
        return self._read(lambda: self.log.range(origin, ask.first_seq, ask.last_seq, RANGE_BYTES))

    def _read(self, work: Callable[[], msgspec.Struct | MemoryVector]) -> Deferred:
        answer = Deferred()

        def run() -> None:
            try:
                answer.set_result(work())
            except Exception as error:  # noqa: BLE001 - it becomes the answer, and the bus logs what is unexpected
                answer.set_exception(error)

        self._readers.submit(run)
        return answer

    def _merge(self, entries: list[Any]) -> MemoryMerged:
        if not entries:
            return MemoryMerged()
        outcome = self.log.merge(entries)
        for event in outcome.events:
            self.bus.events.report(event.name, event.severity, event.text, error=event.error, count=event.count)
        for name in ("stored", "already", "waiting", "refused"):
            if count := getattr(outcome.merged, name):
                self.bus.counters.add(f"entries.{name}", count)
        if outcome.merged.stored:
            self._news.set()
        return outcome.merged

    # --- what it says ---------------------------------------------------------------------------------------

    def _speak(self) -> None:
        """Say new entries of our own as they are committed, and the digest now and then while it changes."""
        have_due_s = time.monotonic()
        pending = True
        while not self._ending:
            wait_s = max(0.0, have_due_s - time.monotonic()) if pending else None
            if self._news.wait(wait_s):
                # Puts come in bursts: let one message carry those of a few milliseconds.
                time.sleep(LINGER_S)
            self._news.clear()
            # First: should the disk or the bus fail below, it is tried again, whether or not there is more news.
            pending = True
            try:
                self._say_new_entries()
                if time.monotonic() >= have_due_s:
                    self._say_have()
                    pending = False
                    have_due_s = time.monotonic() + HAVE_INTERVAL_S
            except MindstreamError as error:
                log.warning("new memories are committed and not said yet: %s", error)
                have_due_s = time.monotonic() + RETRY_S

    def _say_new_entries(self) -> None:
        while not self._ending:
            batch = self.log.unpublished(RANGE_BYTES)
            if not batch.entries:
                return
            self.bus.say(MemoryEntries(entries=batch.entries))
            self.log.mark_published(batch)

    def _say_have(self) -> None:
        have: MemoryHave = self.log.digest()
        if have.digest != self._have_said:
            self.bus.say(have)
            self._have_said = have.digest
