"""The bus: typed messages over MQTT 5, on paho-mqtt.

paho's network thread decodes what comes and puts it into a bounded inbox; one handler thread calls the
handlers; a message is acknowledged when its handler has returned, or when the Deferred that it returned is
set. Answers to asks are resolved by the network thread at once. Nothing is dropped without a counter.

A handler must not ask: its own answer could wait behind messages that wait for the handler. Return a Deferred
and ask from a worker.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge.asks import PendingAsks
from edge.counters import Counters, Events
from edge.dispatch import Deferred, Dispatcher
from edge.journal import CommandJournal
from edge.mqtt_client import FastClient
from edge.wire_properties import RequestProperties
from protocol import codec, topics
from protocol.codec import Received
from protocol.errors import (
    BusError,
    MessageTooLarge,
    MindstreamError,
    NotConnected,
    Overloaded,
    ProtocolError,
    UnknownType,
)
from protocol.ids import check_name, uuid7
from protocol.messages import Event, MessageRow, row_of
from protocol.topics import MAX_PACKET_BYTES, Topic

log = logging.getLogger(__name__)

KEEPALIVE_S = 15
SESSION_EXPIRY_S = 7 * 24 * 3600
"""A broker keeps a durable session's messages for a week; the log repairs what it did not keep."""
RECONNECT_MIN_S, RECONNECT_MAX_S = 0.2, 10.0
QUICK_ACK_BELOW = 4
"""With fewer messages under way than this, latency counts more than the system call."""
PUBLISH_WINDOW = 256
"""Publishes under way without a PUBACK; a broker that grants less sets it lower. Beyond it, say() waits."""
BACKLOG_MESSAGES = 50_000
BACKLOG_BYTES = 64 * 1024 * 1024
"""What may wait of those that must not wait themselves: answers, and what handlers say."""


class _Packet(NamedTuple):
    topic: str
    payload: bytes
    retain: bool


def _check_size(topic: str, payload: bytes) -> None:
    """A larger packet would make the broker cut the connection, and paho send it again, for ever."""
    if len(payload) + len(topic) + 512 > MAX_PACKET_BYTES:
        raise MessageTooLarge(
            f"publishing on {topic}: {len(payload):,} bytes, the broker takes {MAX_PACKET_BYTES:,}",
            topic=topic,
        )


@lru_cache(maxsize=4096)
def _topic_of(topic: Topic, names: tuple[tuple[str, str], ...]) -> str:
    return topic.format_topic(**dict(names))


