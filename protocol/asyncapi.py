"""The wire contract as an AsyncAPI 3.0.0 document, made from the topic and message tables.

It is written from the point of view of a participant, a node or any client with a name: it *says* (``send``) in its own
branch, *hears* (``receive``) what others say, *asks* and *answers*. A channel is a topic of the table, and one for each
question of ``ask/{target}/{service}/{verb}``. What AsyncAPI has no word for stands in ``x-`` fields: limits in bytes,
times to live, who may ask.

https://www.asyncapi.com/docs/reference/specification/v3.0.0, MQTT bindings 0.2.0.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from protocol import codec, topics
from protocol.entries import EntryHeader, MemoryContent, SignedEntry
from protocol.ids import NAME_PATTERN
from protocol.manifest import SignedManifest, SnapshotManifest
from protocol.messages import MESSAGES, MessageRow
from protocol.provenance import SignedStatement, Statement
from protocol.sealing import KeyWrap, SignedWrap
from protocol.topics import MAX_PACKET_BYTES, TOPICS, Topic

SPECIFICATION = "3.0.0"
BINDING_VERSION = "0.2.0"
CONTENT_TYPE = {"msgpack": "application/msgpack", "json": "application/json"}
SCHEMAS = "#/components/schemas/"

NESTED: dict[tuple[type[msgspec.Struct], str], type[msgspec.Struct]] = {
    (SignedEntry, "header"): EntryHeader,
    (SignedEntry, "content"): MemoryContent,
    (SignedManifest, "manifest"): SnapshotManifest,
    (SignedWrap, "wrap"): KeyWrap,
    (SignedStatement, "statement"): Statement,
}
"""Binary fields that are msgpack in turn: signed as bytes, so they travel as bytes."""

_PARAMETERS = {
    "node": "Who speaks: the first level below the root, and its owner alone may write there.",
    "target": "The node that is asked.",
    "asker": "The node that asked.",
    "client": "The `reply_to` of the ask.",
    "service": "A service of the node.",
    "run": "UUIDv7 of the run.",
    "transfer": "UUIDv7 that the receiver chose.",
}
_RESPONSE_TOPIC = "/".join({"{node}": "{target}", "{asker}": "{node}"}.get(each, each) for each in topics.REPLY.levels)
"""The reply's address in the words of the ask: who asks is ``node`` there, who answers is ``target``."""
_ABOUT = """\
What crosses the bus between Mindstream nodes, and any client that speaks to them. docs/protocol.md says the same in
words, with the rules that no schema holds.

A payload is one msgpack map, the envelope, whose `data` is the message; topics of content type `application/json` carry
a bare JSON object. Unknown fields are to be ignored; from the first release on a message only grows. Binary values
(`format: binary`) are msgpack's bin family, and are written in hexadecimal in the examples.
"""


