"""The short way in gives what paho's own way gives, for every PUBLISH and PUBACK that paho can read."""

from __future__ import annotations

import dataclasses
import socket
from typing import Any

import paho.mqtt.client as paho
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion, _ConnectionState
from paho.mqtt.exception import MalformedPacket
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edge.mqtt_client import FastClient, Owner, ReadAhead

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


@pytest.mark.parametrize("version", [V5, V3])
def test_a_puback_of_success_frees_its_message_and_says_so(version: MQTTProtocolVersion) -> None:
    acknowledged: list[int] = []
    client = fast_client([], acknowledged, version=version)
    info = client.publish("a", b"x", 1)
    assert not info._published
    handle(client, 0x40, info.mid.to_bytes(2, "big"))
    assert info._published
    assert acknowledged == [1]
    assert not client._out_messages
    handle(client, 0x40, info.mid.to_bytes(2, "big"))
    assert acknowledged == [1], "a PUBACK that nobody waits for counts nothing"


@pytest.mark.parametrize("rest", [b"", b"\x00", b"\x1f\x00\x01a", b"\x04\x1f\x00\x01a"])
@pytest.mark.parametrize("code", [0x00, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99])
def test_a_puback_with_a_reason_is_success_or_failure_as_paho_reads_it(code: int, rest: bytes) -> None:
    packet = b"\0\1" + bytes([code]) + rest
    acknowledged: list[int] = []
    refused: list[tuple[str, int]] = []
    reasons: list[ReasonCode] = []
    stock = stock_client([])
    stock.on_publish = lambda _c, _d, _mid, reason, _p: reasons.append(reason)
    for client in (fast_client([], acknowledged, refused), stock):
        assert client.publish("a/b", b"x", 1).mid == 1
        handle(client, 0x40, packet)
    if not reasons:
        return  # paho cannot read the properties behind it, which we do not read
    assert [reason.value for reason in reasons] == [code]
    assert (acknowledged, refused) == (([], [("a/b", code)]) if reasons[0].is_failure else ([1], []))


def test_a_puback_of_3_1_1_with_more_than_an_id_is_malformed() -> None:
    client = fast_client([], version=V3)
    info = client.publish("a", b"x", 1)
    assert handle(client, 0x40, info.mid.to_bytes(2, "big") + b"\x87") == "malformed"


@pytest.mark.parametrize("version", [V5, V3])
def test_nothing_is_published_before_the_connack_and_all_of_it_after(version: MQTTProtocolVersion) -> None:
    """A PUBLISH packed for one version and read as the other would have a byte too many or too few."""
    here, there = socket.socketpair()
    client = fast_client([], version=version)
    with here, there:
        client._sock = here
        client._state = _ConnectionState.MQTT_CS_CONNECTING
        info = client.publish("a", b"x", 1)
        assert info.rc == MQTTErrorCode.MQTT_ERR_NO_CONN
        assert not client._out_packet
        client._owner = dataclasses.replace(client._owner, on_connack=lambda code: code == 0)
        handle(client, 0x20, b"\0\0\0" if version == V5 else b"\0\0")
        there.settimeout(5)
        properties = b"\0" if version == V5 else b""
        body = b"\0\1a" + info.mid.to_bytes(2, "big") + properties + b"x"
        assert there.recv(100) == b"\x32" + bytes([len(body)]) + body
        client._sock = None


@pytest.mark.parametrize("sizes", [[1, 1, 3], [100_000], [1, 70_000, 1], [5]])
def test_reading_ahead_gives_the_same_bytes_in_the_same_order(sizes: list[int]) -> None:
    here, there = socket.socketpair()
    with here, there:
        here.setblocking(False)
        ahead = ReadAhead(here)
        with pytest.raises(BlockingIOError):
            ahead.recv(1)
        sent = bytes(range(256)) * (sum(sizes) // 256 + 1)
        got = b""
        written = 0
        turn = 0
        while len(got) < len(sent):
            if written < len(sent):
                written += there.send(sent[written : written + 20_000])
            size = sizes[turn % len(sizes)]
            piece = ahead.recv(size) if ahead.pending() or written > len(got) else b""
            assert len(piece) <= size
            got += piece
            turn += 1
        assert got == sent
        assert ahead.pending() == 0
        there.close()
        assert ahead.recv(1) == b"", "the end of the stream is passed on"
