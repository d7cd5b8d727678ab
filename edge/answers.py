"""Answering asks: each is carried out once, in its time to live; a repetition gets the answer that was given.

A durable ask is in the journal before it is acknowledged, and its answer before it is sent.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from edge.counters import Counters, Events
from edge.replies import RUNNING, ReplyCache
from protocol import codec
from protocol.codec import Received
from protocol.errors import AskExpired, MessageTooLarge, MindstreamError, ProtocolError, to_wire
from protocol.messages import MESSAGES

if TYPE_CHECKING:
    from edge.hearings import Arrival

log = logging.getLogger(__name__)

Reply = Any
"""A struct, an error of the tree, a Deferred, or None."""


class Speaker(Protocol):
    """What the dispatcher needs of the bus: to send an encoded answer."""

    source: str

    def send_reply(self, asker: str, client: str, payload: bytes) -> None:
        """Publish an answer in this node's branch. Raises an error of the tree."""


class Journal(Protocol):
    """Where durable asks and dead letters are written down: edge.journal.CommandJournal."""

    def accept(self, received: Received, payload: bytes, ttl_ms: int) -> str | bytes:
        """``new``, ``running``, ``expired``, or the bytes of the answer that it had. Raises StorageError."""

    def finish(self, received: Received, reply: bytes, *, failed: bool = False) -> None:
        """Keep the answer. Raises StorageError."""

    def count_failure(self, key: str) -> int:
        """How often the message of ``key`` has come again, restarts included. Raises StorageError."""

    def forget_failures(self, key: str) -> None:
        """It was handled after all, or given up. Raises StorageError."""

    def dead_letter(self, topic: str, payload: bytes, error: BaseException | str, attempts: int) -> int:
        """Keep a message that cannot be handled. Raises StorageError."""


def key_of(message: Received) -> str:
    """An ask's key: its id is the asker's own, so another node's is another ask."""
    return f"{message.node}/{message.id}"


def remaining_ms(message: Received) -> int:
    """What is left of an ask's time to live, by this node's monotonic clock since its arrival."""
    return message.ttl_ms - int((time.monotonic() - message.received_s) * 1000)


class Answers:
    """What one bus connection answers. The dispatcher's methods call it on the handler thread, Deferreds on any.

    Args:
        node: this node's name, for asks that only its own services may make.
        speaker: sends answers.
        handled: acknowledges an arrival.
    """

    def __init__(
        self,
        node: str,
        speaker: Speaker,
        handled: Callable[[Arrival], None],
        counters: Counters,
        events: Events,
    ) -> None:
        self._node = node
        self._speaker = speaker
        self._handled = handled
        self._counters = counters
        self._events = events
        self._replies = ReplyCache(counters)
        self.journal: Journal | None = None

    def may_answer(self, arrival: Arrival) -> bool:
        """Whether an ask is to be carried out: in time, allowed, and not done or under way already."""
        message = arrival.message
        assert message is not None
        ask = message.row.ask
        assert ask is not None
        if not 0 < message.ttl_ms <= ask.ttl_max_ms:
            error: MindstreamError = ProtocolError(
                f"reading {message.type}: its time to live is {message.ttl_ms} ms, it must be 1 to {ask.ttl_max_ms}",
                field="ttl_ms",
                reason="missing or out of range",
            )
        elif remaining_ms(message) <= 0:
            error = AskExpired(
                f"carrying out {message.type}: its time to live ran out before it could be",
                hint="ask again, with a longer time to live",
                field="ttl_ms",
                reason="expired",
            )
        elif ask.own_node_only and message.node != self._node:
            error = ProtocolError(
                f"carrying out {message.type}: only {self._node}'s own services may ask it, {message.node} did",
                field="node",
                reason="not allowed",
            )
        else:
            return self._is_new(arrival, message)
        self._counters.add(f"refused.{error.code}")
        self.answer(arrival, message, error)
        self._handled(arrival)
        return False

    def _is_new(self, arrival: Arrival, message: Received) -> bool:
        """Whether an ask comes for the first time; a repetition gets the answer that was given, or waits for it."""
        known = self._replies.begin(key_of(message), message.ttl_ms)
        if known is None and message.row.ask is not None and message.row.ask.durable and self.journal is not None:
            if not arrival.journaled:
                try:
                    verdict = self.journal.accept(message, arrival.payload, remaining_ms(message))
                except MindstreamError as error:
                    self.finish(arrival, message, error)
                    return False
                if isinstance(verdict, bytes):
                    self._send(message.node, message.reply_to, verdict, message.type)
                if verdict != "new":
                    known = RUNNING
                arrival.journaled = True
            # It is on the disk: the broker may forget it while it is being carried out.
            self._handled(arrival)
        if known is None:
            return True
        self._counters.add("duplicates")
        if known is not RUNNING:
            self.answer(arrival, message, known)
        self._handled(arrival)
        return False

    def finish(self, arrival: Arrival, message: Received, result: Reply) -> None:
        """Answer an ask, keep the answer for repetitions, and acknowledge."""
        if isinstance(result, MindstreamError):
            self._counters.add(f"refused.{result.code}")
        size_bytes = self.answer(arrival, message, result)
        self._replies.finish(key_of(message), result, size_bytes)
        self._handled(arrival)

    def answer(self, arrival: Arrival, message: Received, result: Reply) -> int:
        """Answer one ask, a durable one's answer being kept first; the answer's size in bytes."""
        payload = self._encode(result, message.id, arrival.topic, message.type)
        if arrival.journaled and self.journal is not None:
            try:
                self.journal.finish(message, payload, failed=isinstance(result, MindstreamError))
            except MindstreamError as error:
                # It will be carried out again after a restart; better than no answer now.
                self._counters.add("dropped.journal")
                log.error("keeping the answer to %s: %s", message.type, error)
        self._send(message.node, message.reply_to, payload, message.type)
        return len(payload)

    def refuse(
        self, asker: str, client: str, correlation: str, error: MindstreamError, *, topic: str, type: str
    ) -> None:
        """Tell an asker that its ask could not be read."""
        self._send(asker, client, self._encode(error, correlation, topic, type), type)

    def _encode(self, result: Reply, correlation: str, topic: str, type: str) -> bytes:
        if not isinstance(result, MindstreamError):
            ask = MESSAGES[type].ask
            assert ask is not None
            row = MESSAGES[ask.reply]
            try:
                if not isinstance(result, row.struct):
                    raise TypeError(f"the handler answered with {result.__class__.__name__}, not {row.struct.__name__}")
                return codec.encode(result, source=self._speaker.source, row=row, correlation=correlation)
            except MessageTooLarge as error:
                result = error
            except (TypeError, ValueError, OverflowError, RecursionError) as error:
                # A handler's mistake must neither end the handler thread nor leave the asker waiting.
                self._counters.add("failed.handler")
                log.exception("%s cannot answer %s", self._speaker.source, type)
                result = error
        info = to_wire(result, topic=topic, type=type)
        return codec.encode(info, source=self._speaker.source, row=MESSAGES["error"], correlation=correlation)

    def _send(self, asker: str, client: str, payload: bytes, type: str) -> None:
        """Send one answer. One that cannot be sent is counted: the asker asks again."""
        try:
            self._speaker.send_reply(asker, client, payload)
        except MindstreamError as error:
            self._counters.add("dropped.reply")
            self._events.report("reply-dropped", "warning", f"answering {type} of {asker}/{client[:63]}: {error}")
