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
from paho.mqtt.enums import MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edge import connect_faults
from edge.connect_faults import Fault
from edge.counters import Counters, Events
from edge.mqtt_client import FastClient, Owner, Packed
from edge.mqtt_version import AUTO, MQTT_3_1_1, MQTT_5, VersionChoice
from protocol.errors import ConfigError, NotConnected
from protocol.topics import MAX_PACKET_BYTES

log = logging.getLogger(__name__)

KEEPALIVE_S = 15
SESSION_EXPIRY_S = 7 * 24 * 3600
"""A broker keeps a durable session's messages for a week; the log repairs what it did not keep."""
RECONNECT_MIN_S, RECONNECT_MAX_S = 0.2, 10.0
PATIENT_MIN_S, PATIENT_MAX_S = 2.0, 30.0
"""Between tries when only a person can mend it: a wrong password tried often looks like an attack."""
QUICK_LOSS_S, QUICK_LOSSES = 5.0, 3
"""So many connections in a row that last no longer than this are a fault."""
SUBSCRIBE_AGAIN_S = 10.0
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
    on_refused: Callable[[str, Packed | None, int], None]
    """A PUBACK of failure: topic and properties of what was published, and the reason code."""
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
        durable: the broker keeps the session while the client is away; on MQTT 5 only.
        protocol: ``auto``, ``5`` or ``3.1.1``: see edge.mqtt_version.

    Raises:
        NotConnected: the URL is none.
        ConfigError: the CA file holds no certificates.
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
        protocol: str,
        counters: Counters,
        events: Events,
        listener: Listener,
    ) -> None:
        self.url = url
        self.source = source
        self.count = 0
        """Connections made so far."""
        self.fault: Fault | None = None
        """Why there is no connection, or not every subscription; None when all is well."""
        self.connected = threading.Event()
        self.subscribed = threading.Event()
        self.stopping = False
        self._receive_maximum = receive_maximum
        self._durable = durable
        self._counters = counters
        self._events = events
        self._listener = listener
        self._client_id = client_id
        self._username = username
        self._ca_file = ca_file
        self._version = VersionChoice(protocol)
        self._fell_back = False
        self._answered = True
        """Whether the CONNECT under way had a CONNACK."""
        self._connected_s = 0.0
        self._quick_losses = 0
        """Connections in a row that ended soon after they began."""
        self._patient = False
        """Whether connecting is tried less often: only a person can mend it."""
        self._unsubscribed: dict[int, list[str]] = {}
        """Packet id to the filters of each SUBSCRIBE without a SUBACK."""
        self._refused: dict[str, str] = {}
        """Filters that the broker refused, with its reasons."""
        self._subscribing = threading.Lock()
        self._news = threading.Condition()
        """Notified when ``subscribed`` or ``fault`` changes."""
        self.client = FastClient(
            Owner(
                on_packet=self._guarded(listener.on_packet),
                on_acknowledged=self._guarded(listener.on_acknowledged),
                on_refused=self._guarded(listener.on_refused),
                before_connect=self._before_connect,
                on_connect_error=self._guarded(self._on_connect_error),
                on_connack=self._on_connack,
                on_turn=self._guarded(self._subscribe_again),
            ),
            client_id=client_id,
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
            try:
                self.client.tls_set(ca_certs=ca_file or None, tls_version=ssl.PROTOCOL_TLS_CLIENT)
            except OSError as error:  # ssl.SSLError is one
                raise ConfigError(
                    f"reading the CA certificates in {ca_file}: {error.strerror or error}",
                    hint="broker.ca_file must hold PEM certificates",
                    field="broker.ca_file",
                ) from error
        self._host, self._port = parts.hostname, parts.port or (8883 if parts.scheme == "mqtts" else 1883)
        # Our own window bounds what is under way; paho's would scan all of it at every PUBACK.
        self.client.max_inflight_messages_set(0)
        self.client.max_queued_messages_set(0)
        self.client.reconnect_delay_set(RECONNECT_MIN_S, RECONNECT_MAX_S)  # type: ignore[arg-type]
        self.client.on_socket_open = _no_delay
        self.client.on_connect = self._guarded(self._on_connect)
        self.client.on_disconnect = self._guarded(self._on_disconnect)
        self.client.on_subscribe = self._guarded(self._on_subscribe)

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

    @property
    def version(self) -> str:
        """The MQTT version spoken, or about to be tried: ``5`` or ``3.1.1``."""
        return self._version.version

    def wait_subscribed(self, timeout_s: float) -> None:
        """Wait until the broker has granted every subscription.

        Raises NotConnected: after ``timeout_s``, or at once when waiting cannot help.
        """
        with self._news:
            self._news.wait_for(lambda: self.subscribed.is_set() or (self.fault and self.fault.lasting), timeout_s)
        fault = self.fault
        if self.subscribed.is_set():
            return
        if fault is None:
            fault = Fault(f"no answer in {timeout_s:g} s", "no answer in time")
        raise NotConnected(
            f"connecting {self.source} to {self.url}: {fault.text}",
            hint=fault.hint,
            field=fault.field,
            reason=fault.reason,
        )

    def subscribe(self, filters: list[str]) -> None:
        """Subscribe to more, when connected; what is heard already is subscribed with each new connection."""
        if not self.connected.is_set():
            return
        # The answer may come before the packet's id is noted: _on_subscribe waits for it.
        with self._subscribing:
            self.subscribed.clear()
            result, packet_id = self.client.subscribe([(filter, 1) for filter in filters])
            if result == MQTTErrorCode.MQTT_ERR_SUCCESS and packet_id is not None:
                self._unsubscribed[packet_id] = filters

    def unsubscribe(self, filter: str) -> None:
        """End a subscription, when connected."""
        with self._subscribing:
            self._refused.pop(filter, None)
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

    def _before_connect(self) -> MQTTProtocolVersion:
        self._answered = False
        return _PAHO_VERSIONS[self._version.version]

    def _on_connect_error(self, error: OSError) -> None:
        self._answered = True  # nobody closes it without a word: it never was
        self._quick_losses = 0  # the broker was away: that explains the loss
        self._set_fault(connect_faults.of_error(error, self.url, self._ca_file))

    def _on_connack(self, code: int) -> bool:
        """Whether to go on with this connection."""
        self._answered = True
        if code in (_UNSUPPORTED_VERSION_3, _UNSUPPORTED_VERSION_5):
            tried = self._version.version
            self.client.hurry = self._version.refused()
            if not self.client.hurry:
                self._set_fault(self._refused_by_connack(_UNSUPPORTED_VERSION_5, "Unsupported protocol version", tried))
            return False
        if code == 0 and not self._version.accepted():
            self.client.hurry = True
            return False
        return True

    def _refused_by_connack(self, code: int, text: str, version: str) -> Fault:
        return connect_faults.of_connack(code, text, self.url, self._client_id, self._username, version)

    def _on_connect(
        self,
        _client: paho.Client,
        _data: Any,
        flags: paho.ConnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if reason.is_failure:
            self._counters.add("refused.connection")
            self._set_fault(self._refused_by_connack(reason.value, str(reason), self._version.version))
            return
        before = self.fault
        self._set_fault(None)
        self._connected_s = time.monotonic()
        self.count += 1
        self._listener.on_up(getattr(properties, "ReceiveMaximum", 65_535) if properties is not None else 65_535)
        with self._subscribing:
            self._unsubscribed.clear()
            self._refused.clear()
        self.client.turned_s = time.monotonic()
        self.connected.set()
        if self.count > 1:
            self._counters.add("reconnected")
        self._say_version()
        if before is not None and before.reason == connect_faults.CLOSED_AGAIN:
            self._events.report("connection-unstable", "error", f"{self.source}: {before.text}; {before.hint}")
        if self.count > 1 and self._durable and not flags.session_present:
            self._counters.add("sessions_lost")
            self._events.report(
                "session-lost",
                "warning",
                f"{self.source}: the broker kept no session of this client: what was sent to it since the connection "
                f"broke is lost there; memories are fetched from those who have them, asks are asked again",
            )
        self.subscribe(self._listener.filters())
        self._listener.on_subscribing()

    def _say_version(self) -> None:
        fell_back = self._version.version == MQTT_3_1_1 and self._version.setting == AUTO
        if fell_back and not self._fell_back:
            self._counters.add("fallback.mqtt_3_1_1")
            text = (
                f"{self.source}: the broker at {self.url} has no MQTT 5; going on with 3.1.1, where it keeps nothing "
                f"for a client that is away and does not say what its ACL refuses"
            )
            if self._durable:
                self._events.report("protocol-fallback", "warning", text)
            else:
                log.info("%s", text)  # a passing client tells nobody what the services have said
        elif self._fell_back and not fell_back:
            self._events.report("protocol-restored", "info", f"{self.source}: the broker at {self.url} has MQTT 5 now")
        self._fell_back = fell_back

    def _set_fault(self, fault: Fault | None) -> None:
        """Note it, say it when it is news, and be patient while only a person can mend it."""
        if fault is not None and fault != self.fault:
            log.warning("connecting %s to %s: %s (%s)", self.source, self.url, fault.text, fault.hint)
        with self._news:
            self.fault = fault
            self._news.notify_all()
        patient = (fault is not None and fault.lasting) or self._quick_losses >= QUICK_LOSSES
        if patient != self._patient:
            self._patient = patient
            least_s, most_s = (PATIENT_MIN_S, PATIENT_MAX_S) if patient else (RECONNECT_MIN_S, RECONNECT_MAX_S)
            self.client.reconnect_delay_set(least_s, most_s)  # type: ignore[arg-type]

    def _on_disconnect(
        self,
        _client: paho.Client,
        _data: Any,
        _flags: Any,
        reason: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        was_connected = self.connected.is_set()
        self.connected.clear()
        self.subscribed.clear()
        self.client.wake_at_s = math.inf
        self._listener.on_down()
        if self.stopping:
            return
        if was_connected:
            self._quick_losses = self._quick_losses + 1 if time.monotonic() - self._connected_s < QUICK_LOSS_S else 0
            taken_over = reason.value == _SESSION_TAKEN_OVER
            if taken_over or self._quick_losses >= QUICK_LOSSES:
                self._set_fault(connect_faults.of_losses(self._client_id, taken_over=taken_over))
            self._version.lost()
            self._counters.add("disconnected")
            log.warning("%s lost its connection to %s: %s", self.source, self.url, reason)
        elif not self._answered:
            self._closed_without_an_answer(timed_out=reason.value == _KEEP_ALIVE_TIMEOUT)

    def _closed_without_an_answer(self, *, timed_out: bool) -> None:
        began = self.client.began
        if began[:1] == _CONNACK:
            self.client.hurry = self._version.refused()  # an answer in another version's form, which paho cannot read
            return
        if not timed_out:
            self._version.closed()
        self._set_fault(connect_faults.of_silence(self.url, began, timed_out=timed_out))

    def _on_subscribe(
        self, _client: paho.Client, _data: Any, packet_id: int, reasons: list[ReasonCode], _properties: Any
    ) -> None:
        with self._subscribing:
            filters = self._unsubscribed.pop(packet_id, [])
            refused = {
                filter: str(reason) for filter, reason in zip(filters, reasons, strict=False) if reason.is_failure
            }
            for filter in filters:
                self._refused.pop(filter, None)
            self._refused.update(refused)
            all_refused = dict(self._refused)
            if not self._unsubscribed and not all_refused:
                self.subscribed.set()
        if refused:
            self._counters.add("refused.subscription", len(refused))
            fault = connect_faults.of_subscriptions(all_refused, self._username)
            if fault != self.fault:
                self._events.report("subscription-refused", "error", f"{self.source}: {fault.text}; {fault.hint}")
            self.client.wake_at_s = time.monotonic() + SUBSCRIBE_AGAIN_S
            self._set_fault(fault)
        elif not all_refused:
            self._set_fault(None)

    def _subscribe_again(self) -> None:
        """Ask once more for what the broker refused: someone may have mended its ACL."""
        with self._subscribing:
            filters = sorted(self._refused)
        if filters:
            self.subscribe(filters)


def _no_delay(_client: paho.Client, _data: Any, sock: Any) -> None:
    """Small packets leave at once: with Nagle's algorithm an answer waits 40 ms for a delayed TCP ACK."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


_PAHO_VERSIONS = {MQTT_5: MQTTProtocolVersion.MQTTv5, MQTT_3_1_1: MQTTProtocolVersion.MQTTv311}
_CONNACK = b"\x20"
_UNSUPPORTED_VERSION_3, _UNSUPPORTED_VERSION_5 = 0x01, 0x84
_KEEP_ALIVE_TIMEOUT, _SESSION_TAKEN_OVER = 0x8D, 0x8E
_QUICK_ACK: int | None = getattr(socket, "TCP_QUICKACK", None)
