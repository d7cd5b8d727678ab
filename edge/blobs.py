"""Snapshots on the way: content-addressed chunks, pulled by the receiver, verified one by one.

Built models go the same way (edge/model_share.py, edge/model_fetch.py), out of and into files of their own.

A holder answers a pull with as many chunks as the receiver gave credit for, on ``blob/{transfer}``, over a
connection of its own, so that tokens and memories do not wait behind them. The receiver says what it has (or
expects) in a bitmap; chunks that do not come are asked for again. Every chunk is verified against the signed
manifest and stored before it counts, so a cut transfer goes on where it was.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Protocol

from edge.bus import Bus
from edge.snapshot_store import SnapshotStore
from protocol.codec import Received
from protocol.errors import AskExpired, BadSignature, BlobError, MindstreamError, Overloaded
from protocol.ids import uuid7
from protocol.layout import ChunkRef
from protocol.manifest import SnapshotManifest, verify_chunk
from protocol.messages import BlobChunk, BlobPull, BlobPulling

log = logging.getLogger(__name__)

CREDIT_CHUNKS = 16
"""Chunks under way to one receiver: 8 MiB, enough to keep a 1 Gbit/s link of 60 ms busy."""
STALL_S = 2.0
"""Chunks that were granted and have not come for this long are asked for again; then after twice as long."""
MAX_QUEUED = 4096
"""Chunks that a sender is asked for and has not sent, of all transfers; a pull beyond it is refused."""
MAX_BAD = 3
"""So often may one chunk come damaged before its holder's copy is held to be."""
PULL_TTL_MS = 10_000


class Chunked(Protocol):
    """What has a list of chunks: a manifest."""

    @property
    def chunks(self) -> Sequence[ChunkRef]:
        """In order."""


class ChunkSource(Protocol):
    """Where chunks are read."""

    def has(self, ref: ChunkRef) -> bool:
        """Whether a chunk is here."""

    def verified_chunk(self, ref: ChunkRef, index: int) -> bytes | None:
        """A chunk's bytes, verified; None when it is not here, or damaged. Raises StorageError."""


class ChunkTarget(Protocol):
    """Where chunks are put."""

    def has(self, ref: ChunkRef) -> bool:
        """Whether a chunk is here."""

    def put_chunk(self, ref: ChunkRef, data: bytes | memoryview) -> None:
        """Keep a chunk that was verified. Raises StorageError."""


class Held(Chunked, ChunkSource, Protocol):
    """Something else than a snapshot that a node holds, chunk by chunk."""


