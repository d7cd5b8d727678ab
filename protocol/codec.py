"""The envelope, and the one way in and out of bytes.

``{v, id, type, source, time_us, correlation?, reply_to?, ttl_ms?, data}`` as one msgpack map, the same on every
broker and MQTT version. Decoding is strict about what it knows (types, limits, versions, who may say what
where) and silent about what it does not (unknown fields). No input makes it allocate more than a small
multiple of its own length.
"""

from __future__ import annotations

import re
import time
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from protocol import messages
from protocol.errors import UNREADABLE, MalformedMessage, MessageTooLarge, UnknownType, UnsupportedVersion, WrongTopic
from protocol.ids import uuid7
from protocol.messages import MESSAGES, MessageRow
from protocol.topics import ParsedTopic

VERSION = 1


class Envelope(msgspec.Struct, omit_defaults=True):
    """What every message is wrapped in."""

    v: int
    """Version of the envelope: 1."""
    id: str
    """UUIDv7 of this message."""
    type: str
    """A row of the message table."""
    source: str
    """``node/service`` or ``node/client``; its node must be the topic's."""
    time_us: int
    """When it was sent, Unix microseconds by the sender's clock. Never used to judge age."""
    data: Any
    """The message itself."""
    correlation: str = ""
    """In an answer: the id of the ask."""
    reply_to: str = ""
    """In an ask: the client part of the topic that the answer goes to."""
    ttl_ms: int = 0
    """In an ask: how much longer it is worth carrying out; each hop subtracts what it took."""


_Id = Annotated[str, Meta(min_length=1, max_length=64)]
"""Ids become keys of journals and caches: a UUID, and room for another scheme, but no essay."""
_Source = Annotated[str, Meta(min_length=1, max_length=127)]
_ClientName = Annotated[str, Meta(max_length=63)]


class _RawEnvelope(msgspec.Struct):
    v: int
    id: _Id
    type: Annotated[str, Meta(max_length=64)]
    source: _Source
    time_us: int
    data: msgspec.Raw
    correlation: Annotated[str, Meta(max_length=64)] = ""
    reply_to: _ClientName = ""
    ttl_ms: int = 0


class Received(msgspec.Struct):
    """A decoded message, its wrapping, and where and when it came."""

    id: str
    type: str
    source: str
    time_us: int
    correlation: str
    reply_to: str
    ttl_ms: int
    data: Any
    """An instance of the row's struct."""
    row: MessageRow
    topic: ParsedTopic
    received_s: float
    """``time.monotonic()`` at arrival."""
    retained: bool = False
    """The broker had kept it: it was said at some time before this client subscribed."""

    @property
    def node(self) -> str:
        """The speaker, proven by the topic."""
        return self.topic.node


_encoder = msgspec.msgpack.Encoder()
_json_encoder = msgspec.json.Encoder()
_envelope_decoder = msgspec.msgpack.Decoder(_RawEnvelope)
_version_decoder = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])
_decoders: dict[str, msgspec.msgpack.Decoder[Any]] = {
    row.type: msgspec.msgpack.Decoder(row.struct) for row in MESSAGES.values()
}
_json_decoders: dict[str, msgspec.json.Decoder[Any]] = {
    row.topic.name: msgspec.json.Decoder(row.struct) for row in MESSAGES.values() if row.topic.format == "json"
}
_json_rows: dict[str, MessageRow] = {row.topic.name: row for row in MESSAGES.values() if row.topic.format == "json"}
_FIELD = re.compile(r"`\$\.?([^`]*)`|field `([^`]+)`")


def encode(
    message: msgspec.Struct,
    *,
    source: str,
    row: MessageRow | None = None,
    id: str = "",
    correlation: str = "",
    reply_to: str = "",
    ttl_ms: int = 0,
    time_us: int = 0,
) -> bytes:
    """The bytes of ``message`` in its envelope (or bare JSON, where its topic says so).

    ``id`` and ``time_us`` are made here when they are not given.

    Raises MessageTooLarge above the row's limit and UnknownType for a struct that no row names.
    """
    row = row or messages.row_of(message)
    if row.topic.format == "json":
        payload = _json_encoder.encode(message)
    else:
        payload = _encoder.encode(
            Envelope(
                VERSION,
                id or uuid7(),
                row.type,
                source,
                time_us or time.time_ns() // 1000,
                message,
                correlation,
                reply_to,
                ttl_ms,
            )
        )
    if len(payload) > row.max_bytes:
        raise MessageTooLarge(
            f"encoding {row.type}: {len(payload):,} bytes, its limit is {row.max_bytes:,}",
            hint="send less at once",
            type=row.type,
            reason="too large",
        )
    return payload


