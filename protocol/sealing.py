"""Sealing: a conversation's data key, the chunks that it encrypts, and the key itself wrapped for its readers.

**Chunks.** One data key serves all snapshots of a conversation, and equal content must become equal bytes, so that
blocks that two snapshots share are stored and sent once. Hence deterministic authenticated encryption, by the SIV
construction (Rogaway and Shrimpton, "Deterministic Authenticated-Encryption", EUROCRYPT 2006; RFC 5297): the nonce is
a pseudo-random function of all that is encrypted, and here of the chunk's role as well:

    hash   = AES-256-GCM(key = hash key; nonce of zeros, empty plaintext, associated data = plaintext): its tag
    nonce  = BLAKE3(key = nonce key; hash, role), the first 12 bytes
    sealed = nonce, AES-256-GCM(key = chunk key; nonce, plaintext, associated data = role), its tag of 16 bytes last

Why it is safe: GCM breaks when one nonce serves two different messages. The tag of a GCM that encrypts nothing (GMAC)
is GHASH of its associated data and its length under a secret key, plus a constant: an almost universal hash (McGrew
and Viega, INDOCRYPT 2004), two chunks have one hash with probability below 2⁻¹¹² if they differ. It is no secret-
keeping function by itself, so nobody sees it: it goes, with the role, into keyed BLAKE3, a pseudo-random function.
Hash, then PRF, is a PRF (Carter and Wegman), as in AES-GCM-SIV, which has POLYVAL and AES in these two places. So
different chunks, or equal ones in different roles, have nonces that are independent and uniform for whoever has not
the key: a nonce comes again for something else with probability q²/2⁹⁷ for q chunks under one key, which is 2⁻⁵⁷ for
2²⁰ chunks, 512 GiB of one conversation. Equal content in an equal role has its nonce again, and gives the very same
bytes: all that an onlooker learns is that they are equal, which is what sharing them means. Under another data key
they differ, so nobody can ask whether a given text was cached by others. AES-GCM-SIV itself (RFC 8452) runs at 0.33
GB/s here; the two passes of GCM and BLAKE3 over the content address together run four times as fast.

The role (``chunk_role``) names what the chunk is of: the kind of layers, the prefix that the positions continue, the
codec, and the chunk's number. A chunk that is moved to another place does not open there.

**Keys.** From the data key HKDF-SHA256 (RFC 5869, no salt) derives the chunk, hash and nonce keys and the key's
public id, each by an info of its own. The id stands in the signed manifest and commits to the key: a wrap that holds
another one is found out.

**Wraps.** For each reader: an ephemeral X25519 key pair (RFC 7748), a key from the shared secret by HKDF over the
wrap's public parts, and the data key under it by AES-256-GCM with a nonce of zeros, as that key is used once. This is
the shape of HPKE's base mode (RFC 9180). Who wrapped it signs the wrap, and a reader takes it from nodes that it
trusts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from protocol.errors import UNREADABLE, SnapshotRefused, TrustError
from protocol.identity import DOMAIN_WRAP, KEY_BYTES, Identity, Keyring, SealingKeys, derive

NONCE_BYTES = 12
TAG_BYTES = 16
SEAL_BYTES = NONCE_BYTES + TAG_BYTES
"""A sealed chunk is longer than its plaintext by this."""
MAX_CHUNK_BYTES = 512 * 1024
MAX_PLAIN_BYTES = MAX_CHUNK_BYTES - SEAL_BYTES
"""What is encoded is cut every so many bytes, so that a sealed chunk has at most 512 KiB."""
MAX_WRAP_BYTES = 512
MAX_WRAPS = 1024

INFO_CHUNK = b"mindstream/v1/data-key/chunk"
INFO_HASH = b"mindstream/v1/data-key/hash"
INFO_NONCE = b"mindstream/v1/data-key/nonce"
INFO_ID = b"mindstream/v1/data-key/id"
ROLE_CHUNK = "mindstream/v1/chunk"
ROLE_PRIVATE = b"mindstream/v1/private\0"

_canonical = msgspec.msgpack.Encoder(order="sorted")
_ZERO_NONCE = bytes(NONCE_BYTES)


def chunk_role(kind: str, address: bytes, codec: Any, index: int) -> bytes:
    """What a chunk is of: the canonical msgpack of ``["mindstream/v1/chunk", kind, address, codec, index]``.

    Args:
        kind: ``full``, ``sliding``, ``recurrent`` or ``logits``.
        address: of the block, or of the last one for what belongs to the whole prefix.
        codec: the manifest's.
        index: of the chunk within its part, from 0.
    """
    return _canonical.encode([ROLE_CHUNK, kind, address, codec, index])


class DataKey:
    """The secret that a conversation's snapshots are encrypted with.

    Args:
        secret: 32 random bytes.
    """

    def __init__(self, secret: bytes) -> None:
        if len(secret) != KEY_BYTES:
            raise SnapshotRefused(
                f"using a data key of {len(secret)} bytes: one has {KEY_BYTES}", field="key", reason="not a key"
            )
        self.secret = secret
        self.id: bytes = derive(secret, INFO_ID)
        """Public, 32 bytes; says nothing of the secret."""
        self._aead = AESGCM(derive(secret, INFO_CHUNK))
        self._hash = AESGCM(derive(secret, INFO_HASH))
        self._nonce_key = derive(secret, INFO_NONCE)

    @classmethod
    def generate(cls) -> DataKey:
        """A new random one."""
        return cls(os.urandom(KEY_BYTES))

    def seal(self, role: bytes, plaintext: bytes | bytearray | memoryview) -> bytearray:
        """``plaintext`` encrypted in its role, ``SEAL_BYTES`` longer. The same always for the same."""
        sealed = bytearray(len(plaintext) + SEAL_BYTES)
        self.seal_into(role, plaintext, memoryview(sealed))
        return sealed

    def seal_into(self, role: bytes, plaintext: bytes | bytearray | memoryview, target: memoryview) -> None:
        """``seal`` into ``target``, of the sealed size: a chunk is never copied."""
        hashed = self._hash.encrypt(_ZERO_NONCE, b"", plaintext)
        nonce = blake3(hashed + role, key=self._nonce_key).digest(length=NONCE_BYTES)
        target[:NONCE_BYTES] = nonce
        self._aead.encrypt_into(nonce, plaintext, role, target[NONCE_BYTES:])

    def open_into(self, role: bytes, sealed: bytes | bytearray | memoryview, target: memoryview) -> None:
        """Decrypt into ``target``, of the plaintext's size. Raises SnapshotRefused when it is not what was sealed."""
        if len(sealed) != len(target) + SEAL_BYTES:
            raise _not_sealed(f"{len(sealed):,} bytes for {len(target):,} of plaintext")
        view = memoryview(sealed)
        try:
            self._aead.decrypt_into(bytes(view[:NONCE_BYTES]), view[NONCE_BYTES:], role, target)
        except InvalidTag:
            raise _not_sealed("another key, another place, or changed bytes") from None

    def open(self, role: bytes, sealed: bytes | bytearray | memoryview) -> bytes:
        """The plaintext. Raises SnapshotRefused when it is not what was sealed."""
        plain = bytearray(max(0, len(sealed) - SEAL_BYTES))
        self.open_into(role, sealed, memoryview(plain))
        return bytes(plain)

    def __repr__(self) -> str:
        return f"DataKey({self.id.hex()[:12]})"


