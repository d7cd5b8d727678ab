"""What a recording holds, in figures: duration, messages by topic and type, gaps, damage, bytes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import msgspec

from edge.recording import Damage, Gap, Message, Recording
from protocol import codec, topics
from protocol.errors import WrongTopic
from protocol.messages import MESSAGES

MAX_GAPS = 1000
MAX_ROWS = 1000
OTHER = "(others)"


class Row(msgspec.Struct):
    """Messages of one kind."""

    node: str
    """Who said them; empty for topics that are not Mindstream's."""
    topic: str
    """The topic table's pattern, or the topic itself where it has none."""
    type: str
    """Message type; ``?`` where it cannot be read."""
    messages: int = 0
    payload_bytes: int = 0


class FileSummary(msgspec.Struct):
    """One file."""

    path: str
    file_bytes: int
    part: int
    messages: int
    closed: bool
    """The recorder closed it; else it was cut, or is still being written."""
    ended: str
    """Why it was closed."""
    damage: list[str]


class Summary(msgspec.Struct):
    """All files of a recording together."""

    recording: str = ""
    node: str = ""
    broker: str = ""
    mindstream: str = ""
    filters: list[str] = []
    first_us: int = 0
    last_us: int = 0
    duration_s: float = 0.0
    messages: int = 0
    lost: int = 0
    """Known not to have been recorded: full queue, full disk."""
    unreadable: int = 0
    """In blocks that are damaged or cut, as far as their heads say."""
    payload_bytes: int = 0
    file_bytes: int = 0
    bytes_per_message: float | None = None
    """On the disk, all included."""
    files: list[FileSummary] = []
    rows: list[Row] = []
    gaps: list[Gap] = []


def summarize(paths: Sequence[Path]) -> Summary:
    """Read all of ``paths``. Raises NotFound, StorageError."""
    summary = Summary()
    rows: dict[tuple[str, str, str], Row] = {}
    for path in paths:
        with Recording(path) as source:
            _add(source, summary, rows)
    summary.rows = sorted(rows.values(), key=lambda row: (-row.messages, row.node, row.topic))
    if summary.messages:
        summary.bytes_per_message = summary.file_bytes / summary.messages
        summary.duration_s = (summary.last_us - summary.first_us) / 1_000_000
    return summary


def _add(source: Recording, summary: Summary, rows: dict[tuple[str, str, str], Row]) -> None:
    info = source.info
    if info is not None and not summary.recording:
        summary.recording, summary.node, summary.broker = info.recording, info.node, info.broker
        summary.mindstream, summary.filters = info.mindstream, info.filters
    file = FileSummary(
        str(source.path), source.size, info.part if info else 0, 0, source.closed_whole, source.index.ended, []
    )
    if info is None:
        file.damage.append("the header cannot be read: where it comes from is not known")
    for item in source.items():
        if isinstance(item, Message):
            file.messages += 1
            summary.payload_bytes += len(item.payload)
            summary.first_us = min(summary.first_us or item.time_us, item.time_us)
            summary.last_us = max(summary.last_us, item.time_us)
            key = kind_of(item)
            row = rows.get(key)
            if row is None:
                key = key if len(rows) < MAX_ROWS else ("", OTHER, OTHER)
                row = rows.setdefault(key, Row(*key))
            row.messages += 1
            row.payload_bytes += len(item.payload)
        elif isinstance(item, Gap):
            summary.lost += item.messages or 0
            if len(summary.gaps) < MAX_GAPS:
                summary.gaps.append(item)
        elif isinstance(item, Damage):
            summary.unreadable += item.messages or 0
            file.damage.append(str(item))
    summary.messages += file.messages
    summary.file_bytes += source.size
    summary.files.append(file)


def kind_of(message: Message) -> tuple[str, str, str]:
    """Node, pattern of the topic, and type."""
    node, pattern, type = _place(message.topic)
    if not type:
        envelope = codec.peek(message.payload)
        type = envelope.type if envelope is not None else "?"
    return node, pattern, type


@lru_cache(maxsize=4096)
def _place(topic: str) -> tuple[str, str, str]:
    try:
        found = topics.parse(topic)
    except WrongTopic:
        return "", topic[:200], "?"
    type = next((row.type for row in MESSAGES.values() if row.topic is found.topic), "?")
    return found.node, found.topic.pattern, type if found.topic.format == "json" else ""
