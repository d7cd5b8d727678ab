"""Writing a recording: blocks into files, files one after another, on a disk that may be slow or full.

``RecordingWriter`` is one file, ``BlockSink`` is the row of them: it rotates by size and time, removes the oldest, and
counts what the disk does not take. Neither knows of a bus. The format stands in edge/recording.py.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import zstandard
from blake3 import blake3

from edge.files import storage_errors
from edge.recording import (
    BLOCK,
    HEAD,
    HEADER,
    INDEX,
    MAGIC,
    TAIL,
    TAIL_MAGIC,
    VERSION,
    Gap,
    Index,
    RecordingInfo,
    Span,
    part_path,
    parts_of,
)
from protocol.errors import NotFound, ProtocolError, StorageError

log = logging.getLogger(__name__)

COMPRESSION_LEVEL = 1
"""zstandard 1: on envelopes within 3 % of level 3, at two thirds of its time."""
SYNC_INTERVAL_S = 5.0
RETRY_S = 1.0
"""A full disk is tried again this often."""
MAX_SPANS = 4096
MAX_TOPICS = 4096
MAX_TOPICS_OF_SPAN = 64
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_encoder = msgspec.msgpack.Encoder()


@dataclass(frozen=True)
class Rotation:
    """When a new file is begun, and how many are kept; 0 is never, and all."""

    bytes: int = 0
    seconds: float = 0.0
    keep: int = 0


@dataclass
class Totals:
    """What a recorder has done so far; read by other threads, written by one each."""

    received: int = 0
    recorded: int = 0
    lost: int = 0
    """Counted as not recorded: the queue or the disk was full."""
    reconnects: int = 0
    written_bytes: int = 0
    files: int = 0
    removed_files: int = 0
    payload_bytes: int = 0


def parse_rotation(text: str, keep: int = 0) -> Rotation:
    """``64MB``, ``10min``, or both: ``64MB|10min``. Raises ProtocolError."""
    size, seconds = 0, 0.0
    for word in re.split(r"[|,]", text.replace(" ", "")) if text else []:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([a-zA-Z]+)", word)
        unit = found.group(2).lower() if found else ""
        if found and unit in _SIZES:
            size = int(float(found.group(1)) * _SIZES[unit])
        elif found and unit in _TIMES:
            seconds = float(found.group(1)) * _TIMES[unit]
        if not found or unit not in {**_SIZES, **_TIMES} or not float(found.group(1)):
            raise ProtocolError(
                f"reading the rotation {text!r}: {word!r} is no size and no time",
                hint="use 64MB, 10min, or both: 64MB|10min",
                field="rotate",
                reason="not a size or time",
            )
    return Rotation(size, seconds, keep)


_SIZES = {"kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 1024, "mib": 1024**2, "gib": 1024**3}
_TIMES = {"s": 1, "sec": 1, "min": 60, "h": 3600, "d": 86_400}


class RecordingWriter:
    """Writes one file. Not thread-safe.

    A block is in the file, whole, when ``write`` returns, and on the disk (fdatasync) at most SYNC_INTERVAL_S later;
    a block that fails leaves the file as it was before.

    Raises StorageError, also when the file exists.
    """

    def __init__(self, path: Path, info: RecordingInfo) -> None:
        self.path = path
        self.size = 0
        self.index = Index()
        self._topics: dict[str, int] = {}
        self._number = 0
        self._blocks_a_span = 1
        self._compressor = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL)
        self._synced_s = time.monotonic()
        # Payloads are private: what a microphone heard, what somebody asked.
        with storage_errors(f"making the recording {path}"):
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            self._append(HEADER, 0, _encoder.encode(info), info.part_started_us, info.part_started_us, 0)
            self._sync()
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except BaseException:
            os.close(self._file)
            path.unlink(missing_ok=True)
            raise

    def write(self, items: Sequence[Any]) -> None:
        """Append one block of messages (tuples or Message) and gaps. Raises StorageError."""
        messages = [item for item in items if not isinstance(item, Gap)]
        gaps = [item for item in items if isinstance(item, Gap)]
        # Not by position: the wall clock may have been set in between.
        times = [item[0] if type(item) is tuple else item.time_us for item in messages]
        times += [time_us for gap in gaps for time_us in (gap.first_us, gap.last_us)]
        first_us, last_us = min(times), max(times)
        offset, number = self.size, self._number
        self._append(BLOCK, number, _encoder.encode(items), first_us, last_us, len(messages))
        self._number += 1
        names = {item[2] if type(item) is tuple else item.topic for item in messages}
        self._add_span(Span(number, 1, offset, first_us, last_us, len(messages), self._listed(names)))
        self.index.messages += len(messages)
        self.index.gaps += len(gaps)
        self.index.lost += sum(gap.messages or 0 for gap in gaps)
        self.index.payload_bytes += sum(len(item[3] if type(item) is tuple else item.payload) for item in messages)
        if time.monotonic() - self._synced_s > SYNC_INTERVAL_S:
            self._sync()

    def close(self, ended: str) -> None:
        """Append the index and close; safe to call twice. Raises StorageError when there is no room for it: the file
        is then as one that was cut."""
        if self._file < 0:
            return
        try:
            self.index.ended = ended
            self.index.topics = list(self._topics)
            first_us = min((span.first_us for span in self.index.spans), default=0)
            last_us = max((span.last_us for span in self.index.spans), default=0)
            offset = self.size
            tail = TAIL.pack(offset, TAIL_MAGIC)
            self._append(INDEX, self._number, _encoder.encode(self.index), first_us, last_us, self.index.messages, tail)
            self._sync()
        finally:
            os.close(self._file)
            self._file = -1

    def sync_if_due(self) -> None:
        """Put on the disk what is older than SYNC_INTERVAL_S; called when nothing is written. Raises StorageError."""
        if time.monotonic() - self._synced_s > SYNC_INTERVAL_S:
            self._sync()

    def _append(
        self, kind: int, number: int, raw: bytes, first_us: int, last_us: int, messages: int, tail: bytes = b""
    ) -> None:
        body = self._compressor.compress(raw)
        head = HEAD.pack(
            MAGIC,
            kind,
            VERSION,
            0,
            number,
            len(body),
            len(raw),
            first_us,
            last_us,
            messages,
            blake3(body).digest(length=16),
        )
        data = memoryview(b"".join((head, zlib.crc32(head).to_bytes(4, "little"), body, tail)))
        with storage_errors(f"writing the recording {self.path}"):
            try:
                written = 0
                while written < len(data):
                    written += os.pwrite(self._file, data[written:], self.size + written)
            except OSError:
                os.ftruncate(self._file, self.size)
                raise
        self.size += len(data)

    def _sync(self) -> None:
        with storage_errors(f"putting the recording {self.path} on the disk"):
            os.fdatasync(self._file)
        self._synced_s = time.monotonic()

    def _listed(self, names: set[str]) -> list[int] | None:
        if len(names) > MAX_TOPICS_OF_SPAN or len(self._topics) + len(names) > MAX_TOPICS:
            return None
        return sorted(self._topics.setdefault(name, len(self._topics)) for name in names)

    def _add_span(self, span: Span) -> None:
        spans = self.index.spans
        if spans and spans[-1].blocks < self._blocks_a_span:
            spans[-1] = _joined(spans[-1], span)
            return
        spans.append(span)
        if len(spans) > MAX_SPANS:
            # A recording of months has millions of blocks: the index stays bounded, its spans grow.
            self._blocks_a_span *= 2
            pairs = zip(spans[::2], [*spans[1::2], None], strict=False)
            self.index.spans = [left if right is None else _joined(left, right) for left, right in pairs]


def _joined(left: Span, right: Span) -> Span:
    topics = None if left.topics is None or right.topics is None else sorted({*left.topics, *right.topics})
    return Span(
        left.number,
        left.blocks + right.blocks,
        left.offset,
        min(left.first_us, right.first_us),
        max(left.last_us, right.last_us),
        left.messages + right.messages,
        topics if topics is None or len(topics) <= MAX_TOPICS_OF_SPAN else None,
    )


class BlockSink:
    """The writing thread's side: files, rotation, and a disk that may be full.

    Args:
        path: the file; with a rotation, what the parts are named after.
        info: for the header of each part; ``part`` and ``part_started_us`` are filled in here.
        wait_when_full: go on when the disk takes no more, counting what is lost; else the recording ends there.
    """

    def __init__(
        self, path: Path, info: RecordingInfo, rotation: Rotation, totals: Totals, *, wait_when_full: bool
    ) -> None:
        self._path = path
        self._info = info
        self._rotation = rotation
        self._totals = totals
        self._wait_when_full = wait_when_full
        self._rotates = bool(rotation.bytes or rotation.seconds)
        self._part = self._last_part() if self._rotates else 0
        self._closed_bytes = 0
        self._gap: Gap | None = None
        self._retry_s = self._rotate_again_s = 0.0
        self.failure: StorageError | None = None
        """Why the recording ended before its time."""
        self._writer = self._open()

    def _last_part(self) -> int:
        try:
            return int(parts_of(self._path)[-1].name[len(self._path.stem) + 1 : -len(self._path.suffix) or None])
        except (NotFound, ValueError):
            return 0

    @property
    def current(self) -> Path:
        """The file that is being written."""
        return self._writer.path

    def write(self, items: list[Any]) -> None:
        """Write one block, or count it. After ``failure`` is set everything is counted only."""
        if self.failure is not None or (self._gap is not None and time.monotonic() < self._retry_s):
            self._lose(items)
            return
        try:
            self._rotate_if_due()
            self._writer.write([self._gap, *items] if self._gap is not None else items)
        except StorageError as error:
            self._failed(error)
            self._lose(items)
            return
        if self._gap is not None:
            log.warning("the disk takes the recording again; %s messages are missing", self._gap.messages)
            self._gap = None
        self._totals.recorded += sum(1 for item in items if not isinstance(item, Gap))
        self._count()

    def idle(self) -> None:
        """Nothing came for a while: put on the disk what is there, rotate by time."""
        try:
            self._writer.sync_if_due()
            if self.failure is None and self._gap is None:
                self._rotate_if_due()
        except StorageError as error:
            self._failed(error)

    def close(self) -> None:
        """End the file with its index; a failure is in ``failure``."""
        ended = "stopped" if self.failure is None else self.failure.reason
        try:
            if self._gap is not None:
                self._writer.write([self._gap])
                self._gap = None
        except StorageError as error:
            self.failure = self.failure or error
            # There is no room for a block; the index, which is smaller, may have some.
            self._writer.index.lost += self._gap.messages or 0 if self._gap else 0
            self._writer.index.gaps += 1
        try:
            self._writer.close(ended)
        except StorageError as error:
            self.failure = self.failure or error
        self._count()

    def _failed(self, error: StorageError) -> None:
        cause = error.__cause__
        full = isinstance(cause, OSError) and cause.errno in _FULL
        if self._gap is None:
            log.error("%s", error)
        self._retry_s = time.monotonic() + RETRY_S
        if not (self._wait_when_full and full):
            self.failure = error

    def _lose(self, items: list[Any]) -> None:
        messages = [item for item in items if not isinstance(item, Gap)]
        earlier = sum(item.messages or 0 for item in items if isinstance(item, Gap))
        self._totals.lost += len(messages)
        if self._gap is None:
            first = items[0]
            first_us, elapsed_us = (first.first_us, first.elapsed_us) if isinstance(first, Gap) else first[:2]
            self._gap = Gap("disk full", first_us, first_us, 0, elapsed_us, "the disk took no more")
        last = items[-1]
        self._gap.last_us = last.last_us if isinstance(last, Gap) else last[0]
        self._gap.messages = (self._gap.messages or 0) + len(messages) + earlier

    # --- files --------------------------------------------------------------------------------------------------

    def _open(self) -> RecordingWriter:
        self._part += 1
        path = part_path(self._path, self._part) if self._rotates else self._path
        info = RecordingInfo(
            **{
                **{name: getattr(self._info, name) for name in self._info.__struct_fields__},
                "part": self._part,
                "part_started_us": time.time_ns() // 1000,
            }
        )
        try:
            writer = RecordingWriter(path, info)
        except StorageError as error:
            self._part -= 1
            if isinstance(error.__cause__, FileExistsError):
                error.hint = "name another file, remove that one, or use --rotate, which adds parts"
            raise
        self._began_s = time.monotonic()
        self._totals.files += 1
        return writer

    def _rotate_if_due(self) -> None:
        rotation, now_s = self._rotation, time.monotonic()
        old = self._writer.size >= rotation.bytes if rotation.bytes else False
        old = old or (rotation.seconds > 0 and now_s - self._began_s >= rotation.seconds)
        if not old or not self._writer.index.messages or now_s < self._rotate_again_s:
            return
        if rotation.keep > 1:
            self._remove_old(rotation.keep - 1)
        try:
            following = self._open()
        except StorageError as error:
            # The present file goes on for as long as the disk takes it.
            log.warning("no new part was begun: %s", error)
            self._rotate_again_s = now_s + RETRY_S
            return
        self._closed_bytes += self._writer.size
        previous, self._writer = self._writer, following
        try:
            previous.close("rotated")
        except StorageError as error:
            log.warning("%s has no index: %s", previous.path, error)
        if rotation.keep:
            self._remove_old(rotation.keep)

    def _remove_old(self, keep: int) -> None:
        for path in parts_of(self._path)[:-keep]:
            try:
                path.unlink()
                self._totals.removed_files += 1
            except OSError as error:
                log.warning("the old recording %s cannot be removed: %s", path, error.strerror)

    def _count(self) -> None:
        self._totals.written_bytes = self._closed_bytes + self._writer.size
        self._totals.payload_bytes = self._writer.index.payload_bytes
