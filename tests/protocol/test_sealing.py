"""Data keys: what they seal opens in its place alone, and they reach whom they were wrapped for."""

from __future__ import annotations

import msgspec
import pytest
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import BadSignature, SnapshotRefused, TrustError, UnknownPeer
from protocol.identity import DOMAIN_WRAP, Identity, Keyring, SealingKeys
from protocol.layout import RAW
from protocol.manifest import SignedManifest, seal_manifest
from protocol.sealing import (
    MAX_CHUNK_BYTES,
    MAX_PLAIN_BYTES,
    SEAL_BYTES,
    DataKey,
    SignedWrap,
    chunk_role,
    read_wrap,
    unwrap_key,
    wrap_key,
)
from protocol.sharing import key_of, known_to_others, share, wrap_for_all
from tests.support.snapshots import KEY, SPROUT, TOMATO, small_snapshot

MARS = Identity("mars", bytes(range(2, 34)))
KEYRING = Keyring({each.node: each.fingerprint for each in (TOMATO, SPROUT)})
ROLE = chunk_role("full", bytes(32), RAW, 0)


# --- chunks ---------------------------------------------------------------------------------------------------


@given(st.binary(max_size=2000), st.binary(max_size=50))
def test_what_is_sealed_opens_and_equal_content_is_equal_bytes(plain: bytes, role: bytes) -> None:
    sealed = KEY.seal(role, plain)
    assert len(sealed) == len(plain) + SEAL_BYTES
    assert KEY.open(role, sealed) == plain
    assert KEY.seal(role, memoryview(plain)) == sealed
    assert DataKey.generate().seal(role, plain) != sealed


def test_a_chunk_of_the_largest_size_is_exactly_as_large_as_a_message_takes() -> None:
    assert len(KEY.seal(ROLE, bytes(MAX_PLAIN_BYTES))) == MAX_CHUNK_BYTES


def test_any_changed_bit_any_other_role_and_any_other_length_is_refused() -> None:
    plain = b"keys and values" * 9
    sealed = bytes(KEY.seal(ROLE, plain))
    for at in range(len(sealed)):
        changed = bytearray(sealed)
        changed[at] ^= 1 << at % 8
        with pytest.raises(SnapshotRefused):
            KEY.open(ROLE, changed)
    roles = [
        chunk_role("sliding", bytes(32), RAW, 0),
        chunk_role("full", bytes([1]) * 32, RAW, 0),
        chunk_role("full", bytes(32), msgspec.structs.replace(RAW, version=2), 0),
        chunk_role("full", bytes(32), RAW, 1),
    ]
    for role in roles:
        with pytest.raises(SnapshotRefused):
            KEY.open(role, sealed)
        assert KEY.seal(role, plain)[:12] != sealed[:12]  # no nonce twice
    for cut in (b"", sealed[:5], sealed[:-1], sealed + b"\0"):
        with pytest.raises(SnapshotRefused):
            KEY.open(ROLE, cut)
    with pytest.raises(SnapshotRefused):
        DataKey.generate().open(ROLE, sealed)


def test_the_derivation_is_the_one_that_is_written_down() -> None:
    def derive(info: bytes) -> bytes:
        return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(KEY.secret)

    sealed = bytes(KEY.seal(ROLE, b"plain"))
    aead = AESGCM(derive(b"mindstream/v1/data-key/chunk"))
    assert aead.decrypt(sealed[:12], sealed[12:], ROLE) == b"plain"
    hashed = AESGCM(derive(b"mindstream/v1/data-key/hash")).encrypt(bytes(12), b"", b"plain")
    assert sealed[:12] == blake3(hashed + ROLE, key=derive(b"mindstream/v1/data-key/nonce")).digest()[:12]
    assert KEY.id == derive(b"mindstream/v1/data-key/id")


def test_a_key_is_32_bytes_and_is_never_printed() -> None:
    with pytest.raises(SnapshotRefused, match="31 bytes"):
        DataKey(bytes(31))
    assert KEY.secret.hex() not in repr(KEY)


