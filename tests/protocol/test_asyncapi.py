"""docs/asyncapi.yaml is valid AsyncAPI 3, says what the tables say, and fits the messages that cross the bus."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from protocol import asyncapi, topics
from protocol.messages import MESSAGES, MessageRow
from tests.golden import make

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: make install (extra `dev`)")
yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: make install (extra `dev`)")

CHECKOUT = Path(__file__).resolve().parents[2]
SCHEMA = CHECKOUT / "tests" / "support" / "asyncapi" / "3.0.0.json"
SCHEMA_SHA256 = "d4571a420e6ffb7fcc7066c95a6db1202f299a3c51daa103d0706bf30f95e626"
every_row = pytest.mark.parametrize("row", MESSAGES.values(), ids=lambda row: row.type)
DOCUMENT: dict[str, Any] = yaml.safe_load((CHECKOUT / "docs" / "asyncapi.yaml").read_text("utf-8"))


@lru_cache(maxsize=1)
def official() -> Any:
    """The validator of the official schema."""
    return jsonschema.Draft7Validator(json.loads(SCHEMA.read_text("utf-8")))


def resolve(reference: str) -> Any:
    """What a reference within the document points at."""
    found: Any = DOCUMENT
    for step in reference.removeprefix("#/").split("/"):
        found = found[step]
    return found


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, each in value.items():
            if key == "$ref":
                yield each
            else:
                yield from references(each)
    elif isinstance(value, list):
        for each in value:
            yield from references(each)


def operations_of(row: MessageRow) -> list[dict[str, Any]]:
    return [
        each
        for each in DOCUMENT["operations"].values()
        if any(reference["$ref"].endswith(f"/messages/{row.type}") for reference in each["messages"])
    ]


def in_hexadecimal(value: Any) -> Any:
    if isinstance(value, dict):
        return value["hex"] if value.keys() == {"hex"} else {key: in_hexadecimal(each) for key, each in value.items()}
    return [in_hexadecimal(each) for each in value] if isinstance(value, list) else value


def payload_errors(row: MessageRow, payload: Any) -> list[str]:
    """What the document's schema of ``row`` has against a payload."""
    schema = {**DOCUMENT["components"]["messages"][row.type]["payload"], "components": DOCUMENT["components"]}
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(payload)]


def golden_payload(row: MessageRow) -> Any:
    return in_hexadecimal(make.plain(make.unpacked(row.type)))


# --- the official schema ----------------------------------------------------------------------------------


def test_the_official_schema_is_the_official_one() -> None:
    assert hashlib.sha256(SCHEMA.read_bytes()).hexdigest() == SCHEMA_SHA256


def test_the_file_is_valid_by_the_official_schema() -> None:
    assert [f"{error.json_path}: {error.message[:200]}" for error in official().iter_errors(DOCUMENT)] == []


def _qos_of_three(document: dict[str, Any]) -> None:
    document["operations"]["say_event"]["bindings"]["mqtt"]["qos"] = 3


def _an_unknown_key(document: dict[str, Any]) -> None:
    document["channels"]["event"]["max_bytes"] = 1


def _an_unknown_action(document: dict[str, Any]) -> None:
    document["operations"]["say_event"]["action"] = "say"


def _an_unknown_key_in_a_binding(document: dict[str, Any]) -> None:
    document["servers"]["local"]["bindings"]["mqtt"]["max_bytes"] = 1


def _a_schema_that_is_none(document: dict[str, Any]) -> None:
    document["components"]["schemas"]["Event"]["type"] = "map"


def _no_channel(document: dict[str, Any]) -> None:
    del document["operations"]["ask_memory_put"]["channel"]


@pytest.mark.parametrize(
    "spoil",
    [
        _qos_of_three,
        _an_unknown_key,
        _an_unknown_action,
        _an_unknown_key_in_a_binding,
        _a_schema_that_is_none,
        _no_channel,
    ],
    ids=lambda spoil: spoil.__name__.strip("_"),
)
def test_a_spoiled_document_is_not_valid(spoil: Callable[[dict[str, Any]], None]) -> None:
    document = copy.deepcopy(DOCUMENT)
    spoil(document)
    assert not official().is_valid(document)


def test_every_reference_leads_somewhere() -> None:
    for reference in references(DOCUMENT):
        assert resolve(reference) is not None, reference


# --- the tables -------------------------------------------------------------------------------------------


def test_the_file_is_what_the_generator_makes() -> None:
    # test_docs compares the text; here its YAML is read by another's parser.
    made = asyncapi.document()
    assert DOCUMENT["channels"] == made["channels"]
    assert DOCUMENT["operations"] == made["operations"]
    assert DOCUMENT["components"]["schemas"].keys() == made["components"]["schemas"].keys()


