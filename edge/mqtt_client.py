"""paho's client with a shorter way in.

Of what a service spends on a message, most went into paho's reading: one system call for each of a packet's first
bytes, a Properties object of some 80 µs for every PUBLISH that has properties, a message object, a lock and a log
line that nobody reads. Here a socket reads ahead, and the packets that come by the thousand (MQTT 5 PUBLISH of QoS 0
and 1, PUBACK of success; sections 3.3 and 3.4) are taken apart by hand. All others go paho's own way.

These are methods that paho keeps to itself: ``tests/edge/test_mqtt_client.py`` holds that what comes out is the same.
"""

from __future__ import annotations

import math
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion, _ConnectionState
from paho.mqtt.exception import MalformedPacket
from paho.mqtt.properties import Properties

READ_AHEAD_BYTES = 64 * 1024
_DUP, _QOS_BITS, _QOS_2, _RETAIN = 0x08, 0x06, 0x04, 0x01
_EXPIRY, _SUBSCRIPTION_IDENTIFIER = 0x02, 0x0B
_FIXED_BYTES = {0x01: 1, 0x23: 2}
_STRINGS = {0x03: 1, 0x08: 1, 0x09: 1, 0x26: 2}
"""Content type, response topic, correlation data, user property: how many length-prefixed fields each has."""


class ReadAhead:
    """A TCP socket that is read in large pieces and given out in small ones; all else is the socket's own.

    ``pending`` is what paho asks of a TLS socket before it waits in select(): bytes that are here already.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._data = b""
        self._at = 0
        self.began = b""
        """The first bytes that came."""

    def recv(self, size: int) -> bytes:
        """At most ``size`` bytes; raises BlockingIOError when there are none, as the socket does."""
        if self._at == len(self._data):
            if size >= READ_AHEAD_BYTES:
                return self._sock.recv(size)
            self._data, self._at = self._sock.recv(READ_AHEAD_BYTES), 0
            self.began = self.began or self._data[:16]
        piece = self._data[self._at : self._at + size]
        self._at += len(piece)
        return piece

    def pending(self) -> int:
        """Bytes that were read and not yet given out."""
        return len(self._data) - self._at

    def fileno(self) -> int:
        """For select()."""
        return self._sock.fileno()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


@dataclass(frozen=True)
class Owner:
    """What the client's owner is told and asked, all on the network thread."""

    on_packet: Callable[[str, bytes, int, int | None, bool, bool], None]
    """A PUBLISH: its topic (empty when it is not UTF-8), payload, packet id (0 for QoS 0), the message expiry in
    seconds that the broker left, or None, whether the broker says that it was sent before (DUP), and whether it had
    kept it for whoever subscribes (RETAIN)."""
    on_acknowledged: Callable[[], None]
    """A PUBACK of success."""
    on_refused: Callable[[str, Properties | None, int], None]
    """A PUBACK of failure: topic and properties of what was published, and the reason code (0x80 and above)."""
    before_connect: Callable[[], MQTTProtocolVersion]
    """The version that the next CONNECT speaks."""
    on_connect_error: Callable[[OSError], None]
    """No connection came about, or no TLS on it."""
    on_connack: Callable[[int], bool]
    """The broker's answer to CONNECT, as it stands in the packet; whether to go on with this connection."""
    on_turn: Callable[[], None]
    """Called once after ``wake_at_s``."""