def _not_sealed(reason: str) -> SnapshotRefused:
    return SnapshotRefused(
        f"opening what a snapshot's key has sealed: {reason}",
        hint="it is not of this snapshot; its tokens can be read again",
        field="chunks",
        reason=reason,
    )


# --- wraps --------------------------------------------------------------------------------------------------


class KeyWrap(msgspec.Struct):
    """A data key, encrypted for one reader."""

    by: str
    """Node that wrapped it, whose key signs this."""
    created_us: int
    """Unix microseconds by its clock."""
    ephemeral: bytes
    """X25519 public key made for this wrap, 32 bytes."""
    key_id: bytes
    """Of the data key, as in the manifest."""
    recipient: str
    """A node's name, or ``group/NAME``."""
    recipient_key: bytes
    """Its X25519 public key, 32 bytes."""
    wrapped: bytes
    """AES-256-GCM of the data key, 48 bytes; its key is HKDF-SHA256 of the X25519 shared secret with the info
    ``mindstream/v1/wrap\\0``, key_id, ephemeral and recipient_key; its nonce 12 zero bytes, no associated data."""


class SignedWrap(msgspec.Struct):
    """A wrap as it is stored and as it crosses the bus."""

    wrap: bytes
    """msgpack of KeyWrap: the signed bytes."""
    signature: bytes
    """Ed25519 of the node that wrapped, over the domain ``mindstream/v1/wrap\\0`` and ``wrap``."""


