"""The codec: every message comes out as it went in, and no input does more than raise a named error."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import codec, messages, topics
from protocol.codec import decode, encode, peek
from protocol.errors import (
    MalformedMessage,
    MessageTooLarge,
    ProtocolError,
    UnknownType,
    UnsupportedVersion,
    WrongTopic,
)
from protocol.ids import UUID7_PATTERN, uuid7
from protocol.messages import MESSAGES, MemoryPut, MessageRow, NodeState, row_of
from protocol.topics import TOPICS, ParsedTopic, Topic, parse

every_row = pytest.mark.parametrize("row", MESSAGES.values(), ids=lambda row: row.type)
every_topic = pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.name)


def topic_of(row: MessageRow, node: str = "tomato") -> ParsedTopic:
    """A topic on which the row may be said."""
    names = dict.fromkeys(row.topic.params, "x") | {"node": node}
    if row.ask is not None:
        names |= {"service": row.ask.service, "verb": row.ask.verb}
    return parse(row.topic.format_topic(**names))


PUT = MESSAGES["memory.put"]
PUT_TOPIC = topic_of(PUT)


def envelope(**changes: Any) -> dict[str, Any]:
    """A good put as an untyped map, changed; None takes a field away."""
    fields = {
        "v": 1,
        "id": uuid7(),
        "type": "memory.put",
        "source": "tomato/cli",
        "time_us": 1,
        "reply_to": "cli",
        "ttl_ms": 1000,
        "data": {"text": "x"},
    }
    return {name: value for name, value in (fields | changes).items() if value is not None}


def read(**changes: Any) -> codec.Received:
    return decode(PUT_TOPIC, msgpack.packb(envelope(**changes)))


# --- what goes in comes out -------------------------------------------------------------------------------


def structs(kind: type[msgspec.Struct]) -> st.SearchStrategy[msgspec.Struct]:
    """Instances of a message struct, within its limits."""
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, msgspec.inspect.StructType)
    return st.builds(kind, **{field.name: _values(field.type) for field in info.fields})


def _values(info: msgspec.inspect.Type) -> st.SearchStrategy[Any]:
    inspect = msgspec.inspect
    if isinstance(info, inspect.StrType):
        if info.pattern:
            return st.from_regex(info.pattern.rstrip("$"), fullmatch=True)
        return st.text(st.characters(exclude_categories=["Cs"]), min_size=info.min_length or 0, max_size=50)
    if isinstance(info, inspect.IntType):
        return st.integers(info.ge if info.ge is not None else -(2**63), info.le if info.le is not None else 2**63 - 1)
    if isinstance(info, inspect.FloatType):
        low = info.ge if info.ge is not None else info.gt
        return st.floats(low, info.le, allow_nan=False, exclude_min=info.gt is not None)
    if isinstance(info, inspect.BytesType):
        return st.binary(min_size=info.min_length or 0, max_size=min(info.max_length or 64, 64))
    if isinstance(info, inspect.ListType):
        return st.lists(_values(info.item_type), min_size=info.min_length or 0, max_size=3)
    if isinstance(info, inspect.VarTupleType):
        return st.lists(_values(info.item_type), max_size=3).map(tuple)
    if isinstance(info, inspect.DictType):
        return st.dictionaries(_values(info.key_type), _values(info.value_type), max_size=3)
    if isinstance(info, inspect.UnionType):
        return st.one_of(*map(_values, info.types))
    if isinstance(info, inspect.StructType):
        return structs(info.cls)
    if isinstance(info, inspect.LiteralType):
        return st.sampled_from(info.values)
    simple = {inspect.BoolType: st.booleans(), inspect.NoneType: st.none(), inspect.AnyType: st.text(max_size=5)}
    return simple[type(info)]


@every_row
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_every_message_comes_out_as_it_went_in(row: MessageRow, data: st.DataObject) -> None:
    message = data.draw(structs(row.struct))
    payload = encode(message, source="tomato/svc", row=row, correlation="c", reply_to="r", ttl_ms=7)
    received = decode(topic_of(row), payload, received_s=12.5)
    assert received.data == message
    assert (received.type, received.node, received.row, received.received_s) == (row.type, "tomato", row, 12.5)
    if row.topic.format == "msgpack":
        assert (received.source, received.correlation, received.reply_to, received.ttl_ms) == (
            "tomato/svc",
            "c",
            "r",
            7,
        )
        assert UUID7_PATTERN.fullmatch(received.id)


def test_an_envelope_is_a_plain_map_that_any_msgpack_library_reads() -> None:
    payload = encode(MemoryPut(text="x"), source="tomato/cli", id="i", ttl_ms=5)
    fields = msgpack.unpackb(payload)
    assert fields.pop("time_us") > 10**15
    assert fields == {
        "v": 1,
        "id": "i",
        "type": "memory.put",
        "source": "tomato/cli",
        "ttl_ms": 5,
        "data": {"text": "x"},
    }


def test_presence_is_plain_json_and_its_source_is_its_topic() -> None:
    row = MESSAGES["node.state"]
    payload = encode(NodeState(state="ready", time_us=5), source="tomato/supervisor")
    assert payload.startswith(b"{")
    received = decode(topic_of(row), payload)
    assert received.source == "tomato/node"


def test_unknown_fields_are_ignored_in_the_envelope_and_in_the_message() -> None:
    received = read(later={"a": [1, None]}, data={"text": "x", "colour": "red", "nested": {"deep": [[]]}})
    assert received.data == MemoryPut(text="x")


def test_a_message_above_its_limit_is_not_encoded() -> None:
    with pytest.raises(MessageTooLarge) as caught:
        encode(MemoryPut(text="x" * 300_000), source="tomato/cli")
    assert (caught.value.type, caught.value.reason) == ("memory.put", "too large")


def test_a_struct_that_no_row_names_is_not_encoded() -> None:
    class Foreign(msgspec.Struct):
        x: int = 0

    with pytest.raises(UnknownType):
        encode(Foreign(), source="tomato/cli")


# --- what is wrong is named -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kind", "field"),
    [
        ({"v": 2}, UnsupportedVersion, "v"),
        ({"v": 2, "data": None, "id": None}, UnsupportedVersion, "v"),
        ({"v": -1}, UnsupportedVersion, "v"),
        ({"v": "1"}, MalformedMessage, "v"),
        ({"v": None}, MalformedMessage, "v"),
        ({"id": None}, MalformedMessage, "id"),
        ({"id": ""}, MalformedMessage, "id"),
        ({"id": "x" * 65}, MalformedMessage, "id"),
        ({"id": 5}, MalformedMessage, "id"),
        ({"type": None}, MalformedMessage, "type"),
        ({"type": "memory.poke"}, UnknownType, "type"),
        ({"type": "memory.recall"}, WrongTopic, "type"),
        ({"type": "node.state"}, WrongTopic, "type"),
        ({"source": None}, MalformedMessage, "source"),
        ({"source": "sprout/cli"}, WrongTopic, "source"),
        ({"source": "tomato2/cli"}, WrongTopic, "source"),
        ({"source": "x" * 128}, MalformedMessage, "source"),
        ({"time_us": "now"}, MalformedMessage, "time_us"),
        ({"data": None}, MalformedMessage, "data"),
        ({"ttl_ms": 1.5}, MalformedMessage, "ttl_ms"),
        ({"ttl_ms": 2**70}, MalformedMessage, ""),
        ({"correlation": "x" * 65}, MalformedMessage, "correlation"),
        ({"reply_to": "x" * 64}, MalformedMessage, "reply_to"),
        ({"data": []}, MalformedMessage, ""),
        ({"data": {}}, MalformedMessage, "text"),
        ({"data": {"text": 5}}, MalformedMessage, "text"),
        ({"data": {"text": ""}}, MalformedMessage, "text"),
        ({"data": {"text": "x" * 65_537}}, MalformedMessage, "text"),
        ({"data": {"text": "x", "scope": "A B"}}, MalformedMessage, "scope"),
        ({"data": {"text": "x", "time_us": -1}}, MalformedMessage, "time_us"),
        ({"data": {"text": "x", "time_us": 2**63}}, MalformedMessage, "time_us"),
    ],
)
def test_each_fault_is_named_with_topic_type_field_and_reason(
    changes: dict[str, Any], kind: type[ProtocolError], field: str
) -> None:
    try:
        payload = msgpack.packb(envelope(**changes))
    except OverflowError:
        payload = msgpack.packb(envelope(ttl_ms=None)) + b"\xa6ttl_ms"
    with pytest.raises(ProtocolError) as caught:
        decode(PUT_TOPIC, payload)
    error = caught.value
    assert type(error) is kind
    assert error.field == field
    assert error.topic == PUT_TOPIC.raw
    assert error.reason
    assert PUT_TOPIC.raw in error.message
    if "data" in changes and changes["data"] is not None:
        assert error.type == "memory.put"


def test_a_name_or_snapshot_with_a_line_feed_behind_it_is_none() -> None:
    for type, data in (
        ("model.cancel", {"run": "abc\n"}),
        ("snapshot.manifest.ask", {"snapshot": "a" * 64 + "\n"}),
    ):
        with pytest.raises(MalformedMessage, match="regex"):
            decode(topic_of(MESSAGES[type]), msgpack.packb(envelope(type=type, data=data)))


def test_a_fault_deep_inside_is_named_by_its_path() -> None:
    row = MESSAGES["memory.merge"]
    entry = {"header": b"h", "signature": 5}
    payload = msgpack.packb(envelope(type=row.type, data={"entries": [entry]}))
    with pytest.raises(MalformedMessage) as caught:
        decode(topic_of(row), payload)
    assert caught.value.field == "entries[0].signature"


def test_an_ask_is_said_on_its_own_verbs_topic_alone() -> None:
    other = parse(topics.ASK.format_topic(node="tomato", target="x", service="memory_store", verb="recall"))
    with pytest.raises(WrongTopic) as caught:
        decode(other, msgpack.packb(envelope()))
    assert "memory_store/put" in caught.value.message


@every_topic
def test_a_payload_above_its_topics_limit_is_refused_unread(topic: Topic) -> None:
    parsed = parse(topic.format_topic(**dict.fromkeys(topic.params, "x")))
    with pytest.raises(MessageTooLarge) as caught:
        decode(parsed, b"\xc1" * (topic.max_bytes + 1))
    assert caught.value.topic == parsed.raw


def test_a_payload_above_its_types_limit_is_refused() -> None:
    row = MESSAGES["memory.vector.ask"]
    payload = msgpack.packb(envelope(type=row.type, data={"padding": "x" * row.max_bytes}))
    with pytest.raises(MessageTooLarge) as caught:
        decode(topic_of(row), payload)
    assert caught.value.type == row.type


def test_text_that_is_not_utf_8_is_malformed() -> None:
    good = msgpack.packb(envelope(data={"text": "tomato"}))
    for bad in (good[:-6] + b"\xff\xfe\xfd\xfc\xfb\xfa", good[:-3] + b"\xed\xa0\x80"):
        with pytest.raises(MalformedMessage):
            decode(PUT_TOPIC, bad)
    with pytest.raises(MalformedMessage):
        decode(PUT_TOPIC, msgpack.packb(envelope(id="abcd")).replace(b"abcd", b"\xff\xff\xff\xff"))


def test_the_same_field_twice_is_no_way_around_a_check() -> None:
    good = msgpack.packb(envelope())
    twice = bytes([good[0] + 1]) + good[1:] + msgpack.packb("source") + msgpack.packb("sprout/cli")
    with pytest.raises(WrongTopic):
        decode(PUT_TOPIC, twice)


def test_what_stands_behind_the_message_is_an_error() -> None:
    with pytest.raises(MalformedMessage):
        decode(PUT_TOPIC, msgpack.packb(envelope()) + b"\0")


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1a", b"\xdd\0\0\0\1", b"\x81\x91"])
@pytest.mark.parametrize("field", ["data", "later", "whole"])
def test_deep_nesting_is_malformed_not_a_crash(opening: bytes, field: str) -> None:
    deep = opening * (200_000 // len(opening)) + b"\xc0"
    payload = deep if field == "whole" else msgpack.packb(envelope(**{field: 0}))[:-1] + deep
    if field == "data":
        payload = msgpack.packb(envelope(data=None) | {"data": 0})[:-1] + deep
    with pytest.raises(ProtocolError):
        decode(PUT_TOPIC, payload)
    assert peek(payload) is None


def test_deep_nesting_in_json_is_malformed() -> None:
    with pytest.raises(MalformedMessage):
        decode(topic_of(MESSAGES["node.state"]), b'{"later":' + b"[" * 4000)


@pytest.mark.parametrize(
    "payload", [b"", b"\xc1", b"\x80", b"\xc0", b"{}", b"\x01", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"]
)
def test_bytes_that_are_no_envelope_are_malformed(payload: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode(PUT_TOPIC, payload)
    assert peek(payload) is None


# --- fuzz -------------------------------------------------------------------------------------------------

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.binary(max_size=40),
    st.text(max_size=40),
    st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=20)),
)
TREES = st.recursive(
    LEAVES, lambda each: st.lists(each, max_size=4) | st.dictionaries(st.text(max_size=8), each, max_size=4)
)


def survive(topic: ParsedTopic, payload: bytes) -> None:
    """Decode, or raise an error of the tree that says where and why."""
    peek(payload)
    error = None
    try:
        decode(topic, payload)
    except ProtocolError as caught:
        error = caught
    assert error is None or (error.topic == topic.raw and error.reason and len(error.message) < 4000)


@every_topic
@settings(max_examples=60, deadline=None)
@given(payload=st.binary(max_size=300))
def test_random_bytes_are_survived(topic: Topic, payload: bytes) -> None:
    survive(parse(topic.format_topic(**dict.fromkeys(topic.params, "x"))), payload)


@every_row
@settings(max_examples=40, deadline=None)
@given(tree=TREES)
def test_random_data_in_a_good_envelope_is_survived(row: MessageRow, tree: Any) -> None:
    survive(topic_of(row), msgpack.packb(envelope(type=row.type, data=None) | {"data": tree}))


@every_row
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_good_message_with_bytes_changed_cut_or_added_is_survived(row: MessageRow, data: st.DataObject) -> None:
    payload = bytearray(encode(data.draw(structs(row.struct)), source="tomato/svc", row=row))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, max(0, len(payload) - 1)))
        match data.draw(st.sampled_from(["change", "cut", "add"])):
            case "change":
                payload[place : place + 1] = bytes([data.draw(st.integers(0, 255))])
            case "cut":
                del payload[place : place + data.draw(st.integers(1, 20))]
            case _:
                payload[place:place] = data.draw(st.binary(max_size=20))
    survive(topic_of(row), bytes(payload))


@settings(max_examples=100, deadline=None)
@given(fields=st.dictionaries(st.sampled_from(sorted(envelope())), LEAVES, max_size=4))
def test_an_envelope_with_any_fields_replaced_is_survived(fields: dict[str, Any]) -> None:
    survive(PUT_TOPIC, msgpack.packb(envelope() | fields))


# --- memory -----------------------------------------------------------------------------------------------

CLAIMS = [
    marker + count.to_bytes(4, "big")
    for marker in (b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9")
    for count in (2**20, 2**28, 2**32 - 1)
]


@pytest.mark.parametrize("claim", CLAIMS, ids=bytes.hex)
def test_a_claimed_length_is_not_allocated(claim: bytes) -> None:
    head = msgpack.packb(envelope(data=None) | {"data": 0})[:-1]
    merge = msgpack.packb(envelope(type="memory.merge", data=None) | {"data": {"entries": 0}})[:-1]
    for topic, payload in (
        (PUT_TOPIC, claim),
        (PUT_TOPIC, head + claim),
        (topic_of(MESSAGES["memory.merge"]), merge + claim),
    ):
        tracemalloc.start()
        survive(topic, payload)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < 200_000


@every_row
def test_memory_stays_within_a_multiple_of_the_rows_limit(row: MessageRow) -> None:
    """The worst that a sender can do: as many of the smallest things as the limit holds, wherever they may stand."""
    fill = row.max_bytes - 400
    if row.topic.format == "json":
        payloads = [b'{"state":"ready","time_us":1,"details":{"x":[%s0]}}' % (b"[]," * (fill // 3 - 50))]
    else:
        names = [field.encode_name for field in msgspec.structs.fields(row.struct)] + ["later"]
        payloads = []
        for name in names:
            head = msgpack.packb(envelope(type=row.type, data=None) | {"data": {name: 0}})[:-1]
            payloads += [
                head + b"\xdd" + fill.to_bytes(4, "big") + one * fill for one in (b"\x90", b"\x80", b"\0", b"\xa0")
            ]
    for payload in payloads:
        assert len(payload) <= row.max_bytes
        tracemalloc.start()
        survive(topic_of(row), payload)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < 64 * row.max_bytes + 200_000


HOSTILE_RUN = """
import resource, sys
from protocol import codec, topics
from protocol.errors import ProtocolError
topic = topics.parse("mindstream/v1/tomato/ask/sprout/memory_store/put")
limit = 200 * 1024 * 1024
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
refused = 0
for size in (1_000, 1_000_000, 1_024_000):
    for pattern in ("dd ff ff ff ff", "91", "81 01", "c6 7f ff ff ff", "00", "ff"):
        try:
            codec.decode(topic, (bytes.fromhex(pattern) * size)[:size])
        except ProtocolError:
            refused += 1
