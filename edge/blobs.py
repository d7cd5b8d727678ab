"""Snapshots on the way: content-addressed chunks, pulled by the receiver, verified one by one.

Built models go the same way (edge/model_share.py, edge/model_fetch.py), out of and into files of their own.

A holder answers a pull with as many chunks as the receiver gave credit for, on ``blob/{transfer}``, over a
connection of its own, so that tokens and memories do not wait behind them. The receiver says what it has (or
expects) in a bitmap; chunks that do not come are asked for again. Every chunk is verified against the signed
manifest and stored before it counts, so a cut transfer goes on where it was. To a receiver on the same host chunks go
through the mailbox (edge/mailbox.py), many at a time, and only its handles go over that connection.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from edge.bus import Bus
from edge.mailbox import Mailbox
from edge.mailbox_reader import LetterReader
from edge.snapshot_store import SnapshotStore
from protocol.codec import Received
from protocol.errors import AskExpired, BadSignature, BlobError, MindstreamError, Overloaded
from protocol.ids import uuid7
from protocol.layout import ChunkRef
from protocol.manifest import SnapshotManifest, verify_chunk
from protocol.messages import BlobChunk, BlobLetter, BlobPull, BlobPulling

log = logging.getLogger(__name__)

CREDIT_CHUNKS = 16
"""Chunks under way to one receiver: 8 MiB, enough to keep a 1 Gbit/s link of 60 ms busy."""
MAILBOX_CREDIT_CHUNKS = 128
"""The same once they come by the mailbox: 64 MiB, so that its writer and its reader are both at work."""
LETTER_CHUNKS = 16
"""Chunks in one letter: 8 MiB."""
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
        """Keep a chunk that was verified. Raises StorageError.

        ``data`` cannot change. By the mailbox it is a view of memory that its holder has sealed: it may be decrypted
        right there, and kept, but then it keeps a whole letter.
        """


class Held(Chunked, ChunkSource, Protocol):
    """Something else than a snapshot that a node holds, chunk by chunk."""


def _bits(indexes: set[int], count: int) -> bytes:
    bitmap = bytearray(-(-count // 8))
    for index in indexes:
        bitmap[index >> 3] |= 1 << (index & 7)
    return bytes(bitmap)


class _Queued(NamedTuple):
    source: ChunkSource
    ref: ChunkRef
    by_mailbox: bool


class BlobSender:
    """Sends chunks that were pulled, on a connection of its own, in one thread.

    Args:
        store: where manifests and chunks are.
        bus: the connection for chunks.
        read_manifest: the decoded manifest of a snapshot id. Raises NotFound and others of the tree.
        other: what else is held under an id; None: nothing.
        mailbox: for receivers on this host; None: they get theirs over the bus as all do.
    """

    def __init__(
        self,
        store: SnapshotStore,
        bus: Bus,
        read_manifest: Callable[[str], SnapshotManifest],
        other: Callable[[str], Held | None] = lambda _identifier: None,
        mailbox: Mailbox | None = None,
    ) -> None:
        self._mailbox = mailbox
        self._store = store
        self._bus = bus
        self._read_manifest = read_manifest
        self._other = other
        # Keyed by transfer and index: a chunk that is asked for again before it was sent goes out once.
        self._queue: OrderedDict[tuple[str, int], _Queued] = OrderedDict()
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
        by_mailbox = self._mailbox is not None and self._mailbox.is_here(ask.mailbox, ask.transfer)
        queued: dict[tuple[str, int], _Queued] = {}
        missing = []
        for index, ref in enumerate(refs):
            if len(queued) >= ask.credit:
                break
            if (index >> 3) < len(ask.have) and ask.have[index >> 3] & 1 << (index & 7):
                continue
            if not source.has(ref):
                missing.append(index)
            else:
                queued[ask.transfer, index] = _Queued(source, ref, by_mailbox)
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
                transfer, batch = self._next()
            try:
                self._send(transfer, batch)
            except MindstreamError as error:
                # The receiver asks again for what does not come.
                self._bus.counters.add("dropped.blob_chunk", len(batch))
                log.warning("sending chunk %d and so on of transfer %s: %s", batch[0][0], transfer, error)

    def _next(self) -> tuple[str, list[tuple[int, _Queued]]]:
        """One chunk to send, or all that go into one letter, with their indexes; under the lock."""
        batch: list[tuple[int, _Queued]] = []
        (transfer, _), _ = first = next(iter(self._queue.items()))
        most = LETTER_CHUNKS if first[1].by_mailbox else 1
        for key, queued in self._queue.items():
            if key[0] != transfer or queued.by_mailbox != first[1].by_mailbox or len(batch) == most:
                break
            batch.append((key[1], queued))
        for index, _ in batch:
            del self._queue[transfer, index]
        return transfer, batch

    def _send(self, transfer: str, batch: list[tuple[int, _Queued]]) -> None:
        found: list[tuple[int, bytes]] = []
        for index, queued in batch:
            data = queued.source.verified_chunk(queued.ref, index)
            if data is None:
                # The receiver asks again, and is then told that it is missing.
                self._bus.counters.add("blob.lost")
            else:
                found.append((index, data))
        if found and batch[0][1].by_mailbox and self._send_letter(transfer, found):
            return
        for index, data in found:
            self._bus.say(BlobChunk(index=index, data=data), transfer=transfer, timeout_s=STALL_S)
            self._bus.counters.add("blob.sent_bytes", len(data))

    def _send_letter(self, transfer: str, found: list[tuple[int, bytes]]) -> bool:
        """Whether the mailbox had room for these chunks."""
        assert self._mailbox is not None
        handle = self._mailbox.put([data for _, data in found])
        if handle is None:
            return False
        try:
            self._bus.say(BlobLetter(handle, [index for index, _ in found]), transfer=transfer, timeout_s=STALL_S)
        except MindstreamError:
            self._mailbox.withdraw(handle)
            raise
        self._bus.counters.add("blob.mailed_bytes", sum(len(data) for _, data in found))
        return True


class BlobReceiver:
    """Pulls the chunks of a snapshot, or of something else, from a holder into the store.

    Args:
        bus: for asking.
        blob_bus: the connection for chunks.
        on_progress: called with (bytes here, bytes in all) after each chunk.
        should_stop: asked between chunks: whether to give up.
        what, mend: what is pulled, and how its holder can have it again, for messages.
        mailbox: of this host; None: all comes over the bus.
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
        mailbox: Mailbox | None = None,
    ) -> None:
        self._mailbox = mailbox
        self._bus = bus
        self._blob_bus = blob_bus
        self._store = store
        self._on_progress = on_progress
        self._should_stop = should_stop
        self._what = what
        self._mend = mend

    def pull(self, holder: str, identifier: str, manifest: Chunked, *, timeout_s: float = 600.0) -> int:
        """Fetch what the store has not; how many bytes were fetched.

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
        most = 2 * (CREDIT_CHUNKS if self._mailbox is None else MAILBOX_CREDIT_CHUNKS)

        def take(message: Received) -> None:
            with wake:
                # More than was granted: the holder repeats itself, or means ill.
                if len(arrived) >= most:
                    self._bus.counters.add("dropped.blob_chunk")
                    return
                arrived.append(message)
                wake.notify()

        def more() -> list[Received]:
            with wake:
                if not arrived:
                    wake.wait(0.25)
                return [arrived.popleft() for _ in range(len(arrived))]

        with contextlib.ExitStack() as ending:
            for struct in (BlobChunk, BlobLetter):
                ending.callback(self._blob_bus.hear(struct, take, node=holder, transfer=transfer))
            letters = ending.enter_context(self._mailbox.reading()) if self._mailbox is not None else None
            self._blob_bus.wait_subscribed(10.0)
            pulling = _Pulling(self, holder, identifier, refs, have, transfer, letters)
            return pulling.run(more, time.monotonic() + timeout_s, timeout_s)


class _Pulling:
    """One pull: what is here, what is under way, and how it comes."""

    def __init__(
        self,
        receiver: BlobReceiver,
        holder: str,
        identifier: str,
        refs: Sequence[ChunkRef],
        have: set[int],
        transfer: str,
        letters: LetterReader | None,
    ) -> None:
        self._receiver = receiver
        self._bus = receiver._bus
        self._holder = holder
        self._what = f"{receiver._what} {identifier[:12]}"
        self._identifier = identifier
        self._refs = refs
        self._have = have
        self._transfer = transfer
        self._letters = letters
        self._credit = CREDIT_CHUNKS
        self._expected: set[int] = set()
        self._bad: Counter[int] = Counter()
        self._stall_s = STALL_S
        self._last_chunk_s = 0.0
        self._here_bytes = sum(refs[i].size_bytes for i in have)
        self._total_bytes = sum(ref.size_bytes for ref in refs)

    def run(self, more: Callable[[], list[Received]], deadline_s: float, timeout_s: float) -> int:
        """Until all is here; ``more`` waits a moment for messages."""
        count, before_bytes = len(self._refs), self._here_bytes
        self._last_chunk_s = time.monotonic()
        while len(self._have) < count:
            now_s = time.monotonic()
            if self._receiver._should_stop():
                raise BlobError(
                    f"fetching {self._what} from {self._holder}: this service is stopping",
                    hint="what came is kept: try again to go on",
                    reason="stopping",
                )
            if now_s > deadline_s:
                raise BlobError(
                    f"fetching {self._what} from {self._holder}: {len(self._have)} of {count} chunks came in "
                    f"{timeout_s:g} s",
                    hint="what came is kept: try again to go on",
                    reason="too slow",
                )
            if self._expected and now_s - self._last_chunk_s > self._stall_s:
                self._bus.counters.add("blob.stalled")
                self._expected.clear()
                self._stall_s *= 2  # a slow link must not be given the same chunks over and over
            if len(self._expected) <= self._credit // 2 and len(self._have) + len(self._expected) < count:
                self._expected |= self._grant()
                self._last_chunk_s = time.monotonic()
            for message in more():
                if isinstance(message.data, BlobLetter):
                    self._take_letter(message.data)
                else:
                    self._take(message.data.index, message.data.data)
        return self._here_bytes - before_bytes

    def _take_letter(self, letter: BlobLetter) -> None:
        indexes = letter.indexes
        if self._letters is None or max(indexes) >= len(self._refs):
            self._bus.counters.add("refused.blob_chunk")
            return
        with contextlib.ExitStack() as ending:
            try:
                size_bytes = sum(self._refs[index].size_bytes for index in indexes)
                view = ending.enter_context(self._letters.open(letter.handle, size_bytes))
            except BlobError as error:
                self._bus.counters.add("mailbox.lost")
                log.warning("fetching %s goes on over the bus: %s", self._what, error)
                self._over_the_bus(indexes)
                return
            self._credit = MAILBOX_CREDIT_CHUNKS
            offset = 0
            for index in indexes:
                end = offset + self._refs[index].size_bytes
                if not self._take(index, view[offset:end]):
                    self._over_the_bus([index])
                offset = end

    def _over_the_bus(self, indexes: Sequence[int]) -> None:
        """These come again, and all that is still to come, over the bus."""
        self._letters = None
        self._credit = CREDIT_CHUNKS
        self._expected.difference_update(indexes)

    def _take(self, index: int, data: bytes | memoryview) -> bool:
        """Verify and keep a chunk; False when it is damaged. Raises BlobError when it has been so too often."""
        if index >= len(self._refs):
            self._bus.counters.add("refused.blob_chunk")
            return True
        if index in self._have:
            self._bus.counters.add("blob.repeated")
            return True
        self._expected.discard(index)
        self._last_chunk_s = time.monotonic()
        ref = self._refs[index]
        try:
            verify_chunk(ref, data, index=index)
        except BadSignature as error:
            self._bus.counters.add("refused.blob_chunk")
            self._bus.events.report("bad-chunk", "warning", f"from {self._holder}: {error}")
            self._bad[index] += 1
            if self._bad[index] >= MAX_BAD:
                raise BlobError(
                    f"fetching {self._what} from {self._holder}: chunk {index} came damaged {MAX_BAD} times",
                    hint=f"fetch it from another holder, or {self._receiver._mend}",
                    reason="chunk damaged",
                ) from error
            return False
        self._stall_s = STALL_S
        self._receiver._store.put_chunk(ref, data)
        self._have.add(index)
        self._here_bytes += ref.size_bytes
        if self._receiver._on_progress is not None:
            self._receiver._on_progress(self._here_bytes, self._total_bytes)
        return True

    def _grant(self) -> set[int]:
        """Give credit for the next chunks; which they will be."""
        skip, count = self._have | self._expected, len(self._refs)
        message = BlobPull(
            snapshot=self._identifier,
            transfer=self._transfer,
            have=_bits(skip, count),
            credit=self._credit - len(self._expected),
            mailbox=self._letters.proof(self._transfer) if self._letters is not None else b"",
        )
        try:
            answer: BlobPulling = self._bus.ask(self._holder, message, ttl_ms=PULL_TTL_MS)
        except AskExpired as error:
            raise BlobError(
                f"fetching {self._what}: {self._holder} does not answer: {error.message}",
                hint="what came is kept: try again when it is back",
                reason="holder silent",
            ) from error
        if answer.missing:
            raise BlobError(
                f"fetching {self._what}: {self._holder} has lost {len(answer.missing)} of its chunks",
                hint=self._receiver._mend,
                reason="chunks missing",
            )
        wanted = (i for i in range(count) if i not in skip)
        return {index for index, _ in zip(wanted, range(answer.sending), strict=False)}
