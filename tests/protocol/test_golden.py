"""The golden bytes: what was once written on the wire is written so for ever, and stays readable.

``tests/golden/`` holds a message of every type; clients in other languages may test themselves against it.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import codec, entries, manifest
from protocol.basis_manifest import SignedBasis, open_basis
from protocol.built_manifest import SignedBuiltManifest, open_built
from protocol.entries import SignedEntry
from protocol.errors import MalformedMessage, MindstreamError, ProtocolError
from protocol.identity import DOMAIN_ENTRY, DOMAIN_MANIFEST, Identity, Keyring, digest
from protocol.manifest import SignedManifest
from protocol.messages import MESSAGES, MemoryEntries, MessageRow
from protocol.topics import parse
from tests.golden import make, values

every_row = pytest.mark.parametrize("row", MESSAGES.values(), ids=lambda row: row.type)
FREE_MAPS = {"counters", "details", "params", "sampler", "state", "dev", "o", "cmps", "avty"}
"""Fields whose keys are the sender's own."""
KEYRING = Keyring({"sprout": values.SPROUT.fingerprint})


def suffix_of(row: MessageRow) -> str:
    return make.SUFFIX[row.topic.format]


def newest(row: MessageRow) -> bytes:
    return make.versions(row.type, suffix_of(row))[-1].read_bytes()


def readable_beside(path: Path, suffix: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.with_name(path.name.removesuffix(suffix) + ".json").read_text("utf-8"))
    return found


def unpack(row: MessageRow, payload: bytes) -> dict[str, Any]:
    """The payload as a client without our code reads it."""
    read: dict[str, Any] = json.loads(payload) if row.topic.format == "json" else msgpack.unpackb(payload)
    return read