def decode(topic: ParsedTopic, payload: bytes, *, received_s: float | None = None) -> Received:
    """Decode and check one message that came on ``topic``.

    Raises MessageTooLarge, MalformedMessage, UnsupportedVersion, UnknownType or WrongTopic; each names topic,
    type, field and reason as far as they are known.
    """
    at_s = time.monotonic() if received_s is None else received_s
    where = topic.raw
    if len(payload) > topic.topic.max_bytes:
        raise MessageTooLarge(
            f"reading a message on {where}: {len(payload):,} bytes, the limit is {topic.topic.max_bytes:,}",
            topic=where,
            reason="too large",
        )
    if topic.topic.format == "json":
        return _decode_json(topic, payload, at_s)
    try:
        envelope = _envelope_decoder.decode(payload)
    except UNREADABLE as error:
        _check_version(payload, where)
        raise _malformed(where, "", error) from None
    if envelope.v != VERSION:
        _check_version(payload, where)
    row = MESSAGES.get(envelope.type)
    if row is None:
        raise UnknownType(
            f"reading a message on {where}: type {envelope.type[:80]!r} is not in this node's table",
            hint="the sender may be newer than this node",
            topic=where,
            type=envelope.type[:80],
            field="type",
            reason="unknown",
        )
    if row.topic is not topic.topic or (
        row.ask and (row.ask.service != topic.names["service"] or row.ask.verb != topic.names["verb"])
    ):
        raise WrongTopic(
            f"reading {row.type} on {where}: it is said on {row.topic.pattern}"
            + (f" as {row.ask.service}/{row.ask.verb}" if row.ask else ""),
            topic=where,
            type=row.type,
            field="type",
            reason="wrong topic",
        )
    if envelope.source.partition("/")[0] != topic.node:
        raise WrongTopic(
            f"reading {row.type} on {where}: source {envelope.source[:80]!r} speaks in the branch of {topic.node!r}",
            topic=where,
            type=row.type,
            field="source",
            reason="not the owner of the branch",
        )
    if len(payload) > row.max_bytes:
        raise MessageTooLarge(
            f"reading {row.type} on {where}: {len(payload):,} bytes, its limit is {row.max_bytes:,}",
            topic=where,
            type=row.type,
            reason="too large",
        )
    try:
        data = _decoders[row.type].decode(envelope.data)
    except UNREADABLE as error:
        raise _malformed(where, row.type, error) from None
    return Received(
        envelope.id,
        row.type,
        envelope.source,
        envelope.time_us,
        envelope.correlation,
        envelope.reply_to,
        envelope.ttl_ms,
        data,
        row,
        topic,
        at_s,
    )


def peek(payload: bytes) -> _RawEnvelope | None:
    """The envelope alone, its data undecoded; None when it cannot be read. For answering a bad ask."""
    try:
        return _envelope_decoder.decode(payload)
    except UNREADABLE:
        return None


def _decode_json(topic: ParsedTopic, payload: bytes, at_s: float) -> Received:
    where = topic.raw
    row = _json_rows[topic.topic.name]
    try:
        data = _json_decoders[topic.topic.name].decode(payload)
    except UNREADABLE as error:
        raise _malformed(where, row.type, error) from None
    source = f"{topic.node}/{topic.names.get('service', 'node')}"
    return Received("", row.type, source, 0, "", "", 0, data, row, topic, at_s)


def _check_version(payload: bytes, where: str) -> None:
    """Raises UnsupportedVersion when the payload is an envelope of another version, whatever else it holds."""
    try:
        found = _version_decoder.decode(payload).get("v")
        version = VERSION if found is None else msgspec.msgpack.decode(found, type=int)
    except UNREADABLE:
        return  # no number: the envelope's own error says so
    if version != VERSION:
        raise UnsupportedVersion(
            f"reading a message on {where}: envelope version {version}, this node speaks {VERSION}",
            hint="update the older node",
            topic=where,
            field="v",
            reason="unsupported version",
        )


def _malformed(where: str, type: str, error: Exception) -> MalformedMessage:
    text = str(error)
    found = _FIELD.search(text.rpartition(" - at ")[2]) or _FIELD.search(text)
    name = next((group for group in found.groups() if group), "") if found else ""
    missing = re.search(r"missing required field `([^`]+)`", text)
    if missing:
        name = f"{name}.{missing.group(1)}" if name and name != missing.group(1) else missing.group(1)
    return MalformedMessage(
        f"reading {type or 'a message'} on {where}: {text}", topic=where, type=type, field=name, reason=text
    )


__all__ = ["VERSION", "Envelope", "Received", "decode", "encode", "peek"]
