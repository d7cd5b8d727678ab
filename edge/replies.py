"""Answers given, kept until their ask has expired: a repeated ask is answered from here, not carried out again."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from edge.counters import Counters
from protocol.errors import MindstreamError

MARGIN_S = 30.0
"""An answer outlives its ask's time to live by this, for repetitions that are still on their way."""
MAX_KEPT_BYTES = 256 * 1024
"""A larger answer is not kept: questions that have such answers change nothing and can be asked again."""


@dataclass
class _Answered:
    until_s: float
    result: object = None
    """The struct or error that was answered; None while the ask is being carried out."""
    size_bytes: int = 0


class ReplyCache:
    """Ask id to answer, bounded in count and bytes; the oldest go first. Thread-safe.

    Args:
        counters: ``dropped.reply_cache`` counts asks forgotten before their time; a repetition is carried out again.
        max_entries: how many asks are remembered.
        max_bytes: how many bytes of encoded answers, about.
    """

    def __init__(self, counters: Counters, max_entries: int = 20_000, max_bytes: int = 32 * 1024 * 1024) -> None:
        self._counters = counters
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, _Answered] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def begin(self, identifier: str, ttl_ms: int) -> object | None:
        """``None``: new, carry it out. ``RUNNING``: it is under way. Else the answer that was given."""
        now_s = time.monotonic()
        with self._lock:
            known = self._entries.get(identifier)
            if known is not None and known.until_s > now_s:
                return RUNNING if known.result is None else known.result
            if known is not None:
                self._bytes -= self._entries.pop(identifier).size_bytes
            self._entries[identifier] = _Answered(now_s + ttl_ms / 1000 + MARGIN_S)
            self._trim(now_s)
            return None

    def finish(self, identifier: str, result: object, size_bytes: int) -> None:
        """Keep the answer. One too large is forgotten, so that a repeated ask is carried out again."""
        with self._lock:
            known = self._entries.get(identifier)
            if known is None:
                return
            self._bytes -= known.size_bytes
            if size_bytes > MAX_KEPT_BYTES:
                del self._entries[identifier]
                return
            known.result, known.size_bytes = result, size_bytes
            self._bytes += size_bytes
            self._trim(time.monotonic())

    def _trim(self, now_s: float) -> None:
        entries = self._entries
        while entries:
            oldest = next(iter(entries.values()))
            if oldest.until_s > now_s and len(entries) <= self._max_entries and self._bytes <= self._max_bytes:
                return
            if oldest.until_s > now_s:
                self._counters.add("dropped.reply_cache")
            self._bytes -= oldest.size_bytes
            entries.popitem(last=False)

    def __len__(self) -> int:
        return len(self._entries)


RUNNING = MindstreamError("this ask is being carried out")
"""What begin() returns for a repetition of an ask that has no answer yet."""
