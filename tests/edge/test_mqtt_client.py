"""The short way in gives what paho's own way gives, for every PUBLISH and PUBACK that paho can read."""

from __future__ import annotations

import dataclasses
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import paho.mqtt.client as paho
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion, _ConnectionState
from paho.mqtt.exception import MalformedPacket
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edge.mqtt_client import CORKED_PACKETS, FastClient, Outgoing, Owner
from edge.mqtt_packets import packed_length
from edge.wire_properties import RequestProperties

V5, V3 = MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311

Seen = tuple[str, bytes, int, "int | None", bool, bool]


def fast_client(
    seen: list[Seen],
    acknowledged: list[int] | None = None,
    refused: list[tuple[str, int]] | None = None,
    version: MQTTProtocolVersion = MQTTProtocolVersion.MQTTv5,
) -> FastClient:
    def never(*_: Any) -> Any:
        raise AssertionError("there is no connection")

    client = FastClient(
        Owner(
            on_packet=lambda *packet: seen.append(packet),
            on_acknowledged=lambda: acknowledged.append(1) if acknowledged is not None else None,
            on_refused=lambda topic, _properties, code: refused.append((topic, code)) if refused is not None else None,
            before_connect=never,
            on_connect_error=never,
            on_connack=never,
            on_turn=never,
        ),
        client_id="",
    )
    client._protocol = version
    return client


def stock_client(seen: list[Seen], version: MQTTProtocolVersion = MQTTProtocolVersion.MQTTv5) -> paho.Client:
    client = paho.Client(CallbackAPIVersion.VERSION2, protocol=version, manual_ack=True)

    def on_message(_client: Any, _data: Any, message: paho.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = ""
        expiry_s = getattr(message.properties, "MessageExpiryInterval", None)
        packet_id = message.mid if message.qos else 0
        seen.append((topic, bytes(message.payload), packet_id, expiry_s, message.dup, message.retain))

    client.on_message = on_message
    return client


def handle(client: paho.Client, header: int, packet: bytes) -> object:
    """One packet, without its header."""
    if isinstance(client, FastClient):
        try:
            return client._take(header, packet)
        except MalformedPacket:
            return "malformed"
    client._in_packet["command"] = header
    client._in_packet["packet"] = bytearray(packet)
    client._in_packet["remaining_length"] = len(packet)
    try:
        return client._packet_handle()
    except MalformedPacket:
        return "malformed"


# paho ends the connection over these two in any property (U+FEFF wrongly: MQTT 5 section 1.5.4 has it kept).
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), max_size=200)


topics = st.one_of(st.text(min_size=1, max_size=40).map(str.encode), st.binary(min_size=1, max_size=8))
flags = st.sampled_from([0, 1, 8])


@st.composite
def publishes_of_3_1_1(draw: st.DrawFn) -> tuple[int, bytes]:
    qos = draw(st.sampled_from([0, 1]))
    topic = draw(topics)
    packet = len(topic).to_bytes(2, "big") + topic
    packet += draw(st.integers(1, 65_535)).to_bytes(2, "big") if qos else b""
    return 0x30 | qos << 1 | draw(flags), packet + draw(st.binary(max_size=300))


@st.composite
def publishes(draw: st.DrawFn) -> tuple[int, bytes]:
    qos = draw(st.sampled_from([0, 1]))
    topic = draw(topics)
    properties = Properties(PacketTypes.PUBLISH)
    if draw(st.booleans()):
        properties.UserProperty = [("name", draw(texts))]
    if draw(st.booleans()):
        properties.MessageExpiryInterval = draw(st.integers(0, 2**32 - 1))
    if draw(st.booleans()):
        properties.CorrelationData = draw(st.binary(max_size=40))
    if draw(st.booleans()):
        properties.ResponseTopic = "a/b"
    if draw(st.booleans()):
        properties.ContentType = draw(texts)
    if draw(st.booleans()):
        properties.PayloadFormatIndicator = draw(st.integers(0, 1))
    if draw(st.booleans()):
        properties.TopicAlias = draw(st.integers(1, 65_535))
    if draw(st.booleans()):
        properties.SubscriptionIdentifier = draw(st.integers(1, 2**28 - 1))
    header = 0x30 | qos << 1 | draw(flags)
    packet = len(topic).to_bytes(2, "big") + topic
    packet += draw(st.integers(1, 65_535)).to_bytes(2, "big") if qos else b""
    return header, packet + properties.pack() + draw(st.binary(max_size=300))