def pack(row: MessageRow, message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() if row.topic.format == "json" else bytes(msgpack.packb(message))


def read(row: MessageRow, payload: bytes) -> codec.Received:
    return codec.decode(parse(values.golden(row).topic), payload)


def data_of(row: MessageRow, message: dict[str, Any]) -> dict[str, Any]:
    """The message without its envelope."""
    data: dict[str, Any] = message if row.topic.format == "json" else message["data"]
    return data


# --- the files --------------------------------------------------------------------------------------------


def test_every_type_has_a_value_and_a_file() -> None:
    missing = [f"tests/golden/values.py has no value for {type}" for type in MESSAGES if type not in values.VALUES]
    missing += [
        f"no bytes of {row.type}: run `python -m tests.golden.make`"
        for row in MESSAGES.values()
        if not make.versions(row.type, suffix_of(row))
    ]
    assert not missing


def test_every_file_belongs_to_a_type_of_the_table() -> None:
    # A type that was once on the wire never leaves the table: files of it would show that it had.
    known = {
        path.name.removesuffix(suffix) + end
        for type in (*MESSAGES, *make.SIGNED)
        for suffix in make.SUFFIX.values()
        for path in make.versions(type, suffix)
        for end in (suffix, ".json")
    }
    assert {path.name for path in make.FOLDER.iterdir() if path.suffix in (".msgpack", ".json")} == known


@every_row
def test_the_readable_file_says_what_the_bytes_say(row: MessageRow) -> None:
    for path in make.versions(row.type, suffix_of(row)):
        beside = readable_beside(path, suffix_of(row))
        assert beside["type"] == row.type
        assert parse(beside["topic"]).topic is row.topic
        assert make.plain(unpack(row, path.read_bytes())) == beside["payload"]


@every_row
def test_every_optional_field_is_given(row: MessageRow) -> None:
    value = values.VALUES[row.type]
    given_fields = {
        field.name for field in msgspec.structs.fields(value) if getattr(value, field.name) != _default_of(field)
    }
    assert given_fields == {field.name for field in msgspec.structs.fields(value)}


def _default_of(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default


# --- encoder and decoder ----------------------------------------------------------------------------------


@every_row
def test_the_encoder_writes_these_bytes(row: MessageRow) -> None:
    assert values.golden(row).payload == newest(row), f"{row.type}: see tests/golden/make.py for what may change"


@every_row
def test_the_decoder_reads_every_version_that_was_ever_written(row: MessageRow) -> None:
    for path in make.versions(row.type, suffix_of(row)):
        message = unpack(row, path.read_bytes())
        received = codec.decode(parse(readable_beside(path, suffix_of(row))["topic"]), path.read_bytes())
        assert_holds(msgspec.to_builtins(received.data, builtin_types=(bytes,)), data_of(row, message))
        if row.topic.format == "msgpack":
            for field in ("id", "type", "source", "time_us", "correlation", "reply_to", "ttl_ms"):
                assert getattr(received, field) == message.get(field, getattr(received, field))


def assert_holds(found: Any, written: Any, where: str = "data") -> None:
    """Everything that was written is found; fields that came later may stand beside it."""
    if isinstance(written, dict):
        for key, value in written.items():
            assert key in found, f"{where}.{key} is read no more"
            assert_holds(found[key], value, f"{where}.{key}")
    elif isinstance(written, list):
        assert len(found) == len(written), where
        for position, (one, other) in enumerate(zip(found, written, strict=True)):
            assert_holds(one, other, f"{where}[{position}]")
    else:
        assert found == written, where


@every_row
def test_fields_of_a_later_version_are_ignored(row: MessageRow) -> None:
    def grown(value: Any) -> Any:
        if isinstance(value, dict):
            inside = {key: each if key in FREE_MAPS else grown(each) for key, each in value.items()}
            return {"earlier_in_the_map": [1, {"deep": None}], **inside, "later": {"any": [True]}}
        return [grown(each) for each in value] if isinstance(value, list) else value

    payload = newest(row)
    later = pack(row, grown(unpack(row, payload)))
    assert len(later) > len(payload)
    assert read(row, later).data == read(row, payload).data


@every_row
def test_a_field_left_out_is_its_default_or_an_error_that_names_it(row: MessageRow) -> None:
    message = unpack(row, newest(row))
    for field in msgspec.structs.fields(row.struct):
        fewer = copy.deepcopy(message)
        if fewer is message or field.name not in data_of(row, fewer):
            continue
        del data_of(row, fewer)[field.name]
        if field.required:
            with pytest.raises(MalformedMessage) as caught:
                read(row, pack(row, fewer))
            assert caught.value.field == field.name
        else:
            assert getattr(read(row, pack(row, fewer)).data, field.name) == _default_of(field)


# --- what is signed ---------------------------------------------------------------------------------------


def signed_vector(name: str) -> tuple[bytes, dict[str, Any]]:
    path = make.FOLDER / f"{name}.msgpack"
    return path.read_bytes(), readable_beside(path, ".msgpack")


def test_a_log_entry_is_signed_and_chained_as_the_vector_says() -> None:
    wire, vector = signed_vector("signed-entry")
    signer = Identity("sprout", bytes.fromhex(vector["private_key"]["hex"]))
    assert signer.fingerprint == vector["fingerprint"]
    entry = msgspec.msgpack.decode(wire, type=SignedEntry)
    signed_bytes = bytes.fromhex(vector["signed_bytes"]["hex"])
    assert signed_bytes == b"mindstream/v1/entry\0" + entry.header == DOMAIN_ENTRY + entry.header
    assert signer.sign(b"", signed_bytes) == entry.signature
    header = entries.verify(entry, Keyring({"sprout": vector["fingerprint"]}))
    assert entry.salt is not None
    assert entry.content is not None
    assert header.content_digest == digest(entry.salt + entry.content)
    assert entries.entry_hash(entry.header).hex() == vector["hash_for_the_next_entry"]["hex"]
    assert msgspec.msgpack.encode(values.FIRST) == wire
    assert entries.read_header(values.SECOND).prev == digest(entry.header)


def test_an_erased_entry_still_verifies() -> None:
    assert entries.verify(values.ERASED, KEYRING) == entries.verify(values.SECOND, KEYRING)


def test_a_manifest_is_signed_and_named_as_the_vector_says() -> None:
    wire, vector = signed_vector("signed-manifest")
    signed = msgspec.msgpack.decode(wire, type=SignedManifest)
    assert bytes.fromhex(vector["signed_bytes"]["hex"]) == b"mindstream/v1/manifest\0" + signed.manifest
    assert values.SPROUT.sign(DOMAIN_MANIFEST, signed.manifest) == signed.signature
    assert manifest.open_manifest(signed, KEYRING) == values.MANIFEST
    assert manifest.snapshot_id(signed) == vector["snapshot_id"] == digest(signed.manifest).hex()
    assert msgspec.msgpack.encode(values.SIGNED_MANIFEST) == wire


def test_one_bit_changed_anywhere_in_a_signed_thing_is_found() -> None:
    def flipped(data: bytes) -> Iterator[bytes]:
        for place in range(len(data)):
            yield data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    first = values.FIRST
    assert first.content is not None
    assert first.salt is not None
    for name in ("header", "signature", "salt", "content"):
        for changed in flipped(getattr(first, name)):
            with pytest.raises(MindstreamError):
                entries.verify(msgspec.structs.replace(first, **{name: changed}), KEYRING)
    for name in ("manifest", "signature"):
        for changed in flipped(getattr(values.SIGNED_MANIFEST, name)):
            with pytest.raises(MindstreamError):
                manifest.open_manifest(msgspec.structs.replace(values.SIGNED_MANIFEST, **{name: changed}), KEYRING)
        for changed in flipped(getattr(values.SIGNED_BUILT_MANIFEST, name)):
            with pytest.raises(MindstreamError):
                open_built(msgspec.structs.replace(values.SIGNED_BUILT_MANIFEST, **{name: changed}), KEYRING)
        for changed in flipped(getattr(values.SIGNED_BASIS, name)):
            with pytest.raises(MindstreamError):
                open_basis(msgspec.structs.replace(values.SIGNED_BASIS, **{name: changed}), KEYRING)


# --- bytes that were damaged on the way -------------------------------------------------------------------


def survive(row: MessageRow, payload: bytes) -> bool:
    """Whether damaged bytes were read; anything but an error of the tree fails the test."""
    try:
        data = read(row, payload).data
    except ProtocolError:
        return False
    for entry in data.entries if isinstance(data, MemoryEntries) else ():
        _harmless(lambda entry=entry: entries.read_content(entry) and entries.verify(entry, KEYRING))  # type: ignore[misc]
    if isinstance(data, SignedManifest):
        _harmless(lambda: manifest.open_manifest(data, KEYRING))
    if isinstance(data, SignedBuiltManifest):
        _harmless(lambda: open_built(data, KEYRING))
    if isinstance(data, SignedBasis):
        _harmless(lambda: open_basis(data, KEYRING))
    return True


def _harmless(call: Callable[[], object]) -> None:
    try:
        call()
    except MindstreamError:
        pass  # refused by name is what is asked for


@every_row
def test_a_payload_cut_anywhere_is_refused(row: MessageRow) -> None:
    payload = newest(row)
    assert not any(survive(row, payload[:length]) for length in range(len(payload)))


@every_row
def test_a_payload_with_any_byte_changed_is_survived(row: MessageRow) -> None:
    payload = newest(row)
    for place in range(len(payload)):
        for value in (0xC0, 0xDF, payload[place] ^ 0x01, payload[place] ^ 0x80):
            survive(row, payload[:place] + bytes([value]) + payload[place + 1 :])


@given(data=st.data())
def test_payloads_spliced_into_each_other_are_survived(data: st.DataObject) -> None:
    row, other = (data.draw(st.sampled_from(list(MESSAGES.values()))) for _ in range(2))
    payload, piece = bytearray(newest(row)), newest(other)
    begin, end = sorted((data.draw(st.integers(0, len(payload))), data.draw(st.integers(0, len(payload)))))
    start = data.draw(st.integers(0, len(piece)))
    payload[begin:end] = piece[start : start + data.draw(st.integers(0, 64))]
    survive(row, bytes(payload))


# --- the maker --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the golden files for the maker to write into."""
    copied = tmp_path / "golden"
    shutil.copytree(
        make.FOLDER, copied, ignore=shutil.ignore_patterns("*.py", "__pycache__", "recordings", "snapshots")
    )
    monkeypatch.setattr(make, "FOLDER", copied)
    return copied


def test_the_maker_writes_what_is_new_and_nothing_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert make.main([]) == 0
    assert capsys.readouterr().out == ""
    for name in ("memory.put.msgpack", "memory.put.json", "node.state.payload.json"):
        (folder / name).unlink()
    assert make.main([]) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_maker_changes_no_file_that_is_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "memory.stored.msgpack"
    old = msgpack.unpackb(path.read_bytes())
    del old["data"]["already"]  # as it was before that field came
    path.write_bytes(msgpack.packb(old))
    before = path.read_bytes()
    assert make.main([]) == 1
    assert "memory.stored" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert make.main(["--grow", "memory.stored"]) == 0
    assert path.read_bytes() == before
    assert [each.name for each in make.versions("memory.stored", ".msgpack")] == [
        "memory.stored.msgpack",
        "memory.stored.v2.msgpack",
    ]
    test_the_decoder_reads_every_version_that_was_ever_written(MESSAGES["memory.stored"])
    test_the_encoder_writes_these_bytes(MESSAGES["memory.stored"])
    assert make.main([]) == 0


def test_the_maker_overwrites_only_when_told(folder: Path) -> None:
    path = folder / "event.msgpack"
    path.write_bytes(b"\x80")
    assert make.main(["--rewrite", "memory.put"]) == 1
    assert path.read_bytes() == b"\x80"
    assert make.main(["--rewrite", "event"]) == 0
    assert path.read_bytes() == values.golden(MESSAGES["event"]).payload