_wrap_decoder = msgspec.msgpack.Decoder(KeyWrap)


def _wrapping_key(shared: bytes, key_id: bytes, ephemeral: bytes, recipient_key: bytes) -> AESGCM:
    return AESGCM(derive(shared, DOMAIN_WRAP + key_id + ephemeral + recipient_key))


def wrap_key(
    identity: Identity,
    key: DataKey,
    recipient: str,
    recipient_key: bytes,
    *,
    created_us: int | None = None,
    ephemeral_secret: bytes | None = None,
) -> SignedWrap:
    """``key`` for ``recipient``, whose raw X25519 public key is given, signed by ``identity``.

    ``ephemeral_secret`` is for test vectors alone. Raises TrustError when the recipient's key is none.
    """
    ephemeral = SealingKeys("", ephemeral_secret or os.urandom(KEY_BYTES))
    wrapping = _wrapping_key(ephemeral.agree(recipient_key), key.id, ephemeral.public_key, recipient_key)
    body = _canonical.encode(
        KeyWrap(
            by=identity.node,
            created_us=time.time_ns() // 1000 if created_us is None else created_us,
            ephemeral=ephemeral.public_key,
            key_id=key.id,
            recipient=recipient,
            recipient_key=recipient_key,
            wrapped=wrapping.encrypt(_ZERO_NONCE, key.secret, None),
        )
    )
    return SignedWrap(body, identity.sign(DOMAIN_WRAP, body))


def read_wrap(signed: SignedWrap) -> KeyWrap | None:
    """What a wrap says, unproven; None when it is none."""
    if len(signed.wrap) > MAX_WRAP_BYTES:
        return None
    try:
        return _wrap_decoder.decode(signed.wrap)
    except UNREADABLE:
        return None


def unwrap_key(
    wraps: Sequence[SignedWrap], key_id: bytes, readers: Sequence[SealingKeys], keyring: Keyring, *, only_by: str = ""
) -> DataKey:
    """The data key of ``key_id``, from the first wrap for one of ``readers`` that holds it.

    Args:
        keyring: a wrap counts when a node of it has signed it.
        only_by: and that node alone, if not empty.

    Raises SnapshotRefused that says what was wrong with each wrap that was for these readers.
    """
    reasons = []
    for signed in wraps[:MAX_WRAPS]:
        wrap = read_wrap(signed)
        reader = next((each for each in readers if wrap and each.recipient == wrap.recipient), None)
        if wrap is None or reader is None:
            continue
        try:
            return _unwrap(signed, wrap, key_id, reader, keyring, only_by)
        except (TrustError, SnapshotRefused) as error:
            reasons.append(error.reason)
    names = " or ".join(reader.recipient for reader in readers)
    raise SnapshotRefused(
        f"opening a snapshot's key as {names}: " + ("; ".join(reasons) or "it was not wrapped for that reader"),
        hint="its holder wraps it for nodes that it trusts: run `mindstream keys trust` there with this node's "
        "fingerprint, and fetch it again",
        field="wraps",
        reason="; ".join(reasons) or "no recipient",
    )


def _unwrap(
    signed: SignedWrap, wrap: KeyWrap, key_id: bytes, reader: SealingKeys, keyring: Keyring, only_by: str
) -> DataKey:
    def refuse(reason: str) -> SnapshotRefused:
        return SnapshotRefused(f"opening a wrap by {wrap.by[:80]}: {reason}", field="wraps", reason=reason)

    if only_by and wrap.by != only_by:
        raise refuse(f"wrapped by {wrap.by[:80]}, and {only_by} alone may")
    if wrap.key_id != key_id:
        raise refuse("of another key")
    if wrap.recipient_key != reader.public_key:
        raise refuse("for another sealing key of this reader")
    keyring.verify(wrap.by, DOMAIN_WRAP, signed.wrap, signed.signature)
    wrapping = _wrapping_key(reader.agree(wrap.ephemeral), key_id, wrap.ephemeral, wrap.recipient_key)
    try:
        key = DataKey(wrapping.decrypt(_ZERO_NONCE, wrap.wrapped, None))
    except (InvalidTag, ValueError):
        raise refuse("it does not open") from None
    if key.id != key_id:
        raise refuse("it holds another key than it says")
    return key
