"""Identifiers: UUIDv7 (RFC 9562), sortable by time, and the names that may stand in a topic."""

from __future__ import annotations

import os
import re
import threading
import time

from protocol.errors import MalformedMessage

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9_\-]{0,62}")
"""A topic level that a person or program chose: node, client, service, conversation, run."""

UUID7_PATTERN = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")

_lock = threading.Lock()
_last_stamp = 0


def uuid7(time_ms: int | None = None) -> str:
    """A new UUIDv7 in canonical text form (36 characters), strictly increasing within a process.

    RFC 9562 section 6.2 method 1: the 12 bits after the time are a counter, which runs over into the
    time when a millisecond gives out more than 4,096 ids.
    """
    global _last_stamp
    now_ms = time.time_ns() // 1_000_000 if time_ms is None else time_ms
    with _lock:
        stamp = max(now_ms << 12, _last_stamp + 1)
        _last_stamp = stamp
    high = f"{stamp >> 12:012x}"
    low = int.from_bytes(os.urandom(8), "big") & 0x3FFF_FFFF_FFFF_FFFF | 0x8000_0000_0000_0000
    tail = f"{low:016x}"
    return f"{high[:8]}-{high[8:]}-7{stamp & 0xFFF:03x}-{tail[:4]}-{tail[4:]}"


def uuid7_time_ms(identifier: str) -> int:
    """The Unix time in milliseconds inside a UUIDv7. Raises MalformedMessage for anything else."""
    if not UUID7_PATTERN.fullmatch(identifier):
        raise MalformedMessage(
            f"reading the time of id {identifier[:60]!r}: not a UUIDv7", field="id", reason="not a UUIDv7"
        )
    return int(identifier[:8] + identifier[9:13], 16)


def check_name(name: str, what: str) -> str:
    """``name`` itself if it may stand as a topic level, else MalformedMessage naming ``what``."""
    if not NAME_PATTERN.fullmatch(name):
        raise MalformedMessage(
            f"{what} {name[:80]!r} is not a name",
            hint="use 1 to 63 of a-z, 0-9, '-' and '_', beginning with a letter or digit",
            field=what,
            reason="not a name",
        )
    return name