class Bus:
    """One connection of one named client of one node.

    Args:
        url: ``mqtt://host:port`` or ``mqtts://host:port``.
        node: the node in whose branch this client speaks.
        client: its name there, a service or a program; with the node it makes the client id.
        username, password: for the broker; empty for none.
        ca_file: CA certificates for ``mqtts``; empty for the system's.
        queue_messages: bound of the inbox, and the receive maximum granted to the broker.
        durable_session: the broker keeps messages for this client while it is away.
        will: a retained state message that the broker publishes when the client vanishes, with the names
            of its topic.
    """

    def __init__(
        self,
        *,
        url: str,
        node: str,
        client: str,
        username: str = "",
        password: str = "",
        ca_file: str = "",
        queue_messages: int = 1000,
        durable_session: bool = False,
        will: tuple[msgspec.Struct, dict[str, str]] | None = None,
    ) -> None:
        self.url = url
        self.node = check_name(node, "node")
        self.client = check_name(client, "client")
        self.source = f"{node}/{client}"
        self.counters = Counters()
        self.events = Events(self._say_event, self.counters)
        self._queue_messages = queue_messages
        self._durable = durable_session
        self._asks = PendingAsks()
        self._started = False
        self._stopping = False
        self._connected = threading.Event()
        self._subscribed = threading.Event()
        self.connections = 0
        """Connections made so far: when it grows, the broker may have forgotten what was retained."""
        self.refusal = ""
        """Why the broker refused the last connection or subscription; empty when it did not."""
        self._unsubscribed: set[int] = set()
        self._subscribing = threading.Lock()
        self._window = threading.Condition(threading.Lock())
        self._window_limit = 20
        self._in_flight = 0
        self._backlog: deque[_Packet] = deque()
        self._backlog_bytes = 0

        client_id = f"mindstream-{node}-{client}"
        self._paho = FastClient(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=paho.MQTTv5,
            manual_ack=True,
            on_packet=self._guarded(self._receive),
            on_acknowledged=self._guarded(self._acknowledged),
        )
        self._dispatch = Dispatcher(
            node,
            self,
            lambda packet_id: self._paho.ack(packet_id, 1),
            self._asks.resolve,
            self.counters,
            self.events,
            queue_messages,
        )
        if username:
            self._paho.username_pw_set(username, password)
        parts = urlsplit(url)
        if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname:
            raise NotConnected(
                f"reading the broker's address {url!r}: not mqtt://host:port or mqtts://host:port",
                hint="set broker.url in mindstream.toml",
                field="broker.url",
            )
        if parts.scheme == "mqtts":
            self._paho.tls_set(ca_certs=ca_file or None, tls_version=ssl.PROTOCOL_TLS_CLIENT)
        self._host, self._port = parts.hostname, parts.port or (8883 if parts.scheme == "mqtts" else 1883)
        # Our own window bounds what is under way; paho's would scan all of it at every PUBACK.
        self._paho.max_inflight_messages_set(0)
        self._paho.max_queued_messages_set(0)
        self._paho.reconnect_delay_set(RECONNECT_MIN_S, RECONNECT_MAX_S)  # type: ignore[arg-type]
        self._paho.on_socket_open = _no_delay
        self._paho.on_connect = self._guarded(self._on_connect)
        self._paho.on_disconnect = self._guarded(self._on_disconnect)
        self._paho.on_subscribe = self._guarded(self._on_subscribe)
        self._paho.on_publish = self._guarded(self._on_publish)
        if will is not None:
            message, names = will
            row = row_of(message)
            self._paho.will_set(
                self._topic(row.topic, names),
                codec.encode(message, source=self.source, row=row),
                qos=1,
                retain=row.topic.retain,
            )

    # --- life ---------------------------------------------------------------------------------------------

    def start(self, timeout_s: float | None = 10.0) -> None:
        """Connect and subscribe. Raises NotConnected after ``timeout_s``; None waits for ever in the background.

        The connection heals by itself from then on, with backoff.
        """
        if not self._started:
            self._started = True
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = SESSION_EXPIRY_S if self._durable else 0
            properties.ReceiveMaximum = min(65_535, self._queue_messages)
            properties.MaximumPacketSize = MAX_PACKET_BYTES
            self._paho.connect_async(
                self._host,
                self._port,
                keepalive=KEEPALIVE_S,
                clean_start=not self._durable,
                properties=properties,
            )
            self._paho.loop_start()
            self._dispatch.thread.start()
        if timeout_s is not None:
            self.wait_subscribed(timeout_s)

    def stop(self, *, goodbye: Sequence[tuple[msgspec.Struct, dict[str, str]]] = (), timeout_s: float = 5.0) -> None:
        """Say ``goodbye``, wait for what is under way, disconnect. What is not acknowledged comes again."""
        if self._stopping or not self._started:
            return
        self.events.flush(everything=True)
        self._stopping = True
        self._dispatch.inbox.close()
        if self._dispatch.thread is not threading.current_thread():
            self._dispatch.thread.join(timeout_s)
        if self._connected.is_set():
            for message, names in goodbye:
                self._publish(row_of(message), message, names, timeout_s=timeout_s)
            self.flush(timeout_s)
        self._asks.fail_all(NotConnected(f"{self.source} is stopping"))
        self._paho.disconnect()
        self._paho.loop_stop()

    def __enter__(self) -> Bus:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def connected(self) -> bool:
        """Connected and subscribed at this moment."""
        return self._subscribed.is_set()

    def keep_asks_in(self, journal: CommandJournal) -> None:
        """Write durable asks and dead letters into ``journal``, and carry out what an earlier process left there.

        Called once every hearing is there, before start(). Raises StorageError.
        """
        self._dispatch.journal = journal
        recovery = journal.unfinished()
        left = sum(not self._dispatch.again(each.topic, each.payload, each.ttl_ms) for each in recovery.commands)
        for name, count in (("expired", recovery.expired), ("dead_letters", recovery.dead), ("left_for_later", left)):
            if count:
                self.counters.add(name, count)
                log.warning("%s: %d commands of before the restart are %s", self.source, count, name.replace("_", " "))

    @property
    def queued(self) -> int:
        """Messages received and not yet handled."""
        return len(self._dispatch.inbox)

    # --- saying -------------------------------------------------------------------------------------------

    def say(self, message: msgspec.Struct, *, timeout_s: float = 30.0, **names: str) -> None:
        """Publish ``message`` on its topic in this node's branch; ``names`` fill the topic's other levels.

        Returns when the client library has it; waits while the window is full, except in a handler, which must
        not: there it goes to a backlog. Raises MessageTooLarge, WrongTopic, or Overloaded when no room came in
        ``timeout_s``.
        """
        self._publish(row_of(message), message, names, timeout_s=timeout_s)

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until the broker has acknowledged all that was said; False when it has not in time."""
        with self._window:
            return self._window.wait_for(lambda: self._in_flight == 0 and not self._backlog, timeout_s)

    def ask(self, target: str, message: msgspec.Struct, *, ttl_ms: int) -> Any:
        """Ask ``target`` node and wait for its answer, at most ``ttl_ms``.

        The ask is sent again (same id: it is carried out once) when the connection comes back. Raises
        AskExpired, or the error that the other side answered with.
        """
        if threading.current_thread() is self._paho._thread:
            raise BusError(
                f"asking {target} from the network thread of {self.source}: it would wait for itself",
                hint="ask from a worker thread, or use ask_later",
            )
        return self.ask_later(target, message, ttl_ms=ttl_ms).result()

    def ask_later(self, target: str, message: msgspec.Struct, *, ttl_ms: int, id: str = "") -> Future[Any]:
        """Like ask(), as a future. ``id`` (a UUIDv7) repeats an earlier ask instead of making a new one."""
        if threading.current_thread() is self._dispatch.thread:
            raise BusError(
                f"asking {target} from a handler of {self.source}: its answer could never be taken",
                hint="return a Deferred and ask from a worker thread",
            )
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
        identifier = id or uuid7()
        topic = self._topic(row.topic, {"target": target, "service": row.ask.service, "verb": row.ask.verb})
        response_topic = topics.REPLY.format_topic(node=target, asker=self.node, client=self.client)

        deadline_s = time.monotonic() + ttl_ms / 1000

        def encode() -> tuple[bytes, RequestProperties]:
            left_ms = max(1, round((deadline_s - time.monotonic()) * 1000))
            payload = codec.encode(
                message, source=self.source, row=row, id=identifier, reply_to=self.client, ttl_ms=left_ms
            )
            _check_size(topic, payload)
            return payload, RequestProperties(-(-left_ms // 1000), response_topic, identifier.encode())

        def send(wait_s: float = 0.0) -> bool:
            # Without a connection it is not handed over: in the client library it would wait without growing old,
            # and could be carried out long after its time. The next connection sends it.
            if not self._connected.is_set():
                return True
            if not self._take_room(wait_s):
                return False
            try:
                payload, properties = encode()
            except BaseException:
                self._window_free(1)
                raise
            self._hand_over(_Packet(topic, payload, False), properties)
            return True

        encode()  # what can never be sent is refused here
        what = f"asking {target}/{row.ask.service} to {row.ask.verb}"
        future = self._asks.open(
            identifier, what, node=target, reply_type=row.ask.reply, deadline_s=deadline_s, send=send
        )
        try:
            if not send(ttl_ms / 1000):
                self._asks.fail(identifier, self._overloaded(topic, ttl_ms / 1000))
        except MindstreamError as error:
            self._asks.fail(identifier, error)
        return future

    def send_reply(self, asker: str, client: str, payload: bytes) -> None:
        """Publish the encoded answer to an ask of ``client`` on node ``asker``."""
        topic = self._topic(topics.REPLY, {"asker": asker, "client": client})
        _check_size(topic, payload)
        self._send(_Packet(topic, payload, False), timeout_s=10.0)

    def _say_event(self, event: Event) -> None:
        log.log(_LEVELS[event.severity], event.text)
        if self._connected.is_set() and not self._stopping:
            try:
                self._publish(row_of(event), event, {"service": self.client}, timeout_s=0.0)
            except MindstreamError as error:
                self.counters.add("dropped.event")
                log.warning("an event could not be said: %s", error)

    def _publish(self, row: MessageRow, message: msgspec.Struct, names: dict[str, str], *, timeout_s: float) -> None:
        topic = self._topic(row.topic, names)
        payload = codec.encode(message, source=self.source, row=row)
        _check_size(topic, payload)
        self._send(_Packet(topic, payload, row.topic.retain), timeout_s=timeout_s)

    def _topic(self, topic: Topic, names: dict[str, str]) -> str:
        return _topic_of(topic, (("node", self.node), *names.items()))

    def _send(self, packet: _Packet, *, timeout_s: float) -> None:
        """Send now if the window has room; else wait for it, or put the packet aside on a thread that must not."""
        if self._must_not_wait():
            with self._window:
                if self._backlog or self._in_flight >= self._window_limit:
                    self._put_aside(packet)
                    return
                self._in_flight += 1
        elif not self._take_room(timeout_s):
            self.counters.add("dropped.publish")
            raise self._overloaded(packet.topic, timeout_s)
        self._hand_over(packet, None)

    def _take_room(self, timeout_s: float) -> bool:
        """One place in the window; False when none came free in time."""
        with self._window:
            if self._in_flight >= self._window_limit and not (
                timeout_s > 0 and self._window.wait_for(lambda: self._in_flight < self._window_limit, timeout_s)
            ):
                return False
            self._in_flight += 1
            return True

    def _put_aside(self, packet: _Packet) -> None:
        if self._backlog_bytes + len(packet.payload) > BACKLOG_BYTES or len(self._backlog) >= BACKLOG_MESSAGES:
            self.counters.add("dropped.publish")
            raise self._overloaded(packet.topic, 0.0)
        self._backlog.append(packet)
        self._backlog_bytes += len(packet.payload)

    def _hand_over(self, packet: _Packet, properties: Properties | None) -> None:
        """The only caller of paho's publish; a place in the window has been taken. Holds no lock of ours."""
        info = self._paho.publish(packet.topic, packet.payload, 1, packet.retain, properties)
        if info.rc not in (MQTTErrorCode.MQTT_ERR_SUCCESS, MQTTErrorCode.MQTT_ERR_NO_CONN):
            self._window_free(1)
            raise Overloaded(
                f"publishing on {packet.topic}: the client library refused it: {info.rc.name}", topic=packet.topic
            )
        self.counters.add("published")

    def _overloaded(self, topic: str, timeout_s: float) -> Overloaded:
        return Overloaded(
            f"publishing on {topic}: {self._in_flight} messages wait for the broker at {self.url} "
            f"and none was taken in {timeout_s:g} s",
            hint="is the broker reachable? `mindstream doctor` looks",
            topic=topic,
            reason="slow broker" if self._connected.is_set() else "not connected",
        )

    def _on_network_thread(self) -> bool:
        return threading.current_thread() is self._paho._thread

    def _must_not_wait(self) -> bool:
        """Whether this thread is one that the broker may be waiting for.

        rumqttd sends no PUBACK to a client that owes it a hundred of its own: a handler that waited for the window
        before its messages are acknowledged would wait for itself. What it sends is bounded by what it received.
        """
        return self._on_network_thread() or threading.current_thread() is self._dispatch.thread

    def _window_free(self, count: int) -> None:
        """Give places back; the backlog takes them before anyone who waits."""
        packets: list[_Packet] = []
        with self._window:
            self._in_flight -= count
            while self._backlog and self._in_flight < self._window_limit:
                packets.append(self._backlog.popleft())
                self._backlog_bytes -= len(packets[-1].payload)
                self._in_flight += 1
            if self._in_flight < self._window_limit:
                self._window.notify_all()
        for packet in packets:
            try:
                self._hand_over(packet, None)
            except MindstreamError as error:
                self.counters.add("dropped.publish")
                log.warning("%s", error)

    # --- hearing ------------------------------------------------------------------------------------------

    def hear(
        self, struct: type[msgspec.Struct], handler: Callable[..., Any], *, batch: int = 1, **names: str
    ) -> Callable[[], None]:
        """Call ``handler`` for each message of ``struct``'s type; subscribe if connected already.

        Returns a function that ends the hearing.

        Args:
            handler: takes one Received, or a list of up to ``batch`` when batch is above 1. For an ask it
                returns the answer: a struct, an error of the tree, or a Deferred; for a batch a list of them.
            names: fix levels of the topic; any name otherwise. Asks to this node only, always.
        """
        hearing = self._dispatch.hear(struct, handler, batch, names)
        if self._started:
            self._subscribe([hearing.filter])

        def stop_hearing() -> None:
            self._dispatch.unhear(hearing)
            if self._connected.is_set() and hearing.filter not in self._dispatch.filters():
                self._paho.unsubscribe(hearing.filter)

        return stop_hearing

    def wait_subscribed(self, timeout_s: float) -> None:
        """Wait until the broker has granted every subscription. Raises NotConnected."""
        if not self._subscribed.wait(timeout_s):
            raise NotConnected(
                f"subscribing {self.source} at {self.url}: {self.refusal or f'no answer in {timeout_s:g} s'}",
                hint="is the broker running there? `mindstream doctor` looks",
                reason=self.refusal or "unreachable",
            )

    def watch(self, filter: str, callback: Callable[[str, bytes], None]) -> None:
        """Call ``callback(topic, payload)`` with the raw bytes of all that matches an MQTT filter."""
        self._dispatch.watch(filter, callback)
        if self._started:
            self._subscribe([filter])

    def _filters(self) -> list[str]:
        return sorted(self._dispatch.filters() | {topics.REPLY.filter(asker=self.node, client=self.client)})

    def _subscribe(self, filters: list[str]) -> None:
        if not self._connected.is_set():
            return
        # The answer may come before the packet's id is noted: _on_subscribe waits for it.
        with self._subscribing:
            self._subscribed.clear()
            result, packet_id = self._paho.subscribe([(f, SubscribeOptions(qos=1)) for f in filters])
            if result == MQTTErrorCode.MQTT_ERR_SUCCESS and packet_id is not None:
                self._unsubscribed.add(packet_id)

    # --- paho's callbacks, on its network thread ----------------------------------------------------------

    def _guarded(self, callback: Callable[..., None]) -> Callable[..., None]:
        """An exception in a callback would end paho's network thread, and with it the bus, without a word."""

        def call(*arguments: Any) -> None:
            try:
                callback(*arguments)
            except Exception:
                self.counters.add("failed.callback")
                log.exception("%s: %s failed", self.source, callback.__name__)

        return call

    def _on_connect(
        self,
        _client: paho.Client,
        _data: Any,
        flags: paho.ConnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if reason.is_failure:
            self.refusal = f"the broker refused: {reason}"
            log.warning("connecting %s to %s: %s", self.source, self.url, self.refusal)
            return
        self.refusal = ""
        self._dispatch.ledger.new_connection()
        self.connections += 1
        self._forget_old_asks()
        granted = getattr(properties, "ReceiveMaximum", 65_535) if properties is not None else 65_535
        with self._window:
            self._window_limit = min(PUBLISH_WINDOW, granted)
            self._window.notify_all()
        with self._subscribing:
            self._unsubscribed.clear()
        self._connected.set()
        if self.connections > 1:
            self.counters.add("reconnected")
            if self._durable and not flags.session_present:
                self.events.report(
                    "session-lost",
                    "warning",
                    f"{self.source}: the broker had forgotten this client's session; what came meanwhile is asked for",
                )
        self._subscribe(self._filters())
        self._asks.resend()

    def _forget_old_asks(self) -> None:
        """Take asks out of what paho is about to send again: it would send them with the time to live that they
        had once. Every open ask is sent anew on a new connection, with what is left."""
        with self._paho._out_message_mutex:
            sent = self._paho._out_messages
            old = [mid for mid, message in sent.items() if isinstance(message.properties, RequestProperties)]
            for mid in old:
                del sent[mid]
        if old:
            self._window_free(len(old))

    def _on_disconnect(
        self,
        _client: paho.Client,
        _data: Any,
        _flags: Any,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        self._connected.clear()
        self._subscribed.clear()
        self._dispatch.ledger.new_connection()
        if not self._stopping:
            self.counters.add("disconnected")
            log.warning("%s lost its connection to %s: %s", self.source, self.url, reason)

    def _on_subscribe(
        self, _client: paho.Client, _data: Any, packet_id: int, reasons: list[ReasonCode], _properties: Any
    ) -> None:
        refused = [str(reason) for reason in reasons if reason.is_failure]
        if refused:
            self.refusal = f"the broker refused a subscription: {', '.join(refused)}"
            self.counters.add("refused.subscription", len(refused))
            self.events.report("subscription-refused", "error", f"{self.source}: {self.refusal}")
        with self._subscribing:
            self._unsubscribed.discard(packet_id)
            if not self._unsubscribed and not refused:
                self._subscribed.set()

    def _on_publish(self, _client: paho.Client, _data: Any, _mid: int, reason: ReasonCode, _properties: Any) -> None:
        """A PUBACK that says more than that all is well."""
        self._acknowledged()
        if reason.is_failure:
            self.counters.add("refused.publish")
            self.events.report(
                "publish-refused",
                "error",
                f"{self.source}: the broker refused a message: {reason}; its ACL lets a name write its own branch only",
            )

    def _acknowledged(self) -> None:
        self._window_free(1)
        if self._in_flight < QUICK_ACK_BELOW:
            self._quick_ack()

    def _receive(self, name: str, payload: bytes, packet_id: int, expiry_s: int | None, redelivered: bool) -> None:
        self._dispatch.receive(name, payload, packet_id, expiry_s, redelivered)
        if len(self._dispatch.inbox) < QUICK_ACK_BELOW:
            self._quick_ack()

    def _quick_ack(self) -> None:
        """Send the due TCP ACK now: rumqttd leaves Nagle's algorithm on and would hold its next packet 40 ms."""
        sock: Any = self._paho.socket()
        if sock is not None and _QUICK_ACK is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, _QUICK_ACK, 1)


def _no_delay(_client: paho.Client, _data: Any, sock: Any) -> None:
    """Small packets leave at once: with Nagle's algorithm an answer waits 40 ms for a delayed TCP ACK."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


_QUICK_ACK: int | None = getattr(socket, "TCP_QUICKACK", None)
_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

__all__ = ["Bus", "Deferred", "Received"]
