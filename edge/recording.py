"""A recording: what passed over the bus, in a file that says what it lacks. docs/recordings.md has the format.

A file is a row of frames: a header, blocks, an index at its end. A frame has a head of 64 bytes with its own check sum
(lengths, times, count, BLAKE3 of the body) and a body: msgpack, compressed with zstandard. So a file that was cut is
readable up to its last whole block, a flipped bit costs its block and no other, and both are named. This module knows
files and nothing of a bus; a file is never trusted: lengths are checked before anything is allocated from them.
"""

from __future__ import annotations

import bisect
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import zstandard
from blake3 import blake3
from msgspec import Meta

from edge.files import storage_errors
from protocol.errors import UNREADABLE, NotFound, StorageError

FORMAT = "mindstream recording"
VERSION = 1
MAGIC = b"\x89MSREC\r\n"
TAIL_MAGIC = b"MSRECEND"
HEADER, BLOCK, INDEX = 1, 2, 3
"""Kinds of frames."""
HEAD = struct.Struct("<8sBBHIIIqqI16s")
"""Magic, kind, version, 0, number, body bytes, bytes before compression, first and last time (Unix microseconds),
messages, BLAKE3 of the body (its first 16 bytes); little-endian. A CRC-32 of these 60 bytes follows."""
HEAD_BYTES = HEAD.size + 4
TAIL = struct.Struct("<Q8s")
"""Offset of the index frame, and TAIL_MAGIC: the last 16 bytes of a file that was closed."""

MAX_BODY_BYTES = 16 * 1024 * 1024
"""Of one frame, before compression and after it; what claims to be larger is damaged."""
_SEARCH_BYTES = 1024 * 1024


Microseconds = Annotated[int, Meta(ge=0, le=253_402_300_799_999_999)]
"""To the end of the year 9999: what clocks can show."""


class Message(msgspec.Struct, array_like=True):
    """One message of a recording. On disk an array, in this order; more elements may follow one day."""

    time_us: Microseconds
    """When it was received, Unix microseconds by the recorder's wall clock."""
    elapsed_us: Microseconds
    """The same by its monotonic clock, from the start of the recording."""
    topic: str
    payload: bytes
    flags: Annotated[int, Meta(ge=0, le=15)] = 0
    """1: retained; 2: QoS 1; 8: the broker said that it had sent it before. As in a PUBLISH's first byte."""
    expiry_s: Annotated[int, Meta(ge=0, le=2**32 - 1)] | None = None
    """What was left of its message expiry, seconds; None: it had none."""

    @property
    def retain(self) -> bool:
        return bool(self.flags & 1)

    @property
    def qos(self) -> int:
        return self.flags >> 1 & 3


class Gap(msgspec.Struct):
    """What was not recorded. On disk a map, ``{"gap": reason, …}``, between the messages."""

    gap: str
    """``queue full``, ``disk full``, or ``disconnected``."""
    first_us: Microseconds
    """When it began, Unix microseconds."""
    last_us: Microseconds
    messages: Annotated[int, Meta(ge=0)] | None
    """How many messages are missing; None: nobody knows, the broker did not say."""
    elapsed_us: int = 0
    text: str = ""
    """For a person."""


class Damage(NamedTuple):
    """Bytes of a file that could not be read."""

    what: str
    """``cut`` (the file ends within it), ``damaged block``, ``damaged head``, or ``damaged`` and ``header``, ``index``,
    ``tail``."""
    offset: int
    size_bytes: int
    number: int
    """Of the block, from 0."""
    messages: int | None
    """How many are lost with it; None: its head is damaged too."""
    first_us: int = 0
    last_us: int = 0

    def __str__(self) -> str:
        lost = f"{self.messages:,} messages" if self.messages is not None else "an unknown number of messages"
        return f"{self.what} {self.number} at byte {self.offset:,}: {self.size_bytes:,} bytes, {lost} lost"


class RecordingInfo(msgspec.Struct):
    """The body of the header frame: where a recording comes from."""

    recording: str
    """Id, a UUIDv7, the same in all parts."""
    part: int
    """Number of this file among the parts of a rotated recording, from 1."""
    node: str
    broker: str
    """Its URL; names and passwords are never in it."""
    mindstream: str
    """Version of Mindstream that recorded."""
    filters: list[str]
    """What was subscribed to."""
    started_us: int
    """Start of the recording, Unix microseconds: ``elapsed_us`` counts from here, in every part."""
    part_started_us: int
    mqtt: str = "5"
    """Protocol of the connection; with ``3.1.1`` no retain flag of live messages and no expiry is known."""
    format: str = FORMAT
    version: int = VERSION


class Span(msgspec.Struct, array_like=True):
    """One or more blocks that follow each other."""

    number: int
    blocks: int
    offset: int
    first_us: int
    last_us: int
    messages: int
    topics: list[int] | None = None
    """Indexes into the index's topics; None: too many to list."""


