"""Snapshot manifests: proven first, then read, and never believed about sizes."""

from __future__ import annotations

import tracemalloc
import zlib
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import BadSignature, MalformedMessage, MindstreamError, SnapshotRefused, UnknownPeer
from protocol.identity import DOMAIN_ENTRY, DOMAIN_MANIFEST, Identity, Keyring, digest
from protocol.layout import Block, LayerLayout, Part, PartPlace, StateLayout, plain_bytes
from protocol.manifest import (
    MAX_MANIFEST_BYTES,
    ModelDigests,
    SignedManifest,
    SnapshotManifest,
    is_canonical,
    open_manifest,
    open_private,
    pack_signed,
    prefix_addresses,
    seal_manifest,
    seal_private,
    snapshot_id,
    unpack_signed,
    verify_chunk,
)
from protocol.sealing import DataKey
from tests.support.snapshots import CACHED_TOKENS, KEY, LAYERS, MODEL, TOMATO, small_manifest, small_snapshot

KEYRING = Keyring({"tomato": TOMATO.fingerprint})
SMALL = small_snapshot()


def signed(body: bytes, domain: bytes = DOMAIN_MANIFEST, identity: Identity = TOMATO) -> SignedManifest:
    return SignedManifest(manifest=body, signature=identity.sign(domain, body))


def refusal_of(manifest: SnapshotManifest) -> str:
    """The field for which it is refused, although its creator signed it."""
    with pytest.raises(MalformedMessage) as caught:
        open_manifest(seal_manifest(TOMATO, manifest), KEYRING)
    return caught.value.field


def test_a_sealed_manifest_opens_as_it_was_written() -> None:
    assert open_manifest(SMALL.signed, KEYRING) == SMALL.manifest
    assert SMALL.identifier == snapshot_id(SMALL.signed) == digest(SMALL.signed.manifest).hex()


def test_the_parts_are_the_positions_that_each_kind_of_layer_holds() -> None:
    held = [(place.kind, place.block, part.encoded_bytes) for place, part in SMALL.manifest.parts()]
    # 600 positions; the window of 300 holds the last 299, from 301: 211 of block 1 and 88 of block 2.
    full, sliding = 2 * 2 * 64 * 2, 2 * 1 * 16 * 2
    assert held == [
        ("full", 0, 256 * full),
        ("full", 1, 256 * full),
        ("sliding", 1, 211 * sliding),
        ("full", 2, 88 * full),
        ("sliding", 2, 88 * sliding),
    ]
    assert [len(chunk) for chunk in SMALL.chunks] == [ref.size_bytes for ref in SMALL.refs]


def test_a_changed_bit_is_refused() -> None:
    sealed = SMALL.signed
    for place in range(0, len(sealed.manifest), 7):
        body = bytearray(sealed.manifest)
        body[place] ^= 0x10
        with pytest.raises(MindstreamError):
            open_manifest(SignedManifest(bytes(body), sealed.signature), KEYRING)


def test_an_unknown_creator_and_a_signature_of_another_use_are_refused() -> None:
    body = SMALL.signed.manifest
    with pytest.raises(UnknownPeer):
        open_manifest(signed(body), Keyring())
    with pytest.raises(BadSignature):
        open_manifest(signed(body, DOMAIN_ENTRY), KEYRING)


def _blocks(index: int, **changes: Any) -> dict[str, Any]:
    blocks = list(SMALL.manifest.blocks)
    blocks[index] = msgspec.structs.replace(blocks[index], **changes)
    return {"blocks": blocks}


def _full(index: int, **changes: Any) -> dict[str, Any]:
    full = SMALL.manifest.blocks[index].full
    assert full is not None
    return _blocks(index, full=msgspec.structs.replace(full, **changes))