def document(
    descriptions: Mapping[str, Mapping[str, str]] | None = None, examples: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The whole document, of plain JSON types.

    Args:
        descriptions: struct name to field name to what the field means.
        examples: message type to a whole payload, binary values as text.
    """
    schemas = _schemas(descriptions or {})
    return {
        "asyncapi": SPECIFICATION,
        "info": {
            "title": "Mindstream",
            "version": f"{codec.VERSION}.0.0",
            "description": _ABOUT,
            "license": {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        },
        "defaultContentType": CONTENT_TYPE["msgpack"],
        "servers": _servers(),
        "channels": _channels(),
        "operations": _operations(),
        "components": {
            "messages": {row.type: _message(row, examples or {}) for row in MESSAGES.values()},
            "schemas": schemas,
            "securitySchemes": {
                "password": {
                    "type": "userPassword",
                    "description": "The user's name is the node's: the broker lets it write its own branch alone.",
                }
            },
        },
    }


# --- servers and channels -----------------------------------------------------------------------------------


def _servers() -> dict[str, Any]:
    binding = {"mqtt": {"maximumPacketSize": MAX_PACKET_BYTES, "bindingVersion": BINDING_VERSION}}
    return {
        "local": {
            "host": "localhost:1883",
            "protocol": "mqtt",
            "protocolVersion": "5.0",
            "description": "The broker of this machine alone, without passwords. The embedded one speaks MQTT 5 only.",
            "bindings": binding,
        },
        "site": {
            "host": "{broker}:8883",
            "protocol": "secure-mqtt",
            "protocolVersion": "5.0",
            "description": "A broker for several machines: TLS and passwords.",
            "variables": {"broker": {"default": "broker.local", "description": "Its name on the network."}},
            "security": [{"$ref": "#/components/securitySchemes/password"}],
            "bindings": binding,
        },
    }


def _channel_of(row: MessageRow) -> str:
    return f"ask_{row.ask.service}_{row.ask.verb}" if row.ask else row.topic.name


def _channels() -> dict[str, Any]:
    channels: dict[str, Any] = {}
    for row in MESSAGES.values():
        channel = channels.setdefault(_channel_of(row), _channel(row))
        channel["messages"][row.type] = {"$ref": f"#/components/messages/{row.type}"}
    order = {topic.name: position for position, topic in enumerate(TOPICS)}
    return dict(sorted(channels.items(), key=lambda item: order.get(item[0], order["ask"])))


def _channel(row: MessageRow) -> dict[str, Any]:
    address = "/".join(row.topic.levels)
    if row.ask:
        address = address.replace("{service}", row.ask.service).replace("{verb}", row.ask.verb)
    return {
        "address": address,
        "summary": row.topic.about,
        "messages": {},
        "parameters": {
            name: {"description": _PARAMETERS.get(name, f"A name: 1 to 63 of `{NAME_PATTERN.pattern}`.")}
            for name in row.topic.params
            if f"{{{name}}}" in address
        },
        "x-max-bytes": row.topic.max_bytes,
        **({"x-at-least-every-s": row.topic.every_s} if row.topic.every_s else {}),
        "x-subscribe": _filter(row.topic, row),
    }


def _filter(topic: Topic, row: MessageRow) -> str:
    """The MQTT filter of the channel."""
    return topic.filter(service=row.ask.service, verb=row.ask.verb) if row.ask else topic.filter()


# --- operations ---------------------------------------------------------------------------------------------


def _operations() -> dict[str, Any]:
    operations: dict[str, Any] = {}
    for row in MESSAGES.values():
        if row.topic is topics.REPLY:
            continue  # it stands in the operations of what it answers
        name = row.type.replace(".", "_")
        speaking, hearing = ("ask", "answer") if row.ask else ("say", "hear")
        for action, verb in (("send", speaking), ("receive", hearing)):
            operations[f"{verb}_{name}"] = {
                "action": action,
                "channel": {"$ref": f"#/channels/{_channel_of(row)}"},
                "summary": _first_sentence(row.struct),
                "messages": [_in_channel(row)],
                **_reply(row),
                "bindings": {"mqtt": _binding(row)},
            }
    return operations


def _in_channel(row: MessageRow) -> dict[str, str]:
    return {"$ref": f"#/channels/{_channel_of(row)}/messages/{row.type}"}


def _reply(row: MessageRow) -> dict[str, Any]:
    if row.ask is None:
        return {}
    # No `address`: AsyncAPI wants none where the channel has one, and ours has: {target}/reply/{asker}/{reply_to}.
    answers = [_in_channel(MESSAGES[row.ask.reply]), _in_channel(MESSAGES["error"])]
    return {"reply": {"channel": {"$ref": f"#/channels/{topics.REPLY.name}"}, "messages": answers}}


def _binding(row: MessageRow) -> dict[str, Any]:
    expiry = {}
    if row.ask:
        expiry["messageExpiryInterval"] = {
            "type": "integer",
            "minimum": 1,
            "maximum": -(-row.ask.ttl_max_ms // 1000),
            "description": "Seconds: what is left of `ttl_ms`, rounded up. The broker counts it down while it waits.",
        }
    return {"qos": row.topic.qos, "retain": row.topic.retain, **expiry, "bindingVersion": BINDING_VERSION}


# --- messages -----------------------------------------------------------------------------------------------


def _message(row: MessageRow, examples: Mapping[str, Any]) -> dict[str, Any]:
    message: dict[str, Any] = {
        "name": row.type,
        "contentType": CONTENT_TYPE[row.topic.format],
        "summary": _first_sentence(row.struct),
        "payload": _payload(row),
        "x-max-bytes": row.max_bytes,
    }
    if row.ask:
        message["correlationId"] = {"location": "$message.payload#/id"}
        message["x-ttl-max-ms"] = row.ask.ttl_max_ms
        message["x-durable"] = row.ask.durable
        message["x-own-node-only"] = row.ask.own_node_only
        message["bindings"] = {
            "mqtt": {
                "responseTopic": _RESPONSE_TOPIC,
                "correlationData": {"type": "string", "description": "The envelope's `id`."},
                "bindingVersion": BINDING_VERSION,
            }
        }
    elif row.topic is topics.REPLY:
        message["correlationId"] = {"location": "$message.payload#/correlation"}
    if row.type in examples:
        message["examples"] = [{"name": row.type, "payload": examples[row.type]}]
    return message


def _payload(row: MessageRow) -> dict[str, Any]:
    data = {"$ref": SCHEMAS + row.struct.__name__}
    if row.topic.format == "json":
        return data
    properties: dict[str, Any] = {"type": {"const": row.type}, "data": data}
    required = []
    if row.ask:
        properties["ttl_ms"] = {"minimum": 1, "maximum": row.ask.ttl_max_ms}
        required = ["reply_to", "ttl_ms"]
    elif row.topic is topics.REPLY:
        required = ["correlation"]
    narrowed: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        narrowed["required"] = required
    return {"allOf": [{"$ref": f"{SCHEMAS}Envelope"}, narrowed]}


def _first_sentence(struct: type[msgspec.Struct]) -> str:
    text = " ".join((inspect.cleandoc(struct.__doc__ or "")).split()).replace("``", "`")
    return text.partition(". ")[0].rstrip(".") + "."


# --- schemas ------------------------------------------------------------------------------------------------


def _schemas(descriptions: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    structs = [*dict.fromkeys([row.struct for row in MESSAGES.values()]), *NESTED.values()]
    # The envelope's limits are those of the struct that reads it, its meaning that of the one that is documented.
    envelope = codec._RawEnvelope
    _, components = msgspec.json.schema_components([envelope, *structs], ref_template=SCHEMAS + "{name}")
    schemas: dict[str, Any] = {"Envelope": components.pop(envelope.__name__), **components}
    schemas["Envelope"]["title"] = "Envelope"
    schemas["Envelope"]["description"] = codec.Envelope.__doc__
    schemas["Envelope"]["properties"]["v"] = {"type": "integer", "const": codec.VERSION}
    by_name = _all_structs([envelope, *structs])
    for name, schema in schemas.items():
        schema["description"] = " ".join(str(schema["description"]).split()).replace("``", "`")
        struct = by_name[envelope.__name__ if name == "Envelope" else name]
        _complete(struct, schema, descriptions.get(name, {}))
    return schemas


def _complete(struct: type[msgspec.Struct], schema: dict[str, Any], descriptions: Mapping[str, str]) -> None:
    """Binary as binary, msgpack within binary named, and what each field means."""
    info = msgspec.inspect.type_info(struct)
    assert isinstance(info, msgspec.inspect.StructType)
    for field in info.fields:
        made = _binary(schema["properties"][field.encode_name], field.type)
        if (struct, field.name) in NESTED:
            made["contentMediaType"] = CONTENT_TYPE["msgpack"]
            made["x-content-schema"] = {"$ref": SCHEMAS + NESTED[struct, field.name].__name__}
        if "pattern" in made and made.get("default") == "":
            del made["default"]  # left out is not the same as empty, which the pattern refuses
        if text := descriptions.get(field.name):
            # Beside a $ref draft 07 reads nothing.
            made = {"allOf": [made], "description": text} if "$ref" in made else {**made, "description": text}
        schema["properties"][field.encode_name] = made


def _binary(schema: dict[str, Any], info: msgspec.inspect.Type) -> dict[str, Any]:
    """``schema`` with msgspec's base64 texts as what they are in msgpack: bytes."""
    inspected = msgspec.inspect
    if isinstance(info, inspected.BytesType):
        binary: dict[str, Any] = {"type": "string", "format": "binary"}
        if info.min_length is not None:
            binary["x-min-bytes"] = info.min_length
        if info.max_length is not None:
            binary["x-max-bytes"] = info.max_length
        return binary
    if isinstance(info, (inspected.ListType, inspected.VarTupleType)) and "items" in schema:
        return {**schema, "items": _binary(schema["items"], info.item_type)}
    if isinstance(info, inspected.UnionType) and any(isinstance(each, inspected.BytesType) for each in info.types):
        kinds: Sequence[inspected.Type] = info.types
        binary = next(_binary({}, each) for each in kinds if isinstance(each, inspected.BytesType))
        others = [each for each in schema["anyOf"] if each.get("contentEncoding") != "base64"]
        return {**schema, "anyOf": [binary, *others]}
    return schema


def _all_structs(roots: Sequence[type[msgspec.Struct]]) -> dict[str, type[msgspec.Struct]]:
    """Every struct that ``roots`` name, by name."""
    found: dict[str, type[msgspec.Struct]] = {}

    def walk(info: Any) -> None:
        if isinstance(info, msgspec.inspect.StructType):
            if info.cls.__name__ in found:
                return
            found[info.cls.__name__] = info.cls
            for field in info.fields:
                walk(field.type)
        for name in ("item_type", "key_type", "value_type"):
            if inner := getattr(info, name, None):
                walk(inner)
        for inner in getattr(info, "types", ()):
            walk(inner)

    for root in roots:
        walk(msgspec.inspect.type_info(root))
    return found


__all__ = ["NESTED", "document"]