class FastClient(paho.Client):
    """An MQTT client for one connection of ours: 5 or 3.1.1, which on 3.1.1 always begins a clean session."""

    def __init__(self, owner: Owner, *, client_id: str) -> None:
        super().__init__(
            CallbackAPIVersion.VERSION2, client_id=client_id, protocol=MQTTProtocolVersion.MQTTv5, manual_ack=True
        )
        self._owner = owner
        self._on_packet, self._on_acknowledged = owner.on_packet, owner.on_acknowledged
        self._clean_session = True  # paho reads it for 3.1.1 alone
        self._ahead: ReadAhead | None = None
        self.turned_s = time.monotonic()
        """When the network thread last went round its loop, ``time.monotonic()``."""
        self.wake_at_s = math.inf
        """When ``Owner.on_turn`` is to be called, within a second."""
        self.hurry = False
        """The next reconnect does not wait."""

    @property
    def began(self) -> bytes:
        """The first bytes that came by the last connection; none of a TLS connection."""
        return self._ahead.began if self._ahead is not None else b""

    def reconnect(self) -> MQTTErrorCode:
        self._ahead = None
        # Whoever packs a PUBLISH holds this lock: none is left that was packed for another version.
        with self._out_message_mutex:
            self._protocol = self._owner.before_connect()
        try:
            return super().reconnect()
        except OSError as error:
            self._owner.on_connect_error(error)
            raise

    def _create_socket(self) -> Any:
        sock: Any = super()._create_socket()  # type: ignore[misc, unused-ignore]
        if isinstance(sock, ssl.SSLSocket):
            return sock
        self._ahead = ReadAhead(sock)
        return self._ahead

    def _reconnect_wait(self) -> None:
        if self.hurry:
            self.hurry = False
        else:
            super()._reconnect_wait()

    def _handle_connack(self) -> MQTTErrorCode:
        packet = self._in_packet["packet"]
        if len(packet) >= 2 and not self._owner.on_connack(packet[1]):
            if packet[1] == 0 and self._sock is not None:
                self._sock.send(b"\xe0\x00")  # DISCONNECT, so that no will is published
            return MQTTErrorCode.MQTT_ERR_CONN_REFUSED
        return super()._handle_connack()

    def _send_publish(self, *args: Any, **kwargs: Any) -> MQTTErrorCode:
        # paho would send it before the CONNACK too, in a version that may be refused. What waits is sent after it.
        if self._state != _ConnectionState.MQTT_CS_CONNECTED:
            return MQTTErrorCode.MQTT_ERR_NO_CONN
        return super()._send_publish(*args, **kwargs)

    def loop_misc(self) -> MQTTErrorCode:
        self.turned_s = time.monotonic()
        if self.turned_s >= self.wake_at_s:
            self.wake_at_s = math.inf
            self._owner.on_turn()
        return super().loop_misc()

    def _handle_publish(self) -> MQTTErrorCode:
        header = self._in_packet["command"]
        packet = self._in_packet["packet"]
        qos_bits = header & _QOS_BITS
        if qos_bits & _QOS_2:
            return super()._handle_publish()
        try:
            at = 2 + (packet[0] << 8 | packet[1])
            if at > len(packet) or (at == 2 and self._protocol != MQTTProtocolVersion.MQTTv5):
                raise MalformedPacket("a PUBLISH without a topic, or cut in it")
            try:
                topic = packet[2:at].decode()
            except UnicodeDecodeError:
                topic = ""
            packet_id = 0
            if qos_bits:
                packet_id = packet[at] << 8 | packet[at + 1]
                at += 2
            expiry_s: int | None = None
            if self._protocol != MQTTProtocolVersion.MQTTv5:
                pass  # 3.1.1 has no properties
            elif packet[at] == 0:
                at += 1
            else:
                length, at = _variable_byte_integer(packet, at)
                expiry_s = _expiry(packet, at, length)
                at += length
        except IndexError as error:
            raise MalformedPacket(str(error)) from error
        self.turned_s = time.monotonic()  # a packet taken is progress, also where the inbox holds the next one back
        self._on_packet(
            topic, bytes(memoryview(packet)[at:]), packet_id, expiry_s, bool(header & _DUP), bool(header & _RETAIN)
        )
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def _handle_pubackcomp(self, cmd: Literal["PUBACK", "PUBCOMP"]) -> MQTTErrorCode:
        packet = self._in_packet["packet"]
        # Without a reason code all is well (MQTT 5 section 3.4.2.1); what follows the code nobody asks for.
        if cmd != "PUBACK" or len(packet) < 2 or (len(packet) > 2 and self._protocol != MQTTProtocolVersion.MQTTv5):
            return super()._handle_pubackcomp(cmd)
        code = packet[2] if len(packet) > 2 else 0
        with self._out_message_mutex:
            message = self._out_messages.pop(packet[0] << 8 | packet[1], None)
            if message is None:
                return MQTTErrorCode.MQTT_ERR_SUCCESS
            self._inflight_messages -= 1
            message.info._set_as_published()
        if code < 0x80:
            self._on_acknowledged()
        else:
            self._owner.on_refused(message.topic, message.properties, code)
        return MQTTErrorCode.MQTT_ERR_SUCCESS


def _variable_byte_integer(packet: bytearray, at: int) -> tuple[int, int]:
    """The integer at ``at`` (MQTT 5 section 1.5.5) and where it ends. Raises IndexError."""
    value = shift = 0
    while True:
        byte = packet[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80 or shift == 21:
            return value, at
        shift += 7


def _expiry(packet: bytearray, at: int, length: int) -> int | None:
    """Message expiry among the ``length`` bytes of properties at ``at``, in seconds (MQTT 5 section 3.3.2.3).

    Texts are stepped over unread: what a peer wrote into a property that nobody asks for must not end the connection.

    Raises:
        MalformedPacket: a property that a PUBLISH cannot have, or one longer than what is left.
    """
    end = at + length
    if end > len(packet):
        raise MalformedPacket(f"{length} bytes of properties in a PUBLISH that has {len(packet) - at} left")
    expiry_s: int | None = None
    while at < end:
        identifier = packet[at]
        at += 1
        if identifier == _EXPIRY:
            expiry_s = int.from_bytes(packet[at : at + 4], "big")
            if length == 5:
                return expiry_s
            at += 4
        elif identifier in _FIXED_BYTES:
            at += _FIXED_BYTES[identifier]
        elif identifier in _STRINGS:
            for _ in range(_STRINGS[identifier]):
                at += 2 + (packet[at] << 8 | packet[at + 1])
        elif identifier == _SUBSCRIPTION_IDENTIFIER:
            _, at = _variable_byte_integer(packet, at)
        else:
            raise MalformedPacket(f"property {identifier:#04x} in a PUBLISH")
    if at != end:
        raise MalformedPacket("a PUBLISH whose last property ends beyond its properties")
    return expiry_s