def _layers(index: int, **changes: Any) -> dict[str, Any]:
    layers = list(LAYERS)
    layers[index] = msgspec.structs.replace(layers[index], **changes)
    return {"layers": layers}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"version": 1}, "version"),
        ({"version": 3}, "version"),
        ({"total_bytes": 1}, "total_bytes"),
        ({"total_bytes": -17}, "total_bytes"),
        ({"total_bytes": 10**13}, "total_bytes"),
        ({"key_id": b"short"}, "key_id"),
        ({"parent": bytes(31)}, "parent"),
        ({"digests": ModelDigests(bytes(32), bytes(31), bytes(32))}, "digests"),
        ({"digests": ModelDigests(bytes(32), bytes(32), bytes(32), (b"",))}, "digests"),
        ({"kv_dtype": "float8"}, "kv_dtype"),
        ({"cached_tokens": -1}, "cached_tokens"),
        ({"cached_tokens": 2**62}, "cached_tokens"),
        ({"cached_tokens": 2**31 - 1}, "layers[0]"),
        ({"cached_tokens": 2**31 - 1, "layers": []}, "blocks"),
        (_layers(0, kind="other"), "layers[0].kind"),
        (_layers(0, kv_heads=-1), "layers[0]"),
        (_layers(0, head_dim=2**40), "layers[0]"),
        (_layers(0, tokens=5), "layers[0]"),
        (_layers(1, window_tokens=200), "layers[1]"),
        (_layers(1, seen_tokens=2**60), "layers[1]"),
        ({"states": [[]]}, "states"),
        ({"states": [[StateLayout((2**60,), "float32")], []]}, "states"),
        ({"states": [[StateLayout((0,), "float32")], []]}, "states"),
        ({"states": [[StateLayout((4,), "float32")], []]}, "recurrent"),
        ({"recurrent": Part(16, bytes(32))}, "recurrent"),
        ({"logits": Part(2**40, bytes(32))}, "logits.encoded_bytes"),
        ({"blocks": SMALL.manifest.blocks[:-1]}, "blocks"),
        ({"blocks": [*SMALL.manifest.blocks, Block(0)]}, "blocks"),
        (_blocks(0, tokens=255), "blocks"),
        (_blocks(0, full=None), "blocks[0].full"),
        (_blocks(0, sliding=Part(10, bytes(32))), "blocks[0].sliding"),
        (_full(0, encoded_bytes=0, digests=b""), "blocks[0].full.encoded_bytes"),
        (_full(0, encoded_bytes=-5), "blocks[0].full.encoded_bytes"),
        (_full(0, encoded_bytes=10 * 10**12), "blocks[0].full.encoded_bytes"),
        (_full(0, digests=bytes(31)), "blocks[0].full.digests"),
        (_full(0, digests=bytes(64)), "blocks[0].full.digests"),
        (_blocks(0, kept=b"\x0f"), "blocks[0].kept"),
        (_blocks(0, kept=bytes(33)), "blocks[0].kept"),
        (_blocks(0, kept=bytes(2**16)), "blocks[0].kept"),
        (_blocks(0, kept=b"\xff" * 32), "blocks[0].kept"),
        (_blocks(0, kept=b"\x0f" * 32, tokens=-8), "blocks[0].kept"),
        (_blocks(0, kept=b"\x0f" * 32, tokens=2**40), "blocks[0].kept"),
        (_blocks(2, kept=b"\x80" * 11, tokens=87), "blocks[2].kept"),
        (_blocks(0, kept=b"\x0f" * 32), "layers[0]"),
        (_blocks(0, kept=b"\x01" * 32) | _layers(0, tokens=CACHED_TOKENS - 224), "blocks[0].full.encoded_bytes"),
        (_blocks(0, kept=bytes(32)) | _layers(0, tokens=CACHED_TOKENS - 256), "blocks[0].full"),
        (_blocks(0, kept=b"\x0f" * 32) | {"layers": LAYERS[1:]}, "blocks"),
    ],
)
def test_a_claim_that_does_not_add_up_is_refused_although_it_is_signed(changes: dict[str, Any], field: str) -> None:
    assert refusal_of(small_manifest(**changes)) == field


