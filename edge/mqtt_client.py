"""paho's client with a shorter way in and a shorter way out.

Of what a service spends on a message, most went into paho: one system call for each of a packet's first bytes, some
80 µs of Properties for every PUBLISH that has them, objects, locks and log lines that nobody reads; and on the way out
a wake-up of the network thread for every packet, which then writes each with a system call of its own. Here what has
come is read at once and taken apart in place; PUBLISH of QoS 0 and 1 and PUBACK (sections 3.3 and 3.4 of MQTT 5 and of
3.1.1) by hand, all others paho's own way. What goes out is written by whoever says it, several packets at a time.

It also lets its owner choose the MQTT version before each CONNECT, and see each CONNACK before paho does.

These are methods that paho keeps to itself: ``tests/edge/test_mqtt_client.py`` holds that what comes out is the same.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import paho.mqtt.client as paho
from paho.mqtt.enums import (
    CallbackAPIVersion,
    MessageState,
    MQTTErrorCode,
    MQTTProtocolVersion,
    _ConnectionState,
)
from paho.mqtt.exception import MalformedPacket

from edge.mqtt_packets import packed_length

READ_BYTES = 128 * 1024
"""Read at once, and written at once when there are several packets."""
CORKED_PACKETS = 32
CORKED_S = 0.005
"""So many packets are held back at most, and about so long, before they are written together."""
_PUBLISH, _PUBACK, _DISCONNECT = 0x30, 0x40, 0xE0
_OF_QOS_2 = (0x50, 0x70)
"""PUBREC and PUBCOMP."""
_DUP, _QOS_BITS, _QOS_2, _RETAIN = 0x08, 0x06, 0x04, 0x01
_EXPIRY, _SUBSCRIPTION_IDENTIFIER = 0x02, 0x0B
_FIXED_BYTES = {0x01: 1, 0x23: 2}
_STRINGS = {0x03: 1, 0x08: 1, 0x09: 1, 0x26: 2}
"""Content type, response topic, correlation data, user property: how many length-prefixed fields each has."""


class Packed(Protocol):
    """Properties of a PUBLISH, ready."""

    def pack(self) -> bytes:
        """As they stand in the packet, their length first."""


class Outgoing:
    """A PUBLISH of QoS 1 until its PUBACK; what paho reads of its own MQTTMessage, without the locks in it."""

    __slots__ = ("dup", "mid", "payload", "properties", "qos", "retain", "state", "timestamp", "topic")

    def __init__(self, mid: int, topic: str, payload: bytes, retain: bool, properties: Packed | None) -> None:
        self.mid = mid
        self.topic = topic
        self.payload = payload
        self.retain = retain
        self.properties = properties
        self.qos = 1
        self.dup = False
        self.state = MessageState.MQTT_MS_PUBLISH
        self.timestamp = 0.0


@dataclass(frozen=True)
class Owner:
    """What the client's owner is told and asked, all on the network thread."""

    on_packet: Callable[[str, bytes, int, int | None, bool, bool], None]
    """A PUBLISH: its topic (empty when it is not UTF-8), payload, packet id (0 for QoS 0), the message expiry in
    seconds that the broker left, or None, whether the broker says that it was sent before (DUP), and whether it had
    kept it for whoever subscribes (RETAIN)."""
    on_acknowledged: Callable[[], None]
    """A PUBACK of success."""
    on_refused: Callable[[str, Packed | None, int], None]
    """A PUBACK of failure: topic and properties of what was published, and the reason code (0x80 and above)."""
    before_connect: Callable[[], MQTTProtocolVersion]
    """The version that the next CONNECT speaks."""
    on_connect_error: Callable[[OSError], None]
    """No connection came about, or no TLS on it."""
    on_connack: Callable[[int], bool]
    """The broker's answer to CONNECT, as it stands in the packet; whether to go on with this connection."""
    on_turn: Callable[[], None]
    """Called once after ``wake_at_s``."""


class _Rest(bytes):
    """What is left of packets that were written in part: its first byte is no header."""


