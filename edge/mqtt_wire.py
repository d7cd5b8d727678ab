"""A small MQTT client on a bare socket, for those who move every message and look into none: record and replay.

It knows CONNECT, SUBSCRIBE, PUBLISH, PUBACK and PING of MQTT 5 and 3.1.1 (OASIS, sections 3.1 to 3.14), and nothing
of topics or envelopes. What was read from the socket is taken apart in one loop, and all of it is acknowledged with
one send: a message costs about a microsecond and a half where paho's way costs ten times that. Not thread-safe.
"""

from __future__ import annotations

import select
import socket
import ssl
import time
from typing import NamedTuple
from urllib.parse import urlsplit

from edge import connect_faults, mqtt_packets
from protocol.errors import NotConnected, WrongTopic
from protocol.topics import MAX_PACKET_BYTES

KEEPALIVE_S = 15
SILENCE_S = 30.0
"""A broker that says nothing for this long, or takes nothing, is gone: it should have answered a ping."""
READ_BYTES = 256 * 1024
CONNECT_TIMEOUT_S = 5.0
RECEIVE_MAXIMUM = 1000
READ_INTERVAL_MIN_S, READ_INTERVAL_MAX_S = 0.001, 0.01
"""Reads are at least this far apart, so that a stream is taken in handfuls: waking up for each message would cost the
machine more than the message itself. A lone message is read at once. Between the two it is fitted so that a read brings
some READ_MESSAGES: brokers send a hundred, and then wait for their acknowledgement."""
READ_MESSAGES = 60
PUBLISH_WINDOW = 256
_SEND_BYTES = 64 * 1024
_CONNECT, _CONNACK, _PUBLISH, _PUBACK, _SUBSCRIBE, _SUBACK = 0x10, 0x20, 0x30, 0x40, 0x82, 0x90
_PINGREQ, _PINGRESP, _DISCONNECT = 0xC0, 0xD0, 0xE0
RETAIN, QOS_BITS, DUP = 0x01, 0x06, 0x08
"""Bits of a PUBLISH's first byte (section 3.3.1)."""
_NOT_YET = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_UNSUPPORTED_VERSION = 0x84
_REASONS_OF_3_1_1 = {1: 0x84, 2: 0x85, 3: 0x88, 4: 0x86, 5: 0x87}
"""Return codes of 3.1.1 (its section 3.2.2.3) as reason codes of 5."""
_REASONS = {
    0x84: "Unsupported protocol version",
    0x85: "Client identifier not valid",
    0x86: "Bad user name or password",
    0x87: "Not authorized",
    0x88: "Server unavailable",
    0x89: "Server busy",
    0x8A: "Banned",
    0x8C: "Bad authentication method",
}
_SESSION_EXPIRY, _RECEIVE_MAXIMUM, _MAXIMUM_PACKET, _MESSAGE_EXPIRY = 0x11, 0x21, 0x27, 0x02


class Arrival(NamedTuple):
    """One message as it came. ``WireClient.read`` gives plain tuples of this shape: they are quicker to make."""

    time_us: int
    """Wall clock when it was read, Unix microseconds; what is read at once has one time."""
    elapsed_us: int
    """The same by the monotonic clock, from the client's ``epoch_ns`` on."""
    topic: str
    payload: bytes
    flags: int
    """Low bits of the PUBLISH's first byte: 1 retain, 2 and 4 QoS, 8 sent before (DUP)."""
    expiry_s: int | None
    """What the broker left of its message expiry, seconds."""