# --- wraps ----------------------------------------------------------------------------------------------------


def wrapped(by: Identity = TOMATO, to: Identity = SPROUT, key: DataKey = KEY) -> SignedWrap:
    return wrap_key(by, key, to.node, to.sealing.public_key)


def opened(*wraps: SignedWrap, by: Identity = SPROUT, keyring: Keyring = KEYRING, only_by: str = "") -> DataKey:
    return unwrap_key(wraps, KEY.id, [by.sealing], keyring, only_by=only_by)


def test_a_key_is_opened_by_whom_it_was_wrapped_for() -> None:
    assert opened(wrapped(to=TOMATO), wrapped()).secret == KEY.secret
    assert wrapped().wrap != wrapped().wrap  # another ephemeral key each time
    with pytest.raises(SnapshotRefused, match="not wrapped for that reader"):
        opened(wrapped(to=TOMATO))
    with pytest.raises(SnapshotRefused, match="not wrapped"):
        opened()


def test_a_group_opens_what_was_wrapped_for_it() -> None:
    group = SealingKeys("group/site", bytes(range(9, 41)))
    wrap = wrap_key(TOMATO, KEY, group.recipient, group.public_key)
    assert unwrap_key([wrap], KEY.id, [SPROUT.sealing, group], KEYRING).secret == KEY.secret


def test_a_wrap_counts_when_a_trusted_node_made_it() -> None:
    with pytest.raises(SnapshotRefused, match="unknown peer"):
        opened(wrapped(by=MARS))
    with pytest.raises(SnapshotRefused, match="tomato alone may"):
        opened(wrapped(by=SPROUT), only_by="tomato")
    assert opened(wrapped(), only_by="tomato").secret == KEY.secret


def test_a_wrap_of_another_key_or_for_another_key_is_refused() -> None:
    with pytest.raises(SnapshotRefused, match="of another key"):
        opened(wrapped(key=DataKey.generate()))
    with pytest.raises(SnapshotRefused, match="another sealing key"):
        opened(wrap_key(TOMATO, KEY, "sprout", MARS.sealing.public_key))
    lie = read_wrap(wrapped(key=DataKey.generate()))
    assert lie is not None
    lie.key_id = KEY.id
    body = msgspec.msgpack.encode(lie)
    with pytest.raises(SnapshotRefused, match="does not open"):
        opened(SignedWrap(body, TOMATO.sign(DOMAIN_WRAP, body)))


def test_a_changed_wrap_is_refused() -> None:
    signed = wrapped()
    for at in range(len(signed.wrap)):
        body = bytearray(signed.wrap)
        body[at] ^= 1 << at % 8
        with pytest.raises(SnapshotRefused):
            opened(SignedWrap(bytes(body), signed.signature))
    for body in (b"", signed.wrap[:-1], b"\xc1" * 600):
        with pytest.raises(SnapshotRefused):
            opened(SignedWrap(body, signed.signature))


def test_a_public_key_of_small_order_is_no_key() -> None:
    for public_key in (bytes(32), b"\x01" + bytes(31), b"short"):
        with pytest.raises(TrustError):
            wrap_key(TOMATO, KEY, "sprout", public_key)


# --- sealing keys of nodes, and sharing -----------------------------------------------------------------------


def test_a_sealing_key_is_believed_when_its_node_signed_it() -> None:
    keyring = Keyring(KEYRING.fingerprints)
    keyring.add_sealing_key("sprout", SPROUT.sealing_key)
    assert keyring.sealing_keys == {"sprout": SPROUT.sealing.public_key}
    assert SPROUT.sealing_key == Identity("sprout", SPROUT.seed).sealing_key
    with pytest.raises(BadSignature):
        keyring.add_sealing_key("tomato", SPROUT.sealing_key)
    with pytest.raises(UnknownPeer):
        keyring.add_sealing_key("mars", MARS.sealing_key)
    for text in ("", "x25519:", "x25519:aaaa", SPROUT.fingerprint, SPROUT.sealing_key[:-2], "ä"):
        with pytest.raises(TrustError):
            keyring.add_sealing_key("sprout", text)
    keyring.add("sprout", MARS.fingerprint)
    assert keyring.sealing_keys == {}