@given(publishes())
def test_a_publish_is_read_as_paho_reads_it(publish: tuple[int, bytes]) -> None:
    fast: list[Seen] = []
    stock: list[Seen] = []
    handle(fast_client(fast), *publish)
    handle(stock_client(stock), *publish)
    assert fast == stock


@given(publishes_of_3_1_1())
def test_a_publish_of_3_1_1_is_read_as_paho_reads_it(publish: tuple[int, bytes]) -> None:
    fast: list[Seen] = []
    stock: list[Seen] = []
    handle(fast_client(fast, version=V3), *publish)
    handle(stock_client(stock, V3), *publish)
    assert fast == stock
    assert len(fast) == 1


@given(st.sampled_from([0x30, 0x32, 0x31, 0x3A, 0x36]), st.binary(max_size=40))
def test_bytes_that_are_no_publish_of_3_1_1_are_refused_as_paho_refuses_them(header: int, packet: bytes) -> None:
    fast: list[Seen] = []
    stock: list[Seen] = []
    assert handle(fast_client(fast, version=V3), header, packet) == handle(stock_client(stock, V3), header, packet)
    assert fast == stock


@pytest.mark.parametrize("expiry", [b"", b"\x02\0\0\0\x07"])
def test_what_a_peer_wrote_into_a_property_that_nobody_asks_for_does_not_end_the_connection(expiry: bytes) -> None:
    seen: list[Seen] = []
    properties = b"\x26\0\1a\0\1\0" + expiry
    handle(fast_client(seen), 0x30, b"\0\1t" + bytes([len(properties)]) + properties + b"payload")
    assert seen == [("t", b"payload", 0, 7 if expiry else None, False, False)]


@given(st.sampled_from([0x30, 0x32, 0x31, 0x3A]), st.binary(max_size=40))
def test_bytes_that_are_no_publish_are_malformed_or_read_as_paho_reads_them(header: int, packet: bytes) -> None:
    fast: list[Seen] = []
    stock: list[Seen] = []
    refused = handle(fast_client(fast), header, packet) == "malformed"
    stock_refused = handle(stock_client(stock), header, packet) == "malformed"
    if not refused and not stock_refused:
        assert fast == stock


@pytest.mark.parametrize(
    "properties",
    [b"\x23\x17", b"\x02\0\0\0", b"\x26\0\1a\0\x09b", b"\x0b\xff", b"\x7e\0", b"\x02\0\0\0\1\x23\0"],
    ids=["alias cut", "expiry cut", "text too long", "number cut", "unknown", "second cut"],
)
def test_properties_that_run_beyond_their_length_or_that_no_publish_has_are_malformed(properties: bytes) -> None:
    seen: list[Seen] = []
    packet = b"\0\1t" + bytes([len(properties)]) + properties
    assert handle(fast_client(seen), 0x30, packet + b"payload") == "malformed"
    assert handle(fast_client(seen), 0x30, packet) == "malformed"
    assert not seen


# --- PUBACK ---------------------------------------------------------------------------------------------------


def sent(client: FastClient, topic: str = "a", payload: bytes = b"x", **options: Any) -> int:
    """Publish; the packet's id."""
    client.send(topic, payload, **{"retain": False, **options})
    return next(reversed(client._out_messages))


@pytest.mark.parametrize("version", [V5, V3])
def test_a_puback_of_success_frees_its_message_and_says_so(version: MQTTProtocolVersion) -> None:
    acknowledged: list[int] = []
    client = fast_client([], acknowledged, version=version)
    mid = sent(client)
    handle(client, 0x40, mid.to_bytes(2, "big"))
    assert acknowledged == [1]
    assert not client._out_messages
    handle(client, 0x40, mid.to_bytes(2, "big"))
    assert acknowledged == [1], "a PUBACK that nobody waits for counts nothing"


@pytest.mark.parametrize("rest", [b"", b"\x00", b"\x1f\x00\x01a", b"\x04\x1f\x00\x01a"])
@pytest.mark.parametrize("code", [0x00, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99])
def test_a_puback_with_a_reason_is_success_or_failure_as_paho_reads_it(code: int, rest: bytes) -> None:
    packet = b"\0\1" + bytes([code]) + rest
    acknowledged: list[int] = []
    refused: list[tuple[str, int]] = []
    reasons: list[ReasonCode] = []
    fast, stock = fast_client([], acknowledged, refused), stock_client([])
    stock.on_publish = lambda _c, _d, _mid, reason, _p: reasons.append(reason)
    assert sent(fast, "a/b") == stock.publish("a/b", b"x", 1).mid == 1
    for client in (fast, stock):
        handle(client, 0x40, packet)
    if not reasons:
        return  # paho cannot read the properties behind it, which we do not read
    assert [reason.value for reason in reasons] == [code]
    assert (acknowledged, refused) == (([], [("a/b", code)]) if reasons[0].is_failure else ([1], []))