def _is_goodbye(packet: bytes) -> bool:
    return packet[0] == _DISCONNECT and not isinstance(packet, _Rest)


class FastClient(paho.Client):
    """An MQTT client for one connection of ours: 5 or 3.1.1, which on 3.1.1 always begins a clean session."""

    def __init__(self, owner: Owner, *, client_id: str) -> None:
        super().__init__(
            CallbackAPIVersion.VERSION2, client_id=client_id, protocol=MQTTProtocolVersion.MQTTv5, manual_ack=True
        )
        self._owner = owner
        self._on_packet, self._on_acknowledged = owner.on_packet, owner.on_acknowledged
        self._clean_session = True  # paho reads it for 3.1.1 alone
        self._network_thread = 0
        self._parts: list[bytes] = []
        """Pieces of a packet whose end has not come."""
        self._missing = 0
        """How many bytes of it at least."""
        self.began = b""
        """The first bytes that came by this connection."""
        # Held to write to the socket and to close it; taken after _out_message_mutex where both are.
        self._writing = threading.Lock()
        self._corked_until_s = 0.0
        self.turned_s = time.monotonic()
        """When the network thread last went round its loop, ``time.monotonic()``."""
        self.wake_at_s = math.inf
        """When ``Owner.on_turn`` is to be called, within a second."""
        self.hurry = False
        """The next reconnect does not wait."""

    # --- connecting -----------------------------------------------------------------------------------------

    def _thread_main(self) -> None:
        self._network_thread = threading.get_ident()
        super()._thread_main()

    def reconnect(self) -> MQTTErrorCode:
        self._parts, self._missing, self.began = [], 0, b""
        # Whoever packs a PUBLISH holds this lock: none is left that was packed for another version.
        with self._out_message_mutex:
            self._protocol = self._owner.before_connect()
            self._out_packet.clear()
        try:
            return super().reconnect()
        except OSError as error:
            self._owner.on_connect_error(error)
            raise

    def _sock_close(self) -> None:
        with self._writing:
            super()._sock_close()

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

    def loop_misc(self) -> MQTTErrorCode:
        self.turned_s = time.monotonic()
        if self.turned_s >= self.wake_at_s:
            self.wake_at_s = math.inf
            self._owner.on_turn()
        return super().loop_misc()

    # --- the way out ----------------------------------------------------------------------------------------

    def send(self, topic: str, payload: bytes, *, retain: bool, properties: Packed | None = None) -> None:
        """Publish at QoS 1; without a connection, once there is one. Any thread."""
        with self._out_message_mutex:
            mid = self._mid_generate()
            while mid in self._out_messages:
                mid = self._mid_generate()
            message = Outgoing(mid, topic, payload, retain, properties)
            self._out_messages[mid] = message  # type: ignore[assignment]
            # Before the CONNACK the broker may still refuse the version that it would be packed for.
            if self._state != _ConnectionState.MQTT_CS_CONNECTED or self._sock is None:
                return
            self._inflight_messages += 1
            message.state = MessageState.MQTT_MS_WAIT_FOR_PUBACK
            self._out_packet.append(self._packed_publish(message))  # type: ignore[arg-type]
        self._write_soon()

    def ack(self, mid: int, qos: int = 1) -> MQTTErrorCode:  # noqa: ARG002
        self._out_packet.append(b"\x40\x02" + mid.to_bytes(2, "big"))  # type: ignore[arg-type]
        self._write_soon()
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    @contextlib.contextmanager
    def corked(self) -> Iterator[None]:
        """Hold back what is said meanwhile, and write it together. One thread at a time."""
        self._corked_until_s = time.monotonic() + CORKED_S
        try:
            yield
        finally:
            self._corked_until_s = 0.0
            self._write_soon()

    def _packed_publish(self, message: Outgoing) -> bytes:
        properties = b""
        if self._protocol == MQTTProtocolVersion.MQTTv5:
            properties = b"\0" if message.properties is None else message.properties.pack()
        topic = message.topic.encode()
        length = 4 + len(topic) + len(properties) + len(message.payload)
        header = bytes((0x32 | message.dup << 3 | message.retain,)) + packed_length(length)
        name = len(topic).to_bytes(2, "big") + topic
        return b"".join((header, name, message.mid.to_bytes(2, "big"), properties, message.payload))

    def _send_publish(self, mid: int, *_: Any, **__: Any) -> MQTTErrorCode:
        """paho sends again what has no PUBACK, after a CONNACK; it holds the lock."""
        message: Any = self._out_messages[mid]
        self._out_packet.append(self._packed_publish(message))  # type: ignore[arg-type]
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def _packet_queue(self, command: int, packet: bytes | bytearray, *_: Any, **__: Any) -> MQTTErrorCode:  # noqa: ARG002
        """paho's own packets."""
        self._out_packet.append(bytes(packet))  # type: ignore[arg-type]
        self._write_soon()
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def _write_soon(self) -> None:
        """Have what waits written: now, by this thread, where that can be; else by the network thread."""
        if threading.get_ident() == self._network_thread:
            return  # it writes before it waits again
        if self._corked_until_s and len(self._out_packet) < CORKED_PACKETS and time.monotonic() < self._corked_until_s:
            return
        # A TLS connection is no matter for two threads.
        if not self._ssl and self._thread is not None:
            with self._writing:
                rc = self._write_waiting()
            if rc == MQTTErrorCode.MQTT_ERR_SUCCESS and not self._out_packet:
                return
        if self._sockpairW is not None:
            with contextlib.suppress(BlockingIOError):
                self._sockpairW.send(b"0")

    def _write_waiting(self) -> MQTTErrorCode:
        """Write what waits, up to a DISCONNECT; the caller holds ``_writing``."""
        waiting: Any = self._out_packet
        if self._sock is None or not waiting:
            return MQTTErrorCode.MQTT_ERR_SUCCESS
        while waiting and not _is_goodbye(waiting[0]):
            packets = [waiting.popleft()]
            size = len(packets[0])
            while waiting and size < READ_BYTES and not _is_goodbye(waiting[0]):
                packets.append(waiting.popleft())
                size += len(packets[-1])
            data = packets[0] if len(packets) == 1 else b"".join(packets)
            try:
                sent = self._sock_send(data)
            except BlockingIOError:
                sent = 0
            except (OSError, ValueError):
                waiting.appendleft(_Rest(data))
                return MQTTErrorCode.MQTT_ERR_CONN_LOST
            if sent < len(data):
                waiting.appendleft(_Rest(data[sent:]))
                return MQTTErrorCode.MQTT_ERR_AGAIN
        self._last_msg_out = time.monotonic()
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def _packet_write(self) -> MQTTErrorCode:
        """The network thread's turn to write."""
        with self._writing:
            rc = self._write_waiting()
        if rc == MQTTErrorCode.MQTT_ERR_SUCCESS and self._out_packet and self._sock is not None:
            last: Any = self._out_packet.popleft()
            with contextlib.suppress(OSError):
                self._sock_send(last)
            self._do_on_disconnect(packet_from_broker=False, v1_rc=MQTTErrorCode.MQTT_ERR_SUCCESS)
            self._sock_close()
            if self._state == _ConnectionState.MQTT_CS_DISCONNECTING:
                self._state = _ConnectionState.MQTT_CS_DISCONNECTED
        return rc

    # --- the way in -----------------------------------------------------------------------------------------

    def loop_read(self, max_packets: int = 1) -> MQTTErrorCode:  # noqa: ARG002
        sock = self._sock
        try:
            data = self._sock_recv(READ_BYTES)
        except BlockingIOError:
            return MQTTErrorCode.MQTT_ERR_SUCCESS
        except OSError:
            data = b""
        if not data:
            return self._loop_rc_handle(MQTTErrorCode.MQTT_ERR_CONN_LOST)
        self._last_bytes_received = time.monotonic()
        if not self.began:
            self.began = data[:16]
        if self._parts:
            self._parts.append(data)
            self._missing -= len(data)
            if self._missing > 0:
                return MQTTErrorCode.MQTT_ERR_SUCCESS
            data = b"".join(self._parts)
            self._parts = []
        at, end, self._missing = 0, len(data), 0
        rc = MQTTErrorCode.MQTT_ERR_SUCCESS
        while end - at >= 2:
            length = data[at + 1]
            begin = at + 2
            if length >= 0x80:
                try:
                    length, begin = _variable_byte_integer(data, at + 1)
                except IndexError:
                    break  # the rest of the number is still to come
                if data[begin - 1] >= 0x80:
                    rc = MQTTErrorCode.MQTT_ERR_PROTOCOL
                    break
            if begin + length > end:
                self._missing = begin + length - end
                break
            try:
                rc = self._take(data[at], data[begin : begin + length])
            except MalformedPacket:
                rc = MQTTErrorCode.MQTT_ERR_PROTOCOL
            at = begin + length
            if rc or self._sock is not sock:
                break
        if self._sock is not sock:
            return rc  # a packet's handling has ended this connection
        if rc:
            return self._loop_rc_handle(rc)
        if at < end:
            self._parts = [data[at:]]
        return self.loop_write() if self._out_packet else rc

    def _take(self, header: int, packet: bytes) -> MQTTErrorCode:
        """One whole packet, without its header. Raises MalformedPacket."""
        kind = header & 0xF0
        if kind == _PUBLISH and not header & _QOS_2:
            return self._take_publish(header, packet)
        if kind == _PUBACK and (len(packet) == 2 or (len(packet) > 2 and self._protocol == MQTTProtocolVersion.MQTTv5)):
            return self._take_puback(packet)
        if kind in _OF_QOS_2:
            raise MalformedPacket("a packet of QoS 2, which we never publish with")
        self._in_packet["command"] = header
        self._in_packet["packet"] = bytearray(packet)
        self._in_packet["remaining_length"] = len(packet)
        return self._packet_handle()

    def _take_publish(self, header: int, packet: bytes) -> MQTTErrorCode:
        try:
            at = 2 + (packet[0] << 8 | packet[1])
            if at > len(packet) or (at == 2 and self._protocol != MQTTProtocolVersion.MQTTv5):
                raise MalformedPacket("a PUBLISH without a topic, or cut in it")
            try:
                topic = packet[2:at].decode()
            except UnicodeDecodeError:
                topic = ""
            packet_id = 0
            if header & _QOS_BITS:
                packet_id = packet[at] << 8 | packet[at + 1]
                at += 2
            expiry_s: int | None = None
            if self._protocol == MQTTProtocolVersion.MQTTv5:  # 3.1.1 has no properties
                if packet[at] == 0:
                    at += 1
                else:
                    length, at = _variable_byte_integer(packet, at)
                    expiry_s = _expiry(packet, at, length)
                    at += length
        except IndexError as error:
            raise MalformedPacket(str(error)) from error
        self.turned_s = time.monotonic()  # a packet taken is progress, also where the inbox holds the next one back
        self._on_packet(topic, packet[at:], packet_id, expiry_s, bool(header & _DUP), bool(header & _RETAIN))
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def _take_puback(self, packet: bytes) -> MQTTErrorCode:
        # Without a reason code all is well (MQTT 5 section 3.4.2.1); what follows the code nobody asks for.
        code = packet[2] if len(packet) > 2 else 0
        with self._out_message_mutex:
            message = self._out_messages.pop(packet[0] << 8 | packet[1], None)
            if message is None:
                return MQTTErrorCode.MQTT_ERR_SUCCESS
            self._inflight_messages -= 1
        if code < 0x80:
            self._on_acknowledged()
        else:
            self._owner.on_refused(message.topic, message.properties, code)
        return MQTTErrorCode.MQTT_ERR_SUCCESS


def _variable_byte_integer(packet: bytes, at: int) -> tuple[int, int]:
    """The integer at ``at`` (MQTT 5 section 1.5.5) and where it ends. Raises IndexError."""
    value = shift = 0
    while True:
        byte = packet[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80 or shift == 21:
            return value, at
        shift += 7


def _expiry(packet: bytes, at: int, length: int) -> int | None:
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
