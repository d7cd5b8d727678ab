"""Publishing with a window: what may be under way without a PUBACK, who waits for room, and who must not.

A thread that the broker may be waiting for (the network's, the handlers') never waits: what it publishes goes to a
bounded backlog. Everyone else waits for room. What cannot be taken is an error and counted, never dropped silently.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from edge.connection import Connection
from edge.counters import Counters
from edge.mqtt_client import Packed
from edge.wire_properties import RequestProperties
from protocol.errors import MessageTooLarge, Overloaded
from protocol.topics import MAX_PACKET_BYTES, Topic

log = logging.getLogger(__name__)

PUBLISH_WINDOW = 256
"""Publishes under way without a PUBACK; a broker that grants less sets it lower. Beyond it, say() waits."""
BACKLOG_MESSAGES = 50_000
BACKLOG_BYTES = 64 * 1024 * 1024
"""What may wait of those that must not wait themselves: answers, and what handlers say."""


class Packet(NamedTuple):
    """What is to be published at QoS 1."""

    topic: str
    payload: bytes
    retain: bool


def check_size(topic: str, payload: bytes) -> None:
    """A larger packet would make the broker cut the connection, and paho send it again, for ever."""
    if len(payload) + len(topic) + 512 > MAX_PACKET_BYTES:
        raise MessageTooLarge(
            f"publishing on {topic}: {len(payload):,} bytes, the broker takes {MAX_PACKET_BYTES:,}",
            topic=topic,
        )


@lru_cache(maxsize=4096)
def topic_of(topic: Topic, names: tuple[tuple[str, str], ...]) -> str:
    """The concrete topic; the same few are made again and again. Raises WrongTopic."""
    return topic.format_topic(**dict(names))


class Publisher:
    """The way out of one connection. Thread-safe.

    Args:
        must_not_wait: whether the calling thread is one that the broker may be waiting for.
    """

    def __init__(self, connection: Connection, must_not_wait: Callable[[], bool], counters: Counters) -> None:
        self._connection = connection
        self._must_not_wait = must_not_wait
        self._counters = counters
        self._window = threading.Condition(threading.Lock())
        self.limit = 20
        """How many publishes may be under way; set with each connection."""
        self.in_flight = 0
        """Publishes without a PUBACK."""
        self._backlog: deque[Packet] = deque()
        self._backlog_bytes = 0

    def send(self, packet: Packet, *, timeout_s: float) -> None:
        """Send now if the window has room; else wait for it, or put the packet aside on a thread that must not.

        Raises Overloaded.
        """
        if self._must_not_wait():
            with self._window:
                if self._backlog or self.in_flight >= self.limit:
                    self._put_aside(packet)
                    return
                self.in_flight += 1
        elif not self.take_room(timeout_s):
            self._counters.add("dropped.publish")
            raise self.overloaded(packet.topic, timeout_s)
        self.hand_over(packet, None)

    def take_room(self, timeout_s: float) -> bool:
        """One place in the window; False when none came free in time."""
        with self._window:
            if self.in_flight >= self.limit and not (
                timeout_s > 0 and self._window.wait_for(lambda: self.in_flight < self.limit, timeout_s)
            ):
                return False
            self.in_flight += 1
            return True

    def _put_aside(self, packet: Packet) -> None:
        if self._backlog_bytes + len(packet.payload) > BACKLOG_BYTES or len(self._backlog) >= BACKLOG_MESSAGES:
            self._counters.add("dropped.publish")
            raise self.overloaded(packet.topic, 0.0)
        self._backlog.append(packet)
        self._backlog_bytes += len(packet.payload)

    def hand_over(self, packet: Packet, properties: Packed | None) -> None:
        """The only one who publishes; a place in the window has been taken. Holds no lock of ours."""
        self._connection.client.send(packet.topic, packet.payload, retain=packet.retain, properties=properties)
        self._counters.add("published")

    def overloaded(self, topic: str, timeout_s: float) -> Overloaded:
        """The error of a publish for which no room came."""
        return Overloaded(
            f"publishing on {topic}: {self.in_flight} messages wait for the broker at {self._connection.url} "
            f"and none was taken in {timeout_s:g} s",
            hint="is the broker reachable? `mindstream doctor` looks",
            topic=topic,
            reason="slow broker" if self._connection.connected.is_set() else "not connected",
        )

    def free(self, count: int) -> None:
        """Give places back; the backlog takes them before anyone who waits."""
        packets: list[Packet] = []
        with self._window:
            self.in_flight -= count
            while self._backlog and self.in_flight < self.limit:
                packets.append(self._backlog.popleft())
                self._backlog_bytes -= len(packets[-1].payload)
                self.in_flight += 1
            if self.in_flight < self.limit:
                self._window.notify_all()
        for packet in packets:
            self.hand_over(packet, None)

    def new_connection(self, granted: int) -> None:
        """The broker grants ``granted`` publishes under way; asks of before are sent anew by their asker.

        paho would send them with the time to live that they had once, so they are taken out of what it is about to
        send again.
        """
        client = self._connection.client
        with client._out_message_mutex:
            sent = client._out_messages
            old = [mid for mid, message in sent.items() if isinstance(message.properties, RequestProperties)]
            for mid in old:
                del sent[mid]
        if old:
            self.free(len(old))
        with self._window:
            self.limit = min(PUBLISH_WINDOW, granted)
            self._window.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until the broker has acknowledged everything; False when it has not in time."""
        with self._window:
            return self._window.wait_for(lambda: self.in_flight == 0 and not self._backlog, timeout_s)