class Index(msgspec.Struct):
    """The body of the index frame: where the times are, and what the file holds."""

    spans: list[Span] = []
    topics: list[str] = []
    messages: int = 0
    gaps: int = 0
    lost: int = 0
    """Messages known not to have been recorded."""
    payload_bytes: int = 0
    ended: str = ""
    """Why the file ended: ``stopped``, ``rotated``, ``disk full``; empty: it was never closed."""


class Head(NamedTuple):
    """A frame's head, checked."""

    kind: int
    number: int
    body_bytes: int
    raw_bytes: int
    first_us: int
    last_us: int
    messages: int
    digest: bytes
    offset: int

    @property
    def end(self) -> int:
        return self.offset + HEAD_BYTES + self.body_bytes


Item = Message | Gap | Damage
_items_decoder = msgspec.msgpack.Decoder(list[Message | dict[str, Any]])
_info_decoder = msgspec.msgpack.Decoder(RecordingInfo)
_index_decoder = msgspec.msgpack.Decoder(Index)


class Recording:
    """One file, open for reading; also one that is still being written, or was cut.

    Raises NotFound when there is no such file, StorageError when it cannot be read or is no recording.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise NotFound(f"opening the recording {path}: there is no such file", reason="not found")
        with storage_errors(f"opening the recording {path}"):
            self._file = path.open("rb")
        self._decompressor = zstandard.ZstdDecompressor()
        try:
            self.size = path.stat().st_size
            self.info = self._read_info()
            self.closed_whole = True
            """It has its index: the recorder closed it."""
            self.index = self._read_index() or self._scan()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def items(
        self,
        from_us: int | None = None,
        to_us: int | None = None,
        wanted: Callable[[str], bool] | None = None,
    ) -> Iterator[Item]:
        """Messages, gaps and damage, in the order of the file; one block is in memory at a time.

        Args:
            from_us, to_us: Unix microseconds by the recorder's clock, both included.
            wanted: takes a topic; what it refuses is left out. Gaps and damage always come.
        """
        low = -(2**63) if from_us is None else from_us
        high = 2**63 if to_us is None else to_us
        spans = self.index.spans
        first = next((number for number, span in enumerate(spans) if span.last_us >= low), len(spans))
        unwanted = self._unwanted(wanted)
        # What lies before the first block of the index is gone through too when it is damaged: nothing is hidden.
        for head in self._walk(spans[first].offset if 0 < first < len(spans) else 0):
            if isinstance(head, Damage):
                yield head
                continue
            if head.kind != BLOCK:
                if self._body(head) is None:
                    yield self._damaged(head)
                continue
            if head.last_us < low or head.first_us > high or unwanted(head.number):
                continue
            for item in self._items_of(head):
                if isinstance(item, Message):
                    if low <= item.time_us <= high and (wanted is None or wanted(item.topic)):
                        yield item
                else:
                    yield item

    def _unwanted(self, wanted: Callable[[str], bool] | None) -> Callable[[int], bool]:
        """Whether a block, by its number, is known to hold nothing but unwanted topics."""
        if wanted is None or not self.index.topics:
            return lambda _number: False
        matching = {number for number, topic in enumerate(self.index.topics) if wanted(topic)}
        spans = self.index.spans
        starts = [span.number for span in spans]
        # An empty list is a block of gaps alone: those always come.
        idle = [bool(span.topics) and matching.isdisjoint(span.topics or ()) for span in spans]

        def check(number: int) -> bool:
            position = bisect.bisect_right(starts, number) - 1
            return position >= 0 and idle[position]

        return check

    def _items_of(self, head: Head) -> Iterator[Item]:
        raw = self._body(head)
        try:
            items = _items_decoder.decode(raw) if raw is not None else None
        except UNREADABLE:
            items = None
        if items is None:
            yield self._damaged(head)
            return
        for item in items:
            if isinstance(item, Message):
                yield item
            elif "gap" in item:  # other notes may exist one day
                try:
                    yield msgspec.convert(item, Gap)
                except msgspec.ValidationError:
                    continue

    @staticmethod
    def _damaged(head: Head) -> Damage:
        what = {HEADER: "damaged header", BLOCK: "damaged block", INDEX: "damaged index"}[head.kind]
        lost = head.messages if head.kind == BLOCK else 0
        size = HEAD_BYTES + head.body_bytes
        return Damage(what, head.offset, size, head.number, lost, head.first_us, head.last_us)

    def _walk(self, offset: int) -> Iterator[Head | Damage]:
        """The heads of all frames from ``offset`` on; what cannot be read between them."""
        expected = -1
        while offset < self.size:
            head = self._head(offset)
            if head is None:
                next_offset = self._search(offset + 1)
                what = "cut" if next_offset == self.size else "damaged head"
                yield Damage(what, offset, next_offset - offset, max(expected, 0), None)
                offset = next_offset
                continue
            if head.end > self.size:
                known = head.messages if head.kind == BLOCK else 0
                yield Damage("cut", offset, self.size - offset, head.number, known, head.first_us, head.last_us)
                return
            yield head
            if head.kind == INDEX:
                if self.size - head.end != TAIL.size or self._tail() != head.offset:
                    yield Damage("damaged tail", head.end, self.size - head.end, head.number, 0)
                return
            expected = head.number + (head.kind == BLOCK)
            offset = head.end

    def _head(self, offset: int) -> Head | None:
        self._file.seek(offset)
        return self._parse(self._file.read(HEAD_BYTES), offset)

    @staticmethod
    def _parse(data: bytes, offset: int) -> Head | None:
        if len(data) < HEAD_BYTES or zlib.crc32(data[: HEAD.size]) != int.from_bytes(data[HEAD.size :], "little"):
            return None
        magic, kind, version, _, number, body, raw, first_us, last_us, messages, digest = HEAD.unpack_from(data)
        if magic != MAGIC or version != VERSION or kind not in (HEADER, BLOCK, INDEX):
            return None
        if body > MAX_BODY_BYTES or raw > MAX_BODY_BYTES:
            return None
        return Head(kind, number, body, raw, first_us, last_us, messages, digest, offset)

    def _search(self, offset: int) -> int:
        """The next offset at which a whole head stands; the file's size when there is none."""
        while offset < self.size:
            self._file.seek(offset)
            data = self._file.read(_SEARCH_BYTES + HEAD_BYTES)
            at = data.find(MAGIC)
            while at >= 0:
                if self._parse(data[at : at + HEAD_BYTES], offset + at) is not None:
                    return offset + at
                at = data.find(MAGIC, at + 1)
            offset += _SEARCH_BYTES
        return self.size

    def _body(self, head: Head) -> bytes | None:
        """The frame's body, decompressed; None when it is not what its head says."""
        self._file.seek(head.offset + HEAD_BYTES)
        body = self._file.read(head.body_bytes)
        if len(body) < head.body_bytes or blake3(body).digest(length=16) != head.digest:
            return None
        try:
            # The size is in the compressed frame too: nothing is allocated from one that says otherwise.
            if zstandard.frame_content_size(body) != head.raw_bytes:
                return None
            return self._decompressor.decompress(body)
        except zstandard.ZstdError:
            return None

    def _read_info(self) -> RecordingInfo | None:
        """None: the header is damaged; the blocks may still be read."""
        self._file.seek(0)
        start = self._file.read(HEAD_BYTES)
        head = self._parse(start, 0)
        if head is None or head.kind != HEADER:
            newer = start[:8] == MAGIC and len(start) > 9 and start[9] > VERSION
            if newer or self._search(0) == self.size:
                raise StorageError(
                    f"reading {self.path}: "
                    + (f"a recording of format {start[9]}, this version reads {VERSION}" if newer else "no recording"),
                    hint="update Mindstream" if newer else "recordings are made by `mindstream record`",
                    reason="newer format" if newer else "not a recording",
                )
            return None
        raw = self._body(head)
        try:
            return _info_decoder.decode(raw) if raw is not None else None
        except UNREADABLE:
            return None

    def _read_index(self) -> Index | None:
        """The index at the end of a file that was closed, if it is whole."""
        offset = self._tail()
        return self._index_of(self._head(offset)) if 0 <= offset < self.size else None

    def _tail(self) -> int:
        """Where the last bytes of the file say that the index is; -1 when they are no tail."""
        if self.size < TAIL.size:
            return -1
        self._file.seek(self.size - TAIL.size)
        offset, magic = TAIL.unpack(self._file.read(TAIL.size))
        return int(offset) if magic == TAIL_MAGIC else -1

    def _index_of(self, head: Head | None) -> Index | None:
        raw = self._body(head) if head is not None and head.kind == INDEX else None
        try:
            return _index_decoder.decode(raw) if raw is not None else None
        except UNREADABLE:
            return None

    def _scan(self) -> Index:
        """The index as the heads of the blocks give it: times and counts, no topics."""
        index = Index()
        for head in self._walk(0):
            if isinstance(head, Damage):
                continue
            if whole := self._index_of(head):
                return whole
            if head.kind == BLOCK:
                index.spans.append(Span(head.number, 1, head.offset, head.first_us, head.last_us, head.messages))
                index.messages += head.messages
        self.closed_whole = False
        return index


def part_path(path: Path, part: int) -> Path:
    """``garden.msrec`` and 3: ``garden.000003.msrec``."""
    return path.with_name(f"{path.stem}.{part:06d}{path.suffix}")


def parts_of(path: Path) -> list[Path]:
    """The files of a recording: ``path`` itself, or its parts in order. Raises NotFound."""
    if path.is_file():
        return [path]
    shape = re.compile(re.escape(path.stem) + r"\.\d{6,}" + re.escape(path.suffix))
    parts = [each for each in path.parent.glob("*") if shape.fullmatch(each.name)] if path.parent.is_dir() else []
    if not parts:
        raise NotFound(
            f"looking for the recording {path}: there is no such file, and no part of it", reason="not found"
        )
    return sorted(parts, key=lambda each: int(each.name[len(path.stem) + 1 : len(each.name) - len(path.suffix)]))
