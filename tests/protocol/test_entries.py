"""Log entries: signed bytes, a salted digest of the content, and nothing that can be changed on the way."""

from __future__ import annotations

from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.entries import (
    DOMAIN_ENTRY,
    GENESIS,
    MAX_CONTENT_BYTES,
    MAX_HEADER_BYTES,
    MAX_HLC,
    MAX_SEQ,
    MemoryContent,
    Origin,
    SignedEntry,
    entry_hash,
    read_content,
    read_header,
    seal,
    verify,
)
from protocol.errors import BadSignature, MalformedMessage, MindstreamError, UnknownPeer
from protocol.identity import DOMAIN_MANIFEST, Identity, Keyring, digest
from protocol.ids import uuid7

TOMATO = Identity("tomato", bytes(range(32)))
KEYRING = Keyring({"tomato": TOMATO.fingerprint})
ORIGIN = Origin("tomato", "everyone", uuid7())


def sealed(text: str = "ripe", **changes: Any) -> SignedEntry:
    fields: dict[str, Any] = {
        "origin": ORIGIN,
        "seq": 1,
        "prev": GENESIS,
        "hlc": 5,
        "id": uuid7(),
        "clock_synced": True,
    }
    return seal(TOMATO, MemoryContent(text=text, time_us=1), **(fields | changes))


def signed(header: bytes, domain: bytes = DOMAIN_ENTRY) -> SignedEntry:
    return SignedEntry(header=header, signature=TOMATO.sign(domain, header))


def test_a_sealed_entry_verifies_and_reads_as_it_was_written() -> None:
    entry = sealed("ripe \u2600")
    header = verify(entry, KEYRING)
    assert (header.node, header.scope, header.log_id) == ORIGIN
    assert (header.kind, header.seq, header.prev, header.hlc, header.clock_synced) == (
        "memory.put",
        1,
        GENESIS,
        5,
        True,
    )
    assert read_content(entry) == MemoryContent(text="ripe \u2600", time_us=1)


def test_equal_texts_have_different_digests() -> None:
    assert read_header(sealed()).content_digest != read_header(sealed()).content_digest


def test_an_erased_entry_verifies_and_has_the_same_hash() -> None:
    entry = sealed()
    erased = SignedEntry(header=entry.header, signature=entry.signature)
    assert verify(erased, KEYRING) == verify(entry, KEYRING)
    assert entry_hash(erased.header) == entry_hash(entry.header)
    assert read_content(erased) is None


def test_the_header_says_nothing_of_the_content() -> None:
    assert b"a very telling text" not in sealed("a very telling text").header


