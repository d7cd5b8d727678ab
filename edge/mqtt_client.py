"""paho's client with a shorter way in.

Of what a service spends on a message, most went into paho's reading: one system call for each of a packet's first
bytes, a Properties object of some 80 µs for every PUBLISH that has properties, a message object, a lock and a log
line that nobody reads. Here a socket reads ahead, and the packets that come by the thousand (MQTT 5 PUBLISH of QoS 0
and 1, PUBACK of success; sections 3.3 and 3.4) are taken apart by hand. All others go paho's own way.

These are methods that paho keeps to itself: ``tests/edge/test_mqtt_client.py`` holds that what comes out is the same.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable
from typing import Any, Literal

import paho.mqtt.client as paho
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.exception import MalformedPacket

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

    def recv(self, size: int) -> bytes:
        """At most ``size`` bytes; raises BlockingIOError when there are none, as the socket does."""
        if self._at == len(self._data):
            if size >= READ_AHEAD_BYTES:
                return self._sock.recv(size)
            self._data, self._at = self._sock.recv(READ_AHEAD_BYTES), 0
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


class FastClient(paho.Client):
    """An MQTT 5 client for one ``Bus``.

    Args:
        on_packet: called on the network thread for each PUBLISH with topic (empty when it is not UTF-8), payload,
            packet id (0 for QoS 0), the message expiry in seconds that the broker left, or None, whether the broker
            says that it was sent before (DUP), and whether it had kept it for whoever subscribes (RETAIN).
        on_acknowledged: called on the network thread for each PUBACK of success.
        kwargs: for paho.
    """

    def __init__(
        self,
        *args: Any,
        on_packet: Callable[[str, bytes, int, int | None, bool, bool], None],
        on_acknowledged: Callable[[], None],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._on_packet = on_packet
        self._on_acknowledged = on_acknowledged
        self.turned_s = time.monotonic()
        """When the network thread last went round its loop, ``time.monotonic()``."""

    def _create_socket(self) -> Any:
        sock: Any = super()._create_socket()  # type: ignore[misc, unused-ignore]
        return sock if isinstance(sock, ssl.SSLSocket) else ReadAhead(sock)

    def loop_misc(self) -> MQTTErrorCode:
        self.turned_s = time.monotonic()
        return super().loop_misc()

    def _handle_publish(self) -> MQTTErrorCode:
        header = self._in_packet["command"]
        packet = self._in_packet["packet"]
        qos_bits = header & _QOS_BITS
        if self._protocol != paho.MQTTv5 or qos_bits == _QOS_2:
            return super()._handle_publish()
        try:
            at = 2 + (packet[0] << 8 | packet[1])
            try:
                topic = packet[2:at].decode()
            except UnicodeDecodeError:
                topic = ""
            packet_id = 0
            if qos_bits:
                packet_id = packet[at] << 8 | packet[at + 1]
                at += 2
            expiry_s: int | None = None
            if packet[at] == 0:
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
        if cmd != "PUBACK" or len(packet) != 2:
            return super()._handle_pubackcomp(cmd)
        with self._out_message_mutex:
            message = self._out_messages.pop(packet[0] << 8 | packet[1], None)
            if message is None:
                return MQTTErrorCode.MQTT_ERR_SUCCESS
            self._inflight_messages -= 1
            message.info._set_as_published()
        self._on_acknowledged()
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
