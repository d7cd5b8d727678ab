"""One connection to the broker and its life: how it is made, subscribed, lost and made again.

Runs on paho's network thread. Knows the broker's address, secrets and refusals; knows nothing of messages: packets
go to ``on_packet``, and whoever publishes asks ``publish``.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge.counters import Counters, Events
from edge.mqtt_client import FastClient
from protocol.errors import NotConnected
from protocol.topics import MAX_PACKET_BYTES

log = logging.getLogger(__name__)

KEEPALIVE_S = 15
SESSION_EXPIRY_S = 7 * 24 * 3600
"""A broker keeps a durable session's messages for a week; the log repairs what it did not keep."""
RECONNECT_MIN_S, RECONNECT_MAX_S = 0.2, 10.0
NETWORK_TURN_S = 1.0
"""paho's network thread turns at least this often while it is connected."""


@dataclass(frozen=True)
class Listener:
    """Who hears of the connection, each on the network thread."""

    on_packet: Callable[[str, bytes, int, int | None, bool, bool], None]
    """A PUBLISH came: topic, payload, packet id, what is left of its expiry in seconds, whether it came before, and
    whether the broker had kept it for whoever subscribes."""
    on_acknowledged: Callable[[], None]
    """A PUBACK of success."""
    on_refused: Callable[[int, ReasonCode], None]
    """A PUBACK of failure, with the packet id that publish() gave."""
    on_up: Callable[[int], None]
    """A new connection stands; with how many publishes under way the broker grants. Before ``connected`` is set."""
    on_subscribing: Callable[[], None]
    """The same connection, ``connected`` and about to be subscribed."""
    on_down: Callable[[], None]
    """The connection broke."""
    filters: Callable[[], list[str]]
    """Every filter to subscribe to."""