def test_a_manifest_that_claims_10_tb_is_refused_before_anything_of_that_size_is_there() -> None:
    layers = [LayerLayout("full", 2**15, 2**15, CACHED_TOKENS, CACHED_TOKENS)] * 4
    # The sizes agree with each other; its digests would have to be there too.
    huge = small_manifest(layers=layers, blocks=[Block(block.tokens) for block in SMALL.manifest.blocks])
    for index, block in enumerate(huge.blocks):
        block.full = Part(plain_bytes(huge, PartPlace("full", index)), bytes(32))
    huge.total_bytes = sum(part.encoded_bytes for _, part in huge.parts())
    assert huge.total_bytes > 10**13
    sealed = seal_manifest(TOMATO, huge)
    tracemalloc.start()
    with pytest.raises(MalformedMessage) as caught:
        open_manifest(sealed, KEYRING)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.field == "blocks[0].full.digests"
    assert peak_bytes < 2**20


def test_a_manifest_above_its_limit_is_neither_sealed_nor_read() -> None:
    with pytest.raises(MalformedMessage, match="above the limit"):
        seal_manifest(TOMATO, small_manifest(sealed=bytes(MAX_MANIFEST_BYTES)))
    with pytest.raises(MalformedMessage, match="limit"):
        open_manifest(signed(b"\xc1" * (MAX_MANIFEST_BYTES + 1)), KEYRING)


def test_a_packed_manifest_is_itself_again_and_smaller() -> None:
    found = seal_manifest(TOMATO, small_manifest())
    packed = pack_signed(found)
    assert unpack_signed(packed) == found
    assert len(packed) < len(msgspec.msgpack.encode(found))
    for cut in range(0, len(packed), 7):
        with pytest.raises(MalformedMessage):
            unpack_signed(packed[:cut])


@given(st.binary(max_size=200))
def test_what_is_no_packed_manifest_is_refused(body: bytes) -> None:
    for packed in (body, zlib.compress(body)):
        with pytest.raises(MalformedMessage):
            unpack_signed(packed)


def test_a_packed_manifest_that_unpacks_to_more_than_one_may_have_is_refused_before_that_is_there() -> None:
    bomb = zlib.compress(bytes(200 * 1024 * 1024))
    tracemalloc.start()
    try:
        with pytest.raises(MalformedMessage, match="larger"):
            unpack_signed(bomb)
        assert tracemalloc.get_traced_memory()[1] < 8 * MAX_MANIFEST_BYTES
    finally:
        tracemalloc.stop()


def test_unknown_fields_are_ignored_where_they_are_in_order() -> None:
    fields = msgpack.unpackb(SMALL.signed.manifest) | {"zeal": [1]}
    assert open_manifest(signed(msgpack.packb(fields)), KEYRING) == SMALL.manifest
    out_of_order = {"zeal": [1], **msgpack.unpackb(SMALL.signed.manifest)}
    with pytest.raises(MalformedMessage, match="canonical"):
        open_manifest(signed(msgpack.packb(out_of_order)), KEYRING)


@pytest.mark.parametrize(
    "body",
    [
        b"\x82\xa1b\x01\xa1a\x02",  # keys out of order
        b"\x82\xa1a\x01\xa1a\x02",  # one key twice
        b"\x81\xa1a\xcc\x01",  # a longer form of 1
        b"\x81\xd9\x01a\x01",  # a longer form of a name
        b"\x81\xa1a\xca\x3f\x80\x00\x00",  # a float of 32 bits
        b"\x81\xa1a\x01\x00",  # more behind it
        b"\x82\xa1a\x01\x01\x02",  # keys without an order
    ],
)
def test_what_can_be_written_in_two_ways_is_written_in_one(body: bytes) -> None:
    assert not is_canonical(body)
    assert is_canonical(b"\x82\xa1a\x01\xa1b\x02")


def test_a_manifest_of_a_stranger_is_not_unfolded() -> None:
    fields = msgpack.unpackb(SMALL.signed.manifest) | {"creator": "stranger", "model": 0}
    count = MAX_MANIFEST_BYTES - 4000
    body = msgpack.packb(fields).replace(
        b"\xa5model\x00", b"\xa5model\x81\xa1x\xdd" + count.to_bytes(4, "big") + b"\x90" * count
    )
    tracemalloc.start()
    with pytest.raises(UnknownPeer):
        open_manifest(signed(body), KEYRING)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 3 * MAX_MANIFEST_BYTES