def test_a_holder_wraps_the_key_again_for_a_node_that_it_trusts() -> None:
    small = small_snapshot()
    keyring = Keyring({**KEYRING.fingerprints, "mars": MARS.fingerprint})
    assert share(small.signed, "mars", SPROUT, keyring).sent.wraps == []  # its sealing key is not known yet
    keyring.add_sealing_key("mars", MARS.sealing_key)
    sent, kept = share(small.signed, "mars", SPROUT, keyring)
    assert readers(sent) == ["mars"]
    assert unwrap_key(sent.wraps, KEY.id, [MARS.sealing], keyring).secret == KEY.secret
    assert (sent.manifest, sent.provenance) == (small.signed.manifest, small.signed.provenance)
    assert kept is not None
    assert readers(kept) == ["tomato", "sprout", "mars"]
    assert share(kept, "mars", SPROUT, keyring).kept is None


def test_a_holder_that_cannot_open_it_passes_on_what_was_wrapped_for_the_asker() -> None:
    small = small_snapshot()
    keyring = knowing(TOMATO, SPROUT, MARS)
    sent = share(small.signed, "sprout", MARS, keyring).sent
    assert opened(*sent.wraps).secret == KEY.secret
    assert share(sent, "mars", MARS, keyring).sent.wraps == []


def test_what_its_creator_alone_may_share_another_holder_does_not() -> None:
    small = small_snapshot()
    keyring = knowing(TOMATO, SPROUT, MARS)
    manifest = msgspec.structs.replace(small.manifest, sharing="creator")
    signed = msgspec.structs.replace(seal_manifest(TOMATO, manifest), wraps=small.signed.wraps)
    assert share(signed, "mars", SPROUT, keyring).sent.wraps == []
    assert readers(share(signed, "mars", TOMATO, keyring).sent) == ["mars"]
    by_sprout = msgspec.structs.replace(signed, wraps=[wrap_key(SPROUT, KEY, "mars", MARS.sealing.public_key)])
    with pytest.raises(SnapshotRefused, match="tomato alone may"):
        key_of(by_sprout, manifest, MARS, keyring)


def test_a_key_is_wrapped_for_this_node_and_all_that_it_trusts() -> None:
    wraps = wrap_for_all(SPROUT, KEY, knowing(TOMATO, SPROUT, MARS))
    assert [wrap.recipient for wrap in map(read_wrap, wraps) if wrap] == ["sprout", "mars", "tomato"]
    assert [wrap.recipient for wrap in map(read_wrap, wrap_for_all(SPROUT, KEY, Keyring())) if wrap] == ["sprout"]


def test_a_key_that_a_node_has_that_is_not_trusted_any_more_is_told() -> None:
    signed = small_snapshot().signed  # wrapped for tomato and sprout
    assert not known_to_others(signed, KEY.id, knowing(TOMATO, SPROUT))
    assert known_to_others(signed, KEY.id, knowing(TOMATO))
    assert known_to_others(signed, KEY.id, knowing(SPROUT)), "its creator has it too"
    assert known_to_others(signed, KEY.id, knowing(TOMATO, Identity("sprout", bytes(range(7, 39)))))
    assert not known_to_others(signed, bytes(32), knowing(TOMATO)), "that was another key"


def readers(signed: SignedManifest) -> list[str]:
    return [wrap.recipient for wrap in map(read_wrap, signed.wraps) if wrap]


def knowing(*nodes: Identity) -> Keyring:
    """Trusts them, and knows their sealing keys."""
    keyring = Keyring({each.node: each.fingerprint for each in nodes})
    for each in nodes:
        keyring.add_sealing_key(each.node, each.sealing_key)
    return keyring
