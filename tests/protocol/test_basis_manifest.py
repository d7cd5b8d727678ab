"""Manifests of bases: proven first, then read, and never believed about sizes."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.basis_manifest import MAX_BASIS_BYTES, BasisManifest, SignedBasis, basis_id, open_basis, sign_basis
from protocol.errors import BadSignature, MalformedMessage, UnknownPeer
from protocol.identity import DOMAIN_BASIS, DOMAIN_BUILT_MODEL, Identity, Keyring, digest
from protocol.layout import ChunkRef
from protocol.manifest import MAX_CHUNK_BYTES, ModelDigests

TOMATO = Identity("tomato", bytes(range(32)))
KEYRING = Keyring({"tomato": TOMATO.fingerprint})
DIGESTS = ModelDigests(bytes(32), b"t" * 32, b"c" * 32)
DATA = b"first" + bytes(MAX_CHUNK_BYTES) + b"last"


def signed(**changes: Any) -> SignedBasis:
    good = open_basis(sign_basis(TOMATO, "little", DIGESTS, DATA), KEYRING)
    body = msgspec.msgpack.encode(msgspec.structs.replace(good, **changes))
    return SignedBasis(body, TOMATO.sign(DOMAIN_BASIS, body))


def test_a_signed_manifest_names_the_file_and_its_chunks() -> None:
    sealed = sign_basis(TOMATO, "little", DIGESTS, DATA)
    found = open_basis(sealed, KEYRING)
    assert (found.creator, found.model, found.digests, found.basis) == ("tomato", "little", DIGESTS, digest(DATA))
    cut = DATA[:MAX_CHUNK_BYTES], DATA[MAX_CHUNK_BYTES:]
    assert found.chunk_list() == [ChunkRef(digest(part), len(part)) for part in cut]
    assert basis_id(sealed) == digest(sealed.manifest).hex()


def test_a_stranger_and_a_signature_of_another_use_are_refused() -> None:
    sealed = signed()
    with pytest.raises(UnknownPeer):
        open_basis(sealed, Keyring())
    for signature in (TOMATO.sign(DOMAIN_BUILT_MODEL, sealed.manifest), bytes(64), b""):
        with pytest.raises(BadSignature):
            open_basis(SignedBasis(sealed.manifest, signature), KEYRING)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"version": 2}, "version"),
        ({"total_bytes": 0}, "total_bytes"),
        ({"total_bytes": -1}, "total_bytes"),
        ({"total_bytes": 10**13}, "total_bytes"),
        ({"total_bytes": MAX_BASIS_BYTES}, "chunks"),
        ({"chunks": bytes(32)}, "chunks"),
        ({"basis": b"short"}, "basis"),
        ({"digests": ModelDigests(b"", b"t" * 32, b"c" * 32)}, "digests"),
        ({"digests": ModelDigests(bytes(32), b"t" * 32, b"c" * 32, (b"x",))}, "digests"),
    ],
)
def test_a_claim_that_does_not_add_up_is_refused_although_it_is_signed(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(MalformedMessage) as caught:
        open_basis(signed(**changes), KEYRING)
    assert caught.value.field == field


def test_a_file_above_the_limit_is_not_signed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protocol.basis_manifest.MAX_BASIS_BYTES", 100)
    with pytest.raises(MalformedMessage, match="limit 100"):
        sign_basis(TOMATO, "little", DIGESTS, bytes(101))


@given(st.binary(max_size=300))
def test_random_bytes_are_refused_whoever_signed_them(body: bytes) -> None:
    with pytest.raises((MalformedMessage, UnknownPeer)):
        open_basis(SignedBasis(body, TOMATO.sign(DOMAIN_BASIS, body)), KEYRING)


def test_the_manifest_says_no_more_than_it_must() -> None:
    fields = {field.name for field in msgspec.structs.fields(BasisManifest)}
    assert fields == {"version", "creator", "model", "digests", "basis", "total_bytes", "chunks"}
