"""The site's group key: one secret that the trusted nodes of a site share, and passing it on.

It is a data key (``protocol.sealing``) with a version, made by the node that needs one first. Who holds it grants it to
a node that asks and that it trusts: the secret wrapped for that node, and what is said of it signed by who grants it.
From the secret come further keys by HKDF-SHA256: one for names, one to compare content, one for announcements.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import cached_property

import msgspec
from blake3 import blake3

from protocol.errors import UNREADABLE, SnapshotRefused
from protocol.identity import DOMAIN_GROUP_KEY, KEY_BYTES, Identity, Keyring, derive
from protocol.sealing import DataKey, SignedWrap, unwrap_key, wrap_key

NAME_BYTES = 16
SHORT_NAME_BYTES = 8
MAX_GRANT_BYTES = 1024
MAX_KEYS = 64
"""Versions that a node keeps, to read what was sealed with them."""

INFO_NAME = b"mindstream/v1/group-key/name"
INFO_CONTENT = b"mindstream/v1/group-key/content"
INFO_ANNOUNCE = b"mindstream/v1/group-key/announce"


class GroupKey:
    """One version of the group key.

    Args:
        secret: 32 random bytes.
        version: a later one takes the place of those before it.
        by: the node that made it.
        created_us: when, Unix microseconds by its clock.
    """

    def __init__(self, secret: bytes, version: int, by: str, created_us: int) -> None:
        self.data_key = DataKey(secret)
        self.version = version
        self.by = by
        self.created_us = created_us

    @classmethod
    def generate(cls, by: str, version: int = 1) -> GroupKey:
        """A new random one."""
        return cls(os.urandom(KEY_BYTES), version, by, time.time_ns() // 1000)

    @property
    def id(self) -> bytes:
        """Public, 32 bytes; says nothing of the secret."""
        return self.data_key.id

    @cached_property
    def _name_key(self) -> bytes:
        return derive(self.data_key.secret, INFO_NAME)

    @cached_property
    def _content_key(self) -> bytes:
        return derive(self.data_key.secret, INFO_CONTENT)

    @cached_property
    def _announce_key(self) -> bytes:
        return derive(self.data_key.secret, INFO_ANNOUNCE)

    def name(self, address: bytes) -> bytes:
        """How a prefix address is called where others may look: 16 bytes of keyed BLAKE3. From an address in the
        clear a short prompt could be guessed; from this only by who has the key."""
        return blake3(address, key=self._name_key).digest(length=NAME_BYTES)

    def content(self, *parts: bytes | bytearray | memoryview) -> bytes:
        """A digest of 32 bytes that only holders of the key can compare: keyed BLAKE3 of the parts, joined."""
        hasher = blake3(key=self._content_key)
        for part in parts:
            hasher.update(part)
        return hasher.digest()

    def short_name(self, holder: str, name: bytes) -> bytes:
        """What ``holder`` announces for ``name``: 8 bytes of keyed BLAKE3 over both, other ones for every holder, so
        that onlookers do not see which nodes have read the same."""
        return blake3(holder.encode() + b"\0" + name, key=self._announce_key).digest(length=SHORT_NAME_BYTES)

    def __repr__(self) -> str:
        return f"GroupKey({self.id.hex()[:12]}, version {self.version} by {self.by})"


class GroupGrant(msgspec.Struct):
    """What is said of a version when it is passed on."""

    by: str
    """The node that grants it, whose key signs this."""
    created_us: int
    """When the version was made, Unix microseconds by its maker's clock."""
    maker: str
    """The node that made the version."""
    version: int
    """From 1; the highest is in use."""
    wrap: SignedWrap
    """The secret, wrapped for the asker as a snapshot's data key is."""
    key_id: bytes
    """Of the version, 32 bytes."""


class SignedGrant(msgspec.Struct):
    """A grant as it crosses the bus."""

    grant: bytes
    """msgpack of GroupGrant: the signed bytes."""
    signature: bytes
    """Ed25519 over the domain ``mindstream/v1/group-key\\0`` and ``grant``."""


_canonical = msgspec.msgpack.Encoder(order="sorted")
_decoder = msgspec.msgpack.Decoder(GroupGrant)


def grant_key(
    identity: Identity, key: GroupKey, recipient: str, recipient_key: bytes, *, wrap: SignedWrap | None = None
) -> SignedGrant:
    """``key`` for ``recipient``, whose raw X25519 public key is given, signed by ``identity``.

    ``wrap`` is for test vectors alone. Raises TrustError when the recipient's key is none.
    """
    wrap = wrap or wrap_key(identity, key.data_key, recipient, recipient_key)
    body = _canonical.encode(GroupGrant(identity.node, key.created_us, key.by, key.version, wrap, key.id))
    return SignedGrant(body, identity.sign(DOMAIN_GROUP_KEY, body))


def read_grants(grants: Sequence[SignedGrant], giver: str, identity: Identity, keyring: Keyring) -> list[GroupKey]:
    """The keys that ``giver`` granted to ``identity``. Raises SnapshotRefused, UnknownPeer or BadSignature."""
    keys = []
    for signed in grants[:MAX_KEYS]:
        if len(signed.grant) > MAX_GRANT_BYTES:
            raise _refused(giver, f"{len(signed.grant):,} bytes, limit {MAX_GRANT_BYTES:,}")
        keyring.verify(giver, DOMAIN_GROUP_KEY, signed.grant, signed.signature)
        try:
            grant = _decoder.decode(signed.grant)
        except UNREADABLE as error:
            raise _refused(giver, str(error)) from None
        if grant.by != giver:
            raise _refused(giver, f"it says that {grant.by[:80]} granted it")
        if not 1 <= grant.version < 2**31:
            raise _refused(giver, f"version {grant.version}")
        found = unwrap_key([grant.wrap], grant.key_id, [identity.sealing], keyring, only_by=giver)
        keys.append(GroupKey(found.secret, grant.version, grant.maker, grant.created_us))
    return keys


def _refused(giver: str, reason: str) -> SnapshotRefused:
    return SnapshotRefused(
        f"taking the site's group key from {giver[:80]}: {reason}",
        hint="another node of the site can give it; is that one's version of Mindstream the same?",
        field="grants",
        reason=reason,
    )