class WireClient:
    """One connection.

    Args:
        url: ``mqtt://host:port`` or ``mqtts://host:port``.
        client_id: made unique by the caller.
        username, password: for the broker; empty for none.
        ca_file: CA certificates for ``mqtts``; empty for the system's.
        session_expiry_s: how long the broker keeps messages for this client after its connection broke.
        protocol: ``5``, ``3.1.1``, or ``auto``: 5, and 3.1.1 where the broker refuses it.
    """

    def __init__(
        self,
        url: str,
        client_id: str,
        *,
        username: str = "",
        password: str = "",
        ca_file: str = "",
        session_expiry_s: int = 0,
        protocol: str = "auto",
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname or parts.username or parts.password:
            raise NotConnected(
                f"reading the broker's address {parts.scheme}://{parts.hostname}: not mqtt://host:port or"
                " mqtts://host:port",
                hint="names and passwords stand in mindstream.toml, never in the address",
                field="broker.url",
            )
        self.url = url
        self.client_id = client_id
        self._host, self._port = parts.hostname, parts.port or (8883 if parts.scheme == "mqtts" else 1883)
        self._tls = ssl.create_default_context(cafile=ca_file or None) if parts.scheme == "mqtts" else None
        self._username, self._password, self._ca_file = username, password, ca_file
        self._session_expiry_s = session_expiry_s
        self._level = {"auto": 5, "5": 5, "3.1.1": 4}[protocol]
        self._fall_back = protocol == "auto"
        self._sock: socket.socket | None = None
        self._asked = False
        """CONNECT was sent: what fails from then on is the broker's answer."""
        self._data = b""
        self._topics: dict[bytes, str] = {}
        self._sent_s = self._heard_s = 0.0
        self._packet_id = 0
        self._outgoing = bytearray()
        self._unacknowledged: set[int] = set()
        self._window = PUBLISH_WINDOW
        self._next_read_s, self._interval_s = 0.0, READ_INTERVAL_MAX_S
        self._unread = False
        self.epoch_ns = time.monotonic_ns()
        self.received_bytes = 0
        """Read from the socket so far."""
        self.refusals: dict[int, int] = {}
        """Reasons of refused publishes (section 3.4.2.1; 135 is not authorized), and how often."""

    @property
    def level(self) -> int:
        """Protocol level in use: 5 (MQTT 5) or 4 (3.1.1)."""
        return self._level

    @property
    def in_flight(self) -> int:
        """Publishes of QoS 1 that the broker has not acknowledged."""
        return len(self._unacknowledged)

    # --- life ---------------------------------------------------------------------------------------------------

    def connect(self, *, clean_start: bool = True) -> bool:
        """Connect; whether the broker still had this client's session. Raises NotConnected."""
        for level in (5, 4) if self._level == 5 and self._fall_back else (self._level,):
            self.drop()
            self._level, self._asked, self._data = level, False, b""
            try:
                reason, present = self._handshake(clean_start)
            except (OSError, IndexError) as error:
                if level == 5 and self._fall_back and self._asked and isinstance(error, ConnectionError):
                    continue  # some brokers without MQTT 5 close the connection over it
                raise self._not_connected(self._why_not(error)) from None
            if not reason:
                self._fall_back = False  # a broker that is starting again must not make it an older one
                return present
            if reason == _UNSUPPORTED_VERSION and self._fall_back and level == 5:
                continue
            version, name = ("5" if level == 5 else "3.1.1"), _REASONS.get(reason, "refused")
            raise self._not_connected(
                connect_faults.of_connack(reason, name, self.url, self.client_id, self._username, version)
            )
        raise AssertionError("the last level either connects or raises")

    def _why_not(self, error: Exception) -> connect_faults.Fault:
        if self._asked:  # TCP and TLS stand; it was the answer to our CONNECT that failed
            silent = isinstance(error, TimeoutError)
            return connect_faults.of_silence(self.url, self._data[:16], timed_out=silent)
        if isinstance(error, OSError):
            return connect_faults.of_error(error, self.url, self._ca_file)
        return connect_faults.Fault(_why(error), "unreachable")

    def _not_connected(self, fault: connect_faults.Fault) -> NotConnected:
        self.drop()
        if self._fall_back:
            self._level = 5
        return NotConnected(
            f"connecting to {self.url}: {fault.text}", hint=fault.hint, field=fault.field, reason=fault.reason
        )

    def _handshake(self, clean_start: bool) -> tuple[int, bool]:
        """CONNECT and CONNACK: reason and whether a session was there. Raises OSError."""
        sock = socket.create_connection((self._host, self._port), timeout=CONNECT_TIMEOUT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = self._tls.wrap_socket(sock, server_hostname=self._host) if self._tls else sock
        self._sock.setblocking(False)
        flags = 0x02 * clean_start | 0x80 * bool(self._username) | 0x40 * bool(self._username and self._password)
        body = b"\x00\x04MQTT" + bytes((self._level, flags)) + KEEPALIVE_S.to_bytes(2, "big")
        if self._level == 5:
            properties = bytes((_SESSION_EXPIRY,)) + self._session_expiry_s.to_bytes(4, "big")
            properties += bytes((_RECEIVE_MAXIMUM,)) + RECEIVE_MAXIMUM.to_bytes(2, "big")
            properties += bytes((_MAXIMUM_PACKET,)) + MAX_PACKET_BYTES.to_bytes(4, "big")
            body += bytes((len(properties),)) + properties
        for text in [self.client_id] + [t for t in (self._username, self._username and self._password) if t]:
            body += mqtt_packets.field(text.encode())
        self._asked = True
        self._outgoing.clear()
        self._unacknowledged.clear()
        self._heard_s = time.monotonic()
        self._send(mqtt_packets.packet(_CONNECT, body))
        answer = self._wait_for(_CONNACK)
        self._window = PUBLISH_WINDOW
        if self._level == 5 and len(answer) > 2:
            granted = mqtt_packets.properties(answer, 2)[0].get(_RECEIVE_MAXIMUM, 65_535)
            self._window = min(PUBLISH_WINDOW, granted)
        # A broker without MQTT 5 may answer in the form of 3.1.1.
        reason = _REASONS_OF_3_1_1.get(answer[1], answer[1]) if len(answer) == 2 else answer[1]
        return reason, bool(answer[0] & 1)

    def subscribe(self, filter: str) -> None:
        """Subscribe with QoS 1, retained messages first, and their flag as published. Raises NotConnected."""
        # Retain As Published (section 3.8.3.1): a replay must know what was retained.
        options = 0x09 if self._level == 5 else 0x01
        body = self._next_id().to_bytes(2, "big") + b"\x00" * (self._level == 5)
        body += mqtt_packets.field(filter.encode()) + bytes((options,))
        try:
            self._send(mqtt_packets.packet(_SUBSCRIBE, body))
            answer = self._wait_for(_SUBACK)
        except (OSError, IndexError) as error:
            raise self._lost(_why(error)) from None
        if answer[-1] >= 0x80:
            reason = _REASONS.get(answer[-1], f"reason {answer[-1]}")
            raise self._not_connected(connect_faults.of_subscriptions({filter: reason}, self._username))

    def close(self, timeout_s: float = 5.0) -> None:
        """Wait for what is under way, say goodbye, forget the session."""
        if self._sock is None:
            return
        try:
            self.flush(timeout_s)
            # Reason 0, session expiry 0: the broker need not keep anything for a client that will not come again.
            self._send(b"\xe0\x07\x00\x05\x11\x00\x00\x00\x00" if self._level == 5 else b"\xe0\x00")
        except (OSError, NotConnected):
            pass  # it is gone already
        self.drop()

    def drop(self) -> None:
        """Cut the connection without a word."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    # --- receiving ----------------------------------------------------------------------------------------------

    def read(self, timeout_s: float) -> list[tuple[int, int, str, bytes, int, int | None]]:
        """What came within ``timeout_s``, as tuples like Arrival, acknowledged; empty when nothing did.

        Raises NotConnected when the connection broke.
        """
        if (early_s := self._next_read_s - time.monotonic()) > 0:
            time.sleep(early_s)
        try:
            data = b"" if self._unread else self._receive(timeout_s)
            self._unread = False
            arrivals, acks = self._take_apart(data)
            if acks:
                self._send(b"".join(acks))
            self._keep_alive()
        except (OSError, IndexError) as error:
            raise self._lost(_why(error)) from None
        if arrivals:
            fitted_s = self._interval_s * (0.5 if len(arrivals) > 1.5 * READ_MESSAGES else 1.25)
            if len(arrivals) > 1.5 * READ_MESSAGES or len(arrivals) < READ_MESSAGES:
                self._interval_s = min(READ_INTERVAL_MAX_S, max(READ_INTERVAL_MIN_S, fitted_s))
            self._next_read_s = time.monotonic() + self._interval_s
        return arrivals

    def _receive(self, timeout_s: float) -> bytes:
        sock = self._socket()
        try:
            data = sock.recv(READ_BYTES)
        except _NOT_YET:
            if not self._wait(select.POLLIN, timeout_s):
                return b""
            try:
                data = sock.recv(READ_BYTES)
            except _NOT_YET:
                return b""  # a part of a TLS record
        if not data:
            raise ConnectionResetError("the broker closed the connection")
        self._heard_s = time.monotonic()
        self.received_bytes += len(data)
        return data

    def _take_apart(self, new: bytes) -> tuple[list[tuple[int, int, str, bytes, int, int | None]], list[bytes]]:
        """The PUBLISHes among what was read, and their PUBACKs; other packets are dealt with here."""
        data = self._data + new if self._data else new
        arrivals: list[tuple[int, int, str, bytes, int, int | None]] = []
        acks: list[bytes] = []
        time_us = time.time_ns() // 1000
        elapsed_us = (time.monotonic_ns() - self.epoch_ns) // 1000
        topics = self._topics
        with_properties = self._level == 5
        at, end = 0, len(data)
        while end - at >= 2:
            header = data[at]
            length = data[at + 1]
            start = at + 2
            if length >= 0x80:
                length, start = mqtt_packets.variable(data, at + 1)
                if not start:
                    break
            stop = start + length
            if stop > end:
                break
            at = stop
            if header & 0xF0 != _PUBLISH:
                self._other(header, data[start:stop])
                continue
            body = start + 2 + (data[start] << 8 | data[start + 1])
            raw = data[start + 2 : body]
            topic = topics.get(raw)
            if topic is None:
                topic = self._learn(raw)
            if header & QOS_BITS:
                acks.append(b"\x40\x02" + data[body : body + 2])
                body += 2
            expiry_s = None
            if with_properties:
                if data[body]:
                    found, body = mqtt_packets.properties(data, body)
                    expiry_s = found.get(_MESSAGE_EXPIRY)
                else:
                    body += 1
            arrivals.append((time_us, elapsed_us, topic, data[body:stop], header & 0x0F, expiry_s))
        self._data = data[at:]
        return arrivals, acks

    def _learn(self, raw: bytes) -> str:
        if len(self._topics) >= 4096:  # topics of runs and transfers come and go
            self._topics.clear()
        topic = self._topics[raw] = raw.decode("utf-8", "replace")
        return topic

    def _other(self, header: int, body: bytes) -> None:
        kind = header & 0xF0
        if kind == _PUBACK:
            self._unacknowledged.discard(body[0] << 8 | body[1])
            if len(body) > 2 and body[2] >= 0x80:
                self.refusals[body[2]] = self.refusals.get(body[2], 0) + 1
        elif kind == _DISCONNECT:
            raise ConnectionResetError(f"the broker said goodbye, reason {body[0] if body else 0}")

    def _wait_for(self, wanted: int) -> bytes:
        """The next packet of one kind. Raises OSError.

        Retained messages may come before the SUBACK (section 3.8.4): they are kept for read().
        """
        deadline_s = time.monotonic() + CONNECT_TIMEOUT_S
        kept: list[bytes] = []
        while True:
            length, start = mqtt_packets.variable(self._data, 1) if len(self._data) >= 2 else (0, 0)
            if start and len(self._data) >= start + length:
                packet, self._data = self._data[: start + length], self._data[start + length :]
                if packet[0] == wanted:
                    self._data = b"".join([*kept, self._data])
                    self._unread = bool(self._data)
                    return packet[start:]
                if packet[0] & 0xF0 == _PUBLISH:
                    kept.append(packet)
                else:
                    self._other(packet[0], packet[start:])
                continue
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(f"no answer in {CONNECT_TIMEOUT_S:g} s")
            self._data += self._receive(left_s)

    # --- publishing ---------------------------------------------------------------------------------------------

    def publish(self, topic: str, payload: bytes, *, qos: int, retain: bool, expiry_s: int | None = None) -> None:
        """Hand one message over, QoS 0 or 1; it goes out with the next ones, or at flush(). Waits while the window
        of unacknowledged ones is full. Raises NotConnected, WrongTopic."""
        name = topic.encode()
        if not 0 < len(name) <= 65_535:
            raise WrongTopic(f"publishing on {topic[:80]!r}: {len(name):,} bytes, MQTT takes 1 to 65,535")
        try:
            while qos and len(self._unacknowledged) >= self._window:
                self._push()
                self._absorb(1.0)
                self._keep_alive()
            body = mqtt_packets.field(name)
            if qos:
                identifier = self._next_id()
                self._unacknowledged.add(identifier)
                body += identifier.to_bytes(2, "big")
            if self._level == 5:
                body += b"\x05\x02" + expiry_s.to_bytes(4, "big") if expiry_s else b"\x00"
            self._outgoing += mqtt_packets.packet(_PUBLISH | (qos and 2) | retain, body + payload)
            if len(self._outgoing) >= _SEND_BYTES:
                self._push()
        except (OSError, IndexError) as error:
            raise self._lost(_why(error)) from None

    def push(self) -> None:
        """Send what was handed over, and take in acknowledgements that are here. Raises NotConnected."""
        try:
            self._push()
            self._absorb(0.0)
            self._keep_alive()
        except (OSError, IndexError) as error:
            raise self._lost(_why(error)) from None

    def flush(self, timeout_s: float) -> bool:
        """Send everything and wait for its acknowledgement; False when it did not come in time.

        Raises NotConnected.
        """
        self.push()
        deadline_s = time.monotonic() + timeout_s
        try:
            while self._unacknowledged and time.monotonic() < deadline_s:
                self._absorb(min(1.0, max(0.0, deadline_s - time.monotonic())))
                self._keep_alive()
        except (OSError, IndexError) as error:
            raise self._lost(_why(error)) from None
        return not self._unacknowledged

    def _push(self) -> None:
        if self._outgoing:
            outgoing, self._outgoing = self._outgoing, bytearray()
            self._send(outgoing)

    def _absorb(self, timeout_s: float) -> None:
        """Take in what is here, or comes in time: acknowledgements."""
        _, acks = self._take_apart(self._receive(timeout_s))
        if acks:
            self._send(b"".join(acks))

    # --- the socket ---------------------------------------------------------------------------------------------

    def _socket(self) -> socket.socket:
        if self._sock is None:
            raise NotConnected(f"speaking with {self.url}: not connected", reason="not connected")
        return self._sock

    def _send(self, data: bytes | bytearray) -> None:
        sock, view = self._socket(), memoryview(data)
        while view:
            try:
                view = view[sock.send(view) :]
            except _NOT_YET as error:
                event = select.POLLIN if isinstance(error, ssl.SSLWantReadError) else select.POLLOUT
                if not self._wait(event, SILENCE_S):
                    raise TimeoutError(f"the broker has taken nothing for {SILENCE_S:g} s") from None
        self._sent_s = time.monotonic()

    def _wait(self, event: int, timeout_s: float) -> bool:
        poll = select.poll()
        poll.register(self._socket(), event)
        return bool(poll.poll(timeout_s * 1000))

    def _keep_alive(self) -> None:
        now_s = time.monotonic()
        if now_s - self._sent_s > KEEPALIVE_S / 2:
            self._send(b"\xc0\x00")
        if now_s - self._heard_s > SILENCE_S:
            raise TimeoutError(f"the broker has been silent for {now_s - self._heard_s:.0f} s")

    def _next_id(self) -> int:
        while True:
            self._packet_id = self._packet_id % 65_535 + 1
            if self._packet_id not in self._unacknowledged:
                return self._packet_id

    def _lost(self, why: str) -> NotConnected:
        self.drop()
        return NotConnected(
            f"speaking with {self.url}: {why}",
            hint="is the broker running there? `mindstream doctor` looks",
            reason="connection lost",
        )


def _why(error: Exception) -> str:
    if isinstance(error, IndexError):
        return "the broker sent a packet that cannot be read"
    return getattr(error, "strerror", None) or str(error)