def test_a_puback_of_3_1_1_with_more_than_an_id_is_malformed() -> None:
    client = fast_client([], version=V3)
    assert handle(client, 0x40, sent(client).to_bytes(2, "big") + b"\x87") == "malformed"


@pytest.mark.parametrize("header", [0x50, 0x70])
def test_an_answer_to_qos_2_which_we_never_use_is_malformed(header: int) -> None:
    client = fast_client([])
    assert handle(client, header, sent(client).to_bytes(2, "big")) == "malformed"


def test_a_packet_id_that_is_still_under_way_is_not_given_twice() -> None:
    client = fast_client([])
    first = sent(client)
    client._last_mid = first - 1
    assert sent(client) == first + 1
    assert len(client._out_messages) == 2


# --- what goes out --------------------------------------------------------------------------------------------


class Wire:
    """A client that is connected to a socket; ``there`` is the broker's end."""

    def __init__(self, client: FastClient, stack: ExitStack) -> None:
        here, self.there = socket.socketpair()
        here.setblocking(False)
        self.there.settimeout(30)
        self.client = client
        client._sock = here
        client._state = _ConnectionState.MQTT_CS_CONNECTED
        stack.enter_context(self.there)
        stack.callback(client._sock_close)

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size and (piece := self.there.recv(size - len(data))):
            data += piece
        return data


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as found:
        yield found


request_properties = st.one_of(
    st.none(), st.builds(RequestProperties, st.integers(1, 2**32 - 1), st.just("a/b"), st.binary(max_size=200))
)


@given(
    version=st.sampled_from([V5, V3]),
    topic=st.text(st.characters(exclude_characters="+#\0", exclude_categories=["Cs"]), min_size=1, max_size=100),
    payload=st.one_of(st.binary(max_size=300), st.sampled_from([bytes(20_000), bytes(2_100_000)])),
    retain=st.booleans(),
    dup=st.booleans(),
    properties=request_properties,
)
def test_a_publish_is_packed_as_paho_packs_it(
    version: MQTTProtocolVersion,
    topic: str,
    payload: bytes,
    retain: bool,
    dup: bool,
    properties: RequestProperties | None,
) -> None:
    message = Outgoing(777, topic, payload, retain, properties)
    message.dup = dup
    packed = fast_client([], version=version)._packed_publish(message)
    stock = stock_client([], version)
    stock._thread = threading.current_thread()  # it queues then, and writes nothing itself
    with socket.socket() as stock._sock:
        stock._send_publish(777, topic.encode(), payload, 1, retain, dup, None, properties)  # type: ignore[arg-type]
        assert packed == bytes(stock._out_packet[0]["packet"])
        stock._sock = None


@pytest.mark.parametrize("version", [V5, V3])
def test_nothing_is_published_before_the_connack_and_all_of_it_after(
    version: MQTTProtocolVersion, stack: ExitStack
) -> None:
    """A PUBLISH packed for one version and read as the other would have a byte too many or too few."""
    client = fast_client([], version=version)
    wire = Wire(client, stack)
    client._state = _ConnectionState.MQTT_CS_CONNECTING
    mid = sent(client)
    assert not client._out_packet
    client._owner = dataclasses.replace(client._owner, on_connack=lambda code: code == 0)
    handle(client, 0x20, b"\0\0\0" if version == V5 else b"\0\0")
    body = b"\0\1a" + mid.to_bytes(2, "big") + (b"\0" if version == V5 else b"") + b"x"
    assert wire.read(2 + len(body)) == b"\x32" + bytes([len(body)]) + body