class Connection:
    """A connection that heals by itself.

    Args:
        url: ``mqtt://host:port`` or ``mqtts://host:port``.
        source: ``node/client``, for messages.
        client_id: its MQTT client identifier.
        username, password: for the broker; empty for none.
        ca_file: CA certificates for ``mqtts``; empty for the system's.
        receive_maximum: how many QoS 1 messages the broker may send without an acknowledgement.
        durable: the broker keeps the session while the client is away.

    Raises:
        NotConnected: the URL is none.
    """

    def __init__(
        self,
        *,
        url: str,
        source: str,
        client_id: str,
        username: str,
        password: str,
        ca_file: str,
        receive_maximum: int,
        durable: bool,
        counters: Counters,
        events: Events,
        listener: Listener,
    ) -> None:
        self.url = url
        self.source = source
        self.count = 0
        """Connections made so far."""
        self.refusal = ""
        """Why the broker refused the last connection or subscription; empty when it did not."""
        self.connected = threading.Event()
        self.subscribed = threading.Event()
        self.stopping = False
        self._receive_maximum = receive_maximum
        self._durable = durable
        self._counters = counters
        self._events = events
        self._listener = listener
        self._unsubscribed: set[int] = set()
        self._subscribing = threading.Lock()
        self.client = FastClient(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=paho.MQTTv5,
            manual_ack=True,
            on_packet=self._guarded(listener.on_packet),
            on_acknowledged=self._guarded(listener.on_acknowledged),
        )
        if username:
            self.client.username_pw_set(username, password)
        parts = urlsplit(url)
        if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname:
            raise NotConnected(
                f"reading the broker's address {url!r}: not mqtt://host:port or mqtts://host:port",
                hint="set broker.url in mindstream.toml",
                field="broker.url",
            )
        if parts.scheme == "mqtts":
            self.client.tls_set(ca_certs=ca_file or None, tls_version=ssl.PROTOCOL_TLS_CLIENT)
        self._host, self._port = parts.hostname, parts.port or (8883 if parts.scheme == "mqtts" else 1883)
        # Our own window bounds what is under way; paho's would scan all of it at every PUBACK.
        self.client.max_inflight_messages_set(0)
        self.client.max_queued_messages_set(0)
        self.client.reconnect_delay_set(RECONNECT_MIN_S, RECONNECT_MAX_S)  # type: ignore[arg-type]
        self.client.on_socket_open = _no_delay
        self.client.on_connect = self._guarded(self._on_connect)
        self.client.on_disconnect = self._guarded(self._on_disconnect)
        self.client.on_subscribe = self._guarded(self._on_subscribe)
        self.client.on_publish = self._guarded(self._on_publish)

    # --- from any thread ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Connect in the background; returns at once."""
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = SESSION_EXPIRY_S if self._durable else 0
        properties.ReceiveMaximum = min(65_535, self._receive_maximum)
        properties.MaximumPacketSize = MAX_PACKET_BYTES
        self.client.connect_async(
            self._host,
            self._port,
            keepalive=KEEPALIVE_S,
            clean_start=not self._durable,
            properties=properties,
        )
        self.client.loop_start()

    def stop(self) -> None:
        """Disconnect, and wait for the network thread's end."""
        self.stopping = True
        self.client.disconnect()
        self.client.loop_stop()

    def on_network_thread(self) -> bool:
        """Whether the caller runs on the network thread."""
        return threading.current_thread() is self.client._thread

    def wait_subscribed(self, timeout_s: float) -> None:
        """Wait until the broker has granted every subscription. Raises NotConnected."""
        if not self.subscribed.wait(timeout_s):
            raise NotConnected(
                f"subscribing {self.source} at {self.url}: {self.refusal or f'no answer in {timeout_s:g} s'}",
                hint="is the broker running there? `mindstream doctor` looks",
                reason=self.refusal or "unreachable",
            )

    def subscribe(self, filters: list[str]) -> None:
        """Subscribe to more, when connected; what is heard already is subscribed with each new connection."""
        if not self.connected.is_set():
            return
        # The answer may come before the packet's id is noted: _on_subscribe waits for it.
        with self._subscribing:
            self.subscribed.clear()
            result, packet_id = self.client.subscribe([(f, SubscribeOptions(qos=1)) for f in filters])
            if result == MQTTErrorCode.MQTT_ERR_SUCCESS and packet_id is not None:
                self._unsubscribed.add(packet_id)

    def unsubscribe(self, filter: str) -> None:
        """End a subscription, when connected."""
        if self.connected.is_set():
            self.client.unsubscribe(filter)

    def quick_ack(self) -> None:
        """Send the due TCP ACK now: rumqttd leaves Nagle's algorithm on and would hold its next packet 40 ms."""
        sock: Any = self.client.socket()
        if sock is not None and _QUICK_ACK is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, _QUICK_ACK, 1)

    def stalled_s(self) -> float:
        """How long the network thread has not turned, in seconds, though it has a connection; 0.0 when it turns.

        Infinite when the thread has died.
        """
        if self.client._thread is None:
            return math.inf
        if not self.connected.is_set():
            return 0.0
        late_s = time.monotonic() - self.client.turned_s - NETWORK_TURN_S
        return late_s if late_s > NETWORK_TURN_S else 0.0

    # --- paho's callbacks, on its network thread ------------------------------------------------------------

    def _guarded(self, callback: Callable[..., None]) -> Callable[..., None]:
        """An exception in a callback would end paho's network thread, and with it the bus, without a word."""

        def call(*arguments: Any) -> None:
            try:
                callback(*arguments)
            except Exception:
                self._counters.add("failed.callback")
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
        self.count += 1
        self._listener.on_up(getattr(properties, "ReceiveMaximum", 65_535) if properties is not None else 65_535)
        with self._subscribing:
            self._unsubscribed.clear()
        self.client.turned_s = time.monotonic()
        self.connected.set()
        if self.count > 1:
            self._counters.add("reconnected")
            if self._durable and not flags.session_present:
                self._events.report(
                    "session-lost",
                    "warning",
                    f"{self.source}: the broker had forgotten this client's session; what came meanwhile is asked for",
                )
        self.subscribe(self._listener.filters())
        self._listener.on_subscribing()

    def _on_disconnect(
        self,
        _client: paho.Client,
        _data: Any,
        _flags: Any,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        self.connected.clear()
        self.subscribed.clear()
        self._listener.on_down()
        if not self.stopping:
            self._counters.add("disconnected")
            log.warning("%s lost its connection to %s: %s", self.source, self.url, reason)

    def _on_subscribe(
        self, _client: paho.Client, _data: Any, packet_id: int, reasons: list[ReasonCode], _properties: Any
    ) -> None:
        refused = [str(reason) for reason in reasons if reason.is_failure]
        if refused:
            self.refusal = f"the broker refused a subscription: {', '.join(refused)}"
            self._counters.add("refused.subscription", len(refused))
            self._events.report("subscription-refused", "error", f"{self.source}: {self.refusal}")
        with self._subscribing:
            self._unsubscribed.discard(packet_id)
            if not self._unsubscribed and not refused:
                self.subscribed.set()

    def _on_publish(
        self, _client: paho.Client, _data: Any, packet_id: int, reason: ReasonCode, _properties: Any
    ) -> None:
        """A PUBACK that says more than that all is well."""
        if reason.is_failure:
            self._listener.on_refused(packet_id, reason)
        else:
            self._listener.on_acknowledged()


def _no_delay(_client: paho.Client, _data: Any, sock: Any) -> None:
    """Small packets leave at once: with Nagle's algorithm an answer waits 40 ms for a delayed TCP ACK."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


_QUICK_ACK: int | None = getattr(socket, "TCP_QUICKACK", None)
