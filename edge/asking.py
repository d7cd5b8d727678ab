"""Asking: an ask is packed, sent, and sent again with what is left of its time to live, until its future resolves.

What is under way, and its repetition, stands in ``edge.asks``.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Any

import msgspec

from edge.asks import PendingAsks
from edge.connection import Connection
from edge.publishing import Packet, Publisher, check_size, topic_of
from edge.wire_properties import RequestProperties
from protocol import codec, topics
from protocol.errors import MindstreamError, ProtocolError, UnknownType
from protocol.ids import uuid7
from protocol.messages import row_of

FRESH_MS = 20
"""An ask that is sent within this is sent as it was packed."""


class Asker:
    """Asks of one client of one node.

    Args:
        node, client: who asks, and where the answers go.
    """

    def __init__(self, node: str, client: str, asks: PendingAsks, connection: Connection, publisher: Publisher) -> None:
        self._node = node
        self._client = client
        self._source = f"{node}/{client}"
        self._asks = asks
        self._connection = connection
        self._publisher = publisher

    def ask(self, target: str, message: msgspec.Struct, ttl_ms: int, id: str = "") -> Future[Any]:
        """Ask ``target`` node; the answer as a future.

        Raises UnknownType, ProtocolError for a time to live out of range, WrongTopic, MessageTooLarge, and what
        PendingAsks.open() raises.
        """
        row = row_of(message)
        if row.ask is None:
            raise UnknownType(f"asking with {row.type}: it is not a question or command", type=row.type, field="type")
        if not 0 < ttl_ms <= row.ask.ttl_max_ms:
            raise ProtocolError(
                f"asking {row.type} with a time to live of {ttl_ms} ms: it must be 1 to {row.ask.ttl_max_ms}",
                type=row.type,
                field="ttl_ms",
                reason="out of range",
            )
        deadline_s = time.monotonic() + ttl_ms / 1000
        identifier = id or uuid7()
        names = (("node", self._node), ("target", target), ("service", row.ask.service), ("verb", row.ask.verb))
        topic = topic_of(row.topic, names)
        answer_names = (("node", target), ("asker", self._node), ("client", self._client))
        response_topic = topic_of(topics.REPLY, answer_names)

        def pack(left_ms: int) -> tuple[bytes, RequestProperties]:
            payload = codec.encode(
                message, source=self._source, row=row, id=identifier, reply_to=self._client, ttl_ms=left_ms
            )
            check_size(topic, payload)
            return payload, RequestProperties(-(-left_ms // 1000), response_topic, identifier.encode())

        packed: tuple[bytes, RequestProperties] | None = pack(ttl_ms)  # what can never be sent is refused here

        def send(wait_s: float = 0.0) -> bool:
            nonlocal packed
            # Without a connection it is not handed over: in the client library it would wait without growing old,
            # and could be carried out long after its time. The next connection sends it.
            if not self._connection.connected.is_set():
                return True
            if not self._publisher.take_room(wait_s):
                return False
            try:
                left_ms = max(1, round((deadline_s - time.monotonic()) * 1000))
                fresh = packed if ttl_ms - left_ms < FRESH_MS else None
                packed = None
                payload, properties = fresh or pack(left_ms)
            except BaseException:
                self._publisher.free(1)
                raise
            self._publisher.hand_over(Packet(topic, payload, False), properties)
            return True

        what = f"asking {target}/{row.ask.service} to {row.ask.verb}"
        future = self._asks.open(
            identifier, what, node=target, reply_type=row.ask.reply, deadline_s=deadline_s, send=send
        )
        try:
            if not send(ttl_ms / 1000):
                self._asks.fail(identifier, self._publisher.overloaded(topic, ttl_ms / 1000))
        except MindstreamError as error:
            self._asks.fail(identifier, error)
        return future