def test_what_several_threads_say_at_once_goes_out_whole_and_each_thread_in_order(stack: ExitStack) -> None:
    """With a network thread that writes what the others could not, as the socket is full most of the time."""
    threads, messages = 6, 400
    client = fast_client([], version=V3)
    wire = Wire(client, stack)
    wire.client._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)  # type: ignore[union-attr]
    client._owner = dataclasses.replace(client._owner, before_connect=lambda: V3, on_connack=lambda _: True)
    client.loop_start()
    stack.callback(client.loop_stop)
    stack.callback(client.disconnect)

    def say(number: int) -> None:
        for count in range(messages):
            client.send(f"{number}", count.to_bytes(2, "big") + b"\xe0" * count, retain=False)
            if count % 7 == 0:
                client.ack(count + 1)

    speakers = [threading.Thread(target=say, args=(number,)) for number in range(threads)]
    for speaker in speakers:
        speaker.start()
    seen: dict[int, list[int]] = {number: [] for number in range(threads)}
    acknowledged = 0
    while sum(map(len, seen.values())) < threads * messages or acknowledged < threads * -(-messages // 7):
        header = wire.read(1)[0]
        length = shift = 0
        while True:
            byte = wire.read(1)[0]
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        body = wire.read(length)
        if header == 0x40:
            acknowledged += 1
            continue
        assert header == 0x32
        number, count = int(body[2:3]), int.from_bytes(body[5:7], "big")
        assert body[7:] == b"\xe0" * count  # as DISCONNECT begins: where a packet is cut, nothing follows from it
        seen[number].append(count)
    assert all(counts == list(range(messages)) for counts in seen.values())
    for speaker in speakers:
        speaker.join()


def test_what_is_corked_goes_out_together_at_the_end(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge.mqtt_client.CORKED_S", 60.0)
    client = fast_client([], version=V3)
    wire = Wire(client, stack)
    client._thread = threading.current_thread()  # as if there was one: none is needed to write
    with client.corked():
        for mid in range(1, 4):
            client.ack(mid)
        wire.there.setblocking(False)
        with pytest.raises(BlockingIOError):
            wire.there.recv(100)
    assert wire.there.recv(100) == b"\x40\x02\0\1\x40\x02\0\2\x40\x02\0\3"
    with client.corked():
        for _ in range(CORKED_PACKETS):
            client.ack(1)
        assert wire.there.recv(1000) == b"\x40\x02\0\1" * CORKED_PACKETS, "so many are not held back"
        monkeypatch.setattr("edge.mqtt_client.CORKED_S", 0.0)
    with client.corked():
        client.ack(2)
        assert wire.there.recv(1000) == b"\x40\x02\0\2", "nor for so long"
    client._thread = None


# --- what comes in --------------------------------------------------------------------------------------------


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[int]]:
    """Packets as a broker sends them, one after the other, and where the stream is cut."""
    stream = b""
    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["publish", "publish", "puback", "pingresp", "suback", "large"]))
        if kind == "publish":
            header, packet = draw(publishes())
        elif kind == "large":
            header, packet = 0x30, b"\0\1t\0" + bytes(draw(st.integers(0, 300_000)))
        else:
            header, packet = {"puback": (0x40, b"\0\7"), "pingresp": (0xD0, b""), "suback": (0x90, b"\0\5\0\1")}[kind]
        stream += bytes([header]) + packed_length(len(packet)) + packet
    return stream, sorted(draw(st.lists(st.integers(0, len(stream)), max_size=10)))


@settings(max_examples=60)
@given(streams())
def test_a_stream_cut_anywhere_is_read_as_paho_reads_it(stream: tuple[bytes, list[int]]) -> None:
    data, cuts = stream
    found: list[tuple[list[Seen], list[int]]] = []
    for make in (fast_client, stock_client):
        seen: list[Seen] = []
        subscribed: list[int] = []
        client = make(seen)
        client.on_subscribe = lambda _c, _d, mid, _r, _p, subscribed=subscribed: subscribed.append(mid)
        here, there = socket.socketpair()
        with here, there:
            here.setblocking(False)
            client._sock = here
            client._state = _ConnectionState.MQTT_CS_CONNECTED
            for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
                at = begin
                while at < end:
                    at += there.send(data[at : min(end, at + 50_000)])
                    for _ in range(200):  # paho reads a packet at a time
                        assert client.loop_read() == MQTTErrorCode.MQTT_ERR_SUCCESS
            client._sock = None
        found.append((seen, subscribed))
    assert found[0] == found[1]


@pytest.mark.parametrize("data", [b"\x30\xff\xff\xff\xff\x01", b"\x32\x02\0\x09", b"\x10\x00"])
def test_what_is_no_packet_ends_the_connection(data: bytes, stack: ExitStack) -> None:
    client = fast_client([])
    wire = Wire(client, stack)
    wire.there.sendall(data)
    assert client.loop_read() == MQTTErrorCode.MQTT_ERR_PROTOCOL
    assert client._sock is None


def test_the_end_of_the_stream_ends_the_connection_and_what_began_is_kept(stack: ExitStack) -> None:
    client = fast_client([])
    wire = Wire(client, stack)
    wire.there.sendall(b"SSH-2.0-OpenSSH")
    client.loop_read()
    wire.there.close()
    assert client.loop_read() == MQTTErrorCode.MQTT_ERR_CONN_LOST
    assert client.began == b"SSH-2.0-OpenSSH"
