"""Keys, fingerprints and signatures: what is signed for one use by one node is valid for nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import BadSignature, TrustError, UnknownPeer
from protocol.identity import (
    DOMAIN_BASIS,
    DOMAIN_BUILT_MODEL,
    DOMAIN_ENTRY,
    DOMAIN_MANIFEST,
    SIGNATURE_BYTES,
    Identity,
    Keyring,
    digest,
    fingerprint_of,
    public_key_of,
)

TOMATO = Identity("tomato", bytes(range(32)))


def test_a_key_signs_as_rfc_8032_says() -> None:
    # Section 7.1, test 2.
    identity = Identity("x", bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"))
    assert identity.public_key.hex() == "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    assert identity.sign(b"", b"\x72").hex() == (
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )


def test_a_signature_is_valid_for_its_node_use_and_bytes_alone() -> None:
    keyring = Keyring({"tomato": TOMATO.fingerprint, "sprout": Identity.generate("sprout").fingerprint})
    signature = TOMATO.sign(DOMAIN_ENTRY, b"payload")
    assert len(signature) == SIGNATURE_BYTES
    keyring.verify("tomato", DOMAIN_ENTRY, b"payload", signature)
    for node, domain, payload, signed in (
        ("sprout", DOMAIN_ENTRY, b"payload", signature),
        ("tomato", DOMAIN_MANIFEST, b"payload", signature),
        ("tomato", DOMAIN_ENTRY, b"payloae", signature),
        ("tomato", DOMAIN_ENTRY, b"payload", bytes(64)),
        ("tomato", DOMAIN_ENTRY, b"payload", b""),
        ("tomato", DOMAIN_ENTRY, b"payload", signature + b"\0"),
    ):
        with pytest.raises(BadSignature):
            keyring.verify(node, domain, payload, signed)


def test_bytes_cannot_move_between_domain_and_payload() -> None:
    keyring = Keyring({"tomato": TOMATO.fingerprint})
    domains = (DOMAIN_ENTRY, DOMAIN_MANIFEST, DOMAIN_BUILT_MODEL, DOMAIN_BASIS)
    assert not any(a != b and a.startswith(b) for a in domains for b in domains)
    assert DOMAIN_ENTRY.endswith(b"\0")
    assert DOMAIN_ENTRY.count(b"\0") == 1
    keyring.verify("tomato", DOMAIN_ENTRY, b"", TOMATO.sign(DOMAIN_ENTRY, b""))


def test_an_unknown_node_is_refused_with_what_to_do() -> None:
    with pytest.raises(UnknownPeer) as caught:
        Keyring().verify("stranger", DOMAIN_ENTRY, b"", bytes(64))
    assert "keys trust stranger" in caught.value.hint


def test_a_hostile_node_name_does_not_blow_up_the_message() -> None:
    with pytest.raises(UnknownPeer) as caught:
        Keyring().verify("x" * 100_000, DOMAIN_ENTRY, b"", bytes(64))
    assert len(str(caught.value)) < 1000


def test_a_newer_key_takes_the_place_of_the_older() -> None:
    newer = Identity.generate("tomato")
    keyring = Keyring({"tomato": TOMATO.fingerprint})
    keyring.add("tomato", newer.fingerprint)
    keyring.verify("tomato", DOMAIN_ENTRY, b"x", newer.sign(DOMAIN_ENTRY, b"x"))
    with pytest.raises(BadSignature):
        keyring.verify("tomato", DOMAIN_ENTRY, b"x", TOMATO.sign(DOMAIN_ENTRY, b"x"))
    assert keyring.fingerprints == {"tomato": newer.fingerprint}
    assert "tomato" in keyring
    assert "sprout" not in keyring


def test_a_fingerprint_is_the_key_in_text_and_forgives_case_and_space() -> None:
    assert TOMATO.fingerprint.startswith("ed25519:")
    assert public_key_of(TOMATO.fingerprint) == TOMATO.public_key
    assert public_key_of(f"  {TOMATO.fingerprint.upper()}\n") == TOMATO.public_key


@given(st.binary(min_size=32, max_size=32))
def test_any_key_goes_into_its_fingerprint_and_back(key: bytes) -> None:
    assert public_key_of(fingerprint_of(key)) == key


@given(st.text(max_size=80))
def test_any_other_text_is_no_fingerprint(text: str) -> None:
    for candidate in (text, f"ed25519:{text}"):
        try:
            key = public_key_of(candidate)
        except TrustError:
            continue
        assert fingerprint_of(key) == candidate.strip().lower()


@pytest.mark.parametrize("cut", [slice(0, -1), slice(0, 8), slice(8, None)])
def test_a_cut_fingerprint_is_refused(cut: slice) -> None:
    with pytest.raises(TrustError):
        Keyring({"tomato": TOMATO.fingerprint[cut]})


def test_changing_the_unused_bits_of_a_fingerprint_is_refused() -> None:
    # 52 base32 letters hold 260 bits, 4 more than a key: two texts must not mean one key.
    last = TOMATO.fingerprint[-1]
    others = [letter for letter in "abcdefghijklmnopqrstuvwxyz234567" if letter != last]
    for letter in others:
        text = TOMATO.fingerprint[:-1] + letter
        try:
            assert public_key_of(text) != TOMATO.public_key
        except TrustError:
            continue


def test_an_identity_is_remade_from_its_seed_and_never_shows_it() -> None:
    again = Identity("tomato", TOMATO.seed)
    assert again.public_key == TOMATO.public_key
    assert TOMATO.seed.hex() not in repr(TOMATO)
    assert repr(TOMATO.seed) not in repr(TOMATO)


def test_a_digest_is_over_the_parts_together() -> None:
    assert digest(b"ab", b"c") == digest(b"abc")
    assert len(digest()) == 32