@given(st.binary(max_size=300))
def test_random_bytes_are_refused_whoever_signed_them(body: bytes) -> None:
    with pytest.raises((MalformedMessage, UnknownPeer)):
        open_manifest(signed(body), KEYRING)


@pytest.mark.parametrize("body", [b"\x81\xa7creator" + b"\x91" * 100_000, b"\x81\xa7creator\xa1\xff", b""])
def test_hostile_bytes_are_malformed(body: bytes) -> None:
    with pytest.raises(MalformedMessage):
        open_manifest(signed(body), KEYRING)


def test_a_chunk_is_believed_by_its_digest_alone() -> None:
    ref, chunk = SMALL.refs[0], SMALL.chunks[0]
    verify_chunk(ref, chunk, index=0)
    verify_chunk(ref, memoryview(chunk), index=0)
    for wrong in (SMALL.chunks[1], b"", chunk + b"\0", chunk[:-1] + b"x"):
        with pytest.raises(BadSignature, match="chunk 7"):
            verify_chunk(ref, wrong, index=7)


# --- addresses, and what readers alone see --------------------------------------------------------------------


def test_an_address_names_the_whole_prefix_and_the_model() -> None:
    ids = open_private(SMALL.manifest, KEY).tokens
    longer = prefix_addresses(MODEL, ids, CACHED_TOKENS)
    shorter = prefix_addresses(MODEL, ids, 512)
    assert longer[:2] == shorter[:2]
    assert longer[-1] == shorter[-1]
    changed = b"\xff" + ids[1:]
    assert not set(prefix_addresses(MODEL, changed, CACHED_TOKENS)[:-1]) & set(longer)
    for other in ({"weights": bytes(32)}, {"adapters": (bytes(32),)}):
        addresses = prefix_addresses(msgspec.structs.replace(MODEL, **other), ids, CACHED_TOKENS)
        assert not set(addresses) & set(longer)


def test_what_is_pruned_shares_no_address_with_what_is_whole() -> None:
    ids = open_private(SMALL.manifest, KEY).tokens
    whole = prefix_addresses(MODEL, ids, CACHED_TOKENS)
    pruned = prefix_addresses(MODEL, ids, CACHED_TOKENS, [b"", b"\x0f" * 32, b""])
    assert [one == other for one, other in zip(whole, pruned, strict=True)] == [True, False, False, True]
    assert prefix_addresses(MODEL, ids, CACHED_TOKENS, [b"", b"\x0e" * 32, b""])[1] != pruned[1]


def test_token_ids_messages_and_addresses_are_not_in_the_clear() -> None:
    private = open_private(SMALL.manifest, KEY)
    for secret in (private.tokens[:64], SMALL.addresses[0], b"messages"):
        assert secret not in SMALL.signed.manifest
    assert all(plain[:64] not in sealed for plain, sealed in zip(SMALL.plain, SMALL.chunks, strict=True))


def test_the_private_part_opens_with_its_key_and_holds_what_it_says() -> None:
    def refused(manifest: SnapshotManifest, key: DataKey = KEY) -> str:
        with pytest.raises(SnapshotRefused) as caught:
            open_private(manifest, key)
        return caught.value.field

    private = open_private(SMALL.manifest, KEY)
    assert refused(SMALL.manifest, DataKey.generate()) == "key_id"
    assert refused(small_manifest(sealed=SMALL.manifest.sealed[:-1])) == "sealed"
    assert refused(small_manifest(sealed=b"")) == "sealed"
    assert refused(small_manifest(sealed=bytes(KEY.seal(b"mindstream/v1/private\0", b"\xc0")))) == "sealed"
    shorter = msgspec.structs.replace(private, tokens=private.tokens[4:])
    assert refused(small_manifest(sealed=seal_private(KEY, shorter))) == "tokens"
    others = msgspec.structs.replace(private, tokens=b"\x09\0\0\0" + private.tokens[4:])
    assert refused(small_manifest(sealed=seal_private(KEY, others))) == "addresses"
    assert refused(small_manifest(digests=msgspec.structs.replace(MODEL, adapters=(bytes(32),)))) == "addresses"