def _bits(indexes: set[int], count: int) -> bytes:
    bitmap = bytearray(-(-count // 8))
    for index in indexes:
        bitmap[index >> 3] |= 1 << (index & 7)
    return bytes(bitmap)


class BlobSender:
    """Sends chunks that were pulled, on a connection of its own, in one thread.

    Args:
        store: where manifests and chunks are.
        bus: the connection for chunks.
        read_manifest: the decoded manifest of a snapshot id. Raises NotFound and others of the tree.
        other: what else is held under an id; None: nothing.
    """

    def __init__(
        self,
        store: SnapshotStore,
        bus: Bus,
        read_manifest: Callable[[str], SnapshotManifest],
        other: Callable[[str], Held | None] = lambda _identifier: None,
    ) -> None:
        self._store = store
        self._bus = bus
        self._read_manifest = read_manifest
        self._other = other
        # Keyed by transfer and index: a chunk that is asked for again before it was sent goes out once.
        self._queue: OrderedDict[tuple[str, int], tuple[ChunkSource, ChunkRef]] = OrderedDict()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="blob sender", daemon=True)
        self._thread.start()

    def pull(self, message: Received) -> BlobPulling:
        """Handle a pull: queue the chunks it has credit for. Raises NotFound and Overloaded."""
        ask: BlobPull = message.data
        held = self._other(ask.snapshot)
        source: ChunkSource = self._store if held is None else held
        refs = self._read_manifest(ask.snapshot).chunks if held is None else held.chunks
        queued: dict[tuple[str, int], tuple[ChunkSource, ChunkRef]] = {}
        missing = []
        for index, ref in enumerate(refs):
            if len(queued) >= ask.credit:
                break
            if (index >> 3) < len(ask.have) and ask.have[index >> 3] & 1 << (index & 7):
                continue
            if not source.has(ref):
                missing.append(index)
            else:
                queued[ask.transfer, index] = source, ref
        with self._wake:
            if len(self._queue) + len(queued) > MAX_QUEUED:
                raise Overloaded(
                    f"sending chunks of {ask.snapshot[:12]}: {len(self._queue):,} others wait to be sent",
                    hint="try again later",
                    reason="too many transfers",
                )
            self._queue.update(queued)
            self._wake.notify()
        return BlobPulling(sending=len(queued), missing=missing[:1024])

    def stop(self) -> None:
        """Send nothing more."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(5.0)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._queue and not self._stopping:
                    self._wake.wait()
                if self._stopping:
                    return
                (transfer, index), (source, ref) = self._queue.popitem(last=False)
            try:
                data = source.verified_chunk(ref, index)
                if data is None:
                    # The receiver asks again, and is then told that it is missing.
                    self._bus.counters.add("blob.lost")
                else:
                    self._bus.say(BlobChunk(index=index, data=data), transfer=transfer, timeout_s=STALL_S)
                    self._bus.counters.add("blob.sent_bytes", len(data))
            except MindstreamError as error:
                # The receiver asks again for what does not come.
                self._bus.counters.add("dropped.blob_chunk")
                log.warning("sending chunk %d of transfer %s: %s", index, transfer, error)


class BlobReceiver:
    """Pulls the chunks of a snapshot, or of something else, from a holder into the store.

    Args:
        bus: for asking.
        blob_bus: the connection for chunks.
        on_progress: called with (bytes here, bytes in all) after each chunk.
        should_stop: asked between chunks: whether to give up.
        what, mend: what is pulled, and how its holder can have it again, for messages.
    """

    def __init__(
        self,
        bus: Bus,
        blob_bus: Bus,
        store: ChunkTarget,
        on_progress: Callable[[int, int], None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        *,
        what: str = "snapshot",
        mend: str = "save the conversation again",
    ) -> None:
        self._bus = bus
        self._blob_bus = blob_bus
        self._store = store
        self._on_progress = on_progress
        self._should_stop = should_stop
        self._what = what
        self._mend = mend

    def pull(self, holder: str, identifier: str, manifest: Chunked, *, timeout_s: float = 600.0) -> int:
        """Fetch what the store has not; the bytes that crossed the bus.

        Raises BlobError when the holder does not answer, has lost or damaged chunks, or has not sent all in
        ``timeout_s``; StorageError. What came is kept: another pull goes on from there.
        """
        refs = manifest.chunks
        have = {i for i, ref in enumerate(refs) if self._store.has(ref)}
        if len(have) == len(refs):
            return 0
        transfer = uuid7()
        arrived: deque[Received] = deque()
        wake = threading.Condition()

        def take(message: Received) -> None:
            with wake:
                # More than was granted: the holder repeats itself, or means ill.
                if len(arrived) >= 2 * CREDIT_CHUNKS:
                    self._bus.counters.add("dropped.blob_chunk")
                    return
                arrived.append(message)
                wake.notify()

        stop_hearing = self._blob_bus.hear(BlobChunk, take, node=holder, transfer=transfer)
        try:
            self._blob_bus.wait_subscribed(10.0)
            return self._receive(holder, identifier, refs, have, transfer, arrived, wake, timeout_s)
        finally:
            stop_hearing()

    def _receive(
        self,
        holder: str,
        identifier: str,
        refs: Sequence[ChunkRef],
        have: set[int],
        transfer: str,
        arrived: deque[Received],
        wake: threading.Condition,
        timeout_s: float,
    ) -> int:
        received_bytes = 0
        here_bytes = sum(refs[i].size_bytes for i in have)
        total_bytes = sum(ref.size_bytes for ref in refs)
        expected: set[int] = set()
        bad: Counter[int] = Counter()
        stall_s = STALL_S
        deadline_s = time.monotonic() + timeout_s
        last_chunk_s = time.monotonic()
        while len(have) < len(refs):
            now_s = time.monotonic()
            if self._should_stop():
                raise BlobError(
                    f"fetching {self._what} {identifier[:12]} from {holder}: this service is stopping",
                    hint="what came is kept: try again to go on",
                    reason="stopping",
                )
            if now_s > deadline_s:
                raise BlobError(
                    f"fetching {self._what} {identifier[:12]} from {holder}: {len(have)} of {len(refs)} chunks "
                    f"came in {timeout_s:g} s",
                    hint="what came is kept: try again to go on",
                    reason="too slow",
                )
            if expected and now_s - last_chunk_s > stall_s:
                self._bus.counters.add("blob.stalled")
                expected.clear()
                stall_s *= 2  # a slow link must not be given the same chunks over and over
            if len(expected) <= CREDIT_CHUNKS // 2 and len(have) + len(expected) < len(refs):
                granted = self._grant(holder, identifier, transfer, have | expected, len(refs), len(expected))
                expected |= granted
                last_chunk_s = time.monotonic()
            with wake:
                if not arrived:
                    wake.wait(0.25)
                messages = [arrived.popleft() for _ in range(len(arrived))]
            for message in messages:
                chunk: BlobChunk = message.data
                if chunk.index >= len(refs):
                    self._bus.counters.add("refused.blob_chunk")
                    continue
                if chunk.index in have:
                    self._bus.counters.add("blob.repeated")
                    continue
                expected.discard(chunk.index)
                last_chunk_s = time.monotonic()
                try:
                    verify_chunk(refs[chunk.index], chunk.data, index=chunk.index)
                except BadSignature as error:
                    self._bus.counters.add("refused.blob_chunk")
                    self._bus.events.report("bad-chunk", "warning", f"from {holder}: {error}")
                    bad[chunk.index] += 1
                    if bad[chunk.index] >= MAX_BAD:
                        raise BlobError(
                            f"fetching {self._what} {identifier[:12]} from {holder}: chunk {chunk.index} came damaged "
                            f"{MAX_BAD} times",
                            hint=f"fetch it from another holder, or {self._mend}",
                            reason="chunk damaged",
                        ) from error
                    continue
                stall_s = STALL_S
                self._store.put_chunk(refs[chunk.index], chunk.data)
                have.add(chunk.index)
                received_bytes += len(chunk.data)
                here_bytes += len(chunk.data)
                if self._on_progress is not None:
                    self._on_progress(here_bytes, total_bytes)
        return received_bytes

    def _grant(
        self, holder: str, identifier: str, transfer: str, skip: set[int], count: int, under_way: int
    ) -> set[int]:
        """Give credit for the next chunks; which they will be."""
        credit = CREDIT_CHUNKS - under_way
        message = BlobPull(snapshot=identifier, transfer=transfer, have=_bits(skip, count), credit=credit)
        try:
            answer: BlobPulling = self._bus.ask(holder, message, ttl_ms=PULL_TTL_MS)
        except AskExpired as error:
            raise BlobError(
                f"fetching {self._what} {identifier[:12]}: {holder} does not answer: {error.message}",
                hint="what came is kept: try again when it is back",
                reason="holder silent",
            ) from error
        if answer.missing:
            raise BlobError(
                f"fetching {self._what} {identifier[:12]}: {holder} has lost {len(answer.missing)} of its chunks",
                hint=self._mend,
                reason="chunks missing",
            )
        wanted = (i for i in range(count) if i not in skip)
        return {index for index, _ in zip(wanted, range(answer.sending), strict=False)}