print(refused)
"""


def test_hostile_payloads_are_refused_in_a_process_with_little_memory() -> None:
    child = subprocess.run([sys.executable, "-c", HOSTILE_RUN], capture_output=True, text=True, timeout=150)
    assert child.returncode == 0, child.stderr[-2000:]
    assert child.stdout.strip() == "18"


# --- the table --------------------------------------------------------------------------------------------


def test_each_rows_struct_and_type_find_the_row() -> None:
    for row in MESSAGES.values():
        assert row_of(row.struct, type_name=row.type) is row
        assert row_of(row.struct).struct is row.struct
    with pytest.raises(UnknownType):
        row_of(MemoryPut, type_name="memory.poke")


def test_every_answer_is_said_on_the_reply_topic() -> None:
    for row in MESSAGES.values():
        if row.ask is not None:
            assert row.topic is topics.ASK
            assert MESSAGES[row.ask.reply].topic is topics.REPLY
            assert row.ask.ttl_max_ms > 0


def test_every_field_of_time_or_size_carries_its_unit() -> None:
    for row in MESSAGES.values():
        for field in msgspec.structs.fields(row.struct):
            assert not {"time", "duration", "size", "ttl", "age", "timeout"} & {field.name}, f"{row.type}.{field.name}"


def test_every_message_and_public_field_type_has_a_docstring() -> None:
    for row in MESSAGES.values():
        assert (row.struct.__doc__ or "").strip(), row.type
    assert messages.__doc__
