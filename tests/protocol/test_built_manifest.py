"""Manifests of built models: proven first, then read, and never believed about names and sizes."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.built_manifest import (
    MAX_MODEL_BYTES,
    BuiltFile,
    BuiltManifest,
    SignedBuiltManifest,
    built_id,
    chunk_places,
    is_plain_name,
    open_built,
    seal_built,
)
from protocol.errors import BadSignature, MalformedMessage, UnknownPeer
from protocol.identity import DOMAIN_BUILT_MODEL, DOMAIN_MANIFEST, Identity, Keyring, digest
from protocol.layout import ChunkRef
from protocol.manifest import MAX_CHUNK_BYTES, MAX_MANIFEST_BYTES

TOMATO = Identity("tomato", bytes(range(32)))
KEYRING = Keyring({"tomato": TOMATO.fingerprint})
LONG = MAX_CHUNK_BYTES + 5
CHUNKS = [digest(b"card"), digest(b"first"), digest(b"second")]


def file(name: str, size_bytes: int = 4) -> BuiltFile:
    return BuiltFile(name, size_bytes, bytes(32))


def manifest(**changes: Any) -> BuiltManifest:
    good = BuiltManifest(
        version=1,
        creator="tomato",
        model="little",
        folder="little-0123456789ab-int8-cpu-b2",
        build=2,
        card=bytes(32),
        files=[file("card.json"), file("empty", 0), file("model.onnx", LONG)],
        total_bytes=4 + LONG,
        chunks=b"".join(CHUNKS),
    )
    return msgspec.structs.replace(good, **changes)


def test_a_sealed_manifest_opens_as_it_was_written_and_its_chunks_lie_one_after_another() -> None:
    sealed = seal_built(TOMATO, manifest())
    assert open_built(sealed, KEYRING) == manifest()
    assert built_id(sealed) == digest(sealed.manifest).hex()
    assert chunk_places(manifest()) == [
        (ChunkRef(CHUNKS[0], 4), "card.json", 0),
        (ChunkRef(CHUNKS[1], MAX_CHUNK_BYTES), "model.onnx", 0),
        (ChunkRef(CHUNKS[2], 5), "model.onnx", MAX_CHUNK_BYTES),
    ]


def test_a_stranger_and_a_signature_of_another_use_are_refused() -> None:
    sealed = seal_built(TOMATO, manifest())
    with pytest.raises(UnknownPeer):
        open_built(sealed, Keyring())
    for signature in (TOMATO.sign(DOMAIN_MANIFEST, sealed.manifest), bytes(64), b""):
        with pytest.raises(BadSignature):
            open_built(SignedBuiltManifest(sealed.manifest, signature), KEYRING)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"version": 2}, "version"),
        ({"total_bytes": 1}, "total_bytes"),
        ({"files": [file("model.onnx", 10**13)], "total_bytes": 10**13}, "total_bytes"),
        ({"files": [file("model.onnx", 2**62)], "total_bytes": 2**62}, "total_bytes"),
        ({"files": [file("a", -4), file("b", 8)], "total_bytes": 4}, "files"),
        ({"files": [BuiltFile("a", 4, b"short")], "total_bytes": 4}, "files"),
        ({"files": [], "total_bytes": 0, "chunks": b""}, "files"),
        ({"files": [file(f"f{i}", 0) for i in range(65)], "total_bytes": 0, "chunks": b""}, "files"),
        ({"files": [file("a"), file("A")], "total_bytes": 8}, "files"),
        ({"chunks": b"".join(CHUNKS[:2])}, "chunks"),
        ({"chunks": b"".join(CHUNKS) + b"x"}, "chunks"),
        ({"files": [file("model.onnx", MAX_MODEL_BYTES)], "total_bytes": MAX_MODEL_BYTES}, "chunks"),
        ({"folder": "../little"}, "folder"),
        ({"model": "a/b"}, "model"),
    ],
)
def test_a_claim_that_does_not_add_up_is_refused_although_it_is_signed(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(MalformedMessage) as caught:
        open_built(seal_built(TOMATO, manifest(**changes)), KEYRING)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/b", "..", ".", "", ".hidden", "a\\b", "C:x", "a\nb", "a\0b", "x" * 201]
)
def test_a_name_that_leads_out_of_its_folder_is_refused(name: str) -> None:
    assert not is_plain_name(name)
    with pytest.raises(MalformedMessage, match="plain name") as caught:
        open_built(seal_built(TOMATO, manifest(files=[file(name)], total_bytes=4, chunks=CHUNKS[0])), KEYRING)
    assert caught.value.field == "files"


def test_a_manifest_above_its_limit_is_neither_sealed_nor_read() -> None:
    with pytest.raises(MalformedMessage, match="above the limit"):
        seal_built(TOMATO, manifest(chunks=bytes(MAX_MANIFEST_BYTES)))
    body = b"\xc1" * (MAX_MANIFEST_BYTES + 1)
    with pytest.raises(MalformedMessage, match="limit"):
        open_built(SignedBuiltManifest(body, TOMATO.sign(DOMAIN_BUILT_MODEL, body)), KEYRING)


@given(st.binary(max_size=300))
def test_random_bytes_are_refused_whoever_signed_them(body: bytes) -> None:
    with pytest.raises((MalformedMessage, UnknownPeer)):
        open_built(SignedBuiltManifest(body, TOMATO.sign(DOMAIN_BUILT_MODEL, body)), KEYRING)