@every_row
def test_every_type_has_its_message_channel_and_operations(row: MessageRow) -> None:
    message = DOCUMENT["components"]["messages"][row.type]
    assert message["x-max-bytes"] == row.max_bytes
    assert message["contentType"] == f"application/{row.topic.format}"
    if row.topic is topics.REPLY:
        assert operations_of(row) == []
        assert row.type in DOCUMENT["channels"]["reply"]["messages"]
        return
    assert sorted(each["action"] for each in operations_of(row)) == ["receive", "send"]
    for operation in operations_of(row):
        channel = resolve(operation["channel"]["$ref"])
        assert [reference["$ref"].partition("/messages/")[0] for reference in operation["messages"]] == [
            operation["channel"]["$ref"]
        ]
        known = {"{service}": row.ask.service, "{verb}": row.ask.verb} if row.ask else {}
        assert channel["address"] == "/".join(known.get(level, level) for level in row.topic.levels)
        assert channel["x-max-bytes"] == row.topic.max_bytes
        binding = operation["bindings"]["mqtt"]
        assert (binding["qos"], binding["retain"]) == (row.topic.qos, row.topic.retain)
        assert ("reply" in operation) == ("messageExpiryInterval" in binding) == (row.ask is not None)


@pytest.mark.parametrize("row", [row for row in MESSAGES.values() if row.ask], ids=lambda row: row.type)
def test_every_question_names_its_answers_and_where_they_come(row: MessageRow) -> None:
    assert row.ask is not None
    for operation in operations_of(row):
        reply = operation["reply"]
        assert [each["$ref"].rpartition("/")[2] for each in reply["messages"]] == [row.ask.reply, "error"]
        assert resolve(reply["channel"]["$ref"])["address"] == "/".join(topics.REPLY.levels)
        assert "address" not in reply  # AsyncAPI: not beside a channel that has one
        assert resolve(operation["channel"]["$ref"])["address"].endswith(f"/{row.ask.service}/{row.ask.verb}")
    message = DOCUMENT["components"]["messages"][row.type]
    assert message["x-ttl-max-ms"] == row.ask.ttl_max_ms
    assert message["bindings"]["mqtt"]["responseTopic"] == "mindstream/v1/{target}/reply/{node}/{client}"


def test_the_parameters_of_a_channel_are_those_of_its_address() -> None:
    for name, channel in DOCUMENT["channels"].items():
        assert set(re.findall(r"\{(\w+)\}", channel["address"])) == set(channel["parameters"]), name


# --- the messages -----------------------------------------------------------------------------------------


@every_row
def test_the_golden_message_fits_its_schema_and_is_its_example(row: MessageRow) -> None:
    payload = golden_payload(row)
    assert payload_errors(row, payload) == []
    assert [each["payload"] for each in DOCUMENT["components"]["messages"][row.type]["examples"]] == [payload]


@every_row
def test_unknown_fields_fit_and_missing_ones_do_not(row: MessageRow) -> None:
    payload = golden_payload(row)
    data = payload if row.topic.format == "json" else payload["data"]
    data["later"] = payload["later"] = 1
    assert payload_errors(row, payload) == []
    name = row.struct.__name__
    for field in DOCUMENT["components"]["schemas"][name].get("required", []):
        kept = data.pop(field)
        assert any(f"'{field}' is a required property" in error for error in payload_errors(row, payload)), field
        data[field] = kept
    if row.topic.format == "msgpack":
        for field in ("v", "id", "type", "source", "time_us", "data"):
            kept = payload.pop(field)
            assert payload_errors(row, payload) != []
            payload[field] = kept


@pytest.mark.parametrize(
    ("type", "changes"),
    [
        ("memory.put", {"v": 2}),
        ("memory.put", {"type": "memory.recall"}),
        ("memory.put", {"ttl_ms": 0}),
        ("memory.put", {"ttl_ms": 600_001}),
        ("memory.put", {"id": ""}),
        ("memory.put", {"data": {"text": ""}}),
        ("memory.put", {"data": {"text": "x", "scope": "No Name"}}),
        ("memory.recall", {"data": {"query": "x", "limit": 201}}),
        ("model.generate", {"data": {"conversation": "garden", "top_p": 0}}),
        ("blob.pull", {"data": {"snapshot": "xyz", "transfer": "t", "have": "", "credit": 1}}),
        ("memory.entries", {"data": {"entries": [{"header": ""}]}}),
    ],
)
def test_what_the_decoder_refuses_does_not_fit(type: str, changes: dict[str, Any]) -> None:
    row = MESSAGES[type]
    assert payload_errors(row, golden_payload(row) | changes) != []


def test_binary_fields_are_binary_with_their_length() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    assert "contentEncoding" not in json.dumps(schemas)
    assert schemas["OriginHave"]["properties"]["hash"] == {
        "type": "string",
        "format": "binary",
        "x-min-bytes": 32,
        "x-max-bytes": 32,
        "description": "Hash of entry `seq`.",
    }
    content = schemas["SignedEntry"]["properties"]["content"]
    assert content["anyOf"] == [{"type": "string", "format": "binary"}, {"type": "null"}]
    assert content["x-content-schema"] == {"$ref": "#/components/schemas/MemoryContent"}


def test_every_field_that_the_code_explains_is_explained() -> None:
    assert DOCUMENT["components"]["schemas"]["Envelope"]["properties"]["id"]["description"] == "UUIDv7 of this message."
