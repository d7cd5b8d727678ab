"""Snapshot manifests: proven first, then read, and never believed about sizes."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import BadSignature, MalformedMessage, MindstreamError, UnknownPeer
from protocol.identity import DOMAIN_ENTRY, DOMAIN_MANIFEST, Identity, Keyring, digest
from protocol.manifest import (
    MAX_CHUNK_BYTES,
    MAX_MANIFEST_BYTES,
    ChunkRef,
    LayerLayout,
    ModelDigests,
    NumericsFingerprint,
    SignedManifest,
    SnapshotManifest,
    open_manifest,
    seal_manifest,
    snapshot_id,
    verify_chunk,
)

TOMATO = Identity("tomato", bytes(range(32)))
KEYRING = Keyring({"tomato": TOMATO.fingerprint})
CHUNKS = [b"first chunk", b"second"]


def manifest(**changes: Any) -> SnapshotManifest:
    good = SnapshotManifest(
        version=1,
        model="smollm2",
        digests=ModelDigests(weights=bytes(32), tokenizer=bytes(32), config=bytes(32)),
        creator="tomato",
        created_us=1,
        conversation="c1",
        fingerprint=NumericsFingerprint(
            "transformers", "torch 2", "cpu", "avx512", "bfloat16", 2, "256", "deterministic"
        ),
        kv_dtype="bfloat16",
        layers=[LayerLayout("full", 3, 64, 2, 2)],
        codec="raw",
        codec_params={},
        cached_tokens=2,
        tokens=bytes(12),
        sampler={"seed": 1},
        state={},
        total_bytes=sum(map(len, CHUNKS)),
        chunks=[ChunkRef(digest(chunk), len(chunk)) for chunk in CHUNKS],
    )
    return msgspec.structs.replace(good, **changes)


def signed(body: bytes, domain: bytes = DOMAIN_MANIFEST) -> SignedManifest:
    return SignedManifest(manifest=body, signature=TOMATO.sign(domain, body))


def test_a_sealed_manifest_opens_as_it_was_written() -> None:
    sealed = seal_manifest(TOMATO, manifest())
    assert open_manifest(sealed, KEYRING) == manifest()
    assert snapshot_id(sealed) == digest(sealed.manifest).hex()


def test_a_changed_bit_is_refused() -> None:
    sealed = seal_manifest(TOMATO, manifest())
    for place in range(0, len(sealed.manifest), 7):
        body = bytearray(sealed.manifest)
        body[place] ^= 0x10
        with pytest.raises(MindstreamError):
            open_manifest(SignedManifest(bytes(body), sealed.signature), KEYRING)


def test_an_unknown_creator_and_a_signature_of_another_use_are_refused() -> None:
    body = seal_manifest(TOMATO, manifest()).manifest
    with pytest.raises(UnknownPeer):
        open_manifest(signed(body), Keyring())
    with pytest.raises(BadSignature):
        open_manifest(signed(body, DOMAIN_ENTRY), KEYRING)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"version": 2}, "version"),
        ({"total_bytes": 1}, "total_bytes"),
        ({"total_bytes": -17}, "total_bytes"),
        ({"chunks": [ChunkRef(bytes(32), MAX_CHUNK_BYTES + 1)], "total_bytes": MAX_CHUNK_BYTES + 1}, "chunks"),
        ({"chunks": [ChunkRef(bytes(32), 0)], "total_bytes": 0}, "chunks"),
        ({"chunks": [ChunkRef(bytes(32), -5)], "total_bytes": -5}, "chunks"),
        ({"chunks": [ChunkRef(b"short", 5)], "total_bytes": 5}, "chunks"),
        ({"tokens": bytes(11)}, "tokens"),
        ({"tokens": bytes(8)}, "tokens"),
        ({"tokens": b"", "cached_tokens": -1}, "tokens"),
        ({"cached_tokens": 2**62}, "tokens"),
    ],
)
def test_a_claim_that_does_not_add_up_is_refused_although_it_is_signed(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(MalformedMessage) as caught:
        open_manifest(seal_manifest(TOMATO, manifest(**changes)), KEYRING)
    assert caught.value.field == field


def test_a_manifest_above_its_limit_is_neither_sealed_nor_read() -> None:
    with pytest.raises(MalformedMessage, match="above the limit"):
        seal_manifest(TOMATO, manifest(state={"x": bytes(MAX_MANIFEST_BYTES)}))
    with pytest.raises(MalformedMessage, match="limit"):
        open_manifest(signed(b"\xc1" * (MAX_MANIFEST_BYTES + 1)), KEYRING)


def test_unknown_fields_are_ignored() -> None:
    body = msgpack.packb(msgpack.unpackb(seal_manifest(TOMATO, manifest()).manifest) | {"later": [1]})
    assert open_manifest(signed(body), KEYRING) == manifest()


def test_a_manifest_of_a_stranger_is_not_unfolded() -> None:
    fields = msgpack.unpackb(seal_manifest(TOMATO, manifest()).manifest) | {"creator": "stranger", "state": 0}
    count = MAX_MANIFEST_BYTES - 2000
    body = msgpack.packb(fields).replace(
        b"\xa5state\x00", b"\xa5state\x81\xa1x\xdd" + count.to_bytes(4, "big") + b"\x90" * count
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
    refs = manifest().chunks
    verify_chunk(refs[0], CHUNKS[0], index=0)
    verify_chunk(refs[0], memoryview(CHUNKS[0]), index=0)
    for wrong in (CHUNKS[1], b"", CHUNKS[0] + b"\0", b"First chunk"):
        with pytest.raises(BadSignature, match="chunk 7"):
            verify_chunk(refs[0], wrong, index=7)
