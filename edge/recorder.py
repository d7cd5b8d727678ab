"""The recorder: takes what passes over the bus, and writes it without ever holding the bus up.

One thread reads from the broker and acknowledges at once; another compresses and writes. Between them is a queue
bounded in bytes. What does not fit into it, what the disk does not take and what may have passed while there was no
connection is counted, and a gap in the recording says so. Nothing waits for the disk but the writing thread.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge.mqtt_wire import WireClient
from edge.recording import Gap, RecordingInfo
from edge.recording_writer import BlockSink, Rotation, Totals
from edge.stopping import StopFlag
from edge.text import mindstream_version
from protocol.errors import NotConnected, StorageError
from protocol.ids import uuid7

log = logging.getLogger(__name__)

BLOCK_BYTES = 1024 * 1024
BLOCK_AGE_S = 1.0
"""A block is closed at this size or age: a kill -9 loses about the last second, and what waits in the queue."""
QUEUE_BYTES = 32 * 1024 * 1024
"""What may wait for the disk; beyond it messages are counted and let go."""
SESSION_EXPIRY_S = 60
"""The broker keeps messages for a recorder whose connection broke this long."""
RECONNECT_MIN_S, RECONNECT_MAX_S = 0.2, 5.0

Arrivals = list[tuple[int, int, str, bytes, int, int | None]]


@dataclass
class _Block:
    items: list[Any] = field(default_factory=list)
    size_bytes: int = 0
    began_s: float = 0.0


class BlockQueue:
    """Collects messages into blocks, bounded in bytes; counts what finds no room. One adds, another takes."""

    def __init__(self, totals: Totals, limit_bytes: int = QUEUE_BYTES) -> None:
        self._totals = totals
        self._limit_bytes = limit_bytes
        self._waiting_bytes = 0
        self._block = _Block()
        self._blocks: deque[list[Any]] = deque()
        self._sizes: deque[int] = deque()
        self._gap: Gap | None = None
        self._changed = threading.Condition()
        self._closed = False

    def add(self, arrivals: Arrivals, size_bytes: int) -> None:
        """Take what one read brought, of ``size_bytes``; never waits."""
        block = self._block
        self._totals.received += len(arrivals)
        if self._waiting_bytes + block.size_bytes + size_bytes > self._limit_bytes:
            self._totals.lost += len(arrivals)
            if self._gap is None:
                text = f"the disk was too slow: {self._limit_bytes:,} bytes waited for it"
                self._gap = Gap("queue full", arrivals[0][0], 0, 0, arrivals[0][1], text)
            self._gap.last_us = arrivals[-1][0]
            self._gap.messages = (self._gap.messages or 0) + len(arrivals)
            self.hand_over()
            return
        if self._gap is not None:
            block.items.append(self._gap)
            self._gap = None
        if not block.items or not block.began_s:
            block.began_s = time.monotonic()
        block.items += arrivals
        block.size_bytes += size_bytes
        if block.size_bytes >= BLOCK_BYTES:
            self.hand_over()

    def note(self, gap: Gap) -> None:
        """Add a gap where the stream stands now."""
        self._block.items.append(gap)
        self._block.began_s = self._block.began_s or time.monotonic()

    def close_old(self) -> None:
        """Hand the block over if it is old enough."""
        if self._block.began_s and time.monotonic() - self._block.began_s >= BLOCK_AGE_S:
            self.hand_over()

    def hand_over(self) -> None:
        """Give the block that is being filled to the writing thread."""
        if not self._block.items:
            return
        block, self._block = self._block, _Block()
        with self._changed:
            self._blocks.append(block.items)
            self._sizes.append(block.size_bytes)
            self._waiting_bytes += block.size_bytes
            self._changed.notify()

    def close(self) -> None:
        """No more will come."""
        if self._gap is not None:
            self.note(self._gap)
            self._gap = None
        self.hand_over()
        with self._changed:
            self._closed = True
            self._changed.notify()

    def take(self, timeout_s: float) -> list[Any] | None:
        """The next block; an empty list when none came in time, None at the end. Call ``done`` after it."""
        with self._changed:
            self._changed.wait_for(lambda: self._blocks or self._closed, timeout_s)
            if self._blocks:
                return self._blocks[0]
            return None if self._closed else []

    def done(self) -> None:
        """The block taken last is written, or given up: its bytes are free."""
        with self._changed:
            self._blocks.popleft()
            self._waiting_bytes -= self._sizes.popleft()


class Recorder:
    """Records ``filters`` of one broker, from the moment it is made until ``stop``.

    Args:
        client: not connected; with a session expiry of SESSION_EXPIRY_S.
        path: the file, or what parts are named after.
        node: this node's name, for the header.
        count, seconds: end after so many messages, or this time; 0 never.

    Raises NotConnected, or StorageError when the file cannot be made.
    """

    def __init__(
        self,
        client: WireClient,
        path: Path,
        filters: list[str],
        *,
        node: str,
        rotation: Rotation | None = None,
        wait_when_full: bool = False,
        count: int = 0,
        seconds: float = 0.0,
        queue_bytes: int = QUEUE_BYTES,
    ) -> None:
        self._client = client
        self._filters = filters
        self._count = count
        self._seconds = seconds
        self.totals = Totals()
        self._stop = StopFlag()
        client.epoch_ns = time.monotonic_ns()
        now_us = time.time_ns() // 1000
        client.connect()
        self._subscribe()
        info = RecordingInfo(
            recording=uuid7(),
            part=0,
            node=node,
            broker=client.url,
            mindstream=mindstream_version(),
            filters=filters,
            started_us=now_us,
            part_started_us=now_us,
            mqtt="5" if client.level == 5 else "3.1.1",
        )
        self.queue = BlockQueue(self.totals, queue_bytes)
        try:
            self.sink = BlockSink(path, info, rotation or Rotation(), self.totals, wait_when_full=wait_when_full)
        except StorageError:
            client.close()
            raise
        self._writing = threading.Thread(target=self._write, name="recording writer", daemon=True)

    def stop(self) -> None:
        """End ``run`` soon; safe in a signal handler."""
        self._stop.set()

    def run(self, every_s: float = 1.0, progress: Callable[[Totals], None] = lambda _totals: None) -> None:
        """Record until ``stop``, ``count``, ``seconds``, or a disk that takes no more.

        Everything is in the file when it returns.
        ``progress`` is called about every ``every_s``. Raises StorageError when the disk ended it.
        """
        told_s = began_s = time.monotonic()
        self._writing.start()
        try:
            while not self._stop.is_set() and self.sink.failure is None:
                self._read_once()
                if self._count and self.totals.received >= self._count:
                    break
                if self._seconds and time.monotonic() - began_s >= self._seconds:
                    break
                if time.monotonic() - told_s >= every_s:
                    told_s = time.monotonic()
                    progress(self.totals)
        finally:
            self._client.close(timeout_s=1.0)
            self.queue.close()
            self._writing.join()
        if self.sink.failure is not None:
            raise self.sink.failure

    def _subscribe(self) -> None:
        for each in self._filters:
            self._client.subscribe(each)

    def _read_once(self) -> None:
        before = self._client.received_bytes
        try:
            arrivals = self._client.read(0.2)
        except NotConnected as error:
            self._come_back(error)
            return
        if arrivals:
            if self._count:
                arrivals = arrivals[: self._count - self.totals.received]
            self.queue.add(arrivals, self._client.received_bytes - before)
        self.queue.close_old()

    def _come_back(self, error: NotConnected) -> None:
        """Connect again, and note that something may be missing. Waits as long as it takes, or until ``stop``."""
        log.warning("%s; what passes meanwhile may be missing", error)
        first_us, pause_s = time.time_ns() // 1000, RECONNECT_MIN_S
        elapsed_us = (time.monotonic_ns() - self._client.epoch_ns) // 1000
        kept = False
        while not self._stop.wait(pause_s):
            self.queue.close_old()
            try:
                kept = self._client.connect(clean_start=False)
                self._subscribe()
                self.totals.reconnects += 1
                break
            except NotConnected:
                pause_s = min(pause_s * 2, RECONNECT_MAX_S)
        text = "the broker kept the session: what it had room for came afterwards" if kept else "the session was lost"
        self.queue.note(
            Gap("disconnected", first_us, time.time_ns() // 1000, None, elapsed_us, f"{error.message}; {text}")
        )

    def _write(self) -> None:
        """The writing thread."""
        # Compressing must not take the processor from those who speak and hear.
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)
        except OSError:
            pass
        while (items := self.queue.take(0.5)) is not None:
            if items:
                self.sink.write(items)
                self.queue.done()
            else:
                self.sink.idle()
        self.sink.close()