@settings(max_examples=150)
@given(st.data())
def test_any_change_of_any_part_is_refused(data: st.DataObject) -> None:
    entry = sealed()
    field = data.draw(st.sampled_from(["header", "signature", "salt", "content"]))
    before = getattr(entry, field)
    after = data.draw(
        st.one_of(
            st.binary(max_size=len(before) + 4),
            st.integers(0, len(before) * 8 - 1).map(
                lambda bit: bytes(
                    each ^ (1 << bit % 8 if place == bit // 8 else 0) for place, each in enumerate(before)
                )
            ),
        )
    )
    if after != before:
        with pytest.raises(MindstreamError):
            verify(msgspec.structs.replace(entry, **{field: after}), KEYRING)


def test_a_signature_of_another_use_is_refused() -> None:
    with pytest.raises(BadSignature):
        verify(signed(sealed().header, DOMAIN_MANIFEST), KEYRING)


def test_an_unknown_node_is_refused() -> None:
    with pytest.raises(UnknownPeer):
        verify(sealed(), Keyring())


def test_content_of_another_entry_is_refused() -> None:
    one, other = sealed("one"), sealed("other")
    with pytest.raises(BadSignature) as caught:
        verify(msgspec.structs.replace(one, salt=other.salt, content=other.content), KEYRING)
    assert caught.value.field == "content"


def test_content_without_its_salt_is_refused() -> None:
    with pytest.raises(BadSignature):
        verify(msgspec.structs.replace(sealed(), salt=None), KEYRING)


def test_moving_the_border_between_salt_and_content_is_refused() -> None:
    # The text is chosen so that what is left behind a longer salt is a whole message again.
    inner = msgspec.msgpack.encode(MemoryContent(text="forged", time_us=0))
    body = msgpack.packb({"text": "x", "time_us": 1}) + inner
    salt = bytes(16)
    header = msgspec.structs.replace(read_header(sealed()), content_digest=digest(salt, body))
    entry = signed(msgspec.msgpack.encode(header))
    entry.salt, entry.content = salt + body[: -len(inner)], inner
    assert digest(entry.salt, entry.content) == header.content_digest
    with pytest.raises(BadSignature) as caught:
        verify(entry, KEYRING)
    assert caught.value.field == "salt"


def test_unknown_kinds_and_fields_are_signed_and_kept() -> None:
    fields = msgpack.unpackb(sealed().header) | {"kind": "memory.dream", "colour": ["red"]}
    entry = signed(msgpack.packb(fields))
    assert verify(entry, KEYRING).kind == "memory.dream"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("node", ""),
        ("node", "Tomato"),
        ("node", "a/b"),
        ("scope", "#"),
        ("log_id", "1"),
        ("id", "x" * 36),
        ("seq", 0),
        ("seq", -1),
        ("seq", MAX_SEQ + 1),
        ("hlc", -1),
        ("hlc", MAX_HLC + 1),
        ("prev", b""),
        ("prev", bytes(33)),
        ("content_digest", bytes(31)),
    ],
)
def test_a_field_out_of_range_is_named(field: str, value: object) -> None:
    header = msgpack.packb(msgpack.unpackb(sealed().header) | {field: value})
    with pytest.raises(MalformedMessage) as caught:
        read_header(signed(header))
    assert caught.value.field == field


@pytest.mark.parametrize("field", ["kind", "id", "node", "scope", "log_id", "seq", "prev", "hlc", "clock_synced"])
def test_a_missing_field_is_malformed(field: str) -> None:
    fields = msgpack.unpackb(sealed().header)
    del fields[field]
    with pytest.raises(MalformedMessage, match=field):
        read_header(signed(msgpack.packb(fields)))


def test_headers_and_contents_above_their_limits_are_refused_unread() -> None:
    with pytest.raises(MalformedMessage, match="limit"):
        read_header(signed(b"\xc1" * (MAX_HEADER_BYTES + 1)))
    entry = sealed()
    entry.content = bytes(MAX_CONTENT_BYTES + 1)
    with pytest.raises(MalformedMessage, match="limit"):
        read_header(entry)


def test_a_content_above_its_limit_is_not_sealed() -> None:
    sealed("x" * (MAX_CONTENT_BYTES - 100))
    with pytest.raises(MalformedMessage) as caught:
        sealed("x" * MAX_CONTENT_BYTES)
    assert (caught.value.field, caught.value.reason) == ("text", "too large")


@given(st.binary(max_size=200))
def test_random_headers_and_contents_are_malformed_and_nothing_else(random: bytes) -> None:
    entry = SignedEntry(header=random, signature=random, salt=random, content=random)
    for read in (read_header, read_content, lambda each: verify(each, KEYRING)):
        try:
            read(entry)
        except (MalformedMessage, UnknownPeer, BadSignature):
            continue


def test_content_nested_too_deep_or_not_utf_8_is_malformed() -> None:
    for content in (b"\x81\xa4text" + b"\x91" * 100_000, b"\x82\xa4text\xa1\xff\xa7time_us\x01"):
        with pytest.raises(MalformedMessage):
            read_content(SignedEntry(header=b"", signature=b"", salt=bytes(16), content=content))
